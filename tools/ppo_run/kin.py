"""PPO's critic-free kin, RLOO and GRPO, by TRL's trainers on the same models, prompts and rewards.

Ahmadian et al. 2024 (RLOO, arXiv 2402.14740); Shao et al. 2024 (GRPO, arXiv 2402.03300). The value model and
the options that belong to it are not used; a killed run starts anew.
"""

from __future__ import annotations

from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip

from tuneutils.shared.artifact import Artifact
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError, require
from tuneutils.tools.ppo_run import report
from tuneutils.tools.ppo_run.actors import learning_rates
from tuneutils.tools.ppo_run.advantages import with_missing_eos
from tuneutils.tools.ppo_run.checkpoint import Progress
from tuneutils.tools.ppo_run.params import Params
from tuneutils.tools.ppo_run.processes import Processes
from tuneutils.tools.ppo_run.rewards import Episode

#: Options of PPO that TRL's trainers have no counterpart of → the value that they have by default.
ONLY_PPO = {
    "kl_target": None,
    "kl_budget": None,
    "eval_every": 0,
    "whiten_rewards": False,
    "save_value": False,
    "gamma": 1.0,
    "gae_lambda": 0.95,
    "whiten_advantages": True,
    "kl_horizon": 10_000,
    "value": "auto",
    "value_clip_range": 0.2,
    "value_coef": 0.1,
    "value_learning_rate": None,
}


def check_kin(params: Params, processes: Processes) -> None:
    """Refuse what TRL's trainers cannot do, and sizes that do not divide.

    Raises:
        ToolError: exit 2.
    """
    if params.algo == "ppo":
        return
    require("trl", "train")
    for name, plain in ONLY_PPO.items():
        if getattr(params, name) != plain:
            flag = name.replace("_", "-")
            raise ToolError(f"--{flag} goes with --algo ppo alone", code=ExitCode.USAGE)
    step = params.micro_batch_size * processes.size * params.minibatches
    if params.batch_size % step or params.batch_size % params.group_size:
        raise ToolError(
            f"--algo {params.algo} needs a --batch-size ({params.batch_size}) that is a multiple of "
            f"--group-size ({params.group_size}) and of micro-batch size × processes × minibatches ({step})",
            code=ExitCode.USAGE,
        )


def learn_with_trl(run: Run[Params], art: Artifact, setting: Any, progress: Progress) -> None:
    """All updates by TRL's ``RLOOTrainer`` or ``GRPOTrainer``; leaves the trained weights in the policy."""
    import trl
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback

    params, actors = run.params, setting.actors
    steps = params.minibatches * params.ppo_epochs
    raw: list[float] = []
    shown: list[tuple[Episode, float]] = []

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        episodes = [
            _episode(setting, int(row), ids) for row, ids in zip(prompts, completion_ids, strict=True)
        ]
        scores = setting.reward(episodes)
        raw.extend(scores)
        shown[:] = list(zip(episodes, scores, strict=True))
        finished = torch.tensor([e.finished for e in episodes])
        penalty = params.missing_eos_penalty
        kept: list[float] = with_missing_eos(
            torch.tensor(scores), finished, params.missing_eos, penalty
        ).tolist()
        return kept

    class Report(TrainerCallback):  # type: ignore[misc]
        def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
            if not logs or "reward" not in logs:
                return
            line = _line(logs, state.global_step // steps, params, raw)
            progress.log.append(line)
            progress.update, progress.episodes = line["update"], line["episodes"]
            episodes, scores = [e for e, _ in shown], torch.tensor([s for _, s in shown])
            report.show(run, progress, line, episodes, scores)
            bar.update(1, reward=f"{line['reward']:.3f}", kl=f"{line['kl']:.2f}")
            raw.clear()

    base: Any = trl.RLOOTrainer if params.algo == "rloo" else trl.GRPOTrainer

    class OnOurPrompts(base):  # type: ignore[misc]
        def _tokenize_prompts(self, prompts: list[str]) -> Any:
            return [list(setting.prompts[int(row)].ids) for row in prompts], None, {}

    # TRL leaves out an incomplete batch, which would be all where there are few prompts.
    copies = -(-params.batch_size // (params.group_size * len(setting.prompts)))
    rows = [str(i) for i in range(len(setting.prompts))] * copies
    trainer = OnOurPrompts(
        model=actors.policy,
        reward_funcs=reward,
        args=_config(run, art, setting.processes, actors),
        train_dataset=Dataset.from_dict({"prompt": rows}),
        processing_class=actors.tokenizer,
        callbacks=[Report()],
    )
    trainer.remove_callback(PrinterCallback)
    with run.progress(params.updates, params.algo, "updates") as bar:
        trainer.train()
    actors.policy = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()


def _episode(setting: Any, row: int, ids: list[int]) -> Episode:
    finished = bool(ids) and ids[-1] in setting.how.stop_ids
    text = setting.actors.tokenizer.decode(ids, skip_special_tokens=True)
    return Episode(setting.prompts[row], tuple(ids), finished, text)


def _line(logs: dict[str, Any], update: int, params: Params, raw: list[float]) -> dict[str, Any]:
    """TRL's metrics of an update under the names of ours; its KL is a mean over tokens."""
    length = float(logs["completions/mean_length"])
    return {
        "update": update,
        "episodes": update * params.batch_size,
        "reward": sum(raw) / len(raw),
        "reward_std": float(torch.tensor(raw).std(correction=0)),
        "penalised_reward": float(logs["reward"]),
        "kl": float(logs.get("kl", 0.0)) * length,
        "kl_coef": params.kl_coef,
        "entropy": float(logs["entropy"]),
        "length": length,
        "finished": 1.0 - float(logs["completions/clipped_ratio"]),
        "clip_fraction": float(logs["clip_ratio/region_mean"]),
        "grad_norm": float(logs["grad_norm"]),
        "learning_rate": float(logs["learning_rate"]),
    }


def _config(run: Run[Params], art: Artifact, processes: Processes, actors: Any) -> Any:
    import trl

    params = run.params
    kind = trl.RLOOConfig if params.algo == "rloo" else trl.GRPOConfig
    # TRL's own default is DAPO's normalisation, over the tokens of the batch.
    loss = {"loss_type": "grpo"} if params.algo == "grpo" else {}
    micro_steps = params.batch_size // (params.micro_batch_size * processes.size)
    return kind(
        output_dir=str(art.work / params.algo),
        max_steps=params.updates * params.minibatches * params.ppo_epochs,
        per_device_train_batch_size=params.micro_batch_size,
        gradient_accumulation_steps=micro_steps // params.minibatches,
        steps_per_generation=micro_steps,
        num_iterations=params.ppo_epochs,
        num_generations=params.group_size,
        max_completion_length=params.max_new_tokens,
        temperature=params.temperature,
        top_p=1.0,
        top_k=0,
        beta=params.kl_coef,
        epsilon=params.clip_range,
        learning_rate=learning_rates(params)[0],
        lr_scheduler_type=params.schedule,
        warmup_steps=0,
        adam_epsilon=params.adam_epsilon,
        max_grad_norm=params.max_grad_norm,
        gradient_checkpointing=False,
        logging_steps=params.minibatches * params.ppo_epochs,
        save_strategy="no",
        seed=run.seed,
        data_seed=run.seed,
        bf16=actors.dtype == torch.bfloat16,
        use_cpu=actors.where.type == "cpu",
        report_to=[],
        disable_tqdm=True,
        **loss,
    )
