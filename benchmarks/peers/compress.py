"""One compression by one engine, timed; run by the Python of its environment (see compress_peers.py).

    ENV/bin/python benchmarks/peers/compress.py '{"engine": "llmcompressor", "method": "gptq", ...}'

Timed is what a user waits for once the libraries are imported: reading the model, calibrating, compressing
and writing. Prints one JSON line with seconds, CPU seconds and the peak of resident memory.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Work = Callable[[], None]


def tuneutils(wanted: dict[str, Any]) -> Work:
    """Our command, in this process; tokenizing the records is part of it."""
    import transformers.models.llama.modeling_llama  # noqa: F401 - as a peer's import of transformers

    if wanted["method"] in ("gptq", "awq"):
        import tuneutils.tools.quantize.quantize
        from tuneutils.tools.quantize.cli import main

        args = [wanted["model"], "--scheme", wanted["method"], "--group-size", str(wanted["group_size"])]
        args += ["--symmetric"] if wanted["symmetric"] else []
        args += ["--calibration", wanted["records"]]
    else:
        import tuneutils.tools.prune.prune  # noqa: F401
        from tuneutils.tools.prune.cli import main

        args = [wanted["records"], "-m", wanted["model"], "--method", wanted["method"], "--no-speed"]
    args += ["--calibration-rows", str(wanted["rows"]), "--calibration-length", str(wanted["length"])]
    args += ["--dtype", wanted["dtype"], "-o", wanted["out"], "-q"]
    return lambda: main(args, standalone_mode=False)


def llmcompressor(wanted: dict[str, Any]) -> Work:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from llmcompressor.modifiers.pruning.wanda.base import WandaPruningModifier
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

    linears = {"targets": ["Linear"], "ignore": ["lm_head"]}
    pruned: dict[str, Any] = {
        "sparsity": 0.5,
        "mask_structure": "0:0",
        "targets": [r"re:model.layers.\d+$"],
    }
    weights = {
        "num_bits": 4, "type": "int", "strategy": "group", "group_size": wanted["group_size"],
        "symmetric": wanted["symmetric"],
    }  # fmt: skip
    recipe: Any = {
        "gptq": lambda: GPTQModifier(
            config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, **linears
        ),
        "wanda": lambda: WandaPruningModifier(**pruned),
        "sparsegpt": lambda: SparseGPTModifier(**pruned),
    }[wanted["method"]]()

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(wanted["model"], dtype=getattr(torch, wanted["dtype"]))
        tokenizer = AutoTokenizer.from_pretrained(wanted["model"])
        ids = json.loads(Path(wanted["ids"]).read_text())
        data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
        oneshot(
            model=model, processor=tokenizer, dataset=data, recipe=recipe, max_seq_length=wanted["length"],
            num_calibration_samples=wanted["rows"], batch_size=wanted["batch"],
            data_collator=default_data_collator,
        )  # fmt: skip
        model.save_pretrained(wanted["out"], save_compressed=wanted["method"] == "gptq")
        tokenizer.save_pretrained(wanted["out"])

    return work


def gptqmodel(wanted: dict[str, Any]) -> Work:
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=wanted["group_size"], sym=wanted["symmetric"])

    def work() -> None:
        model = GPTQModel.load(wanted["model"], config, dtype=getattr(torch, wanted["dtype"]))
        ids = json.loads(Path(wanted["ids"]).read_text())
        model.quantize(
            [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids], batch_size=wanted["batch"]
        )
        model.save(wanted["out"])

    return work


def plain(folder: str) -> None:
    """GPTQModel's own dequantization beside its result, into ``FOLDER-plain``."""
    import shutil

    import torch
    from gptqmodel.utils.model_dequant import dequantize_model

    shutil.rmtree(f"{folder}-plain", ignore_errors=True)
    dequantize_model(folder, f"{folder}-plain", target_dtype=torch.float32)


def main() -> int:
    wanted = json.loads(sys.argv[1])
    os.environ["HF_HUB_OFFLINE"] = "1"
    work = {"tuneutils": tuneutils, "llmcompressor": llmcompressor, "gptqmodel": gptqmodel}[wanted["engine"]]
    ready = work(wanted)
    started, cpu = time.perf_counter(), time.process_time()
    ready()
    found = {
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if wanted["engine"] == "gptqmodel":
        plain(wanted["out"])
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
