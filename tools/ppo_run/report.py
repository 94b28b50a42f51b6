"""What a run leaves behind: progress on the way, weights, log, samples, plots and numbers at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

from torch import Tensor  # isort: skip

from tuneutils.shared.artifact import Artifact, log_event
from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name
from tuneutils.shared.evaluate import paired_difference, ratio_estimate
from tuneutils.shared.methods import quantization, settle_adapter_config
from tuneutils.shared.models import ModelRef, parameter_counts
from tuneutils.tools.ppo_run.actors import Actors
from tuneutils.tools.ppo_run.checkpoint import Progress
from tuneutils.tools.ppo_run.masters import exact, widen
from tuneutils.tools.ppo_run.params import Params
from tuneutils.tools.ppo_run.rewards import Episode

SAMPLES = 2


def show(
    run: Run[Params],
    progress: Progress,
    line: dict[str, Any],
    episodes: Sequence[Episode],
    scores: Tensor,
) -> None:
    """One update on stderr and in the run log, with a few texts now and then."""
    log_event(run, event="update", **line, **progress.seconds)
    run.log.debug(
        "update %d: reward %.4f, KL %.3f, entropy %.3f, length %.1f, clipped %.3f, explained %.3f",
        line["update"],
        line["reward"],
        line["kl"],
        line["entropy"],
        line["length"],
        line.get("clip_fraction", math.nan),
        line.get("explained_variance", math.nan),
    )
    every = run.params.samples_every
    if every and (line["update"] - 1) % every == 0:
        for episode, score in list(zip(episodes, scores.tolist(), strict=True))[:SAMPLES]:
            run.log.info(
                "update %d, reward %.3f: %s → %s",
                line["update"],
                score,
                json.dumps(episode.prompt.text[-80:], ensure_ascii=False),
                json.dumps(episode.completion[:240], ensure_ascii=False),
            )
            progress.samples.append(
                {
                    "update": line["update"],
                    "prompt": episode.prompt.text,
                    "completion": episode.completion,
                    "reward": score,
                    "finished": episode.finished,
                }
            )


def save(run: Run[Params], art: Artifact, actors: Actors, base: ModelRef, progress: Progress) -> None:
    """The kept weights in their ecosystem's format, and everything that was learnt about the run."""
    params = run.params
    if params.method == "full":
        widen(actors.policy.parameters())
        actors.policy.save_pretrained(art.dir)
    else:
        config = actors.policy.peft_config["default"]
        config.base_model_name_or_path, config.revision = base.path, base.revision
        actors.policy.save_pretrained(art.dir, save_embedding_layers=False)
        settle_adapter_config(art.dir)
    (art.dir / "README.md").unlink(missing_ok=True)
    actors.tokenizer.save_pretrained(art.dir)
    if params.save_value:
        value = {
            k: exact(p).cpu().contiguous() for k, p in actors.trainable().items() if k.startswith("value.")
        }
        save_file(value, art.dir / "value.safetensors")
    _write_lines(art.dir / "log.jsonl", progress.log)
    _write_lines(art.dir / "samples.jsonl", progress.samples)
    _record(run, art, actors, progress)
    plot(progress.log, art.dir / "training.png", run)


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def _record(run: Run[Params], art: Artifact, actors: Actors, progress: Progress) -> None:
    counts = parameter_counts(actors.policy)
    art.extra["method"] = run.params.method
    art.extra["dtype"] = dtype_name(actors.dtype)
    if (scheme := quantization(run.params)) is not None:
        art.extra["quantization"] = scheme
    last = progress.log[-1]
    art.metrics.update(
        trainable_parameters=counts["trainable"],
        total_parameters=counts["total"],
        updates=progress.update,
        episodes=progress.episodes,
        stopped=progress.stopped,
        reward_first=progress.log[0]["reward"],
        **{k: last[k] for k in ("reward", "kl", "kl_coef", "entropy", "length", "finished")},
    )
    if progress.before is None or progress.best is None:
        return
    before, after = progress.before, progress.best
    estimates = {
        "heldout_reward_before": ratio_estimate(before["rewards"], seed=run.seed),
        "heldout_reward": ratio_estimate(after["rewards"], seed=run.seed),
        "heldout_gain": paired_difference(after["rewards"], before["rewards"], seed=run.seed),
        "heldout_kl": ratio_estimate(after["kl"], seed=run.seed),
        "heldout_length_before": ratio_estimate(before["lengths"], seed=run.seed),
        "heldout_length": ratio_estimate(after["lengths"], seed=run.seed),
    }
    art.metrics.update({name: e.as_json() for name, e in estimates.items()}, kept_update=after["update"])


PANELS = {
    "reward": ("reward", "heldout_reward"),
    "KL from the reference (nats a sequence)": ("kl", "heldout_kl"),
    "entropy (nats a token)": ("entropy",),
    "length (tokens)": ("length",),
    "clip fraction": ("clip_fraction",),
    "explained variance": ("explained_variance",),
}


def plot(log: Sequence[dict[str, Any]], path: Path, run: Run[Params]) -> None:
    """The course of the run as a picture whose bytes depend on the numbers alone."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        run.log.warning("no plot: matplotlib is not installed (pip install 'tuneutils[plots]')")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: dict[Any, Any] = {
        "figure.dpi": 110,
        "font.family": "DejaVu Sans",
        "font.size": 8,
        "axes.grid": True,
        "grid.alpha": 0.3,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharex=True, layout="constrained")
        for axis, (title, keys) in zip(axes.flat, PANELS.items(), strict=True):
            for key in keys:
                points = [(e["update"], e[key]) for e in log if e.get(key) is not None]
                if points:
                    axis.plot(
                        *zip(*points, strict=True), marker="o" if len(keys) > 1 and key != keys[0] else ""
                    )
            axis.set_title(title, fontsize=8)
        for axis in axes[1]:
            axis.set_xlabel("update")
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)
