"""The sparsity report as a picture whose bytes depend on the numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Sparsity by layer for each kind of matrix; with it, where known, the error of its output."""
    modules = list(dict.fromkeys(r["module"] for r in rows))
    second = next((k for k in ("output_error", "influence") if k in rows[0]), None)
    figure, axes = plt.subplots(
        2 if second else 1, 1, figsize=(6, 5), sharex=True, squeeze=False, layout="constrained"
    )
    for module in modules:
        mine = [r for r in rows if r["module"] == module]
        layers = [r["layer"] for r in mine]
        axes[0, 0].plot(layers, [r["sparsity"] for r in mine], marker=".", label=module)
        if second:
            axes[1, 0].plot(layers, [r[second] for r in mine], marker=".")
    axes[0, 0].set_ylabel("share removed")
    axes[0, 0].set_ylim(-0.02, 1.02)
    axes[0, 0].legend(fontsize=7)
    if second:
        axes[1, 0].set_ylabel("relative output error" if second == "output_error" else "score")
    axes[-1, 0].set_xlabel("layer")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
