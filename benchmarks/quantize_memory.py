"""Peak memory of quantizing a model, against one copy of it and one layer, in the precision it is stored in.

    python benchmarks/quantize_memory.py --out quantize_memory.json
    python benchmarks/quantize_memory.py --model artifacts/base --scheme gptq

Each measurement is a process of its own. Growth is the highest resident memory (VmHWM) minus what the process
held once torch, Transformers and the tool were imported and a model of one layer had been quantized; medians
are printed. Without --model, a Llama of random weights in bfloat16 is made. Beside it, the calibration's
hidden states, which a walk through the layers holds once: rows x length x hidden size, in float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SCHEMES = ("rtn", "nf4", "gptq", "awq")
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def resident_peak() -> int:
    """VmHWM of this process, in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("no VmHWM in /proc/self/status: this benchmark needs Linux")


def make_model(folder: Path, layers: int, hidden: int) -> Path:
    """A random Llama in bfloat16 with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

    import torch  # isort: skip

    config = LlamaConfig(
        vocab_size=2048, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def measure(given: dict[str, Any]) -> dict[str, float]:
    """In the child: quantize the small model, then the large one."""
    from tuneutils.tools.quantize.cli import main as tool

    for model in (given["small"], given["model"]):
        before = resident_peak()
        args = [model, "--scheme", given["scheme"], "-q", "-o", f"{given['out']}/{Path(model).name}"]
        if given["scheme"] in ("gptq", "awq"):
            args += ["--calibration", given["records"], "--calibration-rows", str(given["rows"])]
            args += ["--calibration-length", str(given["length"])]
        tool([*args, "--dtype", "float32"], standalone_mode=False)
    return {"peak_growth_bytes": resident_peak() - before}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--scheme", action="append", choices=SCHEMES, help="only these")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rows", type=int, default=16, help="calibration rows")
    parser.add_argument("--length", type=int, default=128, help="tokens of a calibration row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(json.loads(args.measure))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = args.model or make_model(work / "model", args.layers, args.hidden)
        config = json.loads((model / "config.json").read_text())
        small = make_model(work / "small", 1, 256)
        records = work / "records.jsonl"
        line = json.dumps({"text": " ".join(WORDS * 20)})
        records.write_text(f"{line}\n" * (args.rows * args.length // 100))
        copy = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        found: dict[str, list[int]] = {scheme: [] for scheme in args.scheme or SCHEMES}
        for repeat in range(args.repeats):
            for scheme, growths in found.items():
                given = {
                    "model": str(model), "small": str(small), "scheme": scheme, "records": str(records),
                    "out": str(work / f"{scheme}-{repeat}"), "rows": args.rows, "length": args.length,
                }  # fmt: skip
                command = [sys.executable, __file__, "--measure", json.dumps(given)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr)
                growths.append(json.loads(done.stdout.splitlines()[-1])["peak_growth_bytes"])
    states = args.rows * args.length * config["hidden_size"] * 4
    print(f"one copy {copy / 2**20:.0f} MiB, {config['num_hidden_layers']} layers; hidden states of the")
    print(f"calibration {states / 2**20:.0f} MiB; medians of {args.repeats}")
    for scheme, growths in found.items():
        growth = statistics.median(growths)
        print(f"{scheme:6} +{growth / 2**20:6.0f} MiB  {growth / copy:.2f} × one copy")
    if args.out:
        args.out.write_text(json.dumps({"copy": copy, "states": states, "growth": found}, indent=2) + "\n")
    return 0 if all(statistics.median(g) <= copy for g in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
