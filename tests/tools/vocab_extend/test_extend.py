"""The extended model: its tables, that it loads anywhere, and the numbers of its report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from support import invoke, load_tool, write_jsonl

from .conftest import CPU, Extended


def tables(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_old_weights_are_as_they_were_and_new_rows_are_means(extended: Extended) -> None:
    from transformers import AutoTokenizer

    before, after = tables(extended.base), tables(extended.made)
    assert before.keys() == after.keys()
    new = AutoTokenizer.from_pretrained(extended.made).backend_tokenizer
    for name, tensor in before.items():
        if tensor.shape[0] != 384:
            assert torch.equal(tensor, after[name])
            continue
        assert after[name].shape == (424, 32)
        assert torch.equal(after[name][:384], tensor)
        merges = json.loads(new.to_str())["model"]["merges"]
        vocab = new.get_vocab()
        parts: dict[int, list[int]] = {i: [i] for i in range(384)}
        for left, right in merges:  # what a new token is made of, from the merges alone
            parts.setdefault(vocab[left + right], parts[vocab[left]] + parts[vocab[right]])
        for i in range(384, 424):
            torch.testing.assert_close(after[name][i], tensor[parts[i]].mean(0))


def test_old_token_ids_get_the_old_logits(extended: Extended) -> None:
    from transformers import AutoModelForCausalLM

    before, after = (AutoModelForCausalLM.from_pretrained(p) for p in (extended.base, extended.made))
    assert after.config.vocab_size == 424
    ids = torch.randint(384, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(after(ids).logits[..., :384], before(ids).logits)
    tied = after.get_input_embeddings().weight is after.get_output_embeddings().weight
    assert tied == before.config.tie_word_embeddings


def test_bits_per_byte_are_those_of_plain_transformers(extended: Extended) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = extended.report["bits_per_byte"]["heldout"]
    for folder, expected in (
        (extended.base, found["base"]),
        (extended.made, found["inits"]["mean"]["bits_per_byte"]),
    ):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        nats = 0.0
        for text in extended.heldout:
            ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
            assert len(ids) <= 512
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            nats -= sum(logprobs[i, token].item() for i, token in enumerate(ids[1:]))
        size = sum(len(text.encode()) for text in extended.heldout)
        assert expected["value"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
        assert expected["low"] <= expected["value"] <= expected["high"]
    assert found["inits"].keys() == {"mean", "focus", "random"}


def test_fertility_by_counting(extended: Extended) -> None:
    from transformers import AutoTokenizer

    found = extended.report["fertility"]["heldout"]
    words = sum(len(text.split(" ")) for text in extended.heldout)
    for side, folder in (("before", extended.base), ("after", extended.made)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = sum(len(tokenizer.tokenize(text)) for text in extended.heldout)
        assert found[side]["tokens"] == tokens
        assert found[side]["tokens_per_word"]["value"] == pytest.approx(tokens / words)
    assert found["after"]["tokens"] < found["before"]["tokens"]


def test_what_is_not_compared_is_not_measured(extended: Extended, tmp_path: Path) -> None:
    records = write_jsonl(tmp_path / "r.jsonl", [{"text": t} for t in extended.texts])
    args = ("-m", extended.base, records, "--new-tokens", "5", "-o", tmp_path / "out", *CPU, "--json")
    done = invoke(load_tool("vocab-extend"), *args, "--init", "random")
    assert done.code == 0, done.stderr
    metrics = done.json()["metrics"]
    assert metrics["new_tokens"] == 5
    assert not any("bits_per_byte" in name for name in metrics)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--init", "wechsel"], 2, "--source and --dictionary"),
        (["--source", "r.jsonl"], 2, "go together"),
        (["--source", "r.jsonl", "--dictionary", "p.jsonl"], 0, ""),
        (["--source", "r.jsonl", "--dictionary", "p.jsonl", "--init", "wechsel"], 65, "0 translations"),
    ],
)
def test_what_wechsel_needs(
    options: list[str],
    code: int,
    said: str,
    extended: Extended,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("r.jsonl"), [{"text": t} for t in extended.texts])
    write_jsonl(Path("p.jsonl"), [{"src": "a", "tgt": "b", "src_lang": "x", "tgt_lang": "y"}])
    args = ("-m", extended.base, "r.jsonl", "--new-tokens", "5", "-o", "out", *CPU)
    done = invoke(load_tool("vocab-extend"), *args, *options)
    assert done.code == code
    assert said in done.stderr
    assert (tmp_path / "out").exists() == (code == 0)


def test_adapters_are_refused(extended: Extended, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(extended.base), LoraConfig(r=2))
    model.peft_config["default"].base_model_name_or_path = str(extended.base)
    model.save_pretrained(tmp_path / "adapter")
    records = write_jsonl(tmp_path / "r.jsonl", [{"text": "a b"}])
    done = invoke(load_tool("vocab-extend"), "-m", tmp_path / "adapter", records, "-o", tmp_path / "out")
    assert (done.code, "adapter-merge" in done.error) == (2, True)
