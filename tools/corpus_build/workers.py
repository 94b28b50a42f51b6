"""Tasks to parts, in any number of processes or on a Ray cluster; parts come back in the tasks' order."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from tuneutils.shared.errors import ExitCode, ToolError, require
from tuneutils.tools.corpus_build.find import Item
from tuneutils.tools.corpus_build.prepare import Part, Settings, prepare

Tasks = Iterator[Sequence[Item]]


def parts(tasks: Tasks, settings: Settings, *, workers: int, executor: str) -> Iterator[Part]:
    """Each task's part, a few tasks ahead of what has been taken."""
    if executor == "ray":
        yield from _by_ray(tasks, settings)
    elif workers == 1:
        for number, task in enumerate(tasks):
            yield prepare(number, task, settings)
    else:
        yield from _by_processes(tasks, settings, workers)


def _by_processes(tasks: Tasks, settings: Settings, workers: int) -> Iterator[Part]:
    numbered = enumerate(tasks)
    first = list(islice(numbered, 2))
    if len(first) < 2:  # nothing to share out
        for number, task in first:
            yield prepare(number, task, settings)
        return
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting: deque[Future[Part]] = deque(pool.submit(prepare, n, t, settings) for n, t in first)
        try:
            while waiting:
                for number, task in islice(numbered, 2 * workers + 2 - len(waiting)):
                    waiting.append(pool.submit(prepare, number, task, settings))
                yield waiting.popleft().result()
        except BrokenProcessPool as exc:
            raise ToolError(
                "a worker process was killed, perhaps for want of memory; try --workers 1, or a lower "
                "--max-file-bytes",
                code=ExitCode.RETRYABLE,
            ) from exc
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _by_ray(tasks: Tasks, settings: Settings) -> Iterator[Part]:
    """Ray Data over the tasks; the spool beside the output must be a folder that all machines share."""
    require("ray", "ray")
    import ray

    ray.data.DataContext.get_current().execution_options.preserve_order = True
    rows = [{"number": number, "task": list(task)} for number, task in enumerate(tasks)]
    data = ray.data.from_items(rows, override_num_blocks=max(len(rows), 1))
    made = data.map(lambda row: {"part": prepare(row["number"], row["task"], settings)})
    yield from sorted((row["part"] for row in made.iter_rows()), key=lambda part: part.number)
