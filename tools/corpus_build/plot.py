"""The report as a picture whose bytes depend on the numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw(fates: Sequence[tuple[str, int]], words: Sequence[tuple[str, float]], path: Path) -> None:
    """Characters by what became of them; beside it, where known, the domain's words by their z-score."""
    figure, axes = plt.subplots(1, 2 if words else 1, figsize=(10 if words else 6, 4.5), squeeze=False,
                                layout="constrained")  # fmt: skip
    names = [name for name, _ in fates][::-1]
    kept = ("train", "held out")
    axes[0, 0].barh(
        names, [n / 1e6 for _, n in fates][::-1], color=["C2" if n in kept else "C3" for n in names]
    )
    axes[0, 0].set_xlabel("million characters")
    if words:
        axes[0, 1].barh([w for w, _ in words][::-1], [z for _, z in words][::-1], color="C0")
        axes[0, 1].set_xlabel("z-score of the log-odds against general text")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
