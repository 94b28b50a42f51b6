"""A guard on a model's own activations: judges an exchange token by token, given whole or as it is generated.

Two layers, after Constitutional Classifiers++ (Cunningham et al. 2026, arXiv 2601.04603): a linear probe
on the hidden states that generation computes anyway, and for what it raises a small classifier of the
text so far, whose score is joined with the probe's. The artifact is ``guard.json`` and
``guard.safetensors``, made by the tool ``guard`` for one model and refused with any other.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tuneutils.shared import ngrams
from tuneutils.shared.errors import ToolError
from tuneutils.shared.logprobs_model import unwrap
from tuneutils.shared.manifest import MANIFEST, load_manifest
from tuneutils.shared.models import Loaded, model_input
from tuneutils.shared.pii import Masker as Masker  # a guarded reply is masked as it streams
from tuneutils.shared.sample import OnToken

SETTINGS = "guard.json"
WEIGHTS = "guard.safetensors"
FORMAT = 1
#: How hidden states are pooled up to a token: each is linear and needs no more than the last sum.
POOLINGS = ("last", "mean", "ema", "prompt-mean")
EMA_ALPHA = 0.125
#: Tokens after which the second layer looks again while the first one stays up.
EVERY = 8

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """What ``guard.json`` holds.

    Attributes:
        layer: the decoder block whose output is read, from 1.
        pooling: one of ``POOLINGS``.
        categories: names of what the guard tells apart.
        raise_above: the probe's logit from which the second layer is asked.
        flag_above: the joint logit above which an exchange is flagged.
        probe_scale: slope and intercept that make the probe's logit a calibrated one.
        joint: intercept, slope of the probe's logit and slope of the text's logit.
        text_bias: intercept of the text classifier.
        bias: intercept of the probe.
        template: how string prompts are put to the model (``supervise.TEMPLATE_CHOICES``).
        max_length: longest exchange, in tokens.
        budget: the share of harmless exchanges that may be flagged.
    """

    layer: int
    pooling: str
    categories: tuple[str, ...]
    raise_above: float
    flag_above: float
    probe_scale: tuple[float, float]
    joint: tuple[float, float, float]
    text_bias: float
    bias: float
    template: str
    max_length: int
    budget: float
    every: int = EVERY
    format: int = FORMAT


@dataclass
class Guard:
    """A loaded guard.

    Attributes:
        probe: ``(1 or 2, H)`` float32; with ``prompt-mean`` the first row reads the prompt's end.
        category: ``(C, H)``, read with the running mean.
        category_bias: ``(C,)``.
        text: ``(buckets,)`` of ``ngrams``.
        model: role, path and hash of the model that it belongs to, from the manifest.
        seconds, calls: what each layer has cost so far.
    """

    settings: Settings
    probe: Tensor
    category: Tensor
    category_bias: Array
    text: NDArray[np.float32]
    model: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"probe": 0.0, "exchange": 0.0})
    calls: dict[str, int] = field(default_factory=lambda: {"probe": 0, "exchange": 0})

    @property
    def directions(self) -> Tensor:
        """``(P + C, H)``: what hidden states are multiplied with."""
        return torch.cat([self.probe, self.category])

    def text_logit(self, fields: dict[str, str]) -> float:
        return ngrams.score(self.text, self.settings.text_bias, fields)

    def joint_logit(self, probe_logit: float, fields: dict[str, str]) -> float:
        """Both layers' word on an exchange, a calibrated logit."""
        start = time.perf_counter()
        intercept, of_probe, of_text = self.settings.joint
        made = intercept + of_probe * probe_logit + of_text * self.text_logit(fields)
        self.seconds["exchange"] += time.perf_counter() - start
        self.calls["exchange"] += 1
        return made


@dataclass(frozen=True)
class Verdict:
    """What a guard says of an exchange.

    Attributes:
        layer: ``probe`` where the first layer let it pass, ``exchange`` where the second one decided,
            ``pattern`` where personal data in the reply made it flagged.
        score: the highest calibrated probability of a failure.
        category: the likeliest kind of failure; None where it is not flagged.
        at: tokens of the reply when it was flagged, 0 for the prompt alone; None where it is not.
    """

    flagged: bool
    layer: str
    score: float
    category: str | None = None
    at: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "score": round(self.score, 6)}


class Watch:
    """One exchange as its reply grows; the same for a reply that is given whole and for one being written.

    ``see`` takes the projections of the prompt's last token, then those of each token of the reply.
    """

    def __init__(self, guard: Guard, prompt: str) -> None:
        self.guard = guard
        self.prompt = prompt
        self.seen = 0
        self.logits: list[float] = []
        self.asked_at: int | None = None
        self.raised = False
        self.best_probe = -math.inf
        self.best_joint = -math.inf
        self.at: int | None = None
        self._sums = np.zeros(len(guard.probe) + len(guard.category))
        self._ema = 0.0
        self._first = 0.0
        self._category: int | None = None

    def see(self, projections: Sequence[float], text: Callable[[], str]) -> bool:
        """One more token's projections ``(P + C,)``; True when the exchange is (now or before) flagged.

        Args:
            text: gives the reply up to this token; only asked where the second layer looks.
        """
        logit = self._pool(projections)
        self.logits.append(logit)
        self.best_probe = max(self.best_probe, logit)
        if logit >= self.guard.settings.raise_above:
            self.raised = True
            if self.asked_at is None or self.seen - self.asked_at >= self.guard.settings.every:
                self._ask(logit, text())
        self.seen += 1
        return self.at is not None

    def finish(self, text: str) -> Verdict:
        """The verdict, after a last look where the first layer rose since the second one looked."""
        up = bool(self.logits) and self.logits[-1] >= self.guard.settings.raise_above
        if up and self.at is None and self.asked_at != self.seen - 1:
            self._ask(self.logits[-1], text)
        return self.verdict()

    def verdict(self) -> Verdict:
        settings = self.guard.settings
        if not self.raised:
            slope, intercept = settings.probe_scale
            return Verdict(False, "probe", sigmoid(slope * self.best_probe + intercept))
        flagged = self.at is not None
        names = settings.categories
        category = names[self._category or 0] if flagged and names else None
        return Verdict(flagged, "exchange", sigmoid(self.best_joint), category, self.at)

    def _pool(self, projections: Sequence[float]) -> float:
        """Running pooled logit; ``pooled`` does the same for all tokens at once."""
        settings, rows = self.guard.settings, len(self.guard.probe)
        values = np.asarray(projections, dtype=np.float64)
        self._sums += values
        count = self.seen + 1
        if settings.pooling == "last":
            made = values[0]
        elif settings.pooling == "mean":
            made = self._sums[0] / count
        elif settings.pooling == "ema":
            self._ema = values[0] if not self.seen else self._ema + EMA_ALPHA * (values[0] - self._ema)
            made = self._ema
        else:
            self._first = values[0] if not self.seen else self._first
            made = self._first + self._sums[rows - 1] / count
        return float(made) + settings.bias

    def _ask(self, logit: float, reply: str) -> None:
        self.asked_at = self.seen
        joint = self.guard.joint_logit(logit, {"prompt": self.prompt, "reply": reply})
        self.best_joint = max(self.best_joint, joint)
        if joint > self.guard.settings.flag_above and self.at is None:
            self.at = max(0, min(self.seen, len(self.logits) - 1))
            rows = len(self.guard.probe)
            if len(self.guard.category):
                scores = self._sums[rows:] / max(1, len(self.logits)) + self.guard.category_bias
                self._category = int(np.argmax(scores))


def pooled(projections: Array, pooling: str) -> Array:
    """Logits ``(T,)`` without intercept from projections ``(T, P)``, after each token."""
    count = np.arange(1, len(projections) + 1)
    if pooling == "last":
        return projections[:, 0].copy()
    if pooling == "mean":
        return np.asarray(np.cumsum(projections[:, 0]) / count)
    if pooling == "prompt-mean":
        return np.asarray(projections[0, 0] + np.cumsum(projections[:, 1]) / count)
    made = projections[:, 0].copy()
    for t in range(1, len(made)):
        made[t] = made[t - 1] + EMA_ALPHA * (made[t] - made[t - 1])
    return made


def sigmoid(logit: float) -> float:
    """1 / (1 + exp(-logit)), without overflow."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


class _Enough(Exception):
    """Ends a forward pass once the layer that is read has been computed."""


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder blocks of a causal language model, PEFT's wrapping aside.

    Raises:
        ToolError: no list of as many blocks as its config says (65).
    """
    base: Any = unwrap(model)
    count = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ToolError(f"{type(base).__name__} has no list of {count} decoder layers to read activations from")


@contextmanager
def tapped(model: Any, layers: Sequence[int], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Give ``see`` the output ``(B, T, H)`` of each of these blocks (from 1) in every forward pass."""
    blocks = decoder_layers(model)

    def hook(layer: int) -> Callable[..., None]:
        def call(_module: nn.Module, _inputs: Any, output: Any) -> None:
            see(layer, output[0] if isinstance(output, tuple) else output)

        return call

    handles = [blocks[layer - 1].register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def hidden_states(
    loaded: Loaded, rows: Sequence[Sequence[int]], layers: Sequence[int]
) -> dict[int, list[Tensor]]:
    """The outputs ``(T, H)`` of some blocks for each row of token ids; later blocks are not computed.

    Padding is on the right, where a causal model never looks, so no mask is needed.
    """
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[loaded.pad_id] * (width - len(row))] for row in rows], device=loaded.device)
    found: dict[int, list[Tensor]] = {}
    last = max(layers)

    def see(layer: int, states: Tensor) -> None:
        virtual = states.shape[1] - width  # prompt learning puts its own tokens before the text
        found[layer] = [states[i, virtual : virtual + len(row)] for i, row in enumerate(rows)]
        if layer == last:
            raise _Enough

    with tapped(loaded.model, layers, see), suppress(_Enough):
        loaded.model(input_ids=ids, use_cache=False)
    return found


def project(guard: Guard, states: Tensor) -> Tensor:
    """``(T, P + C)`` float64 on the CPU: hidden states ``(T, H)`` times the guard's directions."""
    start = time.perf_counter()
    made = (states.float() @ guard.directions.to(states.device).T).double().cpu()
    guard.seconds["probe"] += time.perf_counter() - start
    guard.calls["probe"] += len(states)
    return made


class StreamingGuard:
    """Watches replies while ``sample.generate`` writes them: its ``on_token``, inside ``with``.

        with StreamingGuard(guard, loaded, prompts) as watching:
            completions = generate(loaded.model, ids, sampling, on_token=watching)
        verdicts = watching.verdicts()

    A reply that turns ends before the token that would have come next. Tokens are passed on to ``on_token``.

    Args:
        prompts: the text of each prompt, for the second layer.
    """

    def __init__(
        self, guard: Guard, loaded: Loaded, prompts: Sequence[str], on_token: OnToken | None = None
    ) -> None:
        self.guard, self.loaded, self.on_token = guard, loaded, on_token
        self.watches = [Watch(guard, prompt) for prompt in prompts]
        self._replies: list[list[int]] = [[] for _ in prompts]
        self._directions = guard.directions.to(loaded.device).T.contiguous()
        self._projections: list[list[float]] = []
        self._next = 0
        self._tap: Any = None

    def __enter__(self) -> StreamingGuard:
        self._tap = tapped(self.loaded.model, [self.guard.settings.layer], self._see)
        self._tap.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._tap.__exit__(None, None, None)

    def _see(self, _layer: int, states: Tensor) -> None:
        start = time.perf_counter()
        self._projections = (states[:, -1].float() @ self._directions).tolist()
        self._next = 0
        self.guard.seconds["probe"] += time.perf_counter() - start

    def __call__(self, index: int, token: int) -> bool:
        """One token that is about to come out; True ends the reply before it."""
        start, asked = time.perf_counter(), self.guard.seconds["exchange"]
        values = self._projections[self._next]
        self._next += 1
        flagged = self.watches[index].see(values, lambda: self.reply(index))
        spent = time.perf_counter() - start - (self.guard.seconds["exchange"] - asked)
        self.guard.seconds["probe"] += spent
        self.guard.calls["probe"] += 1
        if flagged:
            return True
        self._replies[index].append(token)
        return bool(self.on_token(index, token)) if self.on_token is not None else False

    def reply(self, index: int) -> str:
        """The text of a reply so far."""
        return decode(self.loaded.tokenizer, self._replies[index])

    def verdicts(self) -> list[Verdict]:
        """One for each prompt, after generation."""
        return [watch.finish(self.reply(i)) for i, watch in enumerate(self.watches)]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a reply's tokens, special ones left out."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def load_guard(path: str, *, model: str | None = None) -> Guard:
    """A guard, and the check that it belongs to ``model`` (its own, if None).

    Raises:
        ToolError: 66 it is not there; 65 it is damaged, of another format, or was made for another model.
    """
    manifest = load_manifest(path)
    if manifest.get("kind") != "guard":
        raise ToolError(f"{path}: a {manifest.get('kind')}, no guard; train one with: guard train")
    own = next((i for i in manifest["inputs"] if i["role"] == "model"), None)
    if own is None:
        raise ToolError(f"{Path(path) / MANIFEST}: does not name the guard's model; train it again")
    given = model if model is not None else own["path"]
    found = model_input(given)
    if found.sha256 != own["sha256"]:
        raise ToolError(
            f"{path}: a guard of {own['path']} ({own['sha256'][:12]}), not of {given} ({found.sha256[:12]}): "
            f"it reads that model's activations; train another: guard train -m {given}"
        )
    return read_guard(Path(path), own)


def read_guard(folder: Path, model: dict[str, Any] | None = None) -> Guard:
    """The files of a guard, without looking at its manifest."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        raw = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if raw.get("format") != FORMAT:
            raise ToolError(f"{folder}: a guard of format {raw.get('format')}; this version reads {FORMAT}")
        tensors = load_file(folder / WEIGHTS)
        lists = {k: tuple(raw[k]) for k in ("categories", "probe_scale", "joint")}
        settings = Settings(**{k: lists.get(k, v) for k, v in raw.items()})
        category_bias = tensors["category.bias"].double().numpy()
        return Guard(
            settings,
            tensors["probe.weight"],
            tensors["category.weight"],
            category_bias,
            tensors["text.weight"].numpy(),
            model or {},
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as exc:
        raise ToolError(f"{folder}: damaged guard: {' '.join(str(exc).split())[:200]}") from exc


def save_guard(guard: Guard, folder: Path) -> None:
    """Write ``guard.json`` and ``guard.safetensors``."""
    from safetensors.torch import save_file

    text = json.dumps(vars(guard.settings), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")
    tensors = {
        "probe.weight": guard.probe.float().contiguous(),
        "category.weight": guard.category.float().contiguous(),
        "category.bias": torch.from_numpy(np.asarray(guard.category_bias, dtype=np.float64)).contiguous(),
        "text.weight": torch.from_numpy(guard.text).contiguous(),
    }
    save_file(tensors, str(folder / WEIGHTS))
