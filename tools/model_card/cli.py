"""``model-card ARTIFACT -o DIR``: see README.md."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import Run, Summary, option, tool


@dataclass(frozen=True, kw_only=True)
class Params:
    report: tuple[str, ...] = option((), help="A report of lm-bench that measured this artifact; repeatable.")
    language: tuple[str, ...] = option(
        (), help="A language of the data, as a BCP 47 code; repeatable. Without one: unknown."
    )
    title: str | None = option(None, help="The heading; by default the artifact's name.")


@tool(
    "model-card", Params, group="evaluate", inputs="ARTIFACT", many=False, stdin=False, output="card",
    uses_model=False,
)  # fmt: skip
def main(run: Run[Params]) -> Summary:
    """Write a card that says only what the manifests of an artifact and of all it stands on say.

    ARTIFACT is a folder or a record stream with its artifact.json. -o names a folder for README.md and
    plots/; with -o - the Markdown alone goes to stdout.
    """
    from tuneutils.tools.model_card.card import write_card

    return write_card(run)


if __name__ == "__main__":
    main()
