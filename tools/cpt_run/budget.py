"""How many steps fit into a time."""

from __future__ import annotations

import time

from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.models import Loaded
from tuneutils.tools.cpt_run.documents import Corpus
from tuneutils.tools.cpt_run.params import Params
from tuneutils.tools.cpt_run.track import Tracker, mixed_precision

#: Documents whose measurement is timed.
TIMED_DOCUMENTS = 8


def steps_within(*, run: Run[Params], loaded: Loaded, corpus: Corpus, tracker: Tracker, left_s: float) -> int:
    """Steps that fit into the time left, measurements included.

    Raises:
        ToolError: exit 2, not even one step fits.
    """
    params = run.params
    per_step = params.gradient_accumulation * micro_batch_s(params, loaded, corpus)
    started = time.monotonic()
    measuring = measurement_s(tracker, loaded)
    left_s -= time.monotonic() - started
    each = per_step + (measuring / params.eval_every if params.eval_every else 0.0)
    steps = int((left_s - measuring) / each)
    if steps < 1:
        raise ToolError(
            f"--budget {params.budget}: a step takes {per_step:.1f} s and a measurement {measuring:.1f} s, "
            f"and {max(0.0, left_s):.1f} s are left after loading; give more, or an --eval-limit",
            code=ExitCode.USAGE,
        )
    run.log.info(
        "budget %s: %d steps of %.2f s, %.1f s a measurement", params.budget, steps, per_step, measuring
    )
    return steps


def micro_batch_s(params: Params, loaded: Loaded, corpus: Corpus) -> float:
    """Seconds of one micro-batch forward and backward: the second of two, since the first one allocates."""
    import torch

    from tuneutils.tools.cpt_run.trainer import Rows, collate, row_nll

    rows = Rows([corpus], [(0, i % len(corpus.rows)) for i in range(params.batch_size)])
    batch = collate([rows[i] for i in range(len(rows))], loaded.pad_id)
    batch = {name: tensor.to(loaded.device) for name, tensor in batch.items()}
    took = 0.0
    loaded.model.train()
    with torch.random.fork_rng(), mixed_precision(loaded):
        for _ in range(2):
            began = time.monotonic()
            row_nll(loaded.model, batch, params.pack).backward()
            if loaded.device.type == "cuda":
                torch.cuda.synchronize()
            took = time.monotonic() - began
            loaded.model.zero_grad(set_to_none=True)
    return took


def measurement_s(tracker: Tracker, loaded: Loaded) -> float:
    """Seconds of one measurement of all texts, from that of a few documents."""
    if not tracker.texts:
        return 0.0
    few = {name: texts[:TIMED_DOCUMENTS] for name, texts in tracker.texts.items()}
    began = time.monotonic()
    timed = Tracker(few, tracker.max_length, tracker.folder / "timed")
    timed.measure(0, loaded, writes=False)
    took = time.monotonic() - began
    return took * _tokens(tracker) / _tokens(timed)


def _tokens(tracker: Tracker) -> int:
    return sum(len(sequence) for texts in tracker.texts.values() for sequence, _ in texts)
