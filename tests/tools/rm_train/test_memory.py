"""Out of memory: exit 75, and the batch size to try, which then fits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support import PROVERBS, build_tiny_model, environment, write_jsonl
from transformers import LlamaForSequenceClassification

from tuneutils.shared.models import load_tokenizer

from .conftest import CPU

#: Bytes of address space beyond what the imports take.
ROOM = 600 << 20


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of few weights whose activations are large."""
    folder = tmp_path_factory.mktemp("wide")
    return build_tiny_model(
        folder / "wide", hidden_size=256, intermediate_size=8192, max_position_embeddings=2048
    )


def cramped(args: Sequence[Any], workdir: Path) -> subprocess.CompletedProcess[str]:
    """``rm-train`` in a process of its own with little room for activations."""
    code = (
        "import resource, sys\n"
        "from tuneutils.shared import device\n"
        "import torch, peft, transformers.models.llama.modeling_llama\n"
        "import tuneutils.tools.rm_train.train, tuneutils.tools.rm_train.trainer\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (used + {ROOM},) * 2)\n"
        f"sys.argv = {['rm-train', *map(str, args)]!r}\n"
        "from tuneutils.tools.rm_train.cli import main\n"
        "main()\n"
    )
    line = [sys.executable, "-c", code]
    pipes: dict[str, Any] = {"capture_output": True, "text": True, "check": False}
    return subprocess.run(line, env=environment(), cwd=workdir, **pipes)


def test_training_names_the_batch_size_that_fits(wide: Path, workdir: Path) -> None:
    text = " ".join(PROVERBS)
    rows = [{"prompt": f"{i}", "chosen": text + f" {i}", "rejected": f"{i} " + text} for i in range(64)]
    records = write_jsonl(workdir / "long.jsonl", rows)
    args = [records, "-m", wide, "-o", "out", *CPU, "--max-steps", 1, "--checkpoint-every", 0]
    done = cramped([*args, "--batch-size", 64], workdir)
    assert done.returncode == 75, done.stderr
    said = "out of memory; try --batch-size 32 --gradient-accumulation 2 (now 64 and 1)"
    assert said in done.stderr.splitlines()[-1]
    assert not (workdir / "out").exists()


def test_scoring_names_a_smaller_batch(wide: Path, workdir: Path) -> None:
    model = LlamaForSequenceClassification.from_pretrained(wide, num_labels=1)
    model.save_pretrained(workdir / "rm")
    load_tokenizer(str(wide)).save_pretrained(workdir / "rm")
    text = " ".join(PROVERBS)
    records = write_jsonl(workdir / "long.jsonl", [{"prompt": f"{i}", "completion": text} for i in range(99)])
    args = ["score", records, "-m", workdir / "rm", *CPU, "--batch-size", 99, "-o", "scored.jsonl"]
    done = cramped(args, workdir)
    assert done.returncode == 75, done.stderr
    assert "out of memory; try --batch-size 49" in done.stderr.splitlines()[-1]
    assert not (workdir / "scored.jsonl").exists()
