"""pref-tune train through its command: what it starts from, what it leaves, what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Result, build_tiny_model, invoke, load_tool, write_jsonl

from tuneutils.shared import device  # noqa: F401

import torch  # isort: skip

from tuneutils.shared.models import load_model
from tuneutils.shared.texts import Text, encode_text
from tuneutils.tools.pref_tune.batches import Reader, can_pack, pack, packed_length, pair_batch
from tuneutils.tools.pref_tune.examples import Single, mismatched

from .conftest import CPU, QUICK, contents, labelled, preferences, report_of

Run = Callable[..., Result]


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


class TestStart:
    @pytest.mark.parametrize("method", ["lora", "full", "houlsby"])
    def test_dpo_starts_at_ln_2_with_no_margin(self, method: str, pt: Run, records: Path) -> None:
        done = pt(records, "--method", method, "--max-steps", "1", *QUICK)
        assert done.code == 0, done.stderr
        (first,) = log_of(Path("out"))
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert first["margin"] == pytest.approx(0, abs=1e-5)

    def test_kto_starts_at_one_half_with_no_kl(self, pt: Run, records: Path) -> None:
        """λ (1 − σ(0)), whatever the label."""
        write_jsonl(records, labelled())
        done = pt(records, "--loss", "kto", "--max-steps", "1", *QUICK)
        assert done.code == 0, done.stderr
        (first,) = log_of(Path("out"))
        assert (first["loss"], first["kl"]) == pytest.approx((0.5, 0.0), abs=1e-5)

    def test_the_reference_is_the_base_with_the_adapter_off(
        self, pt: Run, records: Path, tiny_model: Path
    ) -> None:
        assert pt(records, "--epochs", "2", *QUICK).code == 0
        base, tuned = (load_model(str(m), device="cpu", dtype="float32") for m in (tiny_model, "out"))
        ids = torch.arange(10, 40)[None]
        with torch.no_grad(), tuned.model.disable_adapter():
            off = tuned.model(input_ids=ids).logits
        with torch.no_grad():
            assert torch.equal(off, base.model(input_ids=ids).logits)
            assert not torch.equal(off, tuned.model(input_ids=ids).logits)


@pytest.mark.parametrize("loss", ["dpo", "cdpo", "robust", "ipo", "dpo-norm", "simpo", "orpo", "kto"])
def test_every_loss_learns_what_is_preferred(loss: str, pt: Run, records: Path) -> None:
    """On pairs that differ alike, the held-out margin's interval ends up above zero."""
    done = pt(records, "--loss", loss, "--epochs", "4", *QUICK)
    assert done.code == 0, done.stderr
    pairs = report_of(Path("out"))["pairs"]
    before, after = pairs["logprob_accuracy_reference"]["value"], pairs["logprob_accuracy"]["value"]
    assert after >= before
    if loss not in ("simpo", "orpo"):  # theirs has no reference, and margins before training
        assert pairs["margin"]["low"] > 0
        assert pairs["accuracy"]["value"] > 0.9


class TestReport:
    def test_everything_is_in_it(self, pt: Run, records: Path, tiny_model: Path, workdir: Path) -> None:
        write_jsonl(
            workdir / "text.jsonl", [{"text": "Many hands make light work."}, {"text": "Haste makes waste."}]
        )
        rm = invoke(
            load_tool("rm-train"),
            str(records),
            "-q",
            "-m",
            str(tiny_model),
            "-o",
            "rm",
            "--max-steps",
            "2",
            *CPU,
        )
        assert rm.code == 0, rm.stderr
        done = pt(records, *QUICK, "-r", "rm", "--general", "text.jsonl")
        assert done.code == 0, done.stderr
        report = report_of(Path("out"))
        assert report["answers"]["judge"] == "reward model"
        assert report["answers"]["prompts"] == 3
        assert report["general"]["texts"] == 2
        metrics = json.loads(Path("out/artifact.json").read_text())["metrics"]
        assert metrics["pairs_margin"] == report["pairs"]["margin"]
        assert metrics["general_perplexity_rise"] == report["general"]["perplexity_rise"]
        text = Path("out/report.md").read_text()
        assert "judged by reward model" in text
        assert len(Path("out/answers.jsonl").read_text().splitlines()) == 3

    @pytest.mark.parametrize("method", ["lora", "full"])
    def test_nothing_learnt_is_nothing_changed(
        self, method: str, pt: Run, records: Path, workdir: Path
    ) -> None:
        """At a learning rate of 0: no margin, no KL, every pair of answers a tie, nothing forgotten."""
        write_jsonl(workdir / "text.jsonl", [{"text": "Many hands make light work."}] * 2)
        args = ("--learning-rate", "0", "--max-steps", "2", "--heldout-share", "0.3", "--method", method)
        done = pt(records, *args, "--general", "text.jsonl")
        assert done.code == 0, done.stderr
        report = report_of(Path("out"))
        assert report["pairs"]["margin"]["value"] == pytest.approx(0, abs=1e-5)
        assert report["answers"]["kl"]["value"] == pytest.approx(0, abs=1e-4)
        assert report["general"]["perplexity_rise"]["value"] == pytest.approx(0, abs=1e-5)
        answers = [json.loads(line) for line in Path("out/answers.jsonl").read_text().splitlines()]
        assert all(a["policy"] == a["reference"] for a in answers)

    def test_unpaired_records_are_measured_as_they_are(self, pt: Run, records: Path) -> None:
        write_jsonl(records, labelled(60))
        done = pt(records, "--loss", "kto", "--epochs", "4", *QUICK)
        assert done.code == 0, done.stderr
        found = report_of(Path("out"))["labelled"]
        assert found["margin"]["value"] > 0
        assert found["ranked_right"] > 0.9


def test_same_again(pt: Run, records: Path) -> None:
    assert pt(records, *QUICK, output="one").code == 0
    assert pt(records, *QUICK, output="two").code == 0
    one, two = (contents(Path(name)) for name in ("one", "two"))
    assert one == two


def test_the_split_into_micro_batches_does_not_change_the_gradient(pt: Run, records: Path) -> None:
    common = (
        records,
        "--heldout-share",
        "0",
        "--max-grad-norm",
        "0",
        "--learning-rate",
        "0.005",
        "--answers",
        "0",
    )
    assert pt(*common, "--batch-size", "6", output="one").code == 0
    assert pt(*common, "--batch-size", "2", "--gradient-accumulation", "3", output="several").code == 0
    one, several = (log_of(Path(name)) for name in ("one", "several"))
    for key in ("loss", "grad_norm"):
        assert [e[key] for e in one] == pytest.approx([e[key] for e in several], rel=1e-4)


class TestBatches:
    def pairs(self, tiny_model: Path) -> list[tuple[Text, Text]]:
        tokenizer = load_model(str(tiny_model), device="cpu").tokenizer
        made = [("Say 1.", "It is so.", "It is not so."), ("Say two things.", "No.", "Yes, and no.")]
        return [(encode_text(p, c, tokenizer), encode_text(p, r, tokenizer)) for p, c, r in made]

    def test_packed_rows_give_what_rows_of_their_own_give(self, tiny_model: Path) -> None:
        reader = Reader(load_model(str(tiny_model), device="cpu", dtype="float32").model)
        pairs = self.pairs(tiny_model)
        with torch.no_grad():
            packed, plain = (reader.pairs(pair_batch(pairs, 1, packs)) for packs in (True, False))
        for ours, theirs in zip(packed, plain):
            assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-5)

    def test_packed_rows_are_as_long_as_is_said(self, tiny_model: Path) -> None:
        pairs = self.pairs(tiny_model)
        batch = pack(pairs, 1)
        assert batch["input_ids"].shape[1] == max(map(packed_length, pairs))
        for mask, side in (("chosen_mask", 0), ("rejected_mask", 1)):
            assert batch[mask].sum(1).tolist() == [len(p[side].ids) - p[side].prompt for p in pairs]

    def test_a_window_of_attention_is_not_packed(self, tiny_model: Path) -> None:
        model = load_model(str(tiny_model), device="cpu", dtype="float32").model
        assert can_pack(model, 40)
        model.config.sliding_window = 30
        assert not can_pack(model, 40)

    def test_mismatched_answers_are_of_other_prompts_and_each_is_used_once(self) -> None:
        singles = [
            Single(f"x:{i}", f"prompt {i // 3}", Text([100 + i // 3, 7, i, 2], 2), bool(i % 2))
            for i in range(12)
        ]
        made = mismatched(singles, 3, 10)
        assert all(t.ids[0] == s.text.ids[0] for t, s in zip(made, singles))
        assert sorted(t.ids[2] for t in made) == list(range(12))
        assert all(t.ids[2] // 3 != i // 3 for i, t in enumerate(made))


class TestRefusals:
    @pytest.mark.parametrize(
        ("rows", "args", "says"),
        [
            ([{"prompt": "a", "chosen": "b", "rejected": "b"}], (), "records.jsonl:1: chosen and rejected are equal"),
            ([{"prompt": "a", "completion": "b"}], ("--loss", "kto"), "field 'label': is missing"),
            ([{"prompt": "a", "completion": "b", "label": "good"}], ("--loss", "kto"), "field 'label'"),
            ([{"prompt": "a", "completion": "b", "label": True}], (), "--loss kto learns from labels"),
            ([{"prompt": f"{i}", "completion": "b", "label": True} for i in range(4)], ("--loss", "kto"), "all 4"),
            ([{"prompt": "a " * 200, "chosen": "b", "rejected": "c"}], (), "more than 128 (--too-long"),
            (
                [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "c", "rejected": "b"}],
                (),
                "swapped",
            ),
        ],
        ids=["equal", "no label", "a word", "labels", "one label", "too long", "swapped"],
    )  # fmt: skip
    def test_bad_records(
        self, rows: list[dict[str, Any]], args: tuple[str, ...], says: str, pt: Run, workdir: Path
    ) -> None:
        done = pt(write_jsonl(workdir / "records.jsonl", rows), *args, "--heldout-share", "0")
        assert (done.code, says in done.error) == (65, True), done.stderr
        assert not Path("out").exists()

    def test_a_template_that_makes_two_prompts_of_one(self, pt: Run, tmp_path: Path, records: Path) -> None:
        from transformers import AutoTokenizer

        folder = build_tiny_model(tmp_path / "odd")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = (
            "{% for m in messages %}{{ '<|im_start|>' + m['role'] + (messages | length | string) + '\n' + m['content']"
            " + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        )
        tokenizer.save_pretrained(folder)
        done = pt(records, *QUICK, model=folder)
        assert done.code == 65, done.stderr
        assert "records.jsonl:1: the chat template" in done.error

    @pytest.mark.parametrize(
        ("args", "says"),
        [
            (("--loss", "kto", "--batch-size", "1"), "take 2 or more"),
            (("--loss", "ipo", "--margin-scale", "1"), "takes no margins"),
            (("--method", "loar"), "did you mean 'lora'?"),
            (("--loss", "dop"), "dop"),
            (("--quantization", "nf4", "--method", "full"), "--method full takes no --quantization"),
        ],
    )
    def test_options(self, args: tuple[str, ...], says: str, pt: Run, records: Path) -> None:
        done = pt(records, *args)
        assert (done.code, says in done.error) == (2, True), done.stderr

    def test_a_judge_of_another_template(self, pt: Run, records: Path, tiny_model: Path) -> None:
        args = ("-q", "-m", str(tiny_model), "-o", "rm", "--max-steps", "1", "--template", "none", *CPU)
        assert invoke(load_tool("rm-train"), str(records), *args).code == 0
        done = pt(records, *QUICK, "-r", "rm")
        assert (done.code, "give --template none" in done.error) == (65, True), done.stderr

    def test_too_long_drops_or_cuts_the_prompt_of_both_sides_alike(self, pt: Run, workdir: Path) -> None:
        rows = [*preferences(10), {"prompt": "word " * 150, "chosen": "Yes, it is.", "rejected": "No."}]
        path = write_jsonl(workdir / "records.jsonl", rows)
        for how, metric in (("drop", "dropped"), ("truncate", "truncated")):
            done = pt(
                path, "--too-long", how, "--max-steps", "1", "--heldout-share", "0", "--json", output=how
            )
            assert done.code == 0, done.stderr
            assert done.json()["metrics"][metric] == 1


def test_votes_are_soft_labels(pt: Run, workdir: Path) -> None:
    """With every pair at a share of one half, the optimum is no preference: the gradient vanishes at the start."""
    rows = [{**r, "strength": 0.5} for r in preferences(8)]
    path = write_jsonl(workdir / "records.jsonl", rows)
    assert pt(path, "--max-steps", "1", "--heldout-share", "0").code == 0
    assert log_of(Path("out"))[0]["grad_norm"] == pytest.approx(0, abs=1e-6)
    assert pt(path, "--max-steps", "1", "--heldout-share", "0", "--margin-scale", "1", output="two").code == 0


def test_dry_run_counts_and_estimates(pt: Run, records: Path) -> None:
    shown = pt(records, "--dry-run").json()
    assert shown["learning_rate"] == 5e-5
    assert 0 < shown["trainable_parameters"] < shown["total_parameters"]
    assert shown["memory_estimate_bytes"] > 0
