"""Parameters of the subcommands; options, environment variables and manifests come from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import option

FORMATS = ("auto", "gettext", "tmx", "xliff", "moses", "subtitles", "dictionary")
ENCODER_HELP = (
    "Sentence encoder: a folder that xl-parallel encoder wrote, or a sentence-transformers folder or Hub id."
)
SRC = "Language of the source side, such as en."
TGT = "Language of the target side, such as sw."


@dataclass(frozen=True, kw_only=True)
class ExtractParams:
    src_lang: str = option(help=SRC)
    tgt_lang: tuple[str, ...] = option(help="Language of the target side, such as sw. Repeatable.")
    format: str = option("auto", help="What the inputs are; auto goes by their names.", choices=FORMATS)
    catalogue_lang: str = option("en", help="Catalogues: the language of the original messages.")
    accelerators: bool = option(False, help="Catalogues: keep the marks of shortcuts, as in _File.")
    min_words: int = option(1, help="Leave out pairs whose source has fewer words.", min=1)
    licence: str | None = option(None, help="Licence to record in place of the source's own declaration.")


@dataclass(frozen=True, kw_only=True)
class EncoderParams:
    dim: int = option(384, help="Dimensions of the vectors.", min=1, max=4096)
    features: int = option(30000, help="Character n-grams and words kept a side.", min=1)


@dataclass(frozen=True, kw_only=True)
class AlignParams:
    src_lang: str = option(help=SRC)
    tgt_lang: str = option(help=TGT)
    method: str = option(
        "auto",
        help="How beads are scored: by length alone (Gale and Church 1993), by words of a dictionary and "
        "cognates, or by an encoder's vectors too; auto takes the most that is given.",
        choices=("auto", "gale-church", "dictionary", "embedding"),
    )  # fmt: skip
    encoder: str | None = option(None, help=ENCODER_HELP)
    dictionary: str | None = option(
        None, help="Word pairs: parallel records, or lines of source, tab, target.", metavar="FILE"
    )
    max_size: int = option(
        6, help="Most sentences of both sides in one bead; Gale-Church has 2-2 at most.", min=2, max=12
    )
    min_score: float | None = option(None, help="Leave out beads that score lower.")
    ladder: str | None = option(
        None, help="Also write all beads as line numbers, [0]:[0, 1], one a line.", metavar="FILE"
    )
