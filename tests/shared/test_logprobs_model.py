"""Chunked loss of whole models against their own full logits, through every kind of wrapper."""

from __future__ import annotations

import os
import socket

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

from tuneutils.shared.errors import ToolError
from tuneutils.shared.logprobs_model import causal_nll, sequence_logprobs, unwrap

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama-tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0),
    "granite": transformers.GraniteConfig(**SIZES, logits_scaling=3.0),
    "cohere": transformers.CohereConfig(**SIZES, logit_scale=0.0625),
    "gpt2": transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
CAUSAL = peft.TaskType.CAUSAL_LM
ADAPTERS = {
    "lora": peft.LoraConfig(task_type=CAUSAL, r=4, init_lora_weights=False),
    "lora-on-head": peft.LoraConfig(
        task_type=CAUSAL, r=4, init_lora_weights=False, target_modules=["q_proj", "lm_head"]
    ),
    "dora-on-head": peft.LoraConfig(
        task_type=CAUSAL, r=4, init_lora_weights=False, target_modules=["lm_head"], use_dora=True
    ),
    "saved-head": peft.LoraConfig(task_type=CAUSAL, r=4, modules_to_save=["lm_head"]),
    "ia3": peft.IA3Config(task_type=CAUSAL, init_ia3_weights=False),
    "llama-adapter": peft.AdaptionPromptConfig(task_type=CAUSAL, adapter_len=4, adapter_layers=2),
    "prefix": peft.PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=3),
    "prompt": peft.PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=3),
    "p-tuning": peft.PromptEncoderConfig(
        task_type=CAUSAL, num_virtual_tokens=3, encoder_hidden_size=16, encoder_dropout=0.0
    ),
}


def build(family="llama", adapter=None):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family])
    for parameter in model.parameters():  # away from the near-uniform start
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval() if adapter is None else peft.get_peft_model(model, ADAPTERS[adapter]).eval()


def batch(side="right"):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 97, (3, 12), generator=generator)
    lengths = torch.tensor([12, 7, 9])
    steps = torch.arange(12)
    mask = steps < lengths[:, None] if side == "right" else steps >= 12 - lengths[:, None]
    labels = torch.where(mask & (torch.rand(3, 12, generator=generator) < 0.7), ids, -100)
    return ids * mask, mask.long(), labels


def reference_nll(model, ids, mask, labels):
    """Row by row without padding, from full logits: ``(B, T)``."""
    nll = torch.zeros(ids.shape)
    for row in range(len(ids)):
        real = mask[row].bool()
        logits = model(input_ids=ids[row, real][None]).logits[0, -int(real.sum()) :].float()
        losses = F.cross_entropy(logits[:-1], labels[row, real][1:], reduction="none")
        nll[row, real] = torch.cat([torch.zeros(1), losses])
    return nll


def check(model, side):
    ids, mask, labels = batch(side)
    expected = reference_nll(model, ids, mask, labels)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = causal_nll(model, ids, mask, labels, reduction="none", chunk_tokens=4)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    scored = (mask[:, :-1] * (labels[:, 1:] != -100)).sum()
    mean = causal_nll(model, ids, mask, labels, chunk_tokens=4)
    torch.testing.assert_close(mean, expected.sum() / scored, rtol=1e-5, atol=1e-6)
    our_grads = torch.autograd.grad(mean * scored, parameters, allow_unused=True)
    their_grads = torch.autograd.grad(expected.sum(), parameters, allow_unused=True)
    for a, b in zip(our_grads, their_grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b.norm() > 1e-4:
            assert (a - b).norm() / b.norm() < 1e-4


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_their_own_logits(family, side):
    check(build(family), side)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_equal_their_own_logits(adapter, side):
    check(build(adapter=adapter), side)


def test_explicit_positions_keep_packed_rows_apart():
    model = build()
    ids, _, _ = batch()
    packed = ids[:2, :6].reshape(1, 12)
    positions = torch.arange(6).repeat(2)[None]
    documents = torch.tensor([0, 1]).repeat_interleave(6)
    block = (documents[:, None] == documents) & torch.ones(12, 12).tril().bool()
    ours = causal_nll(model, packed, block[None, None], packed, positions, reduction="none")
    apart = reference_nll(model, ids[:2, :6], torch.ones(2, 6), ids[:2, :6])
    torch.testing.assert_close(ours.reshape(2, 6), apart, rtol=1e-4, atol=1e-5)


def test_explicit_positions_with_virtual_tokens_are_refused():
    ids, mask, labels = batch()
    with pytest.raises(ToolError, match="virtual tokens"):
        causal_nll(build(adapter="prompt"), ids, mask, labels, torch.arange(12).expand(3, 12))


def test_sequence_logprobs_and_entropy_at_a_temperature():
    model = build("gemma2")
    ids, mask, _ = batch("left")
    completion = torch.zeros_like(ids)
    completion[:, 8:] = 1
    logprobs, entropy = sequence_logprobs(model, ids, mask, completion, 0.7, with_entropy=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 7:-1] / 0.7
    distribution = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(logprobs[:, 8:], distribution.log_prob(ids[:, 8:]))
    torch.testing.assert_close(entropy[:, 8:], distribution.entropy())
    assert not logprobs[:, :8].any()
    assert not entropy[:, :8].any()


@pytest.mark.parametrize(
    "adapter", ["lora", "lora-on-head", "saved-head", "prefix", "prompt", "llama-adapter"]
)
def test_disabled_adapter_equals_the_base(adapter):
    ids, mask, labels = batch()
    expected = causal_nll(build(), ids, mask, labels)
    model = build(adapter=adapter)
    assert causal_nll(model, ids, mask, labels) != expected or adapter in ("saved-head", "llama-adapter")
    with model.disable_adapter():
        torch.testing.assert_close(causal_nll(model, ids, mask, labels), expected)


def test_autocast_gives_the_loss_of_autocast():
    model = build()
    ids, mask, labels = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids, attention_mask=mask).logits.float()
        ours = causal_nll(model, ids, mask, labels)
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(ours, plain)


def test_forward_is_restored_after_an_exception():
    model = build()
    ids, mask, labels = batch()
    before = model(input_ids=ids).logits
    with pytest.raises(IndexError):
        causal_nll(model, ids + 1000, mask, labels)
    assert "forward" not in model.__dict__
    assert "forward" not in model.lm_head.__dict__
    assert torch.equal(model(input_ids=ids).logits, before)


def test_no_label_gives_zero_and_zero_gradients():
    for adapter in ("lora", "lora-on-head"):
        model = build(adapter=adapter)
        ids, mask, labels = batch()
        loss = causal_nll(model, ids, mask, torch.full_like(labels, -100))
        loss.backward()
        assert loss.item() == 0.0
        assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_gradient_checkpointing_gives_the_same_gradients():
    ids, mask, labels = batch()
    grads = []
    for enabled in (False, True):
        model = build()
        if enabled:
            model.gradient_checkpointing_enable()
        model.train()
        causal_nll(model, ids, mask, labels).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_model_without_a_projection_is_named():
    model = transformers.LlamaModel(FAMILIES["llama"])
    ids, mask, labels = batch()
    with pytest.raises(ToolError, match="LlamaModel has no output projection"):
        causal_nll(model, ids, mask, labels)


def test_logits_changed_in_another_way_are_refused():
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.abs().sqrt()
            return output

    ids, mask, labels = batch()
    with pytest.raises(ToolError, match="Odd"):
        causal_nll(Odd(FAMILIES["llama"]), ids, mask, labels)


def distributed_worker(rank, port, kind, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = build()
    ids, mask, labels = batch()
    if kind == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    rows = slice(0, 2) if rank == 0 else slice(2, 3)
    items = (labels[:, 1:] != -100).sum()
    loss = causal_nll(model, ids[rows], mask[rows], labels[rows], num_items=items) * 2
    loss.backward()
    grads = {}
    for name, parameter in unwrap(model).named_parameters():
        grad = parameter.grad
        grads[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    if rank == 0:
        torch.save(grads, folder / "grads.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_give_the_gradients_of_one(kind, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(distributed_worker, (port, kind, tmp_path), nprocs=2)
    grads = torch.load(tmp_path / "grads.pt")
    model = build()
    ids, mask, labels = batch()
    causal_nll(model, ids, mask, labels).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)
