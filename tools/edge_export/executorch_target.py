"""ExecuTorch's ``.pte`` for XNNPACK, from the source's own folder."""

from __future__ import annotations

import json

from tuneutils.shared.engines.runtimes import require_engine
from tuneutils.shared.errors import ToolError
from tuneutils.tools.edge_export.children import run_child
from tuneutils.tools.edge_export.export import Built, Job
from tuneutils.tools.edge_export.gguf_model import tensor_types

MODEL = "model.pte"
#: The file holds its key-value cache's size; a long one is paid for at every token.
LONGEST = 2048
#: Weights that share a scale in int4; the same in ``shared/engines/executorch_pte.py``.
GROUP = 32


def build(job: Job) -> Built:
    """Write ``model.pte``."""
    require_engine("executorch")
    if job.scheme == "int4":
        _check_widths(job)
    context = min(int(job.weights.config.get("max_position_embeddings") or LONGEST), LONGEST)
    target = job.folder / MODEL
    command = ["tuneutils.shared.engines.executorch_pte", "convert", str(job.weights.folder), str(target)]
    run_child([*command, job.scheme, str(context)], job.environment, "ExecuTorch cannot write the model")
    listed = target.with_suffix(".types.json")
    rows = [tuple(row) for row in json.loads(listed.read_text(encoding="utf-8"))]
    listed.unlink()
    return Built("executorch", MODEL, tensor_types(rows), "executorch.py", context)


def _check_widths(job: Job) -> None:
    """Rows of the linear layers must be whole groups."""
    for key in ("hidden_size", "intermediate_size"):
        width = int(job.weights.config.get(key) or 0)
        if width % GROUP:
            raise ToolError(
                f"{job.weights.given}: {key} {width} is no multiple of {GROUP}, the weights of a scale "
                "in int4; take --scheme int8"
            )
