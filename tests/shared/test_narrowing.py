"""Students cut from a teacher: what is removed, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import build_tiny_model

from tuneutils.shared.errors import ToolError
from tuneutils.shared.importance import block_influence, measure_importance
from tuneutils.shared.narrowing import (
    Shape,
    influential_layers,
    make_student,
    matched_layers,
    parse_layers,
    uniform_layers,
)

# isort: split
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

IDS = torch.randint(4, 380, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four layers with weights large enough to matter."""
    folder = tmp_path_factory.mktemp("narrowing") / "teacher"
    return build_tiny_model(folder, num_hidden_layers=4, initializer_range=0.15)


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def silence(layer: Any) -> None:
    """Make a decoder layer the identity: both its branches add zero."""
    layer.self_attn.o_proj.weight.data.zero_()
    layer.mlp.down_proj.weight.data.zero_()


def test_block_influence_of_known_changes() -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)  # each pair by a right angle
    for after, expected in ((x, 0.0), (3 * x, 0.0), (turned, 1.0), (-x, 2.0)):
        assert block_influence(x, after).item() == pytest.approx(expected, abs=1e-6)


def test_an_identity_layer_has_no_influence_and_goes_first(teacher: Path) -> None:
    model = load(teacher)
    silence(model.model.layers[2])
    influence = measure_importance(model, IDS, channels=False).influence
    assert influence[2].item() == pytest.approx(0, abs=1e-6)
    kept = influential_layers(influence, 3)
    assert kept == (0, 1, 3)
    torch.testing.assert_close(logits(make_student(model, Shape(kept), None)), logits(model))


def test_layer_indices_are_renumbered_for_the_cache(teacher: Path, tmp_path: Path) -> None:
    student = make_student(load(teacher), Shape((1, 3)), None)
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]
    student.save_pretrained(tmp_path / "student")
    again = load(tmp_path / "student")
    assert again.config.num_hidden_layers == 2
    with torch.no_grad():
        whole = again(input_ids=IDS).logits[:, -1]
        cache = again(input_ids=IDS[:, :-1], use_cache=True).past_key_values
        step = again(input_ids=IDS[:, -1:], past_key_values=cache).logits[:, -1]
    assert len(cache.layers) == 2
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-5)


def test_the_student_holds_the_teachers_layers(teacher: Path) -> None:
    model = load(teacher)
    student = make_student(model, Shape((1, 3)), None)
    for ours, theirs in ((0, 1), (1, 3)):
        pair = (student.model.layers[ours].state_dict(), model.model.layers[theirs].state_dict())
        assert all(torch.equal(pair[0][n], t) for n, t in pair[1].items())
    model.lm_head.weight.data.zero_()
    assert student.lm_head.weight.any()  # a copy


def test_dropping_mlp_channels_and_heads_that_do_nothing_changes_nothing(teacher: Path) -> None:
    model = load(teacher)
    dead = [[3, 10, 11], [0, 1, 2], [60, 5, 33], [8, 9, 63]]
    for index, layer in enumerate(model.model.layers):
        layer.mlp.up_proj.weight.data[dead[index]] = 0
        head = index % 2  # of two KV heads
        layer.self_attn.v_proj.weight.data[head * 8 : head * 8 + 8] = 0
    importance = measure_importance(model, IDS, channels=True)
    for index in range(4):
        assert sorted(dead[index]) == importance.mlp[index].eq(0).nonzero()[:, 0].tolist()
        assert importance.groups[index].eq(0).tolist() == [index % 2 == 0, index % 2 == 1]
    student = make_student(model, Shape(intermediate=61, kv_heads=1), importance)
    config = student.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    assert student.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)
    torch.testing.assert_close(logits(student), logits(model))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_dropping_hidden_channels_that_hold_nothing_changes_nothing(family: str, teacher: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-12,
        "pad_token_id": 1,
    }
    torch.manual_seed(0)
    if family == "llama":
        model = load(teacher)
        model.config.rms_norm_eps = 1e-12
        model = LlamaForCausalLM(model.config).eval()
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**sizes)).eval()
    else:
        model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes)).eval()
    dead = torch.tensor([0, 7, 8, 21, 31])
    model.model.embed_tokens.weight.data[:, dead] = 0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[dead] = 0
        layer.mlp.down_proj.weight.data[dead] = 0
    importance = measure_importance(model, IDS, channels=True)
    assert importance.hidden.eq(0).nonzero()[:, 0].tolist() == dead.tolist()
    student = make_student(model, Shape(hidden=27), importance)
    assert student.config.hidden_size == 27
    if family == "gemma3":  # it multiplies the embeddings by the root of the width
        with torch.no_grad():
            student.model.embed_tokens.embed_scale.fill_(32**0.5)
    torch.testing.assert_close(logits(student), logits(model), rtol=1e-4, atol=1e-4)


def test_lists_by_layer_lose_the_removed_ones() -> None:
    config = Qwen3Config(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, use_sliding_window=True, sliding_window=8, max_window_layers=2,
    )  # fmt: skip
    assert config.layer_types[1:3] == ["full_attention", "sliding_attention"]
    student = make_student(Qwen3ForCausalLM(config), Shape((1, 2)), None)
    assert student.config.layer_types == ["full_attention", "sliding_attention"]


def test_what_narrowing_has_no_rule_for_is_named() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    with pytest.raises(ToolError, match=r"has no .*q_proj"):
        measure_importance(GPTNeoXForCausalLM(config), IDS, channels=True)


@pytest.mark.parametrize(
    ("count", "keep", "expected"), [(30, 2, (0, 29)), (4, 4, (0, 1, 2, 3)), (7, 3, (0, 3, 6)), (5, 1, (0,))]
)
def test_uniform_layers(count: int, keep: int, expected: tuple[int, ...]) -> None:
    assert uniform_layers(count, keep) == expected


def test_uniform_layers_are_all_different() -> None:
    for count in range(1, 40):
        for keep in range(1, count + 1):
            assert len(set(uniform_layers(count, keep))) == keep


def test_lists_of_layers() -> None:
    assert parse_layers("0-2, 5,7", 8) == (0, 1, 2, 5, 7)
    for bad in ("", "3,1", "1,1", "0-8", "a", "1-"):
        with pytest.raises(ToolError, match="layers '"):
            parse_layers(bad, 8)


def test_a_students_layer_is_matched_with_the_last_that_it_stands_for() -> None:
    assert matched_layers((0, 3, 6), 3, 8) == [2, 5, 7]
    assert matched_layers(None, 2, 8) == [3, 7]
    assert matched_layers(None, 3, 4) == [1, 2, 3]
    assert matched_layers(None, 4, 4) == [0, 1, 2, 3]
