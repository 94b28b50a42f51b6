"""What alignment did, on records that nothing was learnt from: margins, KL, win rate, forgetting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip

from tuneutils.shared.adapters.fused_lora import fused
from tuneutils.shared.command import Run
from tuneutils.shared.evaluate import Estimate, paired_difference, ratio_estimate
from tuneutils.shared.evaluate_model import perplexity_items, record_sequence
from tuneutils.shared.methods import quantization
from tuneutils.shared.models import Loaded, ModelRef, load_base
from tuneutils.shared.records import Reader as RecordReader
from tuneutils.shared.sample import Sampling, generate
from tuneutils.shared.texts import Text
from tuneutils.tools.pref_tune.batches import Reader
from tuneutils.tools.pref_tune.examples import Examples
from tuneutils.tools.pref_tune.losses import Objective
from tuneutils.tools.pref_tune.params import TrainParams
from tuneutils.tools.pref_tune.reference import of_pairs, of_texts
from tuneutils.tools.pref_tune.setup import autocast, without_dropout

Floats = NDArray[np.float64]
Report = dict[str, Any]
SAMPLING_STREAM = 7_919


@dataclass
class Answer:
    """What one model answered to a prompt."""

    ids: list[int]
    text: str
    finished: bool


@dataclass
class Answers:
    """The same prompts answered by both models, with what was measured of each pair of answers."""

    prompts: list[str]
    policy: list[Answer]
    reference: list[Answer]
    kl: list[float]
    scores: tuple[list[float], list[float]]


@dataclass
class Sides:
    """The aligned model and its reference, one of which is in use at a time.

    An adapter's reference is its base, the adapter switched off; after full fine-tuning it is loaded again.
    """

    run: Run[TrainParams]
    base: ModelRef
    fitted: Any
    loaded: Any = None

    @contextmanager
    def policy(self) -> Iterator[Loaded]:
        with self._computing(self.fitted.model) as made:
            yield made

    @contextmanager
    def reference(self) -> Iterator[Loaded]:
        model = self.fitted.model
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter(), self._computing(model) as made:
                yield made
            return
        if self.loaded is None:
            stored = next(model.parameters()).dtype
            trust = self.run.params.trust_remote_code
            self.loaded = load_base(
                self.base, self.fitted.where, stored, quantization(self.run.params), trust
            )
            without_dropout(self.loaded)
        with self._computing(self.loaded) as made:
            yield made

    @contextmanager
    def _computing(self, model: Any) -> Iterator[Loaded]:
        fitted = self.fitted
        model.eval()
        with (
            torch.no_grad(),
            autocast(model, fitted.where, fitted.dtype),
            fused(model, fitted.where, causal_masks=True),
        ):
            yield Loaded(model, fitted.tokenizer, self.base, fitted.where, fitted.dtype)


def measure(
    run: Run[TrainParams], base: ModelRef, fitted: Any, objective: Objective, held: Examples
) -> tuple[Report, Answers | None]:
    """All numbers of the report, and the answers that some of them are of."""
    params = run.params
    sides = Sides(run, base, fitted)
    report: Report = {
        "loss": params.loss,
        "beta": objective.beta,
        "interval": "95 % percentile bootstrap over prompts, paired for differences",
        "seed": run.seed,
    }
    if held.pairs:
        report["pairs"] = _pairs(run, sides, objective, held, fitted.packs)
    if held.singles:
        report["labelled"] = _singles(run, sides, objective, held)
    answers = _answers(run, sides, held) if params.answers and (held.pairs or held.singles) else None
    if answers is not None:
        report["answers"] = _of_answers(answers, params, run.seed)
    if params.general:
        report["general"] = _forgetting(run, sides, params.general)
    return report, answers


# Margins and accuracy


def _pairs(run: Run[TrainParams], sides: Sides, objective: Objective, held: Examples, packs: bool) -> Report:
    pairs = [(p.chosen, p.rejected) for p in held.pairs]
    found = []
    for side in (sides.policy, sides.reference):
        with side() as loaded:
            reader = Reader(loaded.model)
            found.append(of_pairs(reader, pairs, loaded.pad_id, run.params.batch_size, packs, loaded.device))
    tokens = np.array([[len(t.ids) - t.prompt for t in pair] for pair in pairs], dtype=float)
    return pair_report(objective, *found, tokens, [p.key for p in held.pairs], run.seed)


def pair_report(
    objective: Objective, policy: Any, reference: Any, tokens: Floats, keys: Sequence[str], seed: int
) -> Report:
    """Estimates from log-probabilities ``(n, 2)`` of chosen and rejected.

    A tie counts half. ``accuracy`` is by the loss's implicit reward; ``logprob_accuracy`` by the average
    log-probability alone, which the reference has, too.
    """
    rewards = np.asarray(objective.reward(policy, reference, tokens), dtype=float)
    margin = rewards[:, 0] - rewards[:, 1]

    def mean(values: Floats) -> dict[str, Any]:
        return ratio_estimate(values, clusters=keys, seed=seed).as_json()

    after, before = (_ahead((side / tokens)[:, 0] - (side / tokens)[:, 1]) for side in (policy, reference))
    logratio = np.asarray(policy, float) - np.asarray(reference, float)
    return {
        "pairs": len(margin),
        "prompts": len(set(keys)),
        "accuracy": mean(_ahead(margin)),
        "margin": mean(margin),
        "reward_chosen": mean(rewards[:, 0]),
        "reward_rejected": mean(rewards[:, 1]),
        "logratio_chosen": mean(logratio[:, 0]),
        "logratio_rejected": mean(logratio[:, 1]),
        "logprob_accuracy": mean(after),
        "logprob_accuracy_reference": mean(before),
        "logprob_accuracy_gain": paired_difference(after, before, clusters=keys, seed=seed).as_json(),
    }


def _ahead(difference: Any) -> Floats:
    made: Floats = (difference > 0) + 0.5 * (difference == 0)
    return made


def _singles(run: Run[TrainParams], sides: Sides, objective: Objective, held: Examples) -> Report:
    texts = [one.text for one in held.singles]
    found = []
    for side in (sides.policy, sides.reference):
        with side() as loaded:
            reader = Reader(loaded.model)
            found.append(of_texts(reader, texts, loaded.pad_id, run.params.batch_size, loaded.device))
    rewards = objective.beta * (found[0].astype(float) - found[1])
    good = np.array([one.desirable for one in held.singles], dtype=float)
    return single_report(rewards, good, [one.key for one in held.singles], run.seed)


def single_report(rewards: Floats, good: Floats, keys: Sequence[str], seed: int) -> Report:
    """Mean reward of good answers less that of bad ones, and the share of (good, bad) that it ranks right."""
    made: Report = {"answers": len(rewards), "good": int(good.sum()), "prompts": len(set(keys))}
    if not 0 < good.sum() < len(good):
        return made
    try:
        estimate = paired_difference(
            rewards * good, rewards * (1 - good), good, 1 - good, clusters=keys, seed=seed
        )
    except ValueError:  # too few for every resample to have both labels
        value = float(rewards[good == 1].mean() - rewards[good == 0].mean())
        estimate = Estimate(value, None, None, len(rewards), len(set(keys)))
    better = _ahead(rewards[good == 1][:, None] - rewards[good == 0][None])
    made |= {"margin": estimate.as_json(), "ranked_right": float(better.mean())}
    return made


# Answers of both models to the same prompts


def _answers(run: Run[TrainParams], sides: Sides, held: Examples) -> Answers:
    params = run.params
    prompts: dict[str, list[int]] = {}
    for text, key in [*((p.chosen, p.key) for p in held.pairs), *((s.text, s.key) for s in held.singles)]:
        prompts.setdefault(key, text.ids[: text.prompt])
    rows = list(prompts.values())[: params.answers]
    given, logprobs = [], []
    for side in (sides.policy, sides.reference):
        with side() as loaded:
            given.append(_respond(run, loaded, rows))
    texts = [
        Text([*row, *answer.ids], len(row))
        for answers in given
        for row, answer in zip(rows, answers, strict=True)
    ]
    size = params.batch_size
    for side in (sides.policy, sides.reference):
        with side() as loaded:
            reader = Reader(loaded.model)
            logprobs.append(
                of_texts(reader, texts, loaded.pad_id, size, loaded.device, params.temperature).astype(float)
            )
    difference = (logprobs[0] - logprobs[1]).tolist()
    count = len(rows)
    scores = difference[:count], difference[count:]
    if params.reward_model is not None:
        judged = _judged(run, [t.ids for t in texts], sides)
        scores = judged[:count], judged[count:]
    decode = sides.fitted.tokenizer.decode
    shown = [str(decode(row, skip_special_tokens=True)) for row in rows]
    return Answers(shown, given[0], given[1], difference[:count], scores)


def _respond(run: Run[TrainParams], loaded: Loaded, prompts: list[list[int]]) -> list[Answer]:
    """One answer to each prompt; the draws of row i are the same for both models."""
    eos = int(loaded.tokenizer.eos_token_id)  # type: ignore[arg-type]
    sampling = Sampling(
        max_new_tokens=run.params.max_new_tokens,
        temperature=run.params.temperature,
        stop_token_ids=(eos,),
        seed=run.seed + SAMPLING_STREAM,
    )
    made = generate(loaded.model, prompts, sampling, batch_size=16, pad_token_id=loaded.pad_id)
    decode = loaded.tokenizer.decode
    return [
        Answer(c.token_ids, str(decode(c.token_ids, skip_special_tokens=True)), c.finish_reason == "stop")
        for c in made
    ]


def _judged(run: Run[TrainParams], rows: list[list[int]], sides: Sides) -> list[float]:
    """A reward model's scores of prompts with answers, each closed by EOS."""
    from tuneutils.shared.errors import ToolError
    from tuneutils.shared.reward_model import load_reward_model

    params = run.params
    assert params.reward_model is not None
    rm = load_reward_model(
        params.reward_model, run.device, run.dtype, trust_remote_code=params.trust_remote_code
    )
    tokenizer = sides.fitted.tokenizer
    if rm.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ToolError(f"{params.reward_model}: has another tokenizer than {params.model}")
    eos = int(tokenizer.eos_token_id)
    closed = [row if row[-1] == eos else [*row, eos] for row in rows]
    if (longest := max(map(len, closed))) > rm.max_length:
        run.log.warning(
            "answers of up to %d tokens; the reward model has learnt from %d", longest, rm.max_length
        )
    return rm.scores(closed, params.batch_size)


def _of_answers(answers: Answers, params: TrainParams, seed: int) -> Report:
    tokens = [len(a.ids) for a in answers.policy]
    ours, theirs = answers.scores
    wins = _ahead(np.subtract(ours, theirs))
    made = {
        "prompts": len(tokens),
        "kl": ratio_estimate(answers.kl, seed=seed).as_json(),
        "kl_per_token": ratio_estimate(answers.kl, tokens, seed=seed).as_json(),
        "judge": "reward model" if params.reward_model else "implicit reward",
        "win_rate": ratio_estimate(wins, seed=seed).as_json(),
        "score_gain": paired_difference(ours, theirs, seed=seed).as_json(),
    }
    for name, side in (("policy", answers.policy), ("reference", answers.reference)):
        made[f"tokens_{name}"] = float(np.mean([len(a.ids) for a in side]))
        made[f"finished_{name}"] = float(np.mean([a.finished for a in side]))
    return made


# General text


def _forgetting(run: Run[TrainParams], sides: Sides, path: str) -> Report:
    params = run.params
    reader = RecordReader([path], on_error="skip" if run.on_error == "quarantine" else run.on_error)
    sequences = []
    for item in reader.located():
        try:
            sequences.append(record_sequence(item.record, sides.fitted.tokenizer, params.template))
        except ValueError as exc:
            reader.refuse(item, str(exc))
    items = []
    for side in (sides.policy, sides.reference):
        with side() as loaded:
            items.append(perplexity_items(loaded, sequences, max_length=params.max_length))
    return forgetting_report(*items, run.seed)


def forgetting_report(
    policy: Sequence[dict[str, float]], reference: Sequence[dict[str, float]], seed: int
) -> Report:
    """Perplexities, and by what share the policy's is above the reference's, over the same texts."""
    tokens = [i["tokens"] for i in policy]
    ours, theirs = ([i["nll"] for i in side] for side in (policy, reference))
    size = [np.log(2) * i["bytes"] for i in policy]
    more = np.subtract(ours, theirs)
    return {
        "texts": len(tokens),
        "tokens": int(sum(tokens)),
        "perplexity": ratio_estimate(ours, tokens, transform=np.exp, seed=seed).as_json(),
        "perplexity_reference": ratio_estimate(theirs, tokens, transform=np.exp, seed=seed).as_json(),
        "perplexity_rise": ratio_estimate(more, tokens, transform=np.expm1, seed=seed).as_json(),
        "bits_per_byte_rise": paired_difference(ours, theirs, size, size, seed=seed).as_json(),
    }
