"""A whole run of PPO: prompts, a model and a reward in; an adapter or a model out."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads
from tuneutils.shared.record_source import Source, open_source

import torch  # isort: skip
from safetensors.torch import load_file, save_file

from tuneutils.shared.artifact import Artifact, Input, library_versions, log_event
from tuneutils.shared.checkpoints import last_checkpoint, run_identity
from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name, resolve_device, resolve_dtype, seed_everything
from tuneutils.shared.errors import ExitCode, GateFailed, ToolError
from tuneutils.shared.exits import out_of_memory
from tuneutils.shared.methods import check_method
from tuneutils.shared.models import (
    ModelRef,
    context_length,
    load_tokenizer,
    model_input,
    parameter_counts,
    resolve,
)
from tuneutils.tools.ppo_run import report
from tuneutils.tools.ppo_run.actors import Actors, build_actors
from tuneutils.tools.ppo_run.checkpoint import (
    Progress,
    best_file,
    load_checkpoint,
    load_trainable,
    save_checkpoint,
    trainable_tensors,
)
from tuneutils.tools.ppo_run.diagnose import diagnose, is_constant
from tuneutils.tools.ppo_run.kin import check_kin, learn_with_trl
from tuneutils.tools.ppo_run.params import Params
from tuneutils.tools.ppo_run.ppo import make_optimizer, one_update
from tuneutils.tools.ppo_run.processes import Processes
from tuneutils.tools.ppo_run.prompts import FORMATS, Prompt, read_prompts
from tuneutils.tools.ppo_run.reward_model import RewardModel, load_reward_model
from tuneutils.tools.ppo_run.reward_text import check_same_template
from tuneutils.tools.ppo_run.rewards import Reward, kind_of, reward_input, text_reward
from tuneutils.tools.ppo_run.rollout import HELDOUT, Generation, collect, minibatch_rows, score, stream_seed
from tuneutils.tools.ppo_run.speed import measure, shares

CONSTANT_BATCHES = 3


@dataclass
class Setting:
    """All that a run works with, loaded and checked."""

    actors: Actors
    reward: Reward
    prompts: list[Prompt]
    heldout: list[Prompt]
    how: Generation
    processes: Processes


def train(run: Run[Params]) -> dict[str, Any]:
    """Run ``ppo-run train``; gives the summary.

    Raises:
        ToolError: bad input, with its place; nothing is written then.
    """
    where = resolve_device(run.device)
    processes = Processes.join(where.type == "cpu")
    if processes.rank:
        run.quiet = True
        run.log.setLevel("ERROR")
    check_kin(run.params, processes)
    base, inputs, sources = check(run)
    with run.artifact("model" if run.params.method == "full" else "adapter", inputs) as art:
        art.licence = inputs[0].licence
        setting = prepare(run, base, sources, processes, where)
        with setting.actors.fused():
            progress = learn(run, art, setting) if run.params.algo == "ppo" else learn_kin(run, art, setting)
        if processes.rank == 0:
            report.save(run, art, setting.actors, base, progress)
    return {"output": run.output, "metrics": art.metrics}


def check(run: Run[Params]) -> tuple[ModelRef, list[Input], list[Source]]:
    """Everything that can be refused before weights are loaded: the model's name, inputs, contradictions."""
    params = run.params
    check_method(params)
    base = resolve(params.model)
    if base.kind == "adapter":
        raise ToolError(
            f"{params.model}: is an adapter; merge it into its base first (adapter-merge)",
            code=ExitCode.USAGE,
        )
    if params.batch_size < params.minibatches:
        raise ToolError(
            f"--minibatches {params.minibatches}: more than the {params.batch_size} episodes of a batch",
            code=ExitCode.USAGE,
        )
    if params.kl_target == 0:
        raise ToolError("--kl-target 0: must be above 0", code=ExitCode.USAGE)
    if params.value == "reward" and kind_of(params.reward) != "model":
        raise ToolError("--value reward needs a reward model as --reward", code=ExitCode.USAGE)
    sources = [open_source(run, run.inputs, "prompts", formats=FORMATS)]
    if params.heldout:
        sources.append(open_source(run, [params.heldout], "heldout", formats=FORMATS))
    inputs = [model_input(params.model), *reward_input(params.reward)]
    return base, [*inputs, *(i for s in sources for i in s.inputs)], sources


def prepare(
    run: Run[Params], base: ModelRef, sources: list[Source], processes: Processes, where: torch.device
) -> Setting:
    """Load the models and read the prompts."""
    params = run.params
    dtype = resolve_dtype(run.dtype, where)
    if dtype == torch.float16:  # a ratio of probabilities needs more than its ten bits
        if run.dtype == "float16":
            raise ToolError("--dtype float16: use bfloat16 or float32 with PPO", code=ExitCode.USAGE)
        dtype = torch.float32
    tokenizer = load_tokenizer(base, trust_remote_code=params.trust_remote_code)
    contexts = [context_length(base, trust_remote_code=params.trust_remote_code)]
    reward_model: RewardModel | None = None
    if kind_of(params.reward) == "model":
        check_same_template(params.reward, params.template, tokenizer)
        contexts.append(context_length(resolve(params.reward), trust_remote_code=params.trust_remote_code))
        reward_model = load_reward_model(
            params.reward,
            tokenizer,
            where,
            dtype,
            batch_size=params.micro_batch_size,
            trust_remote_code=params.trust_remote_code,
        )
    virtual = params.virtual_tokens if params.method in ("prefix", "p-tuning", "prompt") else 0
    context = min((c for c in contexts if c is not None), default=None)
    context = None if context is None else context - virtual - (reward_model is not None)
    prompts = read_prompts(run, sources[0], tokenizer, context)
    heldout = read_prompts(run, sources[1], tokenizer, context) if len(sources) > 1 else []
    seed_everything(run.seed)
    actors = build_actors(run, base, tokenizer, where, dtype, prompts[0].text, reward_model)
    if reward_model is not None:
        reward_model.autocast = actors.autocast
    reward: Reward = reward_model or text_reward(
        params.reward, timeout_s=params.reward_timeout, retries=params.reward_retries
    )
    counts = parameter_counts(actors.policy)
    run.log.info(
        "%s: %d of %d parameters trainable, %s on %s; %d prompts, %d held out",
        params.method,
        counts["trainable"],
        counts["total"],
        dtype_name(dtype),
        where,
        len(prompts),
        len(heldout),
    )
    how = Generation(params.max_new_tokens, params.rollout_batch_size, (int(tokenizer.eos_token_id),))
    return Setting(actors, reward, prompts, heldout, how, processes)


def learn(run: Run[Params], art: Artifact, setting: Setting) -> Progress:
    """All updates, with what happens between them; leaves the weights to keep in the models."""
    params, actors, processes = run.params, setting.actors, setting.processes
    folder = art.work / "checkpoints"
    optimizer = make_optimizer(actors, params)
    progress = Progress(kl_coef=params.kl_coef)
    found = _resume_point(run, art, folder, processes)
    if found is not None:
        progress = load_checkpoint(found, actors, optimizer, processes)
        run.log.info("going on from update %d", progress.update)
    elif setting.heldout:
        progress.before = evaluate(run, setting)
        run.log.info("held-out reward before: %.4f", mean(progress.before["rewards"]))
    warned: dict[str, int] = {}
    with out_of_memory_named(params):
        rates = measure(actors.policy, actors.dtype) if actors.where.type == "cpu" else None
    with run.progress(params.updates, "ppo", "updates") as bar:
        bar.update(progress.update)
        while progress.update < params.updates and progress.stopped is None:
            with out_of_memory_named(params):
                line, episodes, scores = one_update(
                    run, actors, optimizer, setting.reward, setting.prompts, setting.how, processes, progress
                )
            if rates is not None and "update_s" in progress.seconds:
                progress.seconds |= shares(
                    rates, actors, setting.reward, params, episodes, progress.seconds, processes.size
                )
            progress.log.append(line)
            progress.stopped = line.get("stopped")
            if progress.stopped is None:
                progress.update += 1
                progress.episodes = line["episodes"]
            report.show(run, progress, line, episodes, scores)
            for warning in diagnose(progress.log, params, warned):
                run.log.warning("update %d: %s", line["update"], warning)
            if len(progress.log) == CONSTANT_BATCHES and all(map(is_constant, progress.log)):
                raise GateFailed(
                    f"the reward of every completion was {line['reward']:g} in {CONSTANT_BATCHES} batches: "
                    "there is nothing to learn from; try: ppo-run doctor with the same options"
                )
            shown = ("reward", "kl", "entropy", "length", "clip_fraction", "explained_variance")
            bar.update(1, **{k: f"{line[k]:.3g}" for k in shown if line.get(k) is not None})
            last = progress.update == params.updates or progress.stopped is not None
            if setting.heldout and (last or _due(params.eval_every, progress.update)):
                _evaluate_and_keep(run, setting, progress, folder)
            if _due(params.checkpoint_every, progress.update) and not last:
                save_checkpoint(folder, progress, actors, optimizer, processes)
    log_event(run, event="done", resumed=found is not None, device=str(actors.where))
    if params.keep == "best" and progress.best is not None:
        load_trainable(actors, load_file(str(best_file(folder, progress.best["update"]))))
    return progress


def learn_kin(run: Run[Params], art: Artifact, setting: Setting) -> Progress:
    """The same by TRL's trainers, with the held-out reward before and after."""
    progress = Progress(kl_coef=run.params.kl_coef)
    if setting.heldout:
        progress.before = evaluate(run, setting)
        run.log.info("held-out reward before: %.4f", mean(progress.before["rewards"]))
    with out_of_memory_named(run.params):
        learn_with_trl(run, art, setting, progress)
    if setting.heldout:
        progress.best = evaluate(run, setting) | {"update": progress.update}
        run.log.info("held-out reward after: %.4f", mean(progress.best["rewards"]))
    return progress


def _due(every: int, update: int) -> bool:
    return every > 0 and update % every == 0


def _resume_point(run: Run[Params], art: Artifact, folder: Path, processes: Processes) -> Path | None:
    """The checkpoint to go on from: only one of a run with the same inputs and parameters."""
    values = {k: v["value"] for k, v in run.manifest_params().items()}
    identity = run_identity(
        values,
        run.seed,
        [(i.role, i.sha256) for i in art.inputs],
        library_versions(),
        processes.size,
        resolve_device(run.device).type,
    )
    found = last_checkpoint(folder, identity) if processes.rank == 0 else None
    return processes.together_raw(found)[0]


def evaluate(run: Run[Params], setting: Setting) -> dict[str, Any]:
    """Held-out rewards, sequence KLs and lengths, one a prompt; every call draws from the same seeds."""
    params, processes = run.params, setting.processes
    with out_of_memory_named(params):
        episodes, scores, _ = collect(
            setting.actors,
            setting.reward,
            setting.heldout,
            setting.how,
            processes,
            stream_seed(run.seed, HELDOUT),
        )
        lengths = [len(e.prompt.ids) + len(e.response_ids) for e in episodes]
        (rows,) = minibatch_rows(lengths, 1, setting.actors.rows, processes, run.seed)
        said = score(setting.actors, episodes, rows, processes)
    return {
        "rewards": scores.tolist(),
        "kl": (said.logprobs - said.ref_logprobs).sum(1).tolist(),
        "lengths": [len(e.response_ids) for e in episodes],
        "finished": [e.finished for e in episodes],
    }


def _evaluate_and_keep(run: Run[Params], setting: Setting, progress: Progress, folder: Path) -> None:
    """Measure the held-out reward; keep the weights if it is the best within the KL budget, or the last."""
    params = run.params
    found = evaluate(run, setting) | {"update": progress.update}
    reward, kl = mean(found["rewards"]), mean(found["kl"])
    progress.log[-1] |= {"heldout_reward": reward, "heldout_kl": kl}
    run.log.info("update %d: held-out reward %.4f, KL %.3f", progress.update, reward, kl)
    # Within the budget beats beyond it; then the higher reward.
    better = progress.best is None or _rank(params, found) > _rank(params, progress.best)
    if params.keep == "last" or better:
        progress.best = found
        if params.keep == "best" and setting.processes.rank == 0:
            save_file(trainable_tensors(setting.actors), best_file(folder, progress.update))
        setting.processes.together_raw(None)


def _rank(params: Params, found: dict[str, Any]) -> tuple[bool, float]:
    within = params.kl_budget is None or mean(found["kl"]) <= params.kl_budget
    return within, mean(found["rewards"])


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def out_of_memory_named(params: Params) -> AbstractContextManager[None]:
    """Turns running out of memory into exit 75 with the batch sizes to try."""
    micro, rows = params.micro_batch_size, params.rollout_batch_size
    return out_of_memory(
        f"--micro-batch-size {max(1, micro // 2)} and "
        f"--rollout-batch-size {max(1, rows // 2)} (now {micro} and {rows})"
    )
