"""Code-switching by a dictionary, and back-translation by a model and by commands of every behaviour."""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from support import invoke, load_tool

from tuneutils.tools.xl_parallel.codeswitch import switch

XL = load_tool("xl-parallel")
WORDS = {
    "house": ["casa"],
    "dog": ["perro"],
    "open": ["abrir"],
    "file": ["archivo", "fichero"],
    "red": ["rojo"],
}


def all_of(text: str, other: str | None = None) -> str:
    return switch(text, other, WORDS, 1.0, 0)[0]


@pytest.mark.parametrize(
    ("text", "other", "switched"),
    [
        ("The red house.", None, "The rojo casa."),
        ("The red house.", "La casa roja.", "The roja casa."),
        ("Open the files", "Abra los ficheros", "Open the ficheros"),
        ("A dog", "Un gato, pero no", "A dog"),
        ("OPEN HOUSE", None, "ABRIR CASA"),
        ("House of a dog", "Hogar de un perro", "House of a perro"),
        ("Two houses", None, "Two houses"),
        ("Two houses", "Dos casas", "Two casas"),
        ("open %(file)s in ~/house/dog, see http://dog.house/red or --open", None, "abrir %(file)s in ~/house/dog, see http://dog.house/red or --open"),
        ("", None, ""),
    ],
)  # fmt: skip
def test_switching(text: str, other: str | None, switched: str) -> None:
    assert all_of(text, other) == switched


def test_share_of_the_words_and_the_same_each_time() -> None:
    text = "house dog red file " * 5
    made, pairs = switch(text, None, WORDS, 0.3, 7)
    assert len(pairs) == 6
    assert (made, pairs) == switch(text, None, WORDS, 0.3, 7)
    assert made != switch(text, None, WORDS, 0.3, 8)[0]
    assert switch(text, None, WORDS, 0.0, 7) == (text, [])
    assert Counter(a != b for a, b in zip(text.split(), made.split()))[True] == 6


def write(path: Path, *records: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_records_keep_their_other_fields(tmp_path: Path) -> None:
    words = tmp_path / "words.tsv"
    words.write_text("house\tcasa\ndog\tperro\n")
    source = write(
        tmp_path / "in.jsonl",
        {"src": "a House", "tgt": "una casa", "src_lang": "en", "tgt_lang": "es", "id": 7},
        {"text": "my dog"},
    )
    common = ("--dictionary", words, "--share", "1", "-o", tmp_path / "out.jsonl", source)
    assert invoke(XL, "codeswitch", "-q", "--keep-original", *common).code == 0
    made = rows(tmp_path / "out.jsonl")
    assert [r.get("src", r.get("text")) for r in made] == ["a House", "a Casa", "my dog", "my perro"]
    assert made[1] == {
        "src": "a Casa", "tgt": "una casa", "src_lang": "en", "tgt_lang": "es", "id": 7,
        "switched": [["House", "Casa"]], "switched_lang": "es",
    }  # fmt: skip


def test_a_dictionary_of_another_language_is_an_error(tmp_path: Path) -> None:
    words = tmp_path / "words.tsv"
    words.write_text("casa\thouse\n")
    source = write(tmp_path / "in.jsonl", {"text": "my dog"})
    done = invoke(XL, "codeswitch", "--dictionary", words, "-o", tmp_path / "out.jsonl", source)
    assert (done.code, "languages swapped" in done.stderr) == (65, True)
    assert not (tmp_path / "out.jsonl").exists()


UPPER = "import sys; [print(line.strip().upper() + '!') for line in sys.stdin]"


def back(tmp_path: Path, program: str, *records: dict[str, object]) -> tuple[object, list[dict[str, object]]]:
    source = write(tmp_path / "in.jsonl", *records)
    command = f'{sys.executable} -c "{program}"'
    args = (
        "--from-lang",
        "es",
        "--to-lang",
        "en",
        "--command",
        command,
        "-o",
        tmp_path / "out.jsonl",
        source,
    )
    done = invoke(XL, "backtranslate", *args)
    return done, rows(tmp_path / "out.jsonl") if done.code == 0 else []


def test_a_command_makes_the_source_side(tmp_path: Path) -> None:
    _, made = back(
        tmp_path,
        UPPER,
        {"text": "la casa\nroja", "id": 1},
        {"tgt": "el perro", "src": "old", "src_lang": "x"},
    )
    assert made == [
        {"src": "LA CASA ROJA!", "tgt": "la casa roja", "id": 1, "src_lang": "en", "tgt_lang": "es", "synthetic": "src"},
        {"src": "EL PERRO!", "tgt": "el perro", "src_lang": "en", "tgt_lang": "es", "synthetic": "src"},
    ]  # fmt: skip


def test_what_is_empty_or_not_translated_is_counted(tmp_path: Path) -> None:
    program = "import sys; [print(line.strip() if 'casa' in line else '') for line in sys.stdin]"
    done, made = back(tmp_path, program, {"text": "la casa"}, {"text": "el perro"})
    assert made == []
    assert "1 not translated" in done.stderr
    assert "1 empty" in done.stderr


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("print(1)", 65, "gave 1 lines for 2"),
        ("import sys; sys.exit('no such pair')", 69, "no such pair"),
    ],
)
def test_commands_that_fail(tmp_path: Path, program: str, code: int, said: str) -> None:
    done, _ = back(tmp_path, program, {"text": "uno"}, {"text": "dos"})
    assert (done.code, said in done.stderr) == (code, True)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_command_that_is_not_there_and_two_translators(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"text": "uno"})
    args = ("backtranslate", "--from-lang", "es", "--to-lang", "en", source)
    assert invoke(XL, *args, "--command", "no-such-program -u").code == 69
    assert invoke(XL, *args).code == 2
    assert invoke(XL, *args, "--command", 'tr "a').code == 2
    assert invoke(XL, *args, "--command", "cat", "-m", "x").code == 2
    assert invoke(XL, *args, "--command", "cat", "--prompt", "Translate").code == 2


def test_a_model_is_asked_and_what_it_does_not_finish_is_dropped(tmp_path: Path, tiny_model: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"text": "uno"}, {"text": "dos"}, {"text": "tres " * 200})
    args = ("--from-lang", "es", "--to-lang", "en", "-m", tiny_model, "--device", "cpu", "--dtype", "float32")
    more = ("--max-new-tokens", "4", "-o", tmp_path / "out.jsonl", source)
    done = invoke(XL, "backtranslate", *args, *more)
    assert done.code == 0, done.stderr
    metrics = json.loads((tmp_path / "out.jsonl.artifact.json").read_text())["metrics"]
    assert metrics["read"] == 3 == metrics["written"] + sum(metrics["dropped"].values())
    assert metrics["dropped"]["too long"] == 1


def test_what_a_model_says_is_the_source_side(tmp_path: Path) -> None:
    """A model without attention whose next token follows from the last: newline, one, two, end."""
    import torch
    from support import build_tiny_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = build_tiny_model(tmp_path / "chain", tie_word_embeddings=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chain = [
        tokenizer("\n").input_ids[-1],
        *tokenizer.convert_tokens_to_ids(["o", "k"]),
        tokenizer.eos_token_id,
    ]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for last, following in pairwise(chain):
            model.lm_head.weight[following] = model.model.embed_tokens.weight[last]
    model.save_pretrained(folder)
    source = write(tmp_path / "in.jsonl", {"text": "uno"}, {"text": "dos"}, {"text": "ok"})
    args = ("--from-lang", "es", "--to-lang", "en", "-m", folder, "--device", "cpu", "--dtype", "float32")
    done = invoke(XL, "backtranslate", *args, "-o", tmp_path / "out.jsonl", source)
    assert done.code == 0, done.stderr
    assert [(r["src"], r["tgt"]) for r in rows(tmp_path / "out.jsonl")] == [("ok", "uno"), ("ok", "dos")]
    assert "1 not translated" in done.stderr
