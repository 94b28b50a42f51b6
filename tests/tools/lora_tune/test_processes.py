"""Several processes (gloo, on the CPU) give the result of one with the same examples a step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import Result, run_cli, write_jsonl

from .conftest import Forks, contents, log_of, uneven_records, weights_of

COMMON = ["--dtype", "float32", "--device", "cpu", "--epochs", "2", "--learning-rate", "0.01", "-o", "out"]


def assert_same_run(ours: Path, reference: Path) -> None:
    for a, b in zip(log_of(ours), log_of(reference), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    ours_weights, reference_weights = weights_of(ours), weights_of(reference)
    assert ours_weights.keys() == reference_weights.keys()
    for name, weight in reference_weights.items():
        assert torch.allclose(ours_weights[name], weight, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(
    ("method", "count"), [("lora", 11), ("lora", 9), ("full", 9), ("prefix", 11), ("llama-adapter", 9)]
)
def test_two_processes_equal_one(
    method: str,
    count: int,
    forks: Forks,
    tune: Callable[..., Result],
    tiny_model: Path,
    heldout: Path,
    workdir: Path,
) -> None:
    """With 9 and 11 examples of 4 a step, one process has no batch of its own in the last step, or a short one."""
    records = write_jsonl(workdir / "records.jsonl", uneven_records(count))
    args = [records.name, "-m", tiny_model, "--method", method, "--heldout", heldout.name, *COMMON]
    both = forks(*args, "--batch-size", "1", "--gradient-accumulation", "2", cwd=workdir, world=2)
    assert [r.code for r in both] == [0, 0], both[0].stderr + both[1].stderr
    assert both[1].stderr == ""
    assert sorted(p.name for p in workdir.iterdir() if p.is_dir()) == [".work", "out"]
    one = tune(*args[:1], *args[3:-2], "--batch-size", "4", "--gradient-accumulation", "1", output="one")
    assert one.code == 0, one.stderr
    assert_same_run(workdir / "out", workdir / "one")


def test_all_processes_end_alike(forks: Forks, tiny_model: Path, records: Path, workdir: Path) -> None:
    args = [records.name, "-m", tiny_model, *COMMON, "--max-steps", "1"]
    assert [r.code for r in forks(*args, cwd=workdir, world=2)] == [0, 0]
    before = contents(workdir / "out")
    assert [r.code for r in forks(*args, cwd=workdir, world=2)] == [0, 0]
    assert contents(workdir / "out") == before
    assert [r.code for r in forks(*args, "--batch-size", "3", cwd=workdir, world=2)] == [73, 73]
    with records.open("a") as stream:
        stream.write('{"prompt": "cut o')
    bad = forks(*args, "--force", cwd=workdir, world=2)
    assert [r.code for r in bad] == [65, 65]
    assert "records.jsonl:12" in bad[0].error
    kept = forks(*args, "--force", "--on-error", "quarantine", cwd=workdir, world=2)
    assert [r.code for r in kept] == [0, 0], kept[0].stderr + kept[1].stderr
    (line,) = (workdir / ".work/out/records.quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["raw"] == '{"prompt": "cut o'
    stdin = forks("-", *args[1:], cwd=workdir, world=2)
    assert [r.code for r in stdin] == [2, 2]


def test_two_processes_resume(forks: Forks, tiny_model: Path, records: Path, workdir: Path) -> None:
    args = [records.name, "-m", tiny_model, *COMMON, "--checkpoint-every", "1", "--batch-size", "2"]
    args += ["--lora-dropout", "0.3"]
    assert [r.code for r in forks(*args, cwd=workdir, world=2)] == [0, 0]
    expected = contents(workdir / "out")
    (workdir / "out").rename(workdir / "first")
    first, *later = sorted((workdir / ".work/out/checkpoints").glob("checkpoint-*"))
    for checkpoint in later:
        (checkpoint / "complete").unlink()
    both = forks(*args, cwd=workdir, world=2)
    assert [r.code for r in both] == [0, 0], both[0].stderr
    assert f"going on from step {first.name.split('-')[1]}" in both[0].stderr
    assert contents(workdir / "out") == expected


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers(
    launcher: str, tune: Callable[..., Result], tiny_model: Path, records: Path, workdir: Path
) -> None:
    module = "tuneutils.tools.lora_tune.cli"
    run = {
        "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", module],
        "accelerate": [
            *(
                "-m",
                "accelerate.commands.launch",
                "--multi_gpu",
                "--num_processes",
                "2",
                "--num_machines",
                "1",
            ),
            *("--mixed_precision", "no", "--dynamo_backend", "no", "-m", module),
        ],
    }[launcher]
    args = [records.name, "-m", str(tiny_model), *COMMON]
    done = run_cli(*run, *args, "--batch-size", "2", cwd=workdir)
    assert done.code == 0, done.stderr
    one = tune(*args[:1], *args[3:-2], "--batch-size", "4", output="one")
    assert one.code == 0
    assert_same_run(workdir / "out", workdir / "one")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="accelerate shards over CUDA devices only")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_sharded_weights(method: str, tiny_model: Path, records: Path, heldout: Path, workdir: Path) -> None:
    """On CPUs accelerate ignores FSDP and runs DDP, so this needs two devices."""
    sharded = [
        *("-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--use_fsdp"),
        *("--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "tuneutils.tools.lora_tune.cli"),
    ]
    plain = ["-m", "tuneutils.tools.lora_tune.cli"]
    args = [records.name, "-m", str(tiny_model), "--heldout", heldout.name, "--method", method]
    args += ["--dtype", "float32", "--max-steps", "4", "--checkpoint-every", "2"]
    done = run_cli(*sharded, *args, "--batch-size", "2", "-o", "out", cwd=workdir)
    assert done.code == 0, done.stderr
    one = run_cli(*plain, *args, "--batch-size", "4", "--device", "cuda", "-o", "one", cwd=workdir)
    assert one.code == 0, one.stderr
    assert_same_run(workdir / "out", workdir / "one")
