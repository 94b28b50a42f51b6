"""The models of a run: the policy, its reference, and the value model, and what each says of a batch.

The reference is the policy with its adapter off, or a frozen copy when every weight is trained. The value
model is a linear head on the policy's own hidden states, or the reward model's trunk with a copy of its
head; under a PEFT method that trunk gets a LoRA adapter, and with the adapter off it is still the reward
model, so that its weights are held once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor, nn

from tuneutils.shared.adapters.fused_lora import fused
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.four_bit import keep_4bit_layout
from tuneutils.shared.logprobs import LogitTransform
from tuneutils.shared.logprobs_model import hidden_logprobs, separable_head, sequence_logprobs, unwrap
from tuneutils.shared.methods import apply_method, learning_rate, quantization
from tuneutils.shared.models import ModelRef, load_base
from tuneutils.tools.ppo_run.masters import narrow
from tuneutils.tools.ppo_run.params import Params
from tuneutils.tools.ppo_run.reward_model import RewardModel
from tuneutils.tools.ppo_run.rewards import Episode
from tuneutils.tools.ppo_run.workers import Workers

HEAD_LEARNING_RATE = 1e-4
METHOD_SHARE = 0.1
FULL_LEARNING_RATE = 3e-6


@dataclass(frozen=True)
class Batch:
    """Rows of prompt and response, padded on the right. ``T`` whole length, ``R`` response length.

    Attributes:
        input_ids, attention_mask, response_mask: ``(b, T)``.
        positions: ``(b, R)``, where each response token stands; 1 on pads.
        mask: ``(b, R)``, 1 on real response tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    positions: Tensor
    mask: Tensor


def collate(episodes: Sequence[Episode], pad_id: int, width: int, where: torch.device) -> Batch:
    """A batch of episodes whose responses are laid out over ``width`` columns."""
    prompts = torch.tensor([len(e.prompt.ids) for e in episodes])
    lengths = torch.tensor([len(e.response_ids) for e in episodes])
    total = int((prompts + lengths).max())
    rows = [[*e.prompt.ids, *e.response_ids] for e in episodes]
    ids = torch.tensor([row + [pad_id] * (total - len(row)) for row in rows])
    at = torch.arange(total)
    attention = at < (prompts + lengths)[:, None]
    response = attention & (at >= prompts[:, None])
    column = torch.arange(width)
    mask = column < lengths[:, None]
    positions = torch.where(mask, prompts[:, None] + column, 1)
    return Batch(*(t.to(where) for t in (ids, attention.long(), response, positions, mask.float())))


class HeadOnPolicy(nn.Module):
    """A value head on the policy's last hidden states; zero at the start, so that no value is made up."""

    def __init__(self, policy: nn.Module, hidden_size: int, where: torch.device) -> None:
        super().__init__()
        self.head = nn.Linear(hidden_size, 1, device=where)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self._kept: list[Tensor] | None = None
        decoder: Any = unwrap(policy)
        decoder.get_decoder().register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if self._kept is not None:
            self._kept.append(output[0])

    @contextmanager
    def kept(self) -> Iterator[list[Tensor]]:
        """The hidden states ``(b, T, H)`` of the forward passes made meanwhile."""
        self._kept = []
        try:
            yield self._kept
        finally:
            self._kept = None


class TrunkValue(nn.Module):
    """A value model of its own: a decoder and a head."""

    def __init__(self, trunk: Any, head: nn.Linear) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def hidden(self, input_ids: Tensor) -> Tensor:
        """``(b, T, H)``; rows are padded on the right, where a causal model never looks."""
        made: Tensor = self.trunk(input_ids=input_ids, use_cache=False).last_hidden_state
        return made


@dataclass
class Actors:
    """All models of a run.

    Attributes:
        policy: a causal model, or a PEFT model around one.
        frozen: the reference, where it is a model of its own.
        value: see :class:`HeadOnPolicy` and :class:`TrunkValue`.
        needs_mask: virtual tokens come on the left, so that the attention mask must be given.
        transform: of the logits, where decoder and head can be called apart.
        rows: of a micro-batch.
        workers: threads that share micro-batches; one where decoder and head cannot be called apart.
    """

    policy: Any
    frozen: Any | None
    value: HeadOnPolicy | TrunkValue
    tokenizer: Any
    pad_id: int
    temperature: float
    where: torch.device
    dtype: torch.dtype
    needs_mask: bool = False
    transform: LogitTransform | None = None
    rows: int = 8
    workers: Workers = field(default_factory=Workers)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision in which policy, reference and value compute."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.where.type, dtype=self.dtype)

    @contextmanager
    def fused(self) -> Iterator[None]:
        """Fused operations in policy, reference and value model meanwhile."""
        trunk = self.value.trunk if isinstance(self.value, TrunkValue) else None
        with ExitStack() as stack:
            for model in (self.policy, self.frozen, trunk):
                if model is not None:
                    stack.enter_context(fused(model, self.where, learning_norms=True))
            yield

    def policy_logprobs(
        self, batch: Batch, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities, values and, if asked, entropies ``(b, R)`` of the response tokens, 0 on pads.

        The values of a head on the policy, else None: those of a model of its own are :meth:`trunk_values`.
        """
        with self.autocast():
            if isinstance(self.value, HeadOnPolicy) and self.transform is None:
                with self.value.kept() as kept:
                    logprobs, entropy, _ = self._logprobs(self.policy, batch, with_entropy)
                hidden = kept[0][:, -batch.input_ids.shape[1] :]
            else:
                logprobs, entropy, hidden = self._logprobs(self.policy, batch, with_entropy)
        values = None
        if isinstance(self.value, HeadOnPolicy):
            assert hidden is not None
            values = self._values(hidden, batch)
        return self._responses(logprobs, batch), values, self._entropy(entropy, batch)

    def trunk_values(self, batch: Batch) -> Tensor:
        """Values ``(b, R)`` by a value model of its own, 0 on pads."""
        assert isinstance(self.value, TrunkValue)
        with self.autocast():
            hidden = self.value.hidden(batch.input_ids)
        return self._values(hidden, batch)

    def _values(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The value that belongs to a token is that of the state before it."""
        values = self.value.head(hidden.to(self.value.head.weight.dtype))[..., 0]
        at_state: Tensor = values.gather(1, batch.positions - 1) * batch.mask
        return at_state

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch) -> Tensor:
        """Log-probabilities ``(b, R)`` under the reference, at the same temperature."""
        bare = self.frozen is None
        with self.autocast():
            found = self._logprobs(self.policy if bare else self.frozen, batch, False, bare=bare)
        return self._responses(found[0], batch)

    def reference_in_place(self) -> AbstractContextManager[Any]:
        """Where :meth:`reference_logprobs` may be called, and nothing else may."""
        return nullcontext() if self.frozen is not None else self.policy.disable_adapter()  # type: ignore[no-any-return]

    def _logprobs(
        self, model: Any, batch: Batch, with_entropy: bool, bare: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities and, if asked, entropies ``(b, T)``, and the hidden states where at hand."""
        ids, scored = batch.input_ids, batch.response_mask
        if self.transform is not None:
            hidden = unwrap(model).get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[operator]
            transform = replace(self.transform, temperature=self.temperature)
            return *hidden_logprobs(model, hidden, ids, scored, transform, with_entropy=with_entropy), hidden
        mask = batch.attention_mask if self.needs_mask and not bare else None
        if with_entropy:
            return *sequence_logprobs(model, ids, mask, scored, self.temperature, with_entropy=True), None
        return sequence_logprobs(model, ids, mask, scored, self.temperature), None, None

    @staticmethod
    def _responses(values: Any, batch: Batch) -> Tensor:
        made: Tensor = values.gather(1, batch.positions) * batch.mask
        return made

    def _entropy(self, entropy: Tensor | None, batch: Batch) -> Tensor | None:
        return None if entropy is None else self._responses(entropy, batch)

    def trainable(self) -> dict[str, nn.Parameter]:
        """What training changes, by name; ``value.`` before the value model's own."""
        parts = {"policy": self.policy, "value": self.value}
        return {
            f"{part}.{name}": parameter
            for part, module in parts.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }


def build_actors(
    run: Run[Params],
    base: ModelRef,
    tokenizer: Any,
    where: torch.device,
    dtype: torch.dtype,
    first_text: str,
    reward_model: RewardModel | None,
) -> Actors:
    """Load the policy, put the method on it, and make reference and value model."""
    params = run.params
    # Training every weight keeps float32's precision and multiplies in the one asked for.
    stored = torch.float32 if params.method == "full" else dtype
    model = load_base(base, where, stored, quantization(params), params.trust_remote_code)
    keep_4bit_layout(model)
    no_dropout(model)
    model.requires_grad_(False)
    policy = apply_method(model, tokenizer, params, first_text)
    prompt_learning = any(c.is_prompt_learning for c in getattr(policy, "peft_config", {}).values())
    value = _value(params, policy, reward_model, where)
    frozen = None
    if params.method == "full":
        if dtype == torch.bfloat16 and params.algo == "ppo":  # its kin train by another optimiser
            trunk = value.trunk.parameters() if isinstance(value, TrunkValue) else ()
            narrow([*policy.parameters(), *trunk])
        frozen = copy.deepcopy(policy).requires_grad_(False)
    policy.eval()
    value.eval()
    transform = None if prompt_learning else separable_head(policy)
    workers = Workers() if transform is None else Workers.for_rows(params.micro_batch_size, where)
    if reward_model is not None:
        reward_model.workers = workers
    return Actors(
        policy,
        frozen,
        value,
        tokenizer,
        int(tokenizer.pad_token_id),
        params.temperature,
        where,
        dtype,
        prompt_learning,
        transform,
        max(1, params.micro_batch_size // workers.size),
        workers,
    )


def no_dropout(model: nn.Module) -> None:
    """Dropout would make old and new log-probabilities differ before any update: turn it off for good."""
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)):
            module.p = 0.0


def _value(
    params: Params, policy: Any, reward_model: RewardModel | None, where: torch.device
) -> HeadOnPolicy | TrunkValue:
    from_reward = params.value == "reward" or (params.value == "auto" and reward_model is not None)
    from_reward = from_reward and params.algo == "ppo"  # its kin have no value model; the head stays idle
    if not from_reward:
        hidden_size = unwrap(policy).config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
        return HeadOnPolicy(policy, int(hidden_size), where)
    if reward_model is None:
        raise ToolError("--value reward needs a reward model as --reward", code=ExitCode.USAGE)
    no_dropout(reward_model.trunk)
    head = reward_model.value_head()
    if params.method == "full":
        trunk = copy.deepcopy(reward_model.trunk).float().requires_grad_(True)
        return TrunkValue(trunk, head)
    from peft import LoraConfig, get_peft_model

    # PEFT's "all-linear" spares an output layer by a model's type; a trunk has none.
    targets = {
        n.rpartition(".")[2] for n, m in reward_model.trunk.named_modules() if isinstance(m, nn.Linear)
    }
    config = LoraConfig(r=params.lora_rank, lora_alpha=2 * params.lora_rank, target_modules=sorted(targets))
    reward_model.trunk = get_peft_model(reward_model.trunk, config)
    return TrunkValue(reward_model.trunk, head)


def learning_rates(params: Params) -> tuple[float, float]:
    """First rates of the policy's weights and of the value model's."""
    if params.learning_rate is not None:
        policy = params.learning_rate
    else:
        policy = FULL_LEARNING_RATE if params.method == "full" else METHOD_SHARE * learning_rate(params)
    value = params.value_learning_rate
    if value is None:
        on_policy = params.value == "policy" or (params.value == "auto" and not _names_model(params))
        value = max(policy, HEAD_LEARNING_RATE) if on_policy else policy
    return policy, value


def _names_model(params: Params) -> bool:
    from tuneutils.tools.ppo_run.rewards import kind_of

    return kind_of(params.reward) == "model"
