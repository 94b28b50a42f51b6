"""Where and how to compute: threads, device, precision. Import it before torch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tuneutils.shared.errors import ExitCode, ToolError

if TYPE_CHECKING:
    import torch


def usable_cpus() -> int:
    """CPUs that this process may really use: its affinity mask, cut by a cgroup quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as stream:
            quota, period = stream.read().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return count


def set_thread_policy() -> None:
    """Set OpenMP to wait passively and to use the CPUs that are there; what the user has set stays.

    Spinning threads on a busy machine cost far more than they gain: two of them on two busy cores
    decode 15 times slower than one. Has no effect once torch is loaded.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cpus()))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


set_thread_policy()


def resolve_device(name: str) -> torch.device:
    """``auto`` → cuda, mps or cpu, whichever is there first; else the named device.

    Raises:
        ToolError: no such device here (69), or no device's name (2).
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise ToolError(
            f"--device {name}: no device's name; use cpu, cuda or mps", code=ExitCode.USAGE
        ) from exc
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, False):
        raise ToolError(f"--device {name}: not there; use --device cpu", code=ExitCode.UNAVAILABLE)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ToolError(
            f"--device {name}: only {torch.cuda.device_count()} CUDA devices", code=ExitCode.UNAVAILABLE
        )
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` → bfloat16 where the hardware multiplies it (CUDA ≥ 8.0, AMX, AVX512-BF16), else float32.

    The choice follows from the processor's features, not from a timing, so that it is the same in every run.
    """
    import torch

    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and cpu_multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 matrix instructions (x86 AMX or AVX512-BF16, Arm BF16)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith(("flags", "Features")):
                    return bool({"amx_bf16", "avx512_bf16", "bf16"} & set(line.split()))
    except OSError:
        pass
    return False


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` → ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
