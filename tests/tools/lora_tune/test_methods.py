"""Every method trains, and what it saves is in plain PEFT or Transformers what it was at the end of training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Result, build_tiny_model, tiny_records

from tuneutils.shared import device  # noqa: F401

import torch  # isort: skip
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tuneutils.shared import adapters, methods
from tuneutils.shared.four_bit import keep_4bit_layout
from tuneutils.shared.logprobs_model import causal_nll
from tuneutils.shared.models import load_model
from tuneutils.shared.supervise import IGNORE, Encoded, encode
from tuneutils.shared.training import Collator
from tuneutils.tools.lora_tune.params import Params

from .conftest import log_of, weights_of

METHODS: dict[str, list[str]] = {
    "full": ["--method", "full", "--learning-rate", "0.005"],
    "lora": ["--lora-rank", "4"],
    "dora": ["--lora-rank", "4", "--dora"],
    "rslora": ["--lora-rank", "4", "--rslora"],
    "pissa": ["--lora-rank", "4", "--pissa"],
    "loraplus": ["--lora-rank", "4", "--loraplus-ratio", "8"],
    "qlora": ["--method", "qlora", "--lora-rank", "4"],
    "qlora-fp4": ["--method", "qlora", "--lora-rank", "4", "--quantization", "fp4"],
    "houlsby": ["--method", "houlsby"],
    "pfeiffer": ["--method", "pfeiffer"],
    "parallel": ["--method", "parallel"],
    "mad-x": ["--method", "mad-x"],
    "llama-adapter": ["--method", "llama-adapter", "--virtual-tokens", "4"],
    "prefix": ["--method", "prefix", "--virtual-tokens", "4"],
    "p-tuning": ["--method", "p-tuning", "--virtual-tokens", "4"],
    "prompt": ["--method", "prompt", "--virtual-tokens", "4"],
    "ia3": ["--method", "ia3"],
}
STARTS_ELSEWHERE = ("prefix", "p-tuning", "prompt")
OTHERS: dict[str, list[str]] = {
    "adaption-prompt": [],
    "boft": [],
    "bone": [],
    "c3a": ["block_size=8"],
    "cartridge": [],
    "delora": [],
    "fourierft": ["n_frequency=50"],
    "gralora": [],
    "hira": [],
    "hra": [],
    "lily": [],
    "ln-tuning": [],
    "loha": [],
    "lokr": [],
    "miss": [],
    "oft": ["oft_block_size=8"],
    "prefix-tuning": [],
    "prompt-tuning": [],
    "randlora": [],
    "road": ["group_size=8"],
    "shira": [],
    "trainable-tokens": ["token_indices=[2, 3]"],
    "vblora": ["vector_length=8", "num_vectors=16", "topk=2"],
    "vera": [],
    "waveft": ["n_frequency=50"],
}


def heldout_examples(heldout: Path, model: Path) -> list[Encoded]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [encode(json.loads(line), tokenizer) for line in heldout.read_text().splitlines()]


def loss_of(model: Any, examples: list[Encoded]) -> float:
    """Mean loss over labels from the model's own logits, each example by itself."""
    total, count = 0.0, 0
    for example in examples:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        logits = logits[0, -ids.shape[1] :].float()  # virtual tokens stand before
        total += F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE, reduction="sum").item()
        count += int((labels[1:] != IGNORE).sum())
    return total / count


def reload(folder: Path, base: Path, quantization: str | None) -> Any:
    from peft import PeftModel

    if not (folder / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert adapters.BottleneckConfig  # importing it is what registers our tuners
    kwargs: dict[str, Any] = {}
    if quantization:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization[:3],
            bnb_4bit_use_double_quant=quantization.endswith("double"),
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **kwargs)
    keep_4bit_layout(model)
    return PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize("name", METHODS)
def test_what_is_saved_is_what_was_trained(
    name: str, tune: Callable[..., Result], tiny_model: Path, records: Path, heldout: Path, workdir: Path
) -> None:
    base_path = tiny_model
    if name.startswith("qlora"):  # narrower rows are refused
        base_path = build_tiny_model(workdir / "model", hidden_size=64, intermediate_size=128)
    before = (base_path / "model.safetensors").read_bytes()
    rate = [] if "--learning-rate" in METHODS[name] else ["--learning-rate", "0.02"]
    args = [records, "--heldout", heldout, "--batch-size", "4", "--epochs", "3", *rate, *METHODS[name]]
    planned = tune(*args, "--dry-run", model=base_path)
    assert planned.code == 0, planned.stderr
    done = tune(*args, "--json", model=base_path)
    assert done.code == 0, done.stderr
    metrics = done.json()["metrics"]
    manifest = json.loads((workdir / "out" / "artifact.json").read_text())
    assert manifest["metrics"] == metrics

    for key in ("trainable_parameters", "total_parameters"):
        assert planned.json()[key] == metrics[key]
    model = reload(workdir / "out", base_path, manifest.get("quantization"))
    examples = heldout_examples(heldout, base_path)
    assert metrics["heldout_loss"] == pytest.approx(loss_of(model, examples), rel=1e-5)
    assert loss_of(load_model("out", dtype="float32").model, examples) == pytest.approx(
        metrics["heldout_loss"], rel=1e-2 if name.startswith("qlora") else 1e-5
    )
    assert metrics["heldout_tokens"] == sum(e.learnt for e in examples)
    assert metrics["heldout_loss"] < metrics["heldout_loss_before"]
    if name not in STARTS_ELSEWHERE:
        if name.startswith("qlora"):
            base = model.unload()
        else:
            base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32).eval()
        assert metrics["heldout_loss_before"] == pytest.approx(loss_of(base, examples), rel=1e-4)
    assert (base_path / "model.safetensors").read_bytes() == before
    assert not list((workdir / "out").glob("*.bin"))


@pytest.mark.parametrize("name", OTHERS)
def test_other_peft_methods_by_name(
    name: str, tune: Callable[..., Result], tiny_model: Path, records: Path, heldout: Path, workdir: Path
) -> None:
    if methods._peft_type(name) not in methods._peft_configs():
        pytest.skip(f"this PEFT has no {name}")
    options = [arg for pair in OTHERS[name] for arg in ("--peft-option", pair)]
    args = ["--method", name, *options, "--virtual-tokens", "4", "--lora-rank", "4", "--max-steps", "2"]
    done = tune(records, "--heldout", heldout, "--batch-size", "4", *args, "--json")
    assert done.code == 0, done.stderr
    metrics = done.json()["metrics"]
    assert 0 < metrics["trainable_parameters"] < metrics["total_parameters"]
    loss = loss_of(load_model("out", dtype="float32").model, heldout_examples(heldout, tiny_model))
    assert metrics["heldout_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["heldout_loss"] != metrics["heldout_loss_before"]


@pytest.mark.parametrize("name", [*methods.UNSUPPORTED, "c3a", "trainable-tokens"])
def test_methods_that_cannot_be_trained_say_so_in_one_line(
    name: str, tune: Callable[..., Result], records: Path, workdir: Path
) -> None:
    done = tune(records, "--method", name)
    assert done.code == 2
    assert f"--method {name}: " in done.error
    assert not (workdir / "out").exists()


@pytest.mark.parametrize(
    "name", ["full", "lora", "houlsby", "llama-adapter", "prefix", "p-tuning", "prompt", "ia3"]
)
def test_an_example_has_the_same_loss_alone_and_in_a_padded_batch(name: str, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    params = Params(model=str(tiny_model), method=name, virtual_tokens=4)
    model = methods.apply_method(model.requires_grad_(False), tokenizer, params, "Hello there.").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    examples = [encode(r, tokenizer) for r in tiny_records("prompt-completion")]
    examples += [Encoded(e.input_ids[:k], e.input_ids[:k]) for k, e in enumerate(examples[:4], 2)]
    batch = Collator(tokenizer.pad_token_id)([vars(e) for e in examples])
    together = causal_nll(
        model, batch["input_ids"], batch["attention_mask"], batch["labels"], reduction="none"
    )
    for row, example in zip(together, examples, strict=True):
        alone = loss_of(model, [example]) * example.learnt
        assert row.sum().item() == pytest.approx(alone, rel=1e-5)


def test_loraplus_moves_b_by_the_ratio(tune: Callable[..., Result], records: Path, workdir: Path) -> None:
    """Adam's first step is the rate itself; A, whose gradient is then 0, follows with its own rate."""
    common = ["--loraplus-ratio", "16", "--learning-rate", "1e-4", "--schedule", "constant", "--warmup", "0"]
    for steps in ("1", "2"):
        assert tune(records, *common, "--max-steps", steps, output=steps).code == 0
    first, second = weights_of(workdir / "1"), weights_of(workdir / "2")
    for name, weight in first.items():
        if "lora_B" in name:
            assert weight.abs().max().item() == pytest.approx(16e-4, rel=1e-3)
        else:
            assert (second[name] - weight).abs().max().item() <= 1e-4


def test_pissa_is_saved_as_a_plain_lora_of_twice_the_rank(
    tune: Callable[..., Result], records: Path, workdir: Path
) -> None:
    assert tune(records, "--pissa", "--lora-rank", "4", "--max-steps", "1").code == 0
    config = json.loads((workdir / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (8, True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("guarded", [True, False])
def test_an_evaluation_changes_no_gradient_over_a_4bit_base(
    dtype: str,
    guarded: bool,
    tune: Callable[..., Result],
    records: Path,
    heldout: Path,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bitsandbytes repacks 4-bit weights at the first evaluation; the repacked layout has no backward."""
    from bitsandbytes.functional import has_avx512bf16

    from tuneutils.shared import tuning

    if not guarded:
        if not has_avx512bf16():
            pytest.skip("bitsandbytes repacks only where the CPU has AVX512-BF16")
        monkeypatch.setattr(tuning, "keep_4bit_layout", lambda _model: None)
    model = build_tiny_model(workdir / "model", hidden_size=64, intermediate_size=128)
    common = [records, "--method", "qlora", "--max-steps", "4", "--dtype", dtype]
    assert tune(*common, model=model, output="plain").code == 0
    done = tune(*common, "--heldout", heldout, "--eval-every", "1", model=model, output="evaluated")
    assert done.code == 0, done.stderr
    plain, evaluated = weights_of(workdir / "plain"), weights_of(workdir / "evaluated")
    assert guarded == all(torch.equal(weight, evaluated[name]) for name, weight in plain.items())


def test_4bit_adapters_are_trained_in_float32(
    tune: Callable[..., Result], records: Path, workdir: Path
) -> None:
    model = build_tiny_model(workdir / "model", hidden_size=64, intermediate_size=128)
    args = (records, "--method", "qlora", "--max-steps", "1", "--learning-rate", "1e-6")
    assert tune(*args, model=model).code == 0
    for name, weight in weights_of(workdir / "out").items():
        assert weight.dtype == torch.float32
        assert not torch.equal(weight, weight.bfloat16().float()), name


@pytest.mark.parametrize("method", ["full", "lora", "prefix"])
def test_bfloat16_trains(
    method: str, tune: Callable[..., Result], records: Path, heldout: Path, workdir: Path
) -> None:
    args = [
        records,
        "--heldout",
        heldout,
        "--method",
        method,
        "--dtype",
        "bfloat16",
        "--learning-rate",
        "0.01",
    ]
    done = tune(*args, "--epochs", "3", "--json")
    assert done.code == 0, done.stderr
    assert json.loads((workdir / "out" / "artifact.json").read_text())["dtype"] == "bfloat16"
    assert done.json()["metrics"]["heldout_loss"] < done.json()["metrics"]["heldout_loss_before"]
    assert all(w.dtype == torch.float32 for w in weights_of(workdir / "out").values())


@pytest.mark.parametrize("method", ["full", "lora", "prompt", "houlsby"])
def test_gradient_checkpointing_changes_no_result(
    method: str, tune: Callable[..., Result], records: Path, workdir: Path
) -> None:
    common = [records, "--method", method, "--max-steps", "2"]
    assert tune(*common, output="plain").code == 0
    assert tune(*common, "--gradient-checkpointing", output="recomputed").code == 0
    for a, b in zip(log_of(workdir / "plain"), log_of(workdir / "recomputed"), strict=True):
        assert a == pytest.approx(b, rel=1e-6)


@pytest.mark.parametrize("method", ["prefix", "prefix-tuning"])
def test_gradient_checkpointing_is_refused_where_it_would_change_the_result(
    method: str, tune: Callable[..., Result], records: Path
) -> None:
    done = tune(records, "--method", method, "--gradient-checkpointing")
    assert done.code == 2
    assert "passes a cache" in done.error


def test_early_stopping_keeps_the_weights_of_the_best_evaluation(
    tune: Callable[..., Result], tiny_model: Path, records: Path, heldout: Path, workdir: Path
) -> None:
    common = [records, "--heldout", heldout, "--eval-every", "1", "--learning-rate", "0.3"]
    common += ["--schedule", "constant", "--warmup", "0"]
    done = tune(*common, "--patience", "2", "--max-steps", "20", "--json")
    assert done.code == 0, done.stderr
    metrics = done.json()["metrics"]
    losses = {e["step"]: e["eval_loss"] for e in log_of(workdir / "out") if "eval_loss" in e and e["step"]}
    best = min(losses, key=losses.__getitem__)
    assert metrics["steps"] == best + 2 < 20
    assert metrics["heldout_loss"] == losses[best]
    loss = loss_of(reload(workdir / "out", tiny_model, None), heldout_examples(heldout, tiny_model))
    assert loss == pytest.approx(losses[best], rel=1e-5)
    assert tune(*common, "--max-steps", str(best), output="until-best").code == 0
    until_best = weights_of(workdir / "until-best")
    assert all(torch.equal(w, until_best[n]) for n, w in weights_of(workdir / "out").items())


def test_a_run_that_diverges_leaves_nothing(
    tune: Callable[..., Result], records: Path, workdir: Path
) -> None:
    model = build_tiny_model(workdir / "broken")
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    done = tune(records, model=model)
    assert done.code == 1
    assert "loss is nan; try a lower --learning-rate" in done.error
    assert not (workdir / "out").exists()
    assert not list(workdir.glob(".out*"))
