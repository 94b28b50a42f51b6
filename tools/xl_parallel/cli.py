"""``xl-parallel COMMAND INPUT... -o OUTPUT``: see README.md."""

from __future__ import annotations

from tuneutils.shared.command import Run, Summary, tool, tool_group
from tuneutils.tools.xl_parallel.params import AlignParams, EncoderParams, ExtractParams
from tuneutils.tools.xl_parallel.params_pairs import (
    BacktranslateParams,
    CodeswitchParams,
    FilterParams,
    MineParams,
    ScoreParams,
    SplitParams,
)

main = tool_group(
    "xl-parallel",
    group="data",
    help="Make parallel data: extract, align, mine, filter, score, split, code-switch, back-translate.",
)


@tool(
    "extract", ExtractParams, group="data", inputs="SOURCE", output="record stream", streams=True,
    stdin=False, uses_model=False, parent=main,
)  # fmt: skip
def extract(run: Run[ExtractParams]) -> Summary:
    """Take the pairs out of files that hold them.

    SOURCE is a gettext catalogue (.po, .mo), TMX, XLIFF, a dictd dictionary, a folder of them, or two files:
    line-aligned texts (Moses) or subtitles, source side first. Any source of data-import will do, such as
    'deb:nautilus-data!/usr/share/locale/*/LC_MESSAGES/*.mo'. Messages with plurals give a pair a form.
    """
    from tuneutils.tools.xl_parallel.extract import extract

    return extract(run)


@tool("encoder", EncoderParams, group="data", inputs="PAIRS", output="encoder", uses_model=False, parent=main)
def encoder(run: Run[EncoderParams]) -> Summary:
    """Learn a sentence encoder from PAIRS, in seconds and without a download.

    Both sides' character n-grams and words go into one space by the singular vectors of their
    cross-covariance. All languages of the source field make one side, all of the target field the other.
    """
    from tuneutils.tools.xl_parallel.learn import learn

    return learn(run)


@tool(
    "align", AlignParams, group="data", inputs="DOCUMENT", output="record stream", streams=True, stdin=False,
    uses_model=False, parent=main,
)  # fmt: skip
def align(run: Run[AlignParams]) -> Summary:
    """Align the sentences of two DOCUMENTs, source and target, one sentence a line.

    Writes a record a bead of one or more sentences of each side, with a score between 0 and 1 and
    the line numbers; sentences without a counterpart are counted. Blank lines are skipped, and keep
    their numbers.
    """
    from tuneutils.tools.xl_parallel.align import align

    return align(run)


@tool(
    "mine", MineParams, group="data", inputs="PILE", output="record stream", streams=True, stdin=False,
    uses_model=False, parent=main,
)  # fmt: skip
def mine(run: Run[MineParams]) -> Summary:
    """Find translations of each other in two PILEs of sentences, source and target, one a line.

    Writes pairs with their margin score, best first, and the lines where they stand. Repeated sentences count
    once. A threshold is tuned on piles with known pairs (--tune) and then used on others (--threshold).
    """
    from tuneutils.tools.xl_parallel.mine import mine

    return mine(run)


@tool("split", SplitParams, group="data", inputs="PAIRS", output="records", uses_model=False, parent=main)
def split(run: Run[SplitParams]) -> Summary:
    """Divide PAIRS into streams so that no sentence of either language, nor a near-copy, is in two.

    Pairs that share a sentence, or have similar ones, go together, with all that these are linked to.
    """
    from tuneutils.tools.xl_parallel.split import split

    return split(run)


@tool(
    "score", ScoreParams, group="data", inputs="PAIRS", output="record stream", streams=True,
    uses_model=False, parent=main,
)  # fmt: skip
def score(run: Run[ScoreParams]) -> Summary:
    """Give each of PAIRS a score by an encoder: its cosine, or a margin over the nearest of all records."""
    from tuneutils.tools.xl_parallel.score import score

    return score(run)


@tool(
    "filter", FilterParams, group="data", inputs="PAIRS", output="record stream", streams=True,
    uses_model=False, parent=main,
)  # fmt: skip
def filter_(run: Run[FilterParams]) -> Summary:
    """Keep of PAIRS those that break no rule; every drop is counted under the first that it breaks.

    --langid judges only sides that are long enough, in languages that the detector knows, and drops only
    on a confident other language; what it could not judge is counted too.
    """
    from tuneutils.tools.xl_parallel.filtering import filter_pairs

    return filter_pairs(run)


@tool(
    "codeswitch", CodeswitchParams, group="data", inputs="RECORDS", output="record stream", streams=True,
    uses_model=False, parent=main,
)  # fmt: skip
def codeswitch(run: Run[CodeswitchParams]) -> Summary:
    """Put some words of RECORDS into another language, by a dictionary.

    Of a pair, a word takes the form that it has in the other side, and is left where it has none there; of
    a text alone, the dictionary's form, where it lists the word as it stands. Casing is kept; placeholders,
    addresses, options and code stay.
    """
    from tuneutils.tools.xl_parallel.codeswitch import codeswitch

    return codeswitch(run)


@tool(
    "backtranslate", BacktranslateParams, group="data", inputs="RECORDS", output="record stream",
    streams=True, parent=main,
)  # fmt: skip
def backtranslate(run: Run[BacktranslateParams]) -> Summary:
    """Make pairs of text in one language: a machine's translation is the source side, the text the target.

    The translator is a model, asked by its chat template, or a command such as 'apertium -u es-en' that
    gives a line for a line.
    """
    from tuneutils.tools.xl_parallel.backtranslate import backtranslate

    return backtranslate(run)


if __name__ == "__main__":
    main()
