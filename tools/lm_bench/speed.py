"""Speed and memory of one model, measured in a process of its own so that the peaks are the model's.

These numbers change from run to run: they go to the run log, the table and ``--json``, never into a report.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tuneutils.shared.command import Run
from tuneutils.shared.engines.protocol import peak_rss_bytes
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.tools.lm_bench.params import Params

if TYPE_CHECKING:
    from tuneutils.shared.models import Loaded


def measure_apart(run: Run[Params], label: str, path: str) -> dict[str, Any]:
    """Load time, peak memory, time to first token, prefill and decode rates of a model.

    The top-level rates are those of the first prompt length and batch size; ``speed`` has them all.

    Raises:
        ToolError: naming the model.
    """
    params = run.params
    wanted = {
        "path": path,
        "device": run.device,
        "dtype": run.dtype,
        "seed": run.seed,
        "prompts": params.speed_prompt,
        "batches": params.speed_batch,
        "tokens": params.speed_tokens,
        "repeats": params.repeats,
        "trust_remote_code": params.trust_remote_code,
    }
    run.log.info("%s: speed and memory", label)
    done = subprocess.run(
        [sys.executable, "-m", "tuneutils.tools.lm_bench.speed", json.dumps(wanted)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"]
        known = done.returncode in list(ExitCode)
        raise ToolError(
            f"{label} ({path}): speed measurement failed: {lines[-1]}",
            code=ExitCode(done.returncode) if known else ExitCode.RETRYABLE,
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(wanted: dict[str, Any]) -> dict[str, Any]:
    """The measurement itself, in this process; keys as :func:`measure_apart` passes them."""
    from tuneutils.tools.lm_bench.edge import is_edge

    if is_edge(wanted["path"]):
        return _measure_edge(wanted)
    from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads
    import torch  # isort: skip
    import peft  # noqa: F401 - so that no import counts as loading
    import transformers.generation  # noqa: F401

    from tuneutils.shared.models import load_model

    started = time.perf_counter()
    loaded = load_model(
        wanted["path"],
        device=wanted["device"],
        dtype=wanted["dtype"],
        trust_remote_code=wanted["trust_remote_code"],
    )
    _synchronize(loaded)
    load_s = time.perf_counter() - started
    rows = [
        _rates(loaded, prompt, batch, wanted["tokens"], wanted["repeats"], wanted["seed"])
        for prompt in wanted["prompts"]
        for batch in wanted["batches"]
    ]
    out: dict[str, Any] = {
        "load_s": load_s,
        **{k: rows[0][k] for k in rows[0] if k not in ("prompt", "batch")},
    }
    out.update(weight_bytes=_weight_bytes(loaded))
    out.update(peak_rss_bytes=peak_rss_bytes(), threads=torch.get_num_threads(), device=loaded.device.type)
    if loaded.device.type == "cuda":
        out["peak_cuda_bytes"] = torch.cuda.max_memory_allocated(loaded.device)
    return {**out, "repeats": wanted["repeats"], "speed": rows}


def _rates(loaded: Loaded, prompt: int, batch: int, tokens: int, repeats: int, seed: int) -> dict[str, float]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    vocabulary = min(len(loaded.tokenizer), loaded.model.config.get_text_config().vocab_size)
    ids = torch.randint(0, vocabulary, (batch, prompt), generator=generator).to(loaded.device)
    mask = torch.ones_like(ids)

    def prefill() -> None:
        loaded.model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)

    def generate(count: int) -> Callable[[], None]:
        def call() -> None:
            loaded.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=loaded.pad_id,
            )

        return call

    with torch.inference_mode():
        prefill_s = _seconds(loaded, prefill, repeats)
        ttft_s = _seconds(loaded, generate(1), repeats)
        whole_s = _seconds(loaded, generate(tokens), repeats)
    first = statistics.median(ttft_s)
    step_s = [max(whole - first, 1e-9) / (tokens - 1) for whole in whole_s]
    return rates(prompt, batch, ttft_s, prefill_s, step_s)


def rates(
    prompt: int, batch: int, ttft_s: list[float], prefill_s: list[float], step_s: list[float]
) -> dict[str, float]:
    """Medians over repeats, and the least and largest of them as ``_low`` and ``_high``."""
    out: dict[str, float] = {"prompt": prompt, "batch": batch}
    for name, values in (
        ("ttft_s", ttft_s),
        ("prefill_tokens_per_s", [batch * prompt / s for s in prefill_s]),
        ("decode_tokens_per_s", [batch / s for s in step_s]),
        ("decode_ms_per_token", [1000 * s / batch for s in step_s]),
    ):
        out.update({name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)})
    return out


def _seconds(loaded: Loaded, call: Callable[[], None], repeats: int) -> list[float]:
    """Seconds of each repeat of a call after one that warms up."""
    call()
    times = []
    for _ in range(repeats):
        _synchronize(loaded)
        started = time.perf_counter()
        call()
        _synchronize(loaded)
        times.append(time.perf_counter() - started)
    return times


def _weight_bytes(loaded: Loaded) -> int:
    """What one decoded token reads: every weight but the rows of an embedding that is no head as well."""
    model = loaded.model
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and embedding.weight.data_ptr() != head.weight.data_ptr():
        total -= embedding.weight.numel() * embedding.weight.element_size()
    return total


def _measure_edge(wanted: dict[str, Any]) -> dict[str, Any]:
    """A package in its runtime, by the same keys; this process only waits."""
    from pathlib import Path

    from tuneutils.shared.artifact import load_manifest
    from tuneutils.shared.engines.client import EngineProcess

    folder = Path(wanted["path"])
    manifest = load_manifest(folder)
    edge, metrics = manifest["edge"], manifest["metrics"]
    rows = []
    with EngineProcess(edge["engine"], folder / edge["model"]) as engine:
        for prompt in wanted["prompts"]:
            for batch in wanted["batches"]:
                found = engine.ask(
                    "speed", prompt=prompt, batch=batch, tokens=wanted["tokens"], repeats=wanted["repeats"],
                    seed=wanted["seed"], vocabulary=engine.vocabulary,
                )  # fmt: skip
                rows.append(rates(prompt, batch, found["prefill_s"], found["prefill_s"], found["step_s"]))
        peak = engine.ask("memory")["peak_rss_bytes"]
        info = engine.info
    return {
        "load_s": info["load_s"],
        **{k: v for k, v in rows[0].items() if k not in ("prompt", "batch")},
        "weight_bytes": metrics["weight_bytes"],
        "peak_rss_bytes": peak,
        "threads": info["threads"],
        "device": "cpu",
        "engine": f"{info['engine']} {info['version']}",
        "repeats": wanted["repeats"],
        "speed": rows,
    }


def _synchronize(loaded: Loaded) -> None:
    if loaded.device.type == "cuda":
        import torch

        torch.cuda.synchronize(loaded.device)


def _main() -> int:
    try:
        found = measure(json.loads(sys.argv[1]))
    except ToolError as exc:
        print(exc, file=sys.stderr)
        return exc.code
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
