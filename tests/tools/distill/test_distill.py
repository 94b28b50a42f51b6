"""The command: what it learns from, what it refuses, and that a killed run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import Result, build_tiny_model, tiny_records, tiny_tokenizer, write_jsonl

from tuneutils.shared.errors import ExitCode
from tuneutils.shared.training import MarkComplete

from .conftest import contents, losses, manifest, report

# isort: split
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CUT = ("--student-layers", "2")
WHOLE = ("--keep-layers", "0-3")
Distill = Callable[..., Result]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_close(one: Path, other: Path, *, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "args",
    [
        ("--loss", "forward-kl"),
        ("--loss", "reverse-kl", "--temperature", "2"),
        ("--loss", "jsd", "--beta", "0.3", "--top-k", "384"),
        ("--loss", "uld"),
        ("--hidden-weight", "1", "--attention-weight", "1"),
        ("--data", "student", "--max-new-tokens", "4"),
    ],
    ids=" ".join,
)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(
    args: Sequence[str], distill: Distill, records: Path, workdir: Path
) -> None:
    done = distill(records, *WHOLE, *args, "--max-steps", 1, "--heldout", records)
    assert done.code == 0, done.stderr
    assert abs(losses(workdir / "out")[0]) < 1e-5


def test_without_a_step_the_student_is_the_teacher(
    distill: Distill, records: Path, workdir: Path, teacher: Path
) -> None:
    done = distill(records, *WHOLE, "--max-steps", 1, "--learning-rate", 0, "--heldout", records)
    assert done.code == 0, done.stderr
    assert_close(workdir / "out", teacher, rtol=0, atol=0)
    made = report(workdir / "out")["heldout"]
    assert made["models"]["student"]["kl"]["value"] == pytest.approx(0, abs=1e-9)
    assert made["models"]["student"]["agreement"]["value"] == 1
    assert made["kept"]["student"]["lost_nll"]["value"] == pytest.approx(0, abs=1e-9)


def test_distillation_goes_towards_the_teacher_and_labels_alone_do_not(
    distill: Distill, texts: Path, workdir: Path
) -> None:
    """The texts carry nothing of a random teacher, its distributions do."""
    common = [
        texts,
        *CUT,
        "--max-steps",
        60,
        "--batch-size",
        12,
        "--learning-rate",
        "0.01",
        "--heldout",
        texts,
    ]
    assert distill(*common, "--loss", "ce", output="alone").code == 0
    done = distill(*common, "--baseline", "alone")
    assert done.code == 0, done.stderr
    made = report(workdir / "out")
    against = made["heldout"]["against_baseline"]
    assert against["kl"]["high"] < 0
    assert against["agreement"]["low"] > 0
    assert against["win_rate_kl"]["value"] == 1
    assert all(made["baseline"].values())
    assert "differs in" not in done.stderr


def test_a_baseline_of_other_tokens_is_told(distill: Distill, records: Path, texts: Path) -> None:
    assert distill(texts, *CUT, "--loss", "ce", "--max-steps", 1, output="alone").code == 0
    done = distill(records, *CUT, "--max-steps", 1, "--heldout", records, "--baseline", "alone")
    assert "the baseline differs in examples" in done.stderr


def test_a_cache_of_the_whole_vocabulary_trains_the_same_student(
    distill: Distill, records: Path, workdir: Path
) -> None:
    common = [records, *CUT, "--epochs", 2, "--temperature", 2, "--batch-size", 3]
    assert distill(*common, output="live").code == 0
    assert distill(*common, "--top-k", 384, output="cached").code == 0
    assert_close(workdir / "live", workdir / "cached", rtol=1e-3, atol=1e-4)


def test_the_cache_is_found_again_and_checked(distill: Distill, records: Path, workdir: Path) -> None:
    common = [records, *CUT, "--top-k", 5, "--max-steps", 1]
    distill(*common, output="one")
    (folder,) = (workdir / ".work" / "teacher-logits").iterdir()
    before = contents(folder)
    assert json.loads(before["index.json"])["identity"]["k"] == 5
    again = distill(*common, "--learning-rate", "0.001", output="two")
    assert "teacher logits found in" in again.stderr
    assert contents(folder) == before
    other = distill(*common, "--temperature", 2, output="three")
    assert "teacher logits found in" not in other.stderr
    tensors = load_file(folder / "top_k.safetensors")
    tensors["tail"][0] = -1
    save_file(tensors, folder / "top_k.safetensors")
    broken = distill(*common, output="four")
    assert broken.code == ExitCode.BAD_DATA
    assert "differs from its hash" in broken.error


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_the_cache_holds_what_the_steps_take(
    steps: int, distill: Distill, records: Path, workdir: Path
) -> None:
    args = ("--top-k", 384, "--max-steps", steps, "--batch-size", 3)
    assert distill(records, *CUT, *args, output="cached").code == 0
    assert distill(records, *CUT, "--max-steps", steps, "--batch-size", 3, output="live").code == 0
    assert losses(workdir / "cached") == pytest.approx(losses(workdir / "live"), rel=1e-3)
    (folder,) = (workdir / ".work" / "teacher-logits").iterdir()
    learnt = manifest(workdir / "cached")["metrics"]["learnt_tokens"]
    assert (len(load_file(folder / "top_k.safetensors")["tail"]) == learnt) == (steps >= 4)


def test_two_caches_have_the_same_bytes(distill: Distill, records: Path, workdir: Path) -> None:
    made = []
    for name in ("a", "b"):
        assert (
            distill(records, *CUT, "--top-k", 5, "--max-steps", 1, "--cache", name, output=f"o{name}").code
            == 0
        )
        made.append(contents(workdir / name))
    assert made[0] == made[1]


def test_the_teacher_writes_what_is_learnt(
    distill: Distill, records: Path, workdir: Path, teacher: Path
) -> None:
    """Its answers are those of transformers' own greedy generation."""
    args = ("--data", "teacher", "--sampling-temperature", 0, "--max-new-tokens", 6, "--loss", "ce")
    done = distill(records, *CUT, *args, "--max-steps", 1)
    assert done.code == 0, done.stderr
    (path,) = (workdir / ".work" / "teacher-answers").glob("*.jsonl")
    written = [json.loads(line) for line in path.read_text().splitlines()]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher), AutoTokenizer.from_pretrained(teacher)
    for record in written:
        chat = [{"role": "user", "content": record["prompt"]}]
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert record["completion"] == tokenizer.decode(out, skip_special_tokens=True)


@pytest.mark.parametrize("data", ["teacher", "student"])
def test_prompts_alone_will_do_where_the_answers_are_written(
    data: str, distill: Distill, workdir: Path
) -> None:
    prompts = write_jsonl(workdir / "prompts.jsonl", tiny_records("prompt"))
    done = distill(prompts, *CUT, "--data", data, "--max-new-tokens", 4, "--max-steps", 2)
    assert done.code == 0, done.stderr
    refused = distill(prompts, *CUT, output="other")
    assert refused.code == ExitCode.BAD_DATA


def test_on_its_own_answers_the_prompts_stay_and_the_rest_is_new(
    distill: Distill, texts: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuneutils.tools.distill.trainer import DistillTrainer

    seen: list[tuple[Any, Any]] = []
    original = DistillTrainer._answered

    def spy(self: Any, batch: Any, number: int) -> Any:
        made = original(self, batch, number)
        seen.append((batch, made))
        return made

    monkeypatch.setattr(DistillTrainer, "_answered", spy)
    args = ("--data", "student", "--prompt-tokens", 5, "--max-new-tokens", 4, "--batch-size", 4)
    assert distill(texts, *CUT, *args, "--max-steps", 4, "--student-fraction", "0.5").code == 0
    assert 0 < len(seen) < 4
    for batch, made in seen:
        assert torch.equal(batch["input_ids"][:, :5], made["input_ids"][:, :5])
        assert (made["labels"][:, :5] == -100).all()
        assert ((made["labels"] != -100).sum(1) <= 4).all()
        assert (made["labels"][:, 5] == made["input_ids"][:, 5]).all()


@pytest.mark.parametrize(
    "args",
    [
        ("--top-k", "6", "--loss", "jsd"),
        ("--student-hidden-size", "24", "--hidden-weight", "1"),
        ("--data", "student", "--max-new-tokens", "3", "--student-fraction", "0.6"),
        ("--data", "teacher", "--max-new-tokens", "5"),
    ],
    ids=" ".join,
)
def test_an_interrupted_run_ends_in_the_same_bytes(
    args: Sequence[str], distill: Distill, records: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [records, *CUT, *args, "--epochs", 3, "--batch-size", 2, "--gradient-accumulation", 2]
    common += ["--checkpoint-every", 2, "--heldout", records]
    assert distill(*common, output="whole").code == 0
    original = MarkComplete.on_save

    def stop_at_four(self: Any, args: Any, state: Any, *rest: Any, **kw: Any) -> None:
        original(self, args, state, *rest, **kw)
        if state.global_step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(MarkComplete, "on_save", stop_at_four)
    assert distill(*common).code == ExitCode.INTERRUPTED
    assert not (workdir / "out").exists()
    monkeypatch.setattr(MarkComplete, "on_save", original)
    resumed = distill(*common)
    assert "going on from step 4" in resumed.stderr
    assert contents(workdir / "out") == contents(workdir / "whole")


def test_micro_batches_do_not_change_the_step(distill: Distill, records: Path, workdir: Path) -> None:
    common = [
        records,
        *CUT,
        "--max-steps",
        2,
        "--student-hidden-size",
        24,
        "--hidden-weight",
        1,
        "--ce-weight",
        "0.5",
    ]
    assert distill(*common, "--batch-size", 6, output="one").code == 0
    assert distill(*common, "--batch-size", 2, "--gradient-accumulation", 3, output="three").code == 0
    assert losses(workdir / "one") == pytest.approx(losses(workdir / "three"), rel=1e-4)


def test_capabilities_are_files_and_filters(distill: Distill, texts: Path, workdir: Path) -> None:
    held = [{**r, "subject": "odd" if i % 2 else "even"} for i, r in enumerate(tiny_records("text", 10))]
    heldout = write_jsonl(workdir / "heldout.jsonl", held)
    chat = write_jsonl(workdir / "chat.jsonl", tiny_records("messages", 3))
    args = ("--capability", "odd=subject~^odd$", "--capability", f"chat={chat.name}")
    done = distill(texts, *CUT, "--max-steps", 1, "--heldout", heldout, *args)
    assert done.code == 0, done.stderr
    made = report(workdir / "out")
    assert {name: made[name]["sequences"] for name in made} == {"heldout": 10, "odd": 5, "chat": 3}
    shown = manifest(workdir / "out")
    assert set(shown["metrics"]["report"]) == {"heldout", "odd", "chat"}
    assert {"heldout", "capability-chat", "teacher"} <= {i["role"] for i in shown["inputs"]}


def test_a_pruned_student_keeps_its_pattern_if_asked(
    distill: Distill, records: Path, workdir: Path, teacher: Path
) -> None:
    sparse = build_tiny_model(workdir / "sparse", seed=4)
    tensors = weights(sparse)
    for name in tensors:
        if "_proj" in name:  # two of four
            tensors[name].view(-1, 4)[:, :2] = 0
    save_file(tensors, sparse / "model.safetensors", metadata={"format": "pt"})
    common = [records, "--student", sparse, "--max-steps", 4, "--weight-decay", "0.1", "--hidden-weight", 1]
    for args, expected in (((), False), (("--keep-zeros",), True)):
        done = distill(*common, *args, "--force")
        assert done.code == 0, done.stderr
        after = {n: t for n, t in weights(workdir / "out").items() if "_proj" in n}
        assert all((t.view(-1, 4)[:, :2] == 0).all() for t in after.values()) == expected
        assert all((t.view(-1, 4)[:, 2:] != tensors[n].view(-1, 4)[:, 2:]).any() for n, t in after.items())


def test_an_adapter_is_a_teacher(distill: Distill, records: Path, workdir: Path, teacher: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(teacher),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False),
    )
    tuned.save_pretrained(workdir / "adapter")
    done = distill(records, *WHOLE, "--max-steps", 1, "--learning-rate", 0, model=workdir / "adapter")
    assert done.code == 0, done.stderr
    tuned.merge_and_unload().save_pretrained(workdir / "merged")
    assert_close(workdir / "out", workdir / "merged")


@pytest.fixture
def foreign(workdir: Path) -> Path:
    """A teacher whose tokens are single characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>", "<unk>"]
    vocabulary = {t: i for i, t in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    path = build_tiny_model(workdir / "foreign", seed=2, vocab_size=len(vocabulary), pad_token_id=2)
    for old in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (path / old).unlink(missing_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(path)
    return path


@pytest.mark.parametrize("extra", [(), ("--top-k", "16")])
def test_a_teacher_of_another_vocabulary_needs_uld(
    extra: Sequence[str], distill: Distill, texts: Path, workdir: Path, foreign: Path, teacher: Path
) -> None:
    common = [texts, "--student", teacher, "--max-steps", 2, "--heldout", texts, *extra]
    refused = distill(*common, model=foreign)
    assert refused.code == ExitCode.BAD_DATA
    assert "another vocabulary (260 tokens, 260 logits) than the student's (384, 384)" in refused.error
    done = distill(*common, "--loss", "uld", model=foreign)
    assert done.code == 0, done.stderr
    assert losses(workdir / "out")[0] > 0.1
    assert "kl" not in report(workdir / "out")["heldout"]["models"]["student"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ((), ExitCode.USAGE, "which student?"),
        (("--student", "TEACHER", *CUT), ExitCode.USAGE, "--student-layers would cut it"),
        (("--keep-layers", "0", *CUT), ExitCode.USAGE, "leave --student-layers out"),
        (("--student-layers", "5"), ExitCode.USAGE, "--student-layers 5: the teacher has 4"),
        (("--student-hidden-size", "33"), ExitCode.USAGE, "33 hidden size: the teacher has 32"),
        (("--student-kv-heads", "3"), ExitCode.USAGE, "3 key and value heads: the teacher has 2"),
        ((*CUT, "--temperature", "0"), ExitCode.USAGE, "must be above 0"),
        ((*CUT, "--loss", "ce", "--top-k", "4"), ExitCode.USAGE, "--loss ce learns from labels alone"),
        ((*CUT, "--loss", "uld", "--hidden-weight", "1"), ExitCode.USAGE, "cannot be matched"),
        ((*CUT, "--top-k", "4", "--attention-weight", "1"), ExitCode.USAGE, "--top-k caches distributions"),
        ((*CUT, "--data", "student", "--top-k", "4"), ExitCode.USAGE, "asks the teacher about new answers"),
        ((*CUT, "--capability", "x"), ExitCode.USAGE, "must be NAME=FILE or NAME=FIELD~REGEX"),
        ((*CUT, "--capability", "x=a~b"), ExitCode.USAGE, "filters --heldout, which is missing"),
        ((*CUT, "--capability", "x=a~(", "--heldout", "RECORDS"), ExitCode.USAGE, "--capability x=a~("),
        ((*CUT, "--capability", "x=a~b", "--heldout", "RECORDS"), ExitCode.BAD_DATA, "no held-out record"),
    ],
)
def test_options_that_do_not_go_together(
    args: Sequence[str],
    code: int,
    message: str,
    distill: Distill,
    records: Path,
    teacher: Path,
    workdir: Path,
) -> None:
    names = {"TEACHER": str(teacher), "RECORDS": str(records)}
    done = distill(records, *(names.get(a, a) for a in args))
    assert done.code == code, done.stderr
    assert message in done.error
    assert not (workdir / "out").exists()


def test_several_processes_are_refused(
    distill: Distill, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process" in distill(records, *CUT).error


def test_weights_that_are_no_numbers_are_named(distill: Distill, records: Path, workdir: Path) -> None:
    path = build_tiny_model(workdir / "broken")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    done = distill(records, "--student-layers", 1, model=path)
    assert done.code == ExitCode.BAD_DATA
    assert "model.layers.1.mlp.up_proj.weight holds NaN or infinity" in done.error


def test_records_of_another_kind_are_placed(distill: Distill, workdir: Path) -> None:
    path = write_jsonl(workdir / "votes.jsonl", tiny_records("parallel"))
    done = distill(path, *CUT)
    assert done.code == ExitCode.BAD_DATA
    assert "votes.jsonl:1: needs the fields" in done.error


def test_heldout_records_are_checked_before_training(distill: Distill, records: Path, workdir: Path) -> None:
    held = write_jsonl(workdir / "held.jsonl", [*tiny_records("text", 2), {"prompt": "a", "completion": " "}])
    done = distill(records, *CUT, "--heldout", held)
    assert done.code == ExitCode.BAD_DATA
    assert "held.jsonl:3" in done.error
    assert not (workdir / ".work" / "out" / "checkpoints").exists()


def test_a_diverging_run_stops(distill: Distill, records: Path) -> None:
    done = distill(records, *CUT, "--learning-rate", "1e30", "--schedule", "constant", "--warmup", 0)
    assert done.code == ExitCode.GATE_FAILED
    assert "try a lower --learning-rate" in done.error


def test_dry_run_counts_both(distill: Distill, records: Path, teacher: Path) -> None:
    shown = distill(records, *CUT, "--student-hidden-size", 24, "--dry-run").json()
    assert shown["teacher_parameters"] == sum(t.numel() for t in weights(teacher).values())
    done = distill(records, *CUT, "--student-hidden-size", 24, "--max-steps", 1)
    assert done.code == 0
    assert shown["student_parameters"] == sum(t.numel() for t in weights(Path("out")).values())


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--keep-layers", "1-2"], {"num_hidden_layers": 2}),
        (["--student-layers", "3", "--layer-importance", "block-influence"], {"num_hidden_layers": 3}),
        (
            ["--student-hidden-size", "24", "--student-intermediate-size", "40", "--student-kv-heads", "1"],
            {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "head_dim": 8},
        ),
    ],
)
def test_what_is_written_loads_anywhere(
    args: list[str], expected: dict[str, int], distill: Distill, records: Path, workdir: Path
) -> None:
    done = distill(records, *args, "--max-steps", 1)
    assert done.code == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(workdir / "out")
    assert {name: getattr(model.config, name) for name in expected} == expected
    prompt = tiny_tokenizer()("Measure", return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=5, do_sample=False, use_cache=True)
    again = model.generate(**prompt, max_new_tokens=5, do_sample=False, use_cache=False)
    assert made.tolist() == again.tolist()
