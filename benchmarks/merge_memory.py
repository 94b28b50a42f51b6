"""Peak memory of merging an adapter into its base, against the largest shard and beside PEFT's own merge.

    python benchmarks/merge_memory.py --out merge_memory.json
    python benchmarks/merge_memory.py --base artifacts/base --adapter artifacts/lora

Each measurement is a process of its own, the kinds in turn. Growth is the highest resident memory (VmHWM)
minus what the process held after importing torch, transformers, peft and the model's class; medians are
printed. Without --base, a Llama of 266M parameters in bfloat16 is made in shards of 100 MB, with a LoRA on
all its linear layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tuneutils.shared.device  # noqa: F401  sets the thread policy before torch loads

import torch  # isort: skip

KINDS = ("streamed", "streamed-dora", "checked", "peft")


def resident_peak() -> int:
    """VmHWM of this process, in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("no VmHWM in /proc/self/status: this benchmark needs Linux")


def make_model(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12,
        num_attention_heads=16, num_key_value_heads=4,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size="100MB")
    return folder


def make_adapter(base: Path, folder: Path, dora: bool) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    config = LoraConfig(r=16, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    adapted.save_pretrained(folder)
    return folder


def merge_by_peft(base: Path, adapter: Path, out: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out, max_shard_size="100MB")


def measure(kind: str, base: Path, adapter: Path, out: Path) -> dict[str, float]:
    import peft  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM

    from tuneutils.tools.adapter_merge.cli import main as tool

    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))

    before = resident_peak()
    start = time.perf_counter()
    if kind == "peft":
        merge_by_peft(base, adapter, out)
    else:
        check = [] if kind == "checked" else ["--no-check"]
        tool([str(adapter), "-m", str(base), "-o", str(out), "-q", *check], standalone_mode=False)
    return {"seconds": time.perf_counter() - start, "peak_growth_bytes": resident_peak() - before}


def run_one(kind: str, args: argparse.Namespace, base: Path, adapter: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        command = [
            sys.executable, __file__, "--measure", kind, "--base", str(base), "--adapter", str(adapter),
            "--tmp", str(Path(folder) / "out"),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tmp", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.base, args.adapter, args.tmp)))
        return
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        base = args.base or make_model(Path(folder) / "base")
        adapters = {
            "lora": args.adapter or make_adapter(base, Path(folder) / "lora", dora=False),
            "dora": make_adapter(base, Path(folder) / "dora", dora=True),
        }
        kinds = [k for k in KINDS if k != "checked" or (base / "tokenizer_config.json").is_file()]
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for _ in range(args.repeats):
            for kind in kinds:
                adapter = adapters["dora" if kind.endswith("dora") else "lora"]
                found[kind].append(run_one(kind, args, base, adapter))
        largest = max(p.stat().st_size for p in base.glob("*.safetensors"))
        shards = len(list(base.glob("*.safetensors")))
    report = {"shards": shards, "largest_shard_bytes": largest, "kinds": {}}
    print(f"{shards} shards, the largest {largest / 2**20:.0f} MiB; medians of {args.repeats}")
    for kind, runs in found.items():
        growth = statistics.median(r["peak_growth_bytes"] for r in runs)
        seconds = statistics.median(r["seconds"] for r in runs)
        report["kinds"][kind] = {"peak_growth_bytes": growth, "ratio": growth / largest, "seconds": seconds}
        ratio = growth / largest
        print(f"{kind:14} +{growth / 2**20:7.0f} MiB  {ratio:5.2f} × largest shard  {seconds:6.1f} s")
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
