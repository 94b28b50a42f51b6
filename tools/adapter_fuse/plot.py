"""The weights of a fusion as a heat map whose bytes depend on the numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STYLE: dict[Any, Any] = {"figure.dpi": 110, "font.family": "DejaVu Sans", "font.size": 8}


def draw(report: Mapping[str, Any], path: Path) -> None:
    """One panel a domain: adapters by layers, the mean weight as the colour."""
    domains = report["domains"]
    names = report["adapters"]
    with plt.rc_context(STYLE):
        height = 0.8 + len(domains) * (0.5 + 0.28 * len(names))
        figure, axes = plt.subplots(
            len(domains), 1, figsize=(8, height), sharex=True, squeeze=False, layout="constrained"
        )
        for axis, (domain, found) in zip(axes[:, 0], domains.items(), strict=True):
            weights = list(zip(*found["layers"], strict=True))
            image = axis.imshow(weights, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axis.set_yticks(range(len(names)), names)
            axis.set_title(f"records of {domain} (n = {found['records']})")
        axes[-1, 0].set_xlabel("layer")
        figure.colorbar(image, ax=axes[:, 0].tolist(), label="mean weight")
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)
