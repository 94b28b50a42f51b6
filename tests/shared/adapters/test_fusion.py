"""Composed adapters against the papers' formulas, the adapters alone, PEFT's own sums and the `adapters` library."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tuneutils.shared.adapters import AdapterError, BottleneckConfig, FusionConfig
from tuneutils.shared.adapters.fusion import forced_weights, recorded_weights
from tuneutils.shared.adapters.fusion.compose import compose, read_part, write_parts
from tuneutils.shared.adapters.fusion.layer import fusion_layers
from tuneutils.shared.adapters.fusion.mixers import AttentionMixer, GateMixer
from tuneutils.shared.errors import ToolError
from tuneutils.shared.logprobs_model import causal_nll

DATA = Path(__file__).parent / "data"
CLASSES = {"llama": (LlamaForCausalLM, LlamaConfig), "gpt2": (GPT2LMHeadModel, GPT2Config)}
Make = Callable[..., tuple[list[Path], list[torch.Tensor]]]


def bottleneck(style: str, size: int = 8, **options: Any) -> BottleneckConfig:
    return BottleneckConfig(style=style, bottleneck_size=size, task_type="CAUSAL_LM", **options)


def lora(rank: int = 4, **options: Any) -> LoraConfig:
    return LoraConfig(
        r=rank, lora_alpha=12, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options
    )


KINDS: dict[str, Callable[..., Any]] = {
    "pfeiffer": lambda i: bottleneck("pfeiffer", 4 + i),
    "houlsby": lambda i: bottleneck("houlsby", 4 + i),
    "parallel": lambda i: bottleneck("parallel", 4 + i, scaling="learned"),
    "lora": lambda i: lora(
        3 + i, use_rslora=bool(i), rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 5}
    ),
}


@pytest.fixture
def saved(base: LlamaForCausalLM, input_ids: torch.Tensor, tmp_path: Path) -> Make:
    """Adapters with random weights, each made and saved by its own tuner: folders, and the logits of each."""

    def make(*configs: Any, std: float = 0.3) -> tuple[list[Path], list[torch.Tensor]]:
        folders, logits = [], []
        for index, config in enumerate(configs):
            model = get_peft_model(copy.deepcopy(base), config).eval()
            torch.manual_seed(10 + index)
            for name, parameter in model.named_parameters():
                if "bottleneck_" in name or "lora_" in name:
                    torch.nn.init.normal_(parameter, std=std)
            folders.append(tmp_path / f"adapter-{index}")
            model.save_pretrained(folders[-1], save_embedding_layers=False)
            with torch.no_grad():
                logits.append(model(input_ids).logits)
        return folders, logits

    return make


def composed(base: LlamaForCausalLM, folders: list[Path], kind: str) -> Any:
    parts = [read_part(folder, folder.name) for folder in folders]
    return compose(copy.deepcopy(base), parts, kind).eval()


# The formula


def by_the_paper(
    h: np.ndarray, z: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pfeiffer et al. 2021, section 3.2, one position at a time: ``h (d,)``, ``z (N, d)``."""
    scores = np.array([np.dot(q @ h, k @ z_n) for z_n in z])
    s = np.exp(scores - scores.max())
    s /= s.sum()
    return sum(s_n * (v @ z_n) for s_n, z_n in zip(s, z)), s


@pytest.mark.parametrize(("size", "normalize"), [(None, False), (2, False), (None, True)])
def test_attention_is_the_papers_formula(size: int | None, normalize: bool) -> None:
    torch.manual_seed(0)
    mixer = AttentionMixer(6, size, normalize).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    h, z = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 3, 4, 6, dtype=torch.float64)
    mixed, weights = mixer(h, z)
    p = {n: w.detach().numpy() for n, w in mixer.named_parameters()}
    v = p["value.weight"] if size is None else np.eye(6) + p["value_up.weight"] @ p["value_down.weight"]
    for place in np.ndindex(2, 3):
        read = h[place].numpy() / (np.sqrt((h[place].numpy() ** 2).mean() + 1e-6) if normalize else 1)
        o, s = by_the_paper(read, z[place].numpy(), p["query.weight"], p["key.weight"], v)
        np.testing.assert_allclose(mixed[place].detach().numpy(), o)
        np.testing.assert_allclose(weights[place].detach().numpy(), s)
    assert mixer.penalty().item() == pytest.approx(((v - np.eye(6)) ** 2).sum())


@pytest.mark.parametrize("mixer", [AttentionMixer(6, None, True), GateMixer(6, 3, True)])
def test_a_normalised_query_does_not_depend_on_the_streams_scale(mixer: Any) -> None:
    torch.manual_seed(0)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    h, z = torch.randn(5, 6), torch.randn(5, 3, 6)
    torch.testing.assert_close(mixer(100 * h, z)[1], mixer(h, z)[1], rtol=1e-4, atol=1e-5)


def test_values_start_as_the_identity() -> None:
    z = torch.randn(5, 3, 6)
    for size in (None, 2):
        mixer = AttentionMixer(6, size)
        mixed, weights = mixer(torch.randn(5, 6), z)
        torch.testing.assert_close(mixed, (weights[..., None] * z).sum(-2))
        assert mixer.penalty().item() == 0
        assert mixer.query.weight.abs().min() > 0
        assert mixer.key.weight.abs().min() > 0


def test_the_gate_is_a_softmax_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    gate = GateMixer(6, 3).double()
    h, z = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(gate(h, z)[0], z.mean(-2))  # it starts as the average
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    w, b = gate.gate.weight.detach().numpy(), gate.gate.bias.detach().numpy()
    for i in range(5):
        e = np.exp(w @ h[i].numpy() + b)
        np.testing.assert_allclose(gate(h, z)[0][i].detach().numpy(), (e / e.sum()) @ z[i].numpy())


# Whole models


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("kind", ["attention", "gate"])
def test_one_adapter_fused_is_that_adapter(
    base: LlamaForCausalLM, input_ids: torch.Tensor, saved: Make, method: str, kind: str
) -> None:
    folders, logits = saved(KINDS[method](1))
    torch.testing.assert_close(composed(base, folders, kind)(input_ids).logits, logits[0])


@pytest.mark.parametrize("method", KINDS)
def test_a_gate_that_is_one_hot_is_that_adapter(
    base: LlamaForCausalLM, input_ids: torch.Tensor, saved: Make, method: str
) -> None:
    folders, logits = saved(KINDS[method](0), KINDS[method](1))
    model = composed(base, folders, "gate")
    for index, alone in enumerate(logits):
        for layer in fusion_layers(model).values():
            with torch.no_grad():
                layer.fusion_mixer["default"].gate.bias.copy_(torch.eye(2)[index] * 200)
        torch.testing.assert_close(model(input_ids).logits, alone)
        with forced_weights(model, torch.eye(2)[index].tolist()):
            torch.testing.assert_close(model(input_ids).logits, alone)


def test_an_average_of_loras_is_pefts_own_sum(
    base: LlamaForCausalLM, input_ids: torch.Tensor, saved: Make
) -> None:
    """LoRAs are linear, so the gate's start equals PEFT's exact combination (``cat``) with weights of a half."""
    folders, _ = saved(lora(4), lora(3))
    got = composed(base, folders, "gate")(input_ids).logits
    model = PeftModel.from_pretrained(base, folders[0], adapter_name="one")
    model.load_adapter(folders[1], adapter_name="two")
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "sum", combination_type="cat")
    model.set_adapter("sum")
    torch.testing.assert_close(got, model(input_ids).logits)


def test_a_stack_is_its_adapters_in_order(
    base: LlamaForCausalLM, input_ids: torch.Tensor, saved: Make
) -> None:
    folders, _ = saved(bottleneck("pfeiffer", invertible=True), bottleneck("pfeiffer", 5))
    seen = []
    for order in ((0, 1), (1, 0)):
        model = PeftModel.from_pretrained(copy.deepcopy(base), folders[0], adapter_name="0")
        model.load_adapter(folders[1], adapter_name="1")
        model.base_model.set_adapter([str(i) for i in order])
        seen.append(model(input_ids).logits)
        got = composed(base, [folders[i] for i in order], "stack")(input_ids).logits
        torch.testing.assert_close(got, seen[-1])
    assert not torch.allclose(*seen)


def test_a_stack_written_without_its_base_loads_and_swaps_its_language(
    base: LlamaForCausalLM, input_ids: torch.Tensor, saved: Make, tmp_path: Path
) -> None:
    folders, _ = saved(
        bottleneck("pfeiffer", invertible=True),
        bottleneck("pfeiffer", 5),
        bottleneck("pfeiffer", invertible=True),
    )
    english, task, welsh = (read_part(f, n) for f, n in zip(folders, ("en", "task", "cy")))
    (tmp_path / "stack").mkdir()
    write_parts(tmp_path / "stack", [english, task], "stack", "somewhere")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "stack", adapter_name="any")
    torch.testing.assert_close(
        loaded(input_ids).logits, composed(base, folders[:2], "stack")(input_ids).logits
    )
    # The task is taken off the stack and put on another language.
    (tmp_path / "swapped").mkdir()
    write_parts(tmp_path / "swapped", [welsh, read_part(tmp_path / "stack", "task")], "stack", "somewhere")
    swapped = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "swapped")
    expected = composed(base, [folders[2], folders[1]], "stack")(input_ids).logits
    torch.testing.assert_close(swapped(input_ids).logits, expected)


def test_compositions_side_by_side_switch_by_name(
    base: LlamaForCausalLM, input_ids: torch.Tensor, saved: Make, tmp_path: Path
) -> None:
    """As a chat switches languages: one with an invertible adapter, one without, under the same task."""
    folders, _ = saved(
        bottleneck("pfeiffer"), bottleneck("pfeiffer", invertible=True), bottleneck("pfeiffer", 5)
    )
    parts = [read_part(f, f.name) for f in folders]
    model, alone = None, {}
    for index, name in enumerate(("plain", "cy")):
        (tmp_path / name).mkdir()
        write_parts(tmp_path / name, [parts[index], parts[2]], "stack", "somewhere")
        alone[name] = composed(base, [folders[index], folders[2]], "stack")(input_ids).logits
        if model is None:
            model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name, adapter_name=name)
        else:
            model.load_adapter(tmp_path / name, adapter_name=name)
    assert not torch.allclose(*alone.values())
    for name in ("cy", "plain", "cy"):
        model.set_adapter(name)
        torch.testing.assert_close(model(input_ids).logits, alone[name])


def test_only_what_composes_is_trained(base: LlamaForCausalLM, input_ids: torch.Tensor, saved: Make) -> None:
    language = bottleneck("pfeiffer", invertible=True)
    folders, _ = saved(bottleneck("pfeiffer"), bottleneck("pfeiffer"), language)
    for kind, chosen, trained in (
        ("attention", folders[:2], "fusion_mixer"),
        ("gate", folders[:2], "fusion_mixer"),
        ("stack", folders[:0:-1], "fusion_top"),
    ):
        model = composed(base, chosen, kind)
        causal_nll(model, input_ids, None, input_ids).backward()
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (f".{trained}." in name), name
            assert (parameter.grad is not None) == (f".{trained}." in name), name


@pytest.mark.parametrize("method", ["pfeiffer", "lora"])
@pytest.mark.parametrize("name", ["default", "0"])
def test_a_fusion_is_saved_with_its_adapters_and_loads_alone(
    base: LlamaForCausalLM, input_ids: torch.Tensor, saved: Make, tmp_path: Path, method: str, name: str
) -> None:
    folders, _ = saved(KINDS[method](0), KINDS[method](1))
    model = composed(base, folders, "attention")
    for parameter_name, parameter in model.named_parameters():
        if "fusion_mixer" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.2)
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path / "fused", save_embedding_layers=False)
    keys = load_file(tmp_path / "fused" / "adapter_model.safetensors")
    assert not [k for k in keys if "base_layer" in k or ".default" in k]
    for folder in folders:
        (folder / "adapter_model.safetensors").unlink()
    again = PeftModel.from_pretrained(base, tmp_path / "fused", adapter_name=name)
    torch.testing.assert_close(again(input_ids).logits, expected)
    with again.disable_adapter():
        plain = again(input_ids).logits
    torch.testing.assert_close(again.unload()(input_ids).logits, plain)


def test_weights_are_recorded_by_place(base: LlamaForCausalLM, input_ids: torch.Tensor, saved: Make) -> None:
    folders, _ = saved(lora(4), lora(3))
    model = composed(base, folders, "attention")
    with recorded_weights(model) as kept:
        model(input_ids)
    places = {f"layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "mlp.down_proj")}
    assert {name.partition("model.model.model.")[2] or name.partition("model.")[2] for name in kept} == places
    for (weights,) in kept.values():
        assert weights.shape == (2, 9, 2)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9))


# What does not go together


def test_adapters_that_do_not_go_together_are_refused(saved: Make, base: LlamaForCausalLM) -> None:
    folders, _ = saved(
        bottleneck("pfeiffer"),
        bottleneck("houlsby"),
        lora(),
        bottleneck("pfeiffer", invertible=True),
        lora(use_dora=True),
    )
    pfeiffer, houlsby, plain, language, dora = folders
    for chosen, kind, message in (
        ([pfeiffer, houlsby], "attention", "different modules|styles"),
        ([pfeiffer, plain], "attention", "different modules|only bottlenecks or only LoRAs"),
        ([pfeiffer, language], "gate", "invertible adapters cannot be fused|different modules"),
        ([plain, plain], "stack", "LoRAs only add up"),
        ([plain, dora], "attention", "use_dora"),
    ):
        with pytest.raises(ToolError, match=message):
            composed(base, chosen, kind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "gates"}, "did you mean 'gate'|gate"),
        ({"adapters": []}, "no adapters"),
        ({"attention_size": 0}, "attention_size is 0"),
    ],
)
def test_wrong_configurations_are_refused(options: dict[str, Any], message: str) -> None:
    entry = {"name": "a", "peft_type": "LORA", "config": {"r": 2, "lora_alpha": 2}}
    with pytest.raises(AdapterError, match=message):
        FusionConfig(**{"adapters": [entry], **options})


# The `adapters` library


def library_model(model_type: str, kind: str, names: list[str]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Our composition of the library's adapters, with the library's weights."""
    tensors = load_file(DATA / f"composition_{model_type}.safetensors")
    model_class, config_class = CLASSES[model_type]
    options = json.loads((DATA / f"composition_{model_type}.json").read_text())["model_config"]
    base = model_class(config_class(**options)).eval()
    base.load_state_dict({k[5:]: v for k, v in tensors.items() if k.startswith("base.")}, strict=False)
    entries = []
    for name in names:
        config = {"style": "pfeiffer", "bottleneck_size": 4, "invertible": name == "lang"}
        entries.append({"name": name, "peft_type": "BOTTLENECK", "config": config})
    body, layers, embedding = {
        "llama": ("model", "layers", "embed_tokens"),
        "gpt2": ("transformer", "h", "wte"),
    }[model_type]
    target = rf"{body}\.{layers}\.\d+" + (rf"|{body}\.{embedding}" if "lang" in names else "")
    model = get_peft_model(
        base, FusionConfig(kind=kind, adapters=entries, target_modules=target, normalize_query=False)
    )
    state = {}
    for layer in range(2):
        theirs = f"adapter.{body}.{layers}.{layer}.output_adapters"
        ours = f"base_model.model.{body}.{layers}.{layer}.fusion_"
        for index, name in enumerate(names):
            top = kind == "stack" and index == len(names) - 1
            place = f"{ours}top.default" if top else f"{ours}experts.default.{index}"
            for part, their_part in (("down", "down.0"), ("up", "up")):
                for kind_of in ("weight", "bias"):
                    key = f"{theirs}.adapters.{name}.adapter_{their_part}.{kind_of}"
                    state[f"{place}.bottleneck_{part}.{kind_of}"] = tensors[key]
        for part in ("query", "key", "value") if kind == "attention" else ():
            key = f"{theirs}.adapter_fusion_layer.a,b.{part}.weight"
            state[f"{ours}mixer.default.{part}.weight"] = tensors[key]
    if "lang" in names:
        for theirs, part in (("F.0", "f_down"), ("F.2", "f_up"), ("G.0", "g_down"), ("G.2", "g_up")):
            for kind_of in ("weight", "bias"):
                place = "top.default" if names == ["lang"] else "experts.default.0"
                key = (
                    f"base_model.model.{body}.{embedding}.fusion_{place}.bottleneck_coupling.{part}.{kind_of}"
                )
                state[key] = tensors[f"adapter.{body}.invertible_adapters.lang.{theirs}.{kind_of}"]
    left = {n for n, _ in model.named_parameters() if ".fusion_" in n} ^ set(state)
    assert not left
    model.load_state_dict(state, strict=False)
    return model.eval(), tensors


@pytest.mark.parametrize("model_type", CLASSES)
def test_fusion_equals_the_adapters_library(model_type: str) -> None:
    model, tensors = library_model(model_type, "attention", ["a", "b"])
    with recorded_weights(model) as kept, torch.no_grad():
        logits = model(tensors["input_ids"]).logits
    torch.testing.assert_close(logits, tensors["logits.fused"], rtol=1e-4, atol=1e-4)
    entropy = 0.0
    for layer, (weights,) in enumerate(kept.values()):
        theirs = tensors[f"attention.{layer}"]
        torch.testing.assert_close(weights, theirs, rtol=1e-4, atol=1e-4)
        entropy += torch.special.entr(theirs).sum(-1).mean().item()
    assert entropy > 0.1 * math.log(2)  # the reference chooses by more than one adapter


@pytest.mark.parametrize(
    ("model_type", "setup", "names"),
    [
        ("llama", "a", ["a"]),
        ("llama", "stack", ["b", "a"]),
        ("llama", "lang", ["lang"]),
        ("llama", "mad-x", ["lang", "a"]),
        ("gpt2", "a", ["a"]),
        ("gpt2", "stack", ["b", "a"]),
    ],
)
def test_stacks_and_languages_equal_the_adapters_library(
    model_type: str, setup: str, names: list[str]
) -> None:
    model, tensors = library_model(model_type, "stack", names)
    with torch.no_grad():
        logits = model(tensors["input_ids"]).logits
    torch.testing.assert_close(logits, tensors[f"logits.{setup}"], rtol=1e-4, atol=1e-4)
