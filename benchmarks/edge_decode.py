"""Decoding from edge packages beside Transformers in bfloat16, and the share of the memory bandwidth reached.

    python benchmarks/edge_decode.py --base artifacts/base --heldout artifacts/data/general/records.jsonl
    python benchmarks/edge_decode.py --layers 16 --out edge_decode.json    # and random weights of 1.2B

Each engine runs in a process of its own, the engines in turn, ``--rounds`` times; medians are printed. The
small weights stay in a large cache, so the share of the bandwidth is measured on random weights of 1B and
more (``--layers`` of a Llama 2048 wide). A share above 100 % fails the run. Needs ``edge-export runtime``.
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

SCHEMES = {"gguf": ("bf16", "q8-0", "q4-0"), "onnx": ("int8", "int4"), "openvino": ("q8-0",)}
GOALS = {"gguf q8-0": 10.0, "gguf q4-0": 15.0}
SHARES = {"gguf bf16": 0.65, "gguf q8-0": 0.85, "gguf q4-0": 0.70}


def export(model: Path, heldout: Path, target: str, scheme: str, out: Path, *, gate: bool) -> dict[str, Any]:
    """Make a package; returns its metrics. ``gate``: the default thresholds, else none."""
    command = [sys.executable, "-m", "tuneutils.tools.edge_export.cli", str(model), "--heldout", str(heldout)]
    command += ["--target", target, "--scheme", scheme, "-o", str(out), "-q"]
    loose = ["--min-agreement", "0", "--max-kl", "1e9", "--parity-tokens", "16"]
    subprocess.run(command + (["--parity-tokens", "4096"] if gate else loose), check=True)
    return dict(json.loads((out / "artifact.json").read_text(encoding="utf-8"))["metrics"])


def speed(path: Path, prompt: int, tokens: int, repeats: int) -> dict[str, Any]:
    """lm-bench's measurement of one model in a process of its own."""
    wanted = {
        "path": str(path), "device": "cpu", "dtype": "bfloat16", "seed": 0, "prompts": [prompt],
        "batches": [1], "tokens": tokens, "repeats": repeats, "trust_remote_code": False,
    }  # fmt: skip
    command = [sys.executable, "-m", "tuneutils.tools.lm_bench.speed", json.dumps(wanted)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def bandwidth() -> dict[str, Any]:
    command = [sys.executable, "-m", "tuneutils.tools.lm_bench.bandwidth"]
    return dict(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))


def random_llama(folder: Path, tokenizer: Path, layers: int) -> Path:
    """A Llama 2048 wide with random bfloat16 weights and the base's tokenizer; untied, 1B and more."""
    import tuneutils.shared.device  # noqa: F401 - sets the thread policy before torch loads

    import torch  # isort: skip
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    known = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=len(known), hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2048,
        bos_token_id=known.bos_token_id, eos_token_id=known.eos_token_id, pad_token_id=known.pad_token_id,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.model.rotary_emb.__init__(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder)
    known.save_pretrained(folder)
    return folder


def measure(models: dict[str, Path], rounds: int, prompt: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Every model in turn, the bandwidth between them."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    limits = [bandwidth()]
    for _ in range(rounds):
        for name, path in models.items():
            row = speed(path, prompt, tokens, repeats)
            limits.append(bandwidth())
            row["limit"] = max(limit["bytes_per_s"] for limit in limits[-2:])
            found[name].append(row)
            print(f"  {name}: {row['decode_tokens_per_s']:.1f} tokens/s", file=sys.stderr)
    return {"rows": found, "cache_bytes": limits[0]["cache_bytes"], "limits": limits}


def summary(measured: dict[str, Any], parity: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians, the ratio to Transformers (paired by round), the share of the bandwidth."""
    rows = measured["rows"]
    base = [r["decode_tokens_per_s"] for r in rows["transformers bf16"]]
    first = [r["prefill_tokens_per_s"] for r in rows["transformers bf16"]]
    out = []
    for name, runs in rows.items():
        decode = [r["decode_tokens_per_s"] for r in runs]
        ratios = [d / b for d, b in zip(decode, base, strict=True)]
        prefill = [r["prefill_tokens_per_s"] / b for r, b in zip(runs, first, strict=True)]
        cached = runs[0]["weight_bytes"] <= measured["cache_bytes"]
        shares = [r["weight_bytes"] * r["decode_tokens_per_s"] / r["limit"] for r in runs]
        share = None if cached else statistics.median(shares)
        if share is not None and share > 1:
            raise SystemExit(
                f"{name}: {share:.0%} of the measured bandwidth; the machine is too busy to measure"
            )
        made = parity.get(name, {})
        out.append(
            {
                "engine": name,
                "decode_tokens_per_s": statistics.median(decode),
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
                "prefill_ratio": statistics.median(prefill),
                "share": share,
                "bits_per_weight": made.get("bits_per_weight"),
                "agreement": made.get("agreement", {}).get("value"),
                "kl": made.get("kl", {}).get("value"),
            }
        )
    return out


def show(rows: list[dict[str, Any]], limit: float) -> None:
    print(f"memory bandwidth: {limit / 1e9:.1f} GB/s")
    print("| engine | bits | agreement | KL | tokens/s | against Transformers bf16 | prefill | bandwidth |")
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        cells = [
            r["engine"],
            *("" if r[k] is None else f"{r[k]:.4g}" for k in ("bits_per_weight", "agreement", "kl")),
            f"{r['decode_tokens_per_s']:.1f}",
            f"{r['ratio']:.2f}× [{r['ratio_low']:.2f}, {r['ratio_high']:.2f}]",
            f"{r['prefill_ratio']:.2f}×",
            "in cache" if r["share"] is None else f"{r['share']:.0%}",
        ]
        print("| " + " | ".join(cells) + " |")
    for r in rows:
        goals, found = (GOALS, r["ratio"]) if r["share"] is None else (SHARES, r["share"])
        if (goal := goals.get(r["engine"])) is not None:
            print(f"{r['engine']}: goal {goal:g}, found {found:.3g}: {'met' if found >= goal else 'missed'}")


def run(
    model: Path, heldout: Path, targets: dict[str, tuple[str, ...]], gate: bool, options: argparse.Namespace
) -> Any:
    with tempfile.TemporaryDirectory() as temporary:
        root = str(options.packages or temporary)
        models = {"transformers bf16": model}
        parity = {}
        for target, schemes in targets.items():
            for scheme in schemes:
                name = f"{target} {scheme}"
                models[name] = Path(root) / f"{target}-{scheme}"
                parity[name] = export(model, heldout, target, scheme, models[name], gate=gate)
        measured = measure(models, options.rounds, options.prompt, options.tokens, options.repeats)
    rows = summary(measured, parity)
    show(rows, max(limit["bytes_per_s"] for limit in measured["limits"]))
    return {"rows": rows, **measured}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, default=Path("artifacts/base"))
    parser.add_argument("--heldout", type=Path, default=Path("artifacts/data/general/records.jsonl"))
    parser.add_argument("--targets", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument(
        "--layers", type=int, default=0, help="also a random Llama of so many layers (16: 1.2B)"
    )
    parser.add_argument("--only-random", action="store_true", help="leave the base out")
    parser.add_argument("--packages", type=Path, help="folder that keeps the packages for the next run")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    made = {}
    if not options.only_random:
        targets = {t: SCHEMES[t] for t in options.targets}
        made["base"] = run(options.base, options.heldout, targets, True, options)
    if options.layers:
        with tempfile.TemporaryDirectory() as root:
            big = random_llama(Path(root) / "model", options.base, options.layers)
            made["random"] = run(big, options.heldout, {"gguf": SCHEMES["gguf"]}, False, options)
    if options.out:
        options.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
