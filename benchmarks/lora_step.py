"""A LoRA training step by lora-tune and by TRL's SFTTrainer: real tokens a second, peak memory growth.

    python benchmarks/lora_step.py --model artifacts/base --data artifacts/data/instructions/train.jsonl
    python benchmarks/lora_step.py --records 64 --repeats 5 --out lora_step.json

Both learn the same token ids and labels for two epochs, batch, length limit and rank alike, each run in a
process of its own, the engines in turn; medians are printed. The second epoch is timed, so that warming up
and compiling are left out: by the clock, and by the process's CPU time, whose ratio other work on the machine
disturbs less. Tokens are those of the records; padding counts as nothing. Memory growth is the
peak resident size of training above the resident size with the model loaded and its weights touched.

TRL runs with its defaults, and with the fastest of several settings, which one run each chooses (or --best).
FLOPs are those that the step needs: the frozen layers forward and with respect to their inputs, LoRA's
products, causal attention, the output projection of labelled tokens; nothing recomputed. The share is of
the rate that plain matrix products of the model's own shapes reach in bfloat16 with as many threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tuneutils.shared.device  # noqa: F401  sets the thread policy before torch loads

import torch  # isort: skip

#: TRL settings on top of its defaults; what the search chooses from.
TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "bf16-weights": {"dtype": "bfloat16"},
    "bf16-weights+by-length": {"dtype": "bfloat16", "train_sampling_strategy": "group_by_length"},
    "no-checkpointing": {"gradient_checkpointing": False},
    "bf16-weights+no-checkpointing": {"dtype": "bfloat16", "gradient_checkpointing": False},
    "bf16-weights+no-checkpointing+by-length": {
        "dtype": "bfloat16",
        "gradient_checkpointing": False,
        "train_sampling_strategy": "group_by_length",
    },
    "pure-bf16+no-checkpointing+by-length": {
        "dtype": "bfloat16",
        "bf16": False,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "group_by_length",
    },
    "bf16-weights+no-checkpointing+by-length+compile": {
        "dtype": "bfloat16",
        "gradient_checkpointing": False,
        "train_sampling_strategy": "group_by_length",
        "torch_compile": True,
    },
}


def status_bytes(key: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def start_of_growth(model: torch.nn.Module) -> int:
    """Resident bytes with every weight in memory; the peak is counted from here on."""
    for tensor in model.state_dict().values():
        tensor.view(torch.uint8).sum()
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def encoded(args: argparse.Namespace) -> list[Any]:
    """The first records' token ids and labels, as lora-tune makes them."""
    from tuneutils.shared.models import load_tokenizer
    from tuneutils.shared.records import Reader
    from tuneutils.shared.supervise import encode

    tokenizer = load_tokenizer(args.model)
    reader = Reader([args.data], formats=("prompt-completion", "messages", "text"))
    made = [encode(record, tokenizer) for record in itertools.islice(reader, args.records)]
    for example in made:
        del example.input_ids[args.max_length :], example.labels[args.max_length :]
    return [example for example in made if example.learnt]


def clock() -> Any:
    """A callback whose ``ends`` are clock and CPU seconds at the end of each step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ends: list[tuple[float, float]] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append((time.perf_counter(), time.process_time()))

    return Clock()


def result(
    args: argparse.Namespace, examples: list[Any], ends: list[tuple[float, float]], base: int
) -> dict[str, float]:
    steps = -(-len(examples) // args.batch)
    assert len(ends) == 2 * steps, f"{len(ends)} steps logged, {2 * steps} expected"
    seconds, cpu_seconds = (ends[-1][i] - ends[steps - 1][i] for i in range(2))
    tokens = sum(len(e) for e in examples)
    return {
        "tokens_per_s": tokens / seconds,
        "tokens_per_cpu_s": tokens / cpu_seconds,
        "seconds_per_step": seconds / steps,
        "peak_growth_bytes": status_bytes("VmHWM") - base,
    }


def run_ours(args: argparse.Namespace) -> dict[str, float]:
    """The command itself, with its model loading watched for the memory that training starts from."""
    from tuneutils.shared import fitting, tuning
    from tuneutils.tools.lora_tune import cli

    loaded: list[int] = []
    load = tuning.load_base

    def watched(*given: Any, **keywords: Any) -> Any:
        model = load(*given, **keywords)
        loaded.append(start_of_growth(model))
        return model

    ticks, callbacks = clock(), fitting._callbacks
    tuning.load_base = watched
    fitting._callbacks = lambda *given: [*callbacks(*given), ticks]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "records.jsonl")
        lines = Path(args.data).read_text(encoding="utf-8").splitlines(keepends=True)
        data.write_text("".join(lines[: args.records]), encoding="utf-8")
        command = [str(data), "-m", args.model, "-o", f"{folder}/adapter", "--epochs", "2"]
        command += ["--batch-size", str(args.batch), "--max-length", str(args.max_length)]
        command += ["--too-long", "truncate", "--lora-rank", str(args.rank), "--dtype", args.dtype]
        command += ["--gradient-checkpointing"] if args.task == "lora-tune+checkpointing" else []
        command += ["--checkpoint-every", "0", "--learning-rate", "2e-4", "-q"]
        cli.main(command, standalone_mode=False)
    return result(args, encoded(args), ticks.ends, loaded[0])


def run_trl(args: argparse.Namespace) -> dict[str, float]:
    """SFTTrainer with one of the settings, on the same ids and labels."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from tuneutils.shared.models import load_tokenizer

    settings = dict(TRL_SETTINGS[args.task.removeprefix("trl:")])
    dtype = getattr(torch, settings.pop("dtype", "float32"))
    ticks, examples = clock(), encoded(args)
    rows = Dataset.from_list([{"input_ids": e.input_ids, "labels": e.labels} for e in examples])
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    base = start_of_growth(model)
    with tempfile.TemporaryDirectory() as folder:
        config = {"output_dir": folder, "num_train_epochs": 2, "per_device_train_batch_size": args.batch}
        config |= {"max_length": args.max_length, "save_strategy": "no", "report_to": [], "use_cpu": True}
        config |= {"logging_steps": 1, "learning_rate": 2e-4, "disable_tqdm": True}
        trainer = SFTTrainer(
            model,
            SFTConfig(**(config | settings)),
            train_dataset=rows,
            processing_class=load_tokenizer(args.model),
            peft_config=LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"),
            callbacks=[ticks],
        )
        trainer.train()
    return result(args, examples, ticks.ends, base)


def linear_shapes(model: str) -> tuple[list[tuple[int, int]], tuple[int, int], Any]:
    """``(out, in)`` of the layers' linear modules and of the output projection, and the config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    head = empty.get_output_embeddings()
    found = [m for m in empty.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return [tuple(m.weight.shape) for m in found], tuple(head.weight.shape), config


def run_flops(args: argparse.Namespace) -> dict[str, float]:
    """FLOPs of one epoch, and the rate of the products of the model's shapes over a batch's tokens."""
    shapes, (vocabulary, hidden), config = linear_shapes(args.model)
    examples = encoded(args)
    tokens = sum(len(e) for e in examples)
    labelled = sum(e.learnt for e in examples)
    linear = sum(o * i for o, i in shapes)
    low_rank = sum(args.rank * (o + i) for o, i in shapes)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim * config.num_hidden_layers
    # Two products forward and five backward over the lower triangle: 7 x 2 x T^2 / 2 x width.
    attention = sum(7 * len(e) ** 2 * width for e in examples)
    flops = tokens * (4 * linear + 6 * low_rank) + attention + labelled * 4 * vocabulary * hidden
    rows = args.batch * tokens // len(examples)
    work = seconds = 0.0
    for (out, into), count in {s: shapes.count(s) for s in shapes}.items():
        x, weight = torch.randn(rows, into).bfloat16(), torch.randn(out, into).bfloat16()
        y = torch.randn(rows, out).bfloat16()
        for a, b in ((x, weight.t()), (y, weight)):
            times = []
            for _ in range(12):
                start = time.perf_counter()
                a @ b
                times.append(time.perf_counter() - start)
            seconds += count * statistics.median(times[2:])
            work += count * 2.0 * rows * out * into
    return {
        "epoch_flops": flops,
        "matmul_flops_per_s": work / seconds,
        "tokens": tokens,
        "labelled": labelled,
    }


def in_subprocess(task: str) -> dict[str, float]:
    """One task in a process of its own; its last line is the result."""
    command = [sys.executable, __file__, *sys.argv[1:], "--task", task]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{task} failed:\n{done.stderr[-2000:]}")
    made: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return made


def search() -> str:
    """The fastest TRL setting, by one run each."""
    found: dict[str, float] = {}
    for name in TRL_SETTINGS:
        if name == "default":
            continue
        try:
            found[name] = in_subprocess(f"trl:{name}")["tokens_per_cpu_s"]
            print(f"search {name:52} {found[name]:8.0f} tokens/CPU s", flush=True)
        except SystemExit as exc:
            print(f"search {name:52} fails: {str(exc).splitlines()[-1][:100]}", flush=True)
    return max(found, key=found.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="artifacts/base")
    parser.add_argument(
        "--data", default="artifacts/data/instructions/train.jsonl", help="a JSONL of records"
    )
    parser.add_argument("--records", type=int, default=64, help="how many of them, from the first")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="auto", help="of lora-tune")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--best", choices=list(TRL_SETTINGS), help="TRL's best settings; searched if not given"
    )
    parser.add_argument("--checkpointing", action="store_true", help="also lora-tune with it")
    parser.add_argument("--out", help="a JSON file for the result")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        runner = {"flops": run_flops, "trl": run_trl}.get(args.task.partition(":")[0], run_ours)
        print(json.dumps(runner(args)))
        return

    best = args.best or search()
    engines = ["lora-tune", "trl:default", f"trl:{best}"]
    engines += ["lora-tune+checkpointing"] if args.checkpointing else []
    runs: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    for _ in range(args.repeats):
        for engine in engines:
            runs[engine].append(in_subprocess(engine))
    flops = in_subprocess("flops")
    report(args, runs, flops)


def report(
    args: argparse.Namespace, runs: dict[str, list[dict[str, float]]], flops: dict[str, float]
) -> None:
    """The table, and the same as JSON."""
    median = {e: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for e, rs in runs.items()}
    ours = median["lora-tune"]
    rate = flops["matmul_flops_per_s"]
    print(
        f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{args.records} records, {flops['tokens']} tokens, batch {args.batch}, rank {args.rank}")
    print(f"matrix products of the model's shapes: {rate / 1e12:.2f} TFLOP/s in bfloat16")
    print(f"{'':50} tokens/s  ours/it  tokens/CPU s  ours/it  growth MiB  ours/it  share of rate")
    for engine, row in median.items():
        row["cpu_ratio"] = ours["tokens_per_cpu_s"] / row["tokens_per_cpu_s"]
        row["speed_ratio"] = ours["tokens_per_s"] / row["tokens_per_s"]
        row["memory_ratio"] = ours["peak_growth_bytes"] / row["peak_growth_bytes"]
        row["rate_share"] = flops["epoch_flops"] / flops["tokens"] * row["tokens_per_s"] / rate
        print(
            f"{engine:50} {row['tokens_per_s']:8.0f} {row['speed_ratio']:8.2f} "
            f"{row['tokens_per_cpu_s']:13.0f} {row['cpu_ratio']:8.2f} "
            f"{row['peak_growth_bytes'] / 2**20:11.0f} {row['memory_ratio']:8.2f} {row['rate_share']:14.1%}"
        )
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "task", "model", "data")}
        Path(args.out).write_text(
            json.dumps({"settings": settings, "flops": flops, "medians": median, "runs": runs}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
