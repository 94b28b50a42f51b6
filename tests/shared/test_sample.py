"""Generation against transformers' own, the exact softmax and full recomputation."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tuneutils.shared.errors import ToolError
from tuneutils.shared.logprobs_model import sequence_logprobs
from tuneutils.shared.sample import Sampling, draw, generate, warp

CAUSAL = peft.TaskType.CAUSAL_LM
ADAPTERS = {
    "lora": peft.LoraConfig(task_type=CAUSAL, r=4, init_lora_weights=False),
    "prefix": peft.PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=3),
    "prompt": peft.PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=3),
    "p-tuning": peft.PromptEncoderConfig(task_type=CAUSAL, num_virtual_tokens=3, encoder_hidden_size=16),
    "llama-adapter": peft.AdaptionPromptConfig(task_type=CAUSAL, adapter_len=4, adapter_layers=2),
}
GREEDY = Sampling(max_new_tokens=12, temperature=0)


def build(adapter=None, config=transformers.LlamaConfig, **options):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **options,
        )
    )
    for parameter in model.parameters():  # away from the near-uniform start
        parameter.data += 0.2 * torch.randn_like(parameter)
    if adapter is None:
        return model.eval()
    model = peft.get_peft_model(model, ADAPTERS[adapter])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.5 * torch.randn_like(parameter)
    return model.eval()


def some_prompts(count=7, seed=3):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 15, (count,), generator=generator).tolist()
    return [torch.randint(1, 97, (length,), generator=generator).tolist() for length in lengths]


def stop_ids_of(model, prompts):
    """A few tokens that greedy completions really meet, so that rows finish at different steps."""
    free = generate(model, prompts, GREEDY)
    return tuple({free[0].token_ids[2], free[1].token_ids[5], free[2].token_ids[7]})


def recomputed(model, prompt, steps, stop=()):
    """Greedy tokens, the whole forward pass done anew for each."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in stop:
                break
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("config", [transformers.LlamaConfig, transformers.Gemma2Config])
def test_greedy_equals_transformers(config, batch_size):
    options = {"head_dim": 8, "sliding_window": 6} if config is transformers.Gemma2Config else {}
    model = build(config=config, **options)
    prompts = some_prompts()
    stop = stop_ids_of(model, prompts)
    sampling = Sampling(max_new_tokens=12, temperature=0, stop_token_ids=stop)
    completions = generate(model, prompts, sampling, batch_size=batch_size)
    for prompt, completion in zip(prompts, completions, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=list(stop),
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert completion.token_ids == theirs
        assert completion.finish_reason == ("stop" if theirs[-1] in stop else "length")
    assert {c.finish_reason for c in completions} == {"stop", "length"}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_greedy_under_adapters_equals_recomputation(adapter):
    model = build(adapter)
    prompts = some_prompts()
    stop = stop_ids_of(model, prompts)
    sampling = Sampling(max_new_tokens=12, temperature=0, stop_token_ids=stop)
    ours = [completion.token_ids for completion in generate(model, prompts, sampling, batch_size=3)]
    assert ours == [recomputed(model, prompt, 12, stop) for prompt in prompts]
    assert ours != [completion.token_ids for completion in generate(build(), prompts, sampling)]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_disabled_adapter_generates_as_the_base(adapter):
    model = build(adapter)
    prompts = some_prompts()
    with model.disable_adapter():
        assert generate(model, prompts, GREEDY) == generate(build(), prompts, GREEDY)


@pytest.mark.parametrize("adapter", [None, "lora", "prefix", "prompt"])
def test_samples_do_not_depend_on_the_batch(adapter):
    model = build(adapter)
    prompts = some_prompts(11)
    sampling = Sampling(max_new_tokens=20, stop_token_ids=(5, 6, 7, 8), seed=4)
    alone = generate(model, prompts, sampling, batch_size=1)
    assert generate(model, prompts, sampling, batch_size=8) == alone
    assert generate(model, prompts[:4], sampling, batch_size=3) == alone[:4]
    assert len({len(c.token_ids) for c in alone}) > 2
    other = Sampling(max_new_tokens=20, stop_token_ids=(5, 6, 7, 8), seed=5)
    assert generate(model, prompts, other, batch_size=8) != alone


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("adapter", [None, "prefix", "prompt"])
def test_logprobs_equal_a_forward_pass_over_the_result(adapter, temperature):
    model = build(adapter)
    prompts = some_prompts()
    sampling = Sampling(max_new_tokens=9, temperature=temperature, stop_token_ids=(5, 6, 7), top_k=50)
    for prompt, c in zip(prompts, generate(model, prompts, sampling, return_logprobs=True), strict=True):
        ids = torch.tensor([[*prompt, *c.token_ids]])
        completion_mask = torch.arange(ids.shape[1])[None] >= len(prompt)
        expected = sequence_logprobs(model, ids, None, completion_mask, temperature)[0, len(prompt) :]
        torch.testing.assert_close(torch.tensor(c.logprobs), expected, rtol=1e-4, atol=1e-4)


def test_the_models_generation_config_is_ignored():
    model = build()
    prompts = some_prompts()
    before = generate(model, prompts, GREEDY)
    model.generation_config.update(repetition_penalty=5.0, eos_token_id=before[0].token_ids[0], max_length=1)
    assert generate(model, prompts, GREEDY) == before


def test_draws_follow_the_softmax():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 23, generator=generator)
    sampling = Sampling(temperature=1.3)
    count = 200_000
    uniforms = torch.rand(count, generator=generator, dtype=torch.float64)
    tokens = draw(logits.expand(count, -1), uniforms, sampling)
    expected = count * (logits[0].double() / 1.3).softmax(-1)
    chi_square = ((tokens.bincount(minlength=23) - expected) ** 2 / expected).sum()
    assert chi_square < 48.3  # 99.9th percentile at 22 degrees of freedom


def test_first_tokens_of_many_rows_follow_the_softmax():
    model = build()
    prompt = [3, 14, 15]
    count = 4000
    completions = generate(model, [prompt] * count, Sampling(max_new_tokens=1, seed=1), batch_size=1000)
    observed = torch.tensor([c.token_ids[0] for c in completions]).bincount(minlength=97)
    expected = count * model(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1).detach()
    likely = expected > 5
    observed = torch.cat([observed[likely], observed[~likely].sum()[None]])
    expected = torch.cat([expected[likely], expected[~likely].sum()[None]])
    chi_square = ((observed - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    assert chi_square < degrees + 3.1 * (2 * degrees) ** 0.5 + 7  # about the 99.9th percentile


def test_extreme_uniforms_give_possible_tokens():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniforms, Sampling()).tolist() == [1, 2]


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5},
        {"top_k": 500},
        {"top_p": 0.6},
        {"top_p": 0.01},
        {"min_p": 0.2},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_filters_equal_transformers(options):
    logits = 3 * torch.randn(50, 97, generator=torch.Generator().manual_seed(0))
    theirs = LogitsProcessorList([TemperatureLogitsWarper(options.get("temperature", 1.0))])
    if "top_k" in options:
        theirs.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        theirs.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        theirs.append(MinPLogitsWarper(options["min_p"]))
    assert torch.equal(warp(logits, Sampling(**options)), theirs(None, logits))


def test_tokens_are_streamed_in_order_with_their_prompt():
    model = build()
    prompts = some_prompts()
    seen = [[] for _ in prompts]
    sampling = Sampling(max_new_tokens=10, stop_token_ids=(5, 6, 7))
    completions = generate(
        model, prompts, sampling, batch_size=2, on_token=lambda row, token: seen[row].append(token)
    )
    assert seen == [completion.token_ids for completion in completions]


def test_finished_rows_leave_the_cache_and_waiting_ones_join():
    model = build()
    prompts = some_prompts(12)
    sizes = []
    model.register_forward_pre_hook(lambda _, __, kw: sizes.append(kw["input_ids"].shape), with_kwargs=True)
    sampling = Sampling(max_new_tokens=30, stop_token_ids=tuple(range(20)))
    completions = generate(model, prompts, sampling, batch_size=4)
    decoded = sum(rows for rows, length in sizes if length == 1)
    single_prompts = sum(1 for prompt in prompts if len(prompt) == 1)
    needed = sum(len(completion.token_ids) - 1 for completion in completions)
    assert needed <= decoded <= needed + single_prompts
    assert max(rows for rows, _ in sizes) <= 4


def test_the_context_limits_a_completion():
    model = build(max_position_embeddings=16)
    (completion,) = generate(model, [[1] * 10], Sampling(max_new_tokens=50, temperature=0))
    assert (len(completion.token_ids), completion.finish_reason) == (6, "length")
    with pytest.raises(ToolError, match="prompt 1 has 16 tokens"):
        generate(model, [[1], [1] * 16], GREEDY)
    with pytest.raises(ToolError, match="prompt 0 has 0 tokens"):
        generate(model, [[]], GREEDY)


def test_training_modes_are_put_back():
    model = build().train()
    model.model.layers[0].eval()
    generate(model, some_prompts(2), GREEDY)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training


def test_no_prompts_give_no_completions():
    assert generate(build(), [], GREEDY) == []


@pytest.mark.parametrize("option", [{"top_p": 0}, {"temperature": -1}, {"max_new_tokens": 0}, {"min_p": 2}])
def test_bad_options_are_named(option):
    with pytest.raises(ToolError, match=next(iter(option))):
        Sampling(**option)


@pytest.mark.slow
def test_greedy_equals_transformers_on_the_base_model():
    folder = Path("artifacts/base")
    if not (folder / "config.json").is_file():
        pytest.skip("artifacts/base is not there; run: dvc repro")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["The capital of France is", "Once upon a time", "2 + 2 =", "Water boils at a temperature of"]
    prompts = tokenizer(texts)["input_ids"]
    stop = tokenizer(".")["input_ids"][-1]
    sampling = Sampling(max_new_tokens=16, temperature=0, stop_token_ids=(stop,))
    for prompt, completion in zip(prompts, generate(model, prompts, sampling, batch_size=3), strict=True):
        theirs = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=16, eos_token_id=stop, pad_token_id=0
        )
        assert completion.token_ids == theirs[0, len(prompt) :].tolist()


def test_a_true_result_takes_the_token_back_and_ends_its_row_alone():
    model = build()
    prompts = some_prompts()
    plain = generate(model, prompts, Sampling(max_new_tokens=10), batch_size=3, return_logprobs=True)
    seen = [0] * len(prompts)

    def stop_one(row, _token):
        seen[row] += 1
        return row == 1 and seen[row] == 5

    cut = generate(
        model, prompts, Sampling(max_new_tokens=10), batch_size=3, return_logprobs=True, on_token=stop_one
    )
    assert [c.token_ids for i, c in enumerate(cut) if i != 1] == [
        c.token_ids for i, c in enumerate(plain) if i != 1
    ]
    assert (cut[1].token_ids, cut[1].finish_reason) == (plain[1].token_ids[:4], "interrupted")
    assert len(cut[1].logprobs) == 4
