"""The parameters of ``vocab-extend``; options, schema and manifest come from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import option

INITS = ("mean", "focus", "wechsel", "random")


@dataclass(frozen=True, kw_only=True)
class Params:
    """What decides the new vocabulary and its embeddings."""

    model: str = option(help="The model to extend: artifact, folder or Hub id.", short="-m")
    new_tokens: int = option(4096, help="Tokens to add, at most.", min=1)
    min_frequency: int = option(2, help="Times that a new token must occur in the text.", min=1)
    init: str = option(
        "mean",
        help="How new embeddings start: mean of the old tokens inside, focus, wechsel, or random.",
        choices=INITS,
    )
    compare: bool = option(
        True, help="Measure the other ways to start as well; needs --heldout. WECHSEL needs --source."
    )
    source: str | None = option(None, help="Text in a language that the model knows, for wechsel.")
    dictionary: str | None = option(
        None, help="Translations from it, for wechsel: words or sentences, as src and tgt.", metavar="PAIRS"
    )
    dimensions: int = option(100, help="Of the static embeddings that focus and wechsel make.", min=2)
    window: int = option(5, help="Neighbours on each side that make a static embedding.", min=1)
    heldout: str | None = option(None, help="Text of the new language to measure on.")
    general: str | None = option(None, help="Text of a known language; what the new tokens do to it.")
    eval_documents: int = option(0, help="Measure on the first so many documents of each; 0 for all.", min=0)
    max_length: int = option(512, help="Tokens that the model sees at once while it is measured.", min=2)
    trust_remote_code: bool = option(False, help="Run code that the model's folder brings along.")
