"""What a run must remember to go on as if it had not been stopped."""

from __future__ import annotations

import base64
import dataclasses
import json
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from safetensors.torch import load_file, save_file
from torch import Tensor

from tuneutils.shared.artifact import write_json
from tuneutils.shared.checkpoints import mark_complete
from tuneutils.tools.ppo_run.actors import Actors
from tuneutils.tools.ppo_run.masters import assign, exact
from tuneutils.tools.ppo_run.processes import Processes

TENSORS = "tensors.safetensors"
STATE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class Progress:
    """Where a run stands, besides its tensors.

    Attributes:
        update: updates done.
        episodes: episodes done, which is also the position in the endless row of prompts.
        kl_coef: the coefficient in force.
        log: one line of metrics an update.
        samples: texts shown on the way.
        before: the held-out measures of the reference.
        best: those of the best weights so far, with their ``update``.
        stopped: why the run ended before its last update.
        seconds: where the time of the last update went; not kept.
    """

    kl_coef: float
    update: int = 0
    episodes: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    before: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    stopped: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def save_checkpoint(
    folder: Path, progress: Progress, actors: Actors, optimizer: torch.optim.Adam, processes: Processes
) -> None:
    """Write ``checkpoint-<update>`` and mark it when whole; older ones are then removed."""
    path = folder / f"checkpoint-{progress.update}"
    if processes.rank == 0:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    processes.together_raw(None)
    write_json(path / f"rng-{processes.rank}.json", rng_state())
    if processes.rank == 0:
        save_file(_tensors(actors, optimizer), path / TENSORS)
        state = dataclasses.asdict(progress)
        state.pop("seconds")
        write_json(path / STATE, state)
    processes.together_raw(None)
    if processes.rank == 0:
        mark_complete(path)
        _prune(folder, path, progress)


def _prune(folder: Path, newest: Path, progress: Progress) -> None:
    """Remove what neither the newest checkpoint nor one made after it can need."""
    best = best_file(folder, progress.best["update"]).name if progress.best else ""
    for old in (*folder.glob("checkpoint-*"), *folder.glob("best-*")):
        if old != newest and old.name != best:
            shutil.rmtree(old) if old.is_dir() else old.unlink()


def load_checkpoint(
    path: Path, actors: Actors, optimizer: torch.optim.Adam, processes: Processes
) -> Progress:
    """Put everything back as :func:`save_checkpoint` found it."""
    tensors = load_file(str(path / TENSORS))
    load_trainable(actors, tensors)
    for name, parameter in actors.trainable().items():
        if f"step.{name}" in tensors:
            state = {key: tensors[f"{key}.{name}"].clone() for key in MOMENTS}
            optimizer.state[parameter] = {
                k: v if k == "step" else v.to(parameter.device) for k, v in state.items()
            }
    restore_rng(json.loads((path / f"rng-{processes.rank}.json").read_text(encoding="utf-8")))
    return Progress(**json.loads((path / STATE).read_text(encoding="utf-8")))


def _tensors(actors: Actors, optimizer: torch.optim.Adam) -> dict[str, Tensor]:
    made = trainable_tensors(actors)
    for name, parameter in actors.trainable().items():
        for key in MOMENTS:
            if key in optimizer.state.get(parameter, {}):
                made[f"{key}.{name}"] = optimizer.state[parameter][key].detach().cpu().contiguous()
    return made


def trainable_tensors(actors: Actors) -> dict[str, Tensor]:
    """The tensors that training changes, on the CPU."""
    return {f"weight.{n}": exact(p).cpu().contiguous() for n, p in actors.trainable().items()}


def load_trainable(actors: Actors, tensors: dict[str, Tensor]) -> None:
    for name, parameter in actors.trainable().items():
        assign(parameter, tensors[f"weight.{name}"])


def best_file(folder: Path, update: int) -> Path:
    return folder / f"best-{update}.safetensors"


def rng_state() -> dict[str, Any]:
    """The states of the global generators, which a reward of the user's may draw from."""
    name, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    states = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    return {
        "torch": [base64.b64encode(bytes(s.tolist())).decode() for s in states],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "python": [version, list(internal), gauss],
    }


def restore_rng(state: dict[str, Any]) -> None:
    cpu, *cuda = (torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8) for text in state["torch"])
    torch.set_rng_state(cpu)
    if len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
