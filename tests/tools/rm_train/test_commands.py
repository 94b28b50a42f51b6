"""score, eval and the options of train, through the real commands; what goes wrong is told in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Result, build_tiny_model, invoke, load_tool, tiny_tokenizer, write_jsonl

from .conftest import CPU, QUICK, contents, preferences, report_of

COMMAND = load_tool("rm-train")


def score(*args: Any, stdin: str | None = None) -> Result:
    return invoke(COMMAND, "score", *map(str, args), *CPU, stdin=stdin)


def evaluate(*args: Any) -> Result:
    return invoke(COMMAND, "eval", *map(str, args), *CPU)


@pytest.fixture
def full(trained: Path) -> Path:
    if (trained / "adapter_config.json").is_file():
        pytest.skip("one kind of reward model is enough here")
    return trained


class TestScore:
    def test_each_kind_of_record(self, full: Path, workdir: Path) -> None:
        user, yes, no = (
            {"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "y"), ("assistant", "n"))
        )
        rows: list[dict[str, Any]] = [
            {"prompt": "q", "completion": "y", "keep": {"me": 1}},
            {"prompt": "q", "completion": "n", "label": False},
            {"messages": [user, yes]},
            {"prompt": "q", "chosen": "y", "rejected": "n"},
            {"prompt": [user], "chosen": [yes], "rejected": [no]},
            {"chosen": [user, yes], "rejected": [user, no]},
            {"prompt": "q", "completion_a": "y", "completion_b": "n", "id": 7},
        ]
        path = write_jsonl(Path("in.jsonl"), rows)
        done = score(path, "-m", full, "-o", "out.jsonl", "--json", "-q")
        assert done.code == 0, done.stderr
        made = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
        for row, found in zip(rows, made, strict=True):
            assert {k: found[k] for k in row} == row
        y, n = made[0]["score"], made[1]["score"]
        assert y != n
        assert made[2]["score"] == pytest.approx(y, abs=1e-5)
        for record in made[3:6]:
            assert (record["score_chosen"], record["score_rejected"]) == pytest.approx((y, n), abs=1e-5)
        assert (made[6]["score_a"], made[6]["score_b"]) == pytest.approx((y, n), abs=1e-5)
        assert done.json()["metrics"]["texts"] == 11
        assert score(path, "-m", full, "-o", "out.jsonl", "--json", "-q").json()["up_to_date"] is True
        assert score(path, "-m", full, "-o", "out.jsonl", "--raw").code == 73

    def test_raw_scores_are_normalised_by_the_artifact(self, full: Path, workdir: Path) -> None:
        path = write_jsonl(Path("in.jsonl"), preferences(3))
        normal, raw = (
            [
                json.loads(line)["score_chosen"]
                for line in score(path, "-m", full, "-q", *extra).stdout.splitlines()
            ]
            for extra in ((), ("--raw",))
        )
        entry = json.loads((full / "artifact.json").read_text())["reward_normalisation"]
        assert normal == pytest.approx([(r - entry["mean"]) / entry["std"] for r in raw])

    def test_order_and_batches(self, full: Path, workdir: Path) -> None:
        path = write_jsonl(Path("in.jsonl"), preferences(40))
        one, many = (
            [
                json.loads(line)
                for line in score(path, "-m", full, "-q", "--batch-size", n).stdout.splitlines()
            ]
            for n in ("1", "3")
        )
        assert [r["prompt"] for r in many] == [r["prompt"] for r in preferences(40)]
        assert [r["score_chosen"] for r in many] == pytest.approx([r["score_chosen"] for r in one], abs=1e-4)

    def test_active_selection_takes_the_scores(self, full: Path, workdir: Path) -> None:
        rows = [
            {"prompt": r["prompt"], "completion_a": r["chosen"], "completion_b": r["rejected"]}
            for r in preferences(6)
        ]
        path = write_jsonl(Path("in.jsonl"), rows)
        assert score(path, "-m", full, "-q", "-o", "scored.jsonl").code == 0
        done = invoke(
            load_tool("pref-collect"), "generate", "scored.jsonl", "--select", "2", "-q", "-o", "kept.jsonl"
        )
        assert done.code == 0, done.stderr
        scored = [json.loads(line) for line in Path("scored.jsonl").read_text().splitlines()]
        nearest = sorted(scored, key=lambda r: abs(r["score_a"] - r["score_b"]))[:2]
        assert [json.loads(line) for line in Path("kept.jsonl").read_text().splitlines()] == nearest

    @pytest.mark.parametrize(
        ("row", "says"),
        [
            ({"prompt": "q"}, "needs the fields"),
            ({"prompt": "q", "completion_a": "x"}, "field 'completion_b'"),
            ({"prompt": "q " * 200, "completion": "x"}, "more than 128 (--too-long truncate"),
            ({"messages": [{"role": "user", "content": "x"}]}, "no assistant turn"),
        ],
    )
    def test_bad_records(self, row: dict[str, Any], says: str, full: Path, workdir: Path) -> None:
        path = write_jsonl(Path("in.jsonl"), [{"prompt": "q", "completion": "y"}, row])
        done = score(path, "-m", full, "-q", "-o", "out.jsonl")
        assert (done.code, done.error.startswith("in.jsonl:2: ")) == (65, True), done.stderr
        assert says in done.error
        assert not Path("out.jsonl").exists()
        kept = score(path, "-m", full, "-q", "-o", "out.jsonl", "--on-error", "quarantine")
        assert kept.code == 0, kept.stderr
        assert len(Path("out.jsonl").read_text().splitlines()) == 1
        assert len(Path("out.jsonl.quarantine.jsonl").read_text().splitlines()) == 1

    def test_truncated(self, full: Path, workdir: Path) -> None:
        path = write_jsonl(Path("in.jsonl"), [{"prompt": "q " * 200, "completion": "x"}])
        done = score(path, "-m", full, "-q", "--too-long", "truncate")
        assert math.isfinite(json.loads(done.stdout)["score"])

    def test_no_reward_model(self, tiny_model: Path, workdir: Path) -> None:
        path = write_jsonl(Path("in.jsonl"), preferences(1))
        done = score(path, "-m", tiny_model)
        assert (done.code, "train one with rm-train" in done.error) == (65, True)
        assert score(path, "-m", "nosuch/folder/rm").code == 66


class TestEval:
    def test_is_what_training_found(self, trained: Path, workdir: Path) -> None:
        held = report_of(trained)
        from tuneutils.shared.pairs import prompt_key, split  # noqa: F401

        path = write_jsonl(Path("in.jsonl"), preferences())
        done = evaluate(path, "-m", trained, "-o", "out", "--json", "-q")
        assert done.code == 0, done.stderr
        both = [held["by_split"][name] for name in ("train", "heldout")]
        hits = sum(b["value"] * b["n"] for b in both)
        assert done.json()["metrics"]["accuracy"]["value"] == pytest.approx(hits / 40)

    def test_gate(self, trained: Path, workdir: Path) -> None:
        rows = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in preferences()]
        path = write_jsonl(Path("turned.jsonl"), rows)
        done = evaluate(path, "-m", trained, "-o", "out", "--min-accuracy", "0.5")
        assert done.code == 1
        assert "--min-accuracy 0.5 is not reached" in done.error
        again = evaluate(path, "-m", trained, "-o", "out", "--min-accuracy", "0.5")
        assert again.code == 1, "a report that is up to date has its gate asked"
        assert "--min-accuracy 0.5 is not reached" in again.error
        assert report_of(Path("out"))["accuracy"]["value"] < 0.5
        accepted = evaluate(path, "-m", trained, "-o", "other", "--min-accuracy", "0")
        assert accepted.code == 0, accepted.stderr

    def test_candidates_with_rewards(self, trained: Path, workdir: Path) -> None:
        """The curve of the best of n by this model, in rewards that the records give."""
        rows = [
            {"prompt": f"q{i}", "completions": ["one", "two two", "three"], "rewards": [0.0, 1.0, 5.0]}
            for i in range(4)
        ]
        path = write_jsonl(Path("in.jsonl"), [*rows, *preferences(4)])
        assert evaluate(path, "-m", trained, "-o", "out", "-q").code == 0
        curve = report_of(Path("out"))["best_of_n"]
        assert [p["prompts"] for p in curve] == [8, 8, 4]
        assert curve[0]["value"]["value"] == pytest.approx((4 * 2.0 + 4 * 0.5) / 8)
        flat = [{"prompt": f"{r['prompt']}", "completion": c} for r in rows for c in r["completions"]]
        scores = [
            json.loads(line)["score"]
            for line in score(write_jsonl(Path("flat.jsonl"), flat), "-m", trained, "-q").stdout.splitlines()
        ]
        best = [[0.0, 1.0, 5.0][max(range(3), key=lambda j: scores[3 * i + j])] for i in range(4)]
        assert curve[2]["value"]["value"] == pytest.approx(sum(best) / 4)
        assert curve[2]["reward"]["value"] == pytest.approx(
            sum(max(scores[3 * i : 3 * i + 3]) for i in range(4)) / 4, abs=1e-4
        )

    def test_bad_candidates(self, full: Path, workdir: Path) -> None:
        path = write_jsonl(Path("in.jsonl"), [{"prompt": "q", "completions": ["a", "b"], "rewards": [1]}])
        done = evaluate(path, "-m", full, "-o", "out")
        assert (done.code, "in.jsonl:1: field 'rewards'" in done.error) == (65, True)


class TestFaults:
    def test_a_loss_that_is_no_number(self, rm: Callable[..., Result], records: Path) -> None:
        done = rm(records, *QUICK, "--method", "full", "--learning-rate", "1e30", "--max-grad-norm", "0")
        assert done.code == 1
        assert "try a lower --learning-rate" in done.error
        assert not Path("out").exists()

    def test_scores_that_are_no_numbers(self, full: Path, workdir: Path) -> None:
        import shutil

        from safetensors.torch import load_file, save_file

        shutil.copytree(full, "broken")
        Path("broken/artifact.json").unlink()
        weights = load_file("broken/model.safetensors")
        weights["score.weight"].fill_(float("nan"))
        save_file(weights, "broken/model.safetensors", {"format": "pt"})
        path = write_jsonl(Path("in.jsonl"), preferences(2))
        for command in (score, evaluate):
            done = command(path, "-m", "broken", "-o", "out.jsonl")
            assert (done.code, done.error.startswith("in.jsonl:1: the score is nan")) == (1, True), (
                done.stderr
            )

    def test_constant_scores(self, rm: Callable[..., Result], tiny_model: Path, workdir: Path) -> None:
        """One training pair's chosen text has no spread to normalise by."""
        path = write_jsonl(Path("in.jsonl"), preferences(1))
        done = rm(path)
        assert (done.code, "nothing was learnt" in done.error) == (1, True)

    def test_no_eos(self, rm: Callable[..., Result], records: Path, tmp_path: Path) -> None:
        model = build_tiny_model(tmp_path / "m")
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = None
        tokenizer.save_pretrained(model)
        done = rm(records, model=model)
        assert (done.code, "no EOS token" in done.error) == (65, True)

    @pytest.mark.parametrize(
        ("args", "says"),
        [
            (("--method", "houlsby"), "cannot be merged"),
            (("--method", "prompt"), "cannot be merged"),
            (("--method", "qlora"), "full precision"),
            (("--eval", "a=records.jsonl", "--eval", "a=records.jsonl"), "the name 'a' is taken"),
            (("--method", "full", "--merge"), "nothing to merge"),
            (("--method", "lorra"), "did you mean 'lora'"),
        ],
    )
    def test_options_that_do_not_fit(
        self, args: tuple[str, ...], says: str, rm: Callable[..., Result], records: Path
    ) -> None:
        done = rm(records, *args)
        assert (done.code, says in done.error) == (2, True), done.stderr

    def test_missing_demonstrations(self, rm: Callable[..., Result], records: Path) -> None:
        assert rm(records, "--normalise", "nosuch.jsonl").code == 66

    def test_another_tokenizer(self, full: Path, tmp_path: Path, workdir: Path) -> None:
        """ppo-run refuses a reward model that would read its policy's tokens differently."""
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["<extra>"])
        policy = build_tiny_model(tmp_path / "policy", vocab_size=len(tokenizer))
        tokenizer.save_pretrained(policy)
        path = write_jsonl(Path("prompts.jsonl"), [{"prompt": "q"}])
        done = invoke(load_tool("ppo-run"), str(path), "-m", str(policy), "-r", str(full), "-o", "out", *CPU)
        assert (done.code, "another tokenizer" in done.error) == (65, True), done.stderr


@pytest.mark.parametrize("method", ["ia3", "vera", "lora"])
def test_methods_learn(method: str, rm: Callable[..., Result], records: Path, workdir: Path) -> None:
    more = ("--dora", "--rslora") if method == "lora" else ()
    done = rm(records, *QUICK, "--method", method, "--learning-rate", "0.05", "--epochs", "3", *more)
    assert done.code == 0, done.stderr
    assert report_of(Path("out"))["by_split"]["train"]["value"] > 0.9
    log = [json.loads(line) for line in (workdir / "out" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "accuracy", "margin", "mean_reward"} <= set(log[0])


def test_centring_brings_scores_to_zero(rm: Callable[..., Result], records: Path) -> None:
    means = []
    for name, weight in (("off", "0"), ("on", "5")):
        args = ("--epochs", "4", "--normalise", "none", "--centre", weight)
        assert rm(records, "-q", *QUICK, *args, output=name).code == 0
        scores = report_of(Path(name))["scores"]
        means.append(abs(scores["chosen"]["mean"] + scores["rejected"]["mean"]))
    assert means[1] < 0.3 * means[0]


def test_gradient_checkpointing_changes_nothing(rm: Callable[..., Result], records: Path) -> None:
    for name, args in (("off", ()), ("on", ("--gradient-checkpointing",))):
        done = rm(records, "-q", *QUICK, "--max-steps", "3", *args, output=name)
        assert done.code == 0, done.stderr
    logs = [
        [json.loads(x)["loss"] for x in (Path(n) / "log.jsonl").read_text().splitlines()]
        for n in ("off", "on")
    ]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_a_second_run_gives_the_same_bytes(rm: Callable[..., Result], records: Path) -> None:
    for name in ("one", "two"):
        assert rm(records, "-q", *QUICK, output=name).code == 0
    assert contents(Path("one")) == contents(Path("two"))
