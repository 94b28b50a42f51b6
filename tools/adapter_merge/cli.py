"""``adapter-merge ADAPTER… -o OUT``: see README.md."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import Run, Summary, option, tool


@dataclass(frozen=True, kw_only=True)
class Params:
    model: str | None = option(
        None,
        help="The full-precision base, when it is not where the adapter says.",
        short="-m",
        metavar="MODEL",
    )
    into: str = option(
        "auto",
        help="What to write; auto: a model from one adapter, an adapter from several.",
        choices=("auto", "base", "adapter"),
    )
    method: str = option(
        "linear",
        help="How several LoRA adapters become one; see README.md.",
        choices=("cat", "linear", "svd", "ties", "dare-linear", "dare-ties"),
    )
    weight: tuple[float, ...] = option(
        (), help="Weight of each adapter, one a --weight, in their order; 1 each when not given."
    )
    rank: int | None = option(
        None,
        help="Rank of the merged adapter (svd: by default the largest rank given; ties, dare: their sum).",
        min=1,
    )
    density: float | None = option(
        None, help="Share of entries that ties (default 0.2) and dare (default 0.5) keep.", min=1e-6, max=1.0
    )
    dtype_stored: str = option(
        "source",
        help="Precision as stored; source keeps that of each tensor of the base (adapters: float32).",
        choices=("source", "float32", "bfloat16", "float16"),
    )
    check: bool = option(
        True, help="Compare logits before and after; needs the whole model in memory, once at a time."
    )
    check_records: str | None = option(
        None, help="Records whose text is compared in place of the built-in prompts.", metavar="RECORDS"
    )
    max_kl: float = option(
        0.01, help="Largest mean KL divergence (nats a token) between before and after.", min=0.0
    )
    max_kl_share: float = option(
        0.1, help="Largest share of the adapter's own effect (in mean KL) that merging may change.", min=0.0
    )


@tool(
    "adapter-merge", Params, group="train", inputs="ADAPTER", many=True, stdin=False,
    output="model or adapter",
)  # fmt: skip
def main(run: Run[Params]) -> Summary:
    """Merge an adapter into its full-precision base, or several LoRA adapters into one.

    Weights are read, added to in float32 and written in slices, so memory stays below one shard. The logits
    are compared before anything gets its final name; a merge that changed them is refused (exit 1).
    """
    from tuneutils.tools.adapter_merge.merge import merge

    return merge(run)


if __name__ == "__main__":
    main()
