"""``adapter-fuse report``: losses and weights by domain, checked against the adapters themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import Result, tiny_records, write_jsonl
from transformers import AutoModelForCausalLM

from tuneutils.shared.adapters.fusion.compose import compose, read_part
from tuneutils.shared.models import load_model, load_tokenizer
from tuneutils.shared.supervise import encode

Fuse = Callable[..., Result]
Made = dict[str, Path]


def loss_of(model: Path | str, records: list[dict[str, str]], tokenizer: Path) -> float:
    """Nats a token over the records, by Transformers' own logits."""
    loaded = load_model(str(model), device="cpu", dtype="float32").model
    words = load_tokenizer(str(tokenizer))
    total = count = 0.0
    for record in records:
        example = encode(record, words)
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)[1:]
        with torch.inference_mode():
            logprobs = loaded(ids).logits[0, :-1].log_softmax(-1)
        kept = labels != -100
        total -= logprobs[kept].gather(1, labels[kept, None]).sum().item()
        count += kept.sum().item()
    return total / count


def test_each_way_is_measured_as_what_it_stands_for(
    fuse: Fuse, made: Made, tiny_model: Path, workdir: Path
) -> None:
    both = ("--adapter", made["pfeiffer-a"], "--adapter", made["pfeiffer-b"])
    assert fuse("train", made["text"], *both, "--learning-rate", "0.05", output="fused").code == 0
    records = tiny_records("text", 6)
    held = write_jsonl(workdir / "held.jsonl", [*({**r, "domain": "law"} for r in records[:4]), *records[4:]])
    done = fuse("report", held, "-m", "fused", "--against", made["pfeiffer-a"], "--device", "cpu")
    assert done.code == 0, done.stderr
    report = json.loads(Path("out/report.json").read_text())
    assert list(report["domains"]) == ["held", "law"]

    for domain, part in (("law", records[:4]), ("held", records[4:])):
        found = report["domains"][domain]
        losses = {way: row["loss"]["value"] for way, row in found["ways"].items()}
        for way, model in (
            ("base", tiny_model),
            ("fused", "fused"),
            ("only pfeiffer-a", made["pfeiffer-a"]),
            ("only pfeiffer-b", made["pfeiffer-b"]),
            (str(made["pfeiffer-a"]), made["pfeiffer-a"]),
        ):
            assert losses[way] == pytest.approx(loss_of(model, part, tiny_model), rel=1e-4), way
        best = f"only {found['best_single']}"
        assert losses[best] == min(v for way, v in losses.items() if way.startswith("only"))
        difference = found["ways"][best]["fused_minus"]
        assert difference["value"] == pytest.approx(losses["fused"] - losses[best], abs=1e-9)
        assert found["records"] == len(part)

    assert Path("out/attention.png").read_bytes().startswith(b"\x89PNG")
    assert "## law: 4 records" in Path("out/report.md").read_text()
    assert fuse("report", held, "-m", made["pfeiffer-a"], output="other").code == 2


def test_the_weights_are_the_softmax_of_the_papers_scores(
    fuse: Fuse, made: Made, tiny_model: Path, workdir: Path
) -> None:
    """The first layer's weights, from hidden states that hooks on the bare base give, and the saved tensors."""
    both = ("--adapter", made["pfeiffer-a"], "--adapter", made["pfeiffer-b"])
    plain = ("--learning-rate", "0.05", "--no-normalize-query")
    assert fuse("train", made["text"], *both, *plain, output="fused").code == 0
    assert fuse("report", made["text"], "-m", "fused", "--device", "cpu").code == 0
    found = json.loads(Path("out/report.json").read_text())["domains"]["text"]["layers"]

    stored = load_file("fused/adapter_model.safetensors")
    layer = "base_model.model.model.layers.0."
    first = {k.removeprefix(layer): t for k, t in stored.items() if k.startswith(layer)}
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    streams: list[torch.Tensor] = []
    base.model.layers[0].register_forward_hook(lambda _m, _a, output: streams.append(output))
    words = load_tokenizer(str(tiny_model))
    sums, tokens = torch.zeros(2), 0
    for record in tiny_records("text", 6):
        with torch.inference_mode():
            base(torch.tensor([encode(record, words).input_ids]))
        for h in streams.pop().reshape(-1, 32):
            scores = []
            for n in range(2):
                p = {k.split(f"experts.{n}.")[1]: t for k, t in first.items() if f"experts.{n}." in k}
                inner = torch.relu(p["bottleneck_down.weight"] @ h + p["bottleneck_down.bias"])
                z = p["bottleneck_up.weight"] @ inner + p["bottleneck_up.bias"]
                query, key = first["fusion_mixer.query.weight"] @ h, first["fusion_mixer.key.weight"] @ z
                scores.append(query @ key)
            sums += torch.softmax(torch.stack(scores), 0)
            tokens += 1
    assert found[0] == pytest.approx((sums / tokens).tolist(), abs=1e-5)


def test_a_gate_that_chooses_one_adapter_is_that_adapter(made: Made, tiny_model: Path) -> None:
    parts = [read_part(made[n], n) for n in ("lora-a", "lora-b")]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = compose(base, parts, "gate").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gate.bias"):
            parameter.data = torch.tensor([0.0, 100.0])
    ids = torch.tensor([[5, 9, 40, 7]])
    alone = load_model(str(made["lora-b"]), device="cpu", dtype="float32").model
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, alone(ids).logits)
