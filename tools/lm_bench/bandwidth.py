"""The memory bandwidth of this machine now, and the share of it that decoding reaches.

One decoded token reads every weight once, so ``weight bytes * tokens/s`` cannot pass the bandwidth unless the
weights stay in a cache. The limit is measured in the same run, before and after each model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.tools.lm_bench.params import Params

REPEATS = 5
LEAST_BYTES = 1 << 30


def add_shares(
    run: Run[Params], limits: list[dict[str, Any]], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Measure a model between two measurements of the bandwidth.

    Args:
        limits: what was measured before; the last one is used again, the new one appended.

    Raises:
        ToolError: (70) a share above 100 % of weights that no cache holds: the measurement is wrong.
    """
    if not run.params.bandwidth or run.device not in ("auto", "cpu"):
        return measure()
    if not limits:
        limits.append(measure_apart())
    found = measure()
    limits.append(measure_apart())
    limit = max(row["bytes_per_s"] for row in limits[-2:])
    found["memory_bytes_per_s"] = limit
    read = found.get("weight_bytes")
    if read is None or found.get("device", "cpu") != "cpu":
        return found
    if read <= limits[-1]["cache_bytes"]:
        return {**found, "bandwidth_share": None, "in_cache": True}
    share = read * max(r["decode_tokens_per_s"] / r["batch"] for r in found["speed"]) / limit
    if share > 1:
        raise ToolError(
            f"decoding reached {share:.0%} of the memory bandwidth measured in this run ({limit / 1e9:.1f} "
            "GB/s): the machine was busy then, or the measurement is wrong; run again on idle cores",
            code=ExitCode.BUG,
        )
    return {**found, "bandwidth_share": share}


def measure_apart() -> dict[str, Any]:
    """``{"bytes_per_s": …, "cache_bytes": …}``, in a process of its own."""
    command = [sys.executable, "-m", "tuneutils.tools.lm_bench.bandwidth"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def cache_bytes() -> int:
    """The last-level cache, or 0 where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        sizes.append(int(text.rstrip("KM")) << {"K": 10, "M": 20}.get(text[-1], 0))
    return max(sizes)


def measure() -> dict[str, Any]:
    """The best of several sums over an array of at least 1 GiB and twice the cache, on all threads."""
    from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads
    import torch  # isort: skip

    cache = cache_bytes()
    size = max(LEAST_BYTES, 2 * cache)
    array = torch.ones(size // 4)
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        array.sum()
        seconds.append(time.perf_counter() - started)
    return {"bytes_per_s": size / min(seconds), "cache_bytes": cache, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    print(json.dumps(measure()))
