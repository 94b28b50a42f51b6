"""Threads, device, precision and seeds."""

from __future__ import annotations

import builtins
import io
import os
import subprocess
from typing import Any

import pytest
from support import run_cli

from tuneutils.shared import device
from tuneutils.shared.errors import ExitCode, ToolError

POLICY = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")


def fake_file(monkeypatch: pytest.MonkeyPatch, path: str, content: str | None) -> None:
    """Let ``open(path)`` give ``content``, or nothing at all for None."""
    real = builtins.open

    def opened(name: Any, *args: Any, **keywords: Any) -> Any:
        if name != path:
            return real(name, *args, **keywords)
        if content is None:
            raise FileNotFoundError(path)
        return io.StringIO(content)

    monkeypatch.setattr(builtins, "open", opened)


class TestThreads:
    def test_policy_is_in_force_before_torch_loads(self) -> None:
        unset = dict.fromkeys(POLICY)
        code = (
            "import os; from tuneutils.shared import device; import torch;"
            f"print(*(os.environ[n] for n in {POLICY!r}), torch.get_num_threads(), device.usable_cpus())"
        )
        spin, wait, threads, tokenizers, torch_threads, usable = run_cli("-c", code, env=unset).stdout.split()
        assert (spin, wait, tokenizers) == ("0", "PASSIVE", "false")
        assert threads == torch_threads == usable

    def test_what_the_user_set_stays(self) -> None:
        code = "import os; from tuneutils.shared import device; print(os.environ['OMP_NUM_THREADS'])"
        assert run_cli("-c", code, env={"OMP_NUM_THREADS": "7"}).stdout == "7\n"

    def test_one_cpu_by_affinity(self) -> None:
        code = "from tuneutils.shared.device import usable_cpus; print(usable_cpus())"
        first = min(os.sched_getaffinity(0))

        assert run_cli("-c", code, preexec_fn=lambda: os.sched_setaffinity(0, {first})).stdout == "1\n"

    @pytest.mark.parametrize(
        ("cpu_max", "count"),
        [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("junk", 8), (None, 8)],
    )
    def test_quota_of_the_container(
        self, monkeypatch: pytest.MonkeyPatch, cpu_max: str | None, count: int
    ) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
        fake_file(monkeypatch, "/sys/fs/cgroup/cpu.max", cpu_max)
        assert device.usable_cpus() == count

    def test_module_loads_no_torch(self) -> None:
        code = "import sys; import tuneutils.shared.device; print('torch' in sys.modules)"
        assert run_cli("-c", code).stdout == "False\n"


class TestDevice:
    def test_cpu(self) -> None:
        assert str(device.resolve_device("cpu")) == "cpu"

    @pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "cpu:"])
    def test_no_name_of_a_device(self, name: str) -> None:
        with pytest.raises(ToolError, match="no device's name") as caught:
            device.resolve_device(name)
        assert caught.value.code == ExitCode.USAGE

    @pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "xpu", "meta"])
    def test_absent(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        assert str(device.resolve_device("auto")) == "cpu"
        with pytest.raises(ToolError, match="use --device cpu") as caught:
            device.resolve_device(name)
        assert caught.value.code == ExitCode.UNAVAILABLE

    def test_each_process_takes_its_own_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert str(device.resolve_device("auto")) == "cuda:1"
        with pytest.raises(ToolError, match="only 2 CUDA devices"):
            device.resolve_device("cuda:2")


class TestDtype:
    @pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
    def test_named(self, name: str) -> None:
        import torch

        found = device.resolve_dtype(name, torch.device("cpu"))
        assert found == getattr(torch, name)
        assert device.dtype_name(found) == name

    @pytest.mark.parametrize(
        ("cpuinfo", "name"),
        [
            ("flags\t\t: fpu avx512f amx_bf16 amx_tile\n", "bfloat16"),
            ("flags\t\t: fpu avx512_bf16\n", "bfloat16"),
            ("Features\t: fp asimd bf16\n", "bfloat16"),
            ("flags\t\t: fpu avx2 avx512f\n", "float32"),
            ("flags\t\t: fpu not_bf16\n", "float32"),
            ("model name : a bf16 machine\n", "float32"),
            (None, "float32"),
        ],
    )
    def test_auto_follows_the_processor(
        self, monkeypatch: pytest.MonkeyPatch, cpuinfo: str | None, name: str
    ) -> None:
        import torch

        fake_file(monkeypatch, "/proc/cpuinfo", cpuinfo)
        assert device.dtype_name(device.resolve_dtype("auto", torch.device("cpu"))) == name

    def test_auto_agrees_with_lscpu(self) -> None:
        try:
            text = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
        except FileNotFoundError:
            pytest.skip("no lscpu here")
        words = set(text.split())
        assert device.cpu_multiplies_bfloat16() == bool({"amx_bf16", "avx512_bf16", "bf16"} & words)


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_one_seed_seeds_all(seed: int) -> None:
    import random

    import numpy as np
    import torch

    def draw() -> tuple[float, float, float]:
        device.seed_everything(seed)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        assert draw() == draw()
        assert draw()[0] == random.Random(seed).random()
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
