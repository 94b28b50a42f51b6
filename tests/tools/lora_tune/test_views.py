"""What lora-tune shows without training, and what it refuses to adapt."""

from __future__ import annotations

from pathlib import Path

import torch
from support import invoke, load_tool, tiny_records, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer


def records(tmp: Path) -> str:
    return str(write_jsonl(tmp / "r.jsonl", tiny_records("prompt-completion")))


def test_labels_are_shown_without_an_output(workdir: Path, tiny_model: Path) -> None:
    done = invoke(load_tool("lora-tune"), "-m", str(tiny_model), records(workdir), "--show-labels", "1")
    assert done.code == 0, done.stderr
    assert "learnt" in done.stdout


def test_output_head_is_refused_with_what_to_do(workdir: Path, tiny_model: Path) -> None:
    args = ("-m", str(tiny_model), records(workdir), "-o", "out", "--target-modules", "lm_head")
    done = invoke(load_tool("lora-tune"), *args)
    assert done.code == 2
    assert "modules_to_save" in done.error


def test_prompt_starts_from_the_embeddings_of_the_given_text(workdir: Path, tiny_model: Path) -> None:
    from peft import PeftModel

    args = (
        "-m",
        str(tiny_model),
        records(workdir),
        "-o",
        "out",
        "--method",
        "prompt",
        "--virtual-tokens",
        "3",
    )
    still = ("--learning-rate", "0", "--max-steps", "1", "--init-text", "a b", "--dtype", "float32")
    done = invoke(load_tool("lora-tune"), *args, *still)
    assert done.code == 0, done.stderr
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = AutoTokenizer.from_pretrained(tiny_model)("a b").input_ids
    wanted = base.get_input_embeddings().weight[(ids * 3)[:3]]
    saved = PeftModel.from_pretrained(base, "out").prompt_encoder["default"].embedding.weight
    assert torch.equal(saved, wanted)


def test_files_are_readable_as_the_umask_has_it(workdir: Path, tiny_model: Path) -> None:
    done = invoke(
        load_tool("lora-tune"), "-m", str(tiny_model), records(workdir), "-o", "out", "--max-steps", "1"
    )
    assert done.code == 0, done.stderr
    assert {oct(p.stat().st_mode & 0o777) for p in Path("out").iterdir()} == {"0o644"}
