"""``lm-bench``: quality, forgetting, speed, memory and size of models, side by side."""

from __future__ import annotations

from tuneutils.shared.command import Run, Summary, tool
from tuneutils.tools.lm_bench.params import Params


@tool("lm-bench", Params, group="evaluate", inputs="MODEL", stdin=False, output="report")
def main(run: Run[Params]) -> Summary:
    """Measure each MODEL: an artifact, folder, adapter, GGUF or Hub id, or a report made earlier.

    Every number has its n and a 95 % bootstrap interval; against --baseline, differences are paired. A
    MODEL is labelled by its folder's name, or as NAME=PATH.
    """
    from tuneutils.tools.lm_bench.bench import bench

    return bench(run)


if __name__ == "__main__":
    main()
