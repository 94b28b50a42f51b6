"""Adapters put on top of each other, without training."""

from __future__ import annotations

from typing import Any

from tuneutils.shared.command import Run
from tuneutils.shared.models import load_tokenizer, model_input
from tuneutils.tools.adapter_fuse.adapters import names_of, open_adapters
from tuneutils.tools.adapter_fuse.params import StackParams


def stack(run: Run[StackParams]) -> dict[str, Any]:
    """Run ``adapter-fuse stack``; returns the summary.

    Raises:
        ToolError: adapters that cannot be stacked; nothing is written then.
    """
    refs = open_adapters(run.inputs)
    base = refs[0].root
    # The base is an input, by which the result is found to fit it; its weights are not read.
    inputs = [model_input(base.given), *(model_input(ref.given, "adapter") for ref in refs)]
    with run.artifact("adapter", inputs) as art:
        from tuneutils.shared.adapters.fusion.compose import read_part, write_parts

        names = names_of(refs)
        parts = [read_part(ref.path, name) for ref, name in zip(refs, names, strict=True)]
        write_parts(art.dir, parts, "stack", base.path, base.revision)
        art.licence = inputs[0].licence
        art.extra.update(method="stack", adapters=names)
        if refs[0].quantization:
            art.extra["quantization"] = refs[0].quantization
        load_tokenizer(refs[-1]).save_pretrained(art.dir)
        art.metrics["adapters"] = len(parts)
    return {"output": run.output, "metrics": art.metrics}
