"""Fit a prepared model to encoded examples: what tools with the options of ``lora-tune`` share of training.

The run's parameters are those of ``training_options``, ``optimizer_steps``, ``eval_every`` and ``patience``.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneutils.shared.artifact import Artifact
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.examples import Examples
from tuneutils.shared.tuning import (
    log_done,
    log_parameters,
    optimizer_steps,
    progress_report,
    resume_point,
    trainer_config,
)

if TYPE_CHECKING:
    import torch

    from tuneutils.shared.training import ResumableTrainer


def check_patience(params: Any) -> None:
    """Refuse to wait for a held-out loss that is never taken."""
    if params.patience and not (params.heldout and params.eval_every):
        raise ToolError("--patience needs --heldout and --eval-every", code=ExitCode.USAGE)


@dataclass(frozen=True)
class Fitting:
    """A model with what it is trained on, and where its artifact is written.

    Attributes:
        model: its trainable parameters are those that require gradients.
        held: what the held-out loss is measured on; may be empty.
    """

    run: Run[Any]
    art: Artifact
    model: Any
    tokenizer: Any
    examples: Examples
    held: Examples
    where: torch.device
    dtype: torch.dtype


def fit(
    fitting: Fitting,
    what: str,
    *,
    learning_rate: float,
    trainer_class: type[ResumableTrainer] | None = None,
    **trainer_keywords: Any,
) -> Any:
    """Train from the last checkpoint of the same run if there is one; gives the trainer, to save from.

    The counts, losses and lengths go into the artifact's metrics, times and memory into the run log.

    Args:
        what: is trained, for the log.
        learning_rate: its peak.
        trainer_class, trainer_keywords: in place of `ResumableTrainer`, and for it.
    """
    from tuneutils.shared.adapters.fused_lora import fused
    from tuneutils.shared.training import MarkComplete, ResumableTrainer, StopOnNaN

    run, art, held, model = fitting.run, fitting.art, fitting.held, fitting.model
    examples = fitting.examples
    run.log.info("%d examples, %d tokens, %d learnt", len(examples.encoded), examples.tokens, examples.learnt)
    counts = log_parameters(run, model, what, fitting.dtype, fitting.where)
    checkpoints = art.work / "checkpoints"
    trainer = (trainer_class or ResumableTrainer)(
        model,
        _config(fitting, checkpoints, learning_rate),
        fitting.tokenizer,
        examples.encoded,
        held.encoded,
        callbacks=[MarkComplete(), StopOnNaN(), *_callbacks(run)],
        **trainer_keywords,
    )
    with trainer.accelerator.main_process_first():
        resume = resume_point(run, checkpoints, art)
    trainer.args.eval_on_start = bool(held.encoded) and resume is None
    started = time.monotonic()
    with fused(model, fitting.where) if not trainer.is_fsdp_enabled else nullcontext():
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if held.encoded and not run.params.patience and not _evaluated(trainer.state):
            trainer.evaluate()
    log_done(run, started, resume, fitting.where)
    _record(fitting, trainer, counts)
    return trainer


def _evaluated(state: Any) -> bool:
    """Whether the held-out loss of the last step is known."""
    return any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)


def _config(fitting: Fitting, folder: Path, learning_rate: float) -> Any:
    """The trainer's settings: how many steps, and when the held-out loss is taken."""
    params = fitting.run.params
    evaluates = bool(fitting.held.encoded) and params.eval_every > 0
    # The best checkpoint can be kept only if each evaluation saves one.
    save_every = params.eval_every if params.patience else params.checkpoint_every
    return trainer_config(
        fitting.run,
        folder,
        fitting.dtype,
        steps=optimizer_steps(params, len(fitting.examples.encoded)),
        learning_rate=learning_rate,
        use_cpu=fitting.where.type == "cpu",
        eval_strategy="steps" if evaluates else "no",
        eval_steps=params.eval_every or None,
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or 500,
        load_best_model_at_end=bool(params.patience),
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )


def _callbacks(run: Run[Any]) -> list[Any]:
    from transformers import EarlyStoppingCallback

    made: list[Any] = [progress_report(run)]
    if run.params.patience:
        made.append(EarlyStoppingCallback(early_stopping_patience=run.params.patience))
    return made


def _record(fitting: Fitting, trainer: Any, counts: dict[str, int]) -> None:
    art, examples, held = fitting.art, fitting.examples, fitting.held
    log = trainer.log_lines()
    evals = [e["eval_loss"] for e in log if "eval_loss" in e]
    art.metrics.update(
        trainable_parameters=counts["trainable"],
        total_parameters=counts["total"],
        examples=len(examples.encoded),
        tokens=examples.tokens,
        learnt_tokens=examples.learnt,
        truncated=examples.truncated,
        dropped=examples.dropped,
        steps=trainer.state.global_step,
        final_loss=next((e["loss"] for e in reversed(log) if "loss" in e), None),
    )
    if held.encoded:
        art.metrics.update(
            heldout_examples=len(held.encoded),
            heldout_tokens=held.learnt,
            heldout_loss_before=evals[0],
            heldout_loss=trainer.state.best_metric if art.run.params.patience else evals[-1],
        )
