"""``adapter-fuse train``: what is learnt, what is kept, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import Result, forked

from tuneutils.shared.models import load_model

from .conftest import make_adapter

Fuse = Callable[..., Result]
Made = dict[str, Path]
FAST = ("--learning-rate", "0.05", "--batch-size", "2")


def contents(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.mark.parametrize(("style", "kind"), [("pfeiffer", "attention"), ("lora", "gate")])
def test_only_the_mixer_learns_and_the_adapters_are_kept_as_they_were(
    style: str, kind: str, fuse: Fuse, made: Made, workdir: Path
) -> None:
    adapters = (made[f"{style}-a"], made[f"{style}-b"])
    args = ("--adapter", adapters[0], "--adapter", adapters[1], "--kind", kind, *FAST)
    heldout = ("--heldout", made["text"])
    done = fuse("train", made["text"], made["prompt-completion"], *args, *heldout, "--max-steps", 4)
    assert done.code == 0, done.stderr

    stored = load_file(workdir / "out" / "adapter_model.safetensors")
    for index, folder in enumerate(adapters):
        for key, tensor in load_file(folder / "adapter_model.safetensors").items():
            module, mark, part = key.rpartition(".bottleneck_" if style == "pfeiffer" else ".lora_")
            assert torch.equal(stored[f"{module}.fusion_experts.{index}{mark}{part}"], tensor), key

    manifest = json.loads((workdir / "out" / "artifact.json").read_text())
    assert manifest["method"] == f"fusion-{kind}"
    assert manifest["adapters"] == [f.name for f in adapters]
    assert [i["role"] for i in manifest["inputs"]] == [
        "model", "adapter", "adapter", "records", "records", "heldout",
    ]  # fmt: skip
    mixer = sum(t.numel() for k, t in stored.items() if ".fusion_mixer." in k)
    assert manifest["metrics"]["trainable_parameters"] == mixer
    assert manifest["metrics"]["heldout_loss"] < manifest["metrics"]["heldout_loss_before"]

    loaded = load_model("out", device="cpu", dtype="float32")  # as lm-bench and chat load it
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert fuse("train", made["text"], made["prompt-completion"], *args, *heldout, "--max-steps", 4).code == 0
    assert fuse("train", made["text"], *args).code == 73  # other inputs: not overwritten


def test_a_killed_run_ends_in_the_same_bytes(fuse: Fuse, made: Made, workdir: Path) -> None:
    args = (
        *("train", made["text"], "--adapter", made["pfeiffer-a"], "--adapter", made["pfeiffer-b"], *FAST),
        *("--max-steps", 4, "--checkpoint-every", 2, "--gradient-accumulation", 2),
    )
    _, writes = forked(lambda: fuse(*args))
    expected = contents(workdir / "out")
    shutil.rmtree("out")
    shutil.rmtree(".work")
    code, _ = forked(lambda: fuse(*args), kill_at=writes * 2 // 3)
    assert code == -9
    assert not (workdir / "out").exists()
    assert list(workdir.glob(".work/out/checkpoints/checkpoint-*"))
    assert fuse(*args).code == 0
    assert contents(workdir / "out") == expected


def test_the_penalty_is_the_squared_distance_of_the_values_from_the_identity(
    made: Made, tiny_model: Path
) -> None:
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig

    from tuneutils.shared.adapters.fusion.compose import compose, read_part
    from tuneutils.shared.models import load_tokenizer
    from tuneutils.shared.supervise import Encoded
    from tuneutils.tools.adapter_fuse.train import fusion_trainer

    parts = [read_part(made[n], n) for n in ("pfeiffer-a", "pfeiffer-b")]
    model = compose(AutoModelForCausalLM.from_pretrained(tiny_model), parts, "attention")
    generator = torch.Generator().manual_seed(0)
    expected = 0.0
    for name, parameter in model.named_parameters():
        if ".value." in name:
            noise = torch.randn(parameter.shape, generator=generator) / 10
            parameter.data += noise
            expected += noise.square().sum().item()
    example = Encoded([5, 6, 7, 8], [5, 6, 7, 8])
    losses = []
    for weight in (0.0, 0.5):
        config = SFTConfig(
            output_dir="nowhere",
            use_cpu=True,
            bf16=False,
            report_to=[],
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = fusion_trainer(weight)(model, config, load_tokenizer(str(tiny_model)), [example])
        batch = trainer.data_collator([vars(example)])
        losses.append(trainer.compute_loss(model, batch).item())
    assert losses[1] - losses[0] == pytest.approx(0.5 * expected, rel=1e-4)


def test_a_dry_run_counts_without_weights(fuse: Fuse, made: Made) -> None:
    both = ("--adapter", made["lora-a"], "--adapter", made["lora-b"])
    shown = fuse("train", made["text"], *both, "--kind", "gate", "--dry-run").json()
    # q, k, v, o, gate, up, down of two layers, each with two rows of its output's width and two biases.
    widths = 2 * (32 + 2 * 16 + 32 + 64 + 64 + 32)
    assert shown["trainable_parameters"] == 2 * widths + 2 * 14
    assert shown["adapters"] == ["lora-a", "lora-b"]


@pytest.mark.parametrize(
    ("adapters", "code", "message"),
    [
        (["pfeiffer-a"], 2, "1 adapters given; it takes two or more"),
        (["pfeiffer-a", "pfeiffer-a"], 2, "given twice"),
        (["pfeiffer-a", "lora-a"], 2, "only bottlenecks or only LoRAs"),
        (["pfeiffer-a", "nowhere"], 66, "nowhere: no such adapter folder"),
        (["pfeiffer-a", "base"], 65, "is a model, no adapter"),
        (["pfeiffer-a", "other"], 65, "is not"),
        (["pfeiffer-a", "houlsby"], 2, "styles houlsby and pfeiffer"),
        (["pfeiffer-a", "mad-x-a"], 2, "cannot be fused"),
    ],
)
def test_what_cannot_be_fused_is_named(
    adapters: list[str],
    code: int,
    message: str,
    fuse: Fuse,
    made: Made,
    tiny_model: Path,
    other_tiny_model: Path,
    workdir: Path,
) -> None:
    more = {"base": tiny_model, "nowhere": Path("nowhere")}
    if "other" in adapters:
        more["other"] = make_adapter(other_tiny_model, workdir / "other", "pfeiffer", 0)
    if "houlsby" in adapters:
        more["houlsby"] = make_adapter(tiny_model, workdir / "houlsby", "houlsby", 0)
    given: list[Any] = [x for name in adapters for x in ("--adapter", (made | more)[name])]
    done = fuse("train", made["text"], *given)
    assert done.code == code, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") <= 2
    assert not (workdir / "out").exists()


def test_another_base_than_the_adapters_is_refused(fuse: Fuse, made: Made, other_tiny_model: Path) -> None:
    both = ("--adapter", made["lora-a"], "--adapter", made["lora-b"])
    done = fuse("train", made["text"], *both, "-m", other_tiny_model, "--max-steps", 1)
    assert done.code == 65
    assert "that of --model" in done.stderr
