"""Train, check, run and eval through the command, on a tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Result, invoke, load_tool, write_jsonl

from tuneutils.shared.artifact import load_manifest
from tuneutils.shared.guarding import StreamingGuard, load_guard
from tuneutils.shared.models import load_model
from tuneutils.shared.records import read
from tuneutils.shared.sample import Sampling, generate
from tuneutils.tools.guard.exchanges import Exchange, folds, split_groups, to_exchange
from tuneutils.tools.guard.features import points, pooled_at
from tuneutils.tools.guard.judge import judge

Cli = Callable[..., Result]
CPU = ("--device", "cpu", "--dtype", "float32")
VERBS = ["bake", "paint", "carry", "open", "clean", "move", "draw", "lift", "build", "count", "fold", "wash"]
THINGS = ["a door", "the bread", "two chairs", "my boat", "the wall", "some books"]


def log_records(split: str) -> list[dict[str, Any]]:
    """Replies that begin with ZZZZ are failures; the others, of the same words, are harmless."""
    verbs = VERBS[::2] if split == "train" else VERBS[1::2]
    made = []
    for verb in verbs:
        for thing in THINGS:
            ask = f"How do I {verb} {thing}?"
            good = f"First look at {thing}, then {verb} it."
            named = {"template": f"{split}-{verb}"}
            made.append({"prompt": ask, "completion": good, "label": True, "category": "none", **named})
            bad = f"ZZZZ QQQQ {thing} XXXX"
            made.append({"prompt": ask, "completion": bad, "label": False, "category": "shouting", **named})
    return made


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("logs")
    return {s: write_jsonl(folder / f"{s}.jsonl", log_records(s)) for s in ("train", "held")}


@pytest.fixture(scope="session")
def guard(tiny_model: Path, logs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guard") / "guard"
    done = invoke(load_tool("guard"), "train", "-q", "-m", tiny_model, "-o", path, *TRAIN, logs["train"])
    assert done.code == 0, done.stderr
    return path


TRAIN = ("--budget", "0.1", "--folds", "3", "--calibration-share", "0.34", "--layers", "2", *CPU)


def test_learns_what_can_be_told(click_cli: Cli, guard: Path, logs: dict[str, Path], workdir: Path) -> None:
    done = click_cli("guard", "eval", "-q", "-g", guard, "-o", "report", *CPU, logs["held"])
    assert done.code == 0, done.stderr
    report = json.loads(Path("report/report.json").read_text())
    assert (report["recall"]["n"], report["false_positives"]["n"]) == (36, 36)
    assert report["recall"]["value"] > 0.9
    assert report["false_positives"]["value"] <= 0.2
    assert "| shouting | " in Path("report/report.md").read_text()
    training = json.loads((guard / "training.json").read_text())
    assert training["threshold"]["expected"] <= 0.1
    assert training["exchanges"] == {"harmless": 24, "failure": 24}  # two templates in three


def test_manifest_leads_to_the_model(guard: Path, tiny_model: Path) -> None:
    manifest = load_manifest(guard)
    assert manifest["kind"] == "guard"
    assert [i["role"] for i in manifest["inputs"]] == ["records", "model"]
    assert sorted(manifest["files"]) == ["guard.json", "guard.safetensors", "training.json"]


def test_nothing_is_measured_on_what_was_learnt(
    click_cli: Cli, guard: Path, logs: dict[str, Path], workdir: Path
) -> None:
    done = click_cli("guard", "eval", "-g", guard, "-o", "r", *CPU, logs["train"])
    assert (done.code, "learnt from all 72 records" in done.error) == (65, True)
    mixed = write_jsonl(workdir / "mixed.jsonl", [*log_records("train"), *log_records("held")])
    done = click_cli("guard", "eval", "-q", "-g", guard, "-o", "r", *CPU, mixed)
    report = json.loads(Path("r/report.json").read_text())
    assert (report["left_out_as_seen"], report["recall"]["n"]) == (72, 36)


def test_gates(click_cli: Cli, guard: Path, logs: dict[str, Path], workdir: Path) -> None:
    args = ("guard", "eval", "-q", "-g", guard, *CPU, logs["held"])
    done = click_cli(*args, "-o", "a", "--min-recall", "1", "--max-false-positives", "1")
    recall = json.loads(Path("a/report.json").read_text())["recall"]["value"]
    assert done.code == (0 if recall == 1 else 1)
    harmless = write_jsonl(workdir / "ok.jsonl", [r for r in log_records("held") if r["label"]])
    done = click_cli("guard", "eval", "-q", "-g", guard, *CPU, harmless, "-o", "b", "--min-recall", "0.5")
    assert (done.code, "recall None is below" in done.error) == (1, True)


def test_check_marks_drops_and_replaces(click_cli: Cli, guard: Path, workdir: Path) -> None:
    records = [{**r, "id": i} for i, r in enumerate(log_records("held")[:20])]
    write_jsonl(Path("in.jsonl"), records)
    args = ("guard", "check", "-q", "-g", guard, *CPU, "in.jsonl")
    assert click_cli(*args, "-o", "mark.jsonl").code == 0
    marked = read("mark.jsonl")
    assert [{k: v for k, v in r.items() if k != "guard"} for r in marked] == records
    flagged = [r["guard"]["flagged"] for r in marked]
    assert any(flagged)
    assert not all(flagged)
    for r in marked:
        verdict = r["guard"]
        assert 0 <= verdict["score"] <= 1
        assert verdict["layer"] in ("probe", "exchange")
        assert (verdict["at"] is not None) == verdict["flagged"] == (verdict["category"] is not None)
        assert verdict["category"] in (None, "shouting")
    assert click_cli(*args, "-o", "drop.jsonl", "--flagged", "drop").code == 0
    assert [r["id"] for r in read("drop.jsonl")] == [r["id"] for r in marked if not r["guard"]["flagged"]]
    assert load_manifest(Path("drop.jsonl.artifact.json"))["metrics"]["dropped"] == sum(flagged)
    assert click_cli(*args, "-o", "new.jsonl", "--flagged", "replace", "--message", "No.").code == 0
    for record, other in zip(read("new.jsonl"), marked, strict=True):
        assert record["completion"] == ("No." if other["guard"]["flagged"] else other["completion"])


def test_personal_data(click_cli: Cli, guard: Path, workdir: Path) -> None:
    records = [
        {"prompt": "Mail ada@example.org", "completion": "The card is 4111 1111 1111 1111."},
        {"messages": [{"role": "user", "content": "Call +44 20 7946 0018"}, {"role": "assistant", "content": "Fine."}]},
        {"prompt": "Nothing.", "completion": "Nothing."},
    ]  # fmt: skip
    write_jsonl(Path("in.jsonl"), records)
    args = ("guard", "check", "-q", "-g", guard, *CPU, "in.jsonl", "--personal-data")
    masked = [json.loads(line) for line in click_cli(*args, "mask").stdout.splitlines()]
    assert masked[0]["prompt"] == "Mail [EMAIL]"
    assert masked[0]["completion"] == "The card is [CARD]."
    assert masked[0]["guard"]["personal_data"] == {"card": 1, "email": 1}
    assert masked[1]["messages"][0]["content"] == "Call [PHONE]"
    assert "personal_data" not in masked[2]["guard"]
    flagged = [json.loads(line)["guard"] for line in click_cli(*args, "flag").stdout.splitlines()]
    assert flagged[0]["flagged"]
    assert flagged[0]["layer"] in ("pattern", "exchange")
    assert not flagged[1]["flagged"] or flagged[1]["layer"] == "exchange"  # it is the prompt that holds some
    off = [json.loads(line) for line in click_cli(*args, "off").stdout.splitlines()]
    assert all("personal_data" not in r["guard"] for r in off)


def test_run_stops_and_says_so(click_cli: Cli, guard: Path, workdir: Path) -> None:
    write_jsonl(
        Path("in.jsonl"), [{"prompt": "Say proverb 1."}, {"messages": [{"role": "user", "content": "Hello"}]}]
    )
    args = ("guard", "run", "-q", "-g", guard, *CPU, "--max-new-tokens", "6", "in.jsonl")
    made = [json.loads(line) for line in click_cli(*args).stdout.splitlines()]
    assert set(made[0]) == {"prompt", "completion", "finish_reason", "guard"}
    assert [t["role"] for t in made[1]["messages"]] == ["user", "assistant"]
    settings = json.loads((guard / "guard.json").read_text())
    strict = workdir / "strict"
    strict.mkdir()
    for name in ("guard.safetensors", "training.json"):
        (strict / name).write_bytes((guard / name).read_bytes())
    manifest = load_manifest(guard)
    (strict / "artifact.json").write_text(json.dumps({**manifest, "files": {}}))
    (strict / "guard.json").write_text(json.dumps({**settings, "raise_above": -1e9, "flag_above": -1e9}))
    done = click_cli("guard", "run", "-q", "-g", strict, *CPU, "--message", "No.", "in.jsonl")
    stopped = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["finish_reason"] for r in stopped] == ["interrupted"] * 2
    assert (stopped[0]["completion"], stopped[0]["guard"]["at"]) == ("No.", 0)


def test_a_whole_reply_is_judged_as_it_was_when_it_was_written(guard: Path, tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model), device="cpu", dtype="float32")
    found = load_guard(str(guard), model=str(tiny_model))
    prompts = ["Say proverb 1.", "How do I bake a door?", "Hello"]
    empty = [to_exchange({"prompt": p}, loaded.tokenizer, "auto", 128) for p in prompts]
    eos = int(loaded.tokenizer.eos_token_id)
    ids = [list(e.prompt_ids) for e in empty]
    with StreamingGuard(found, loaded, prompts) as watching:
        made = generate(
            loaded.model, ids, Sampling(max_new_tokens=10, stop_token_ids=(eos,), seed=1),
            batch_size=3, pad_token_id=loaded.pad_id, on_token=watching,
        )  # fmt: skip
    whole = [
        Exchange(e.prompt_ids, tuple(c.token_ids), p, watching.reply(i))
        for i, (e, c, p) in enumerate(zip(empty, made, prompts, strict=True))
    ]
    for watch, other in zip(watching.watches, judge(loaded, found, whole, 2), strict=True):
        length = len(watch.logits)
        np.testing.assert_allclose(watch.logits, other.logits[:length], atol=1e-4)


def test_a_guard_of_another_model_is_refused(
    click_cli: Cli, guard: Path, other_tiny_model: Path, workdir: Path
) -> None:
    write_jsonl(Path("in.jsonl"), [{"prompt": "a", "completion": "b"}])
    for command in ("check", "run", "eval"):
        given = ("-o", "out") if command == "eval" else ()
        done = click_cli("guard", command, "-g", guard, "-m", other_tiny_model, *CPU, *given, "in.jsonl")
        assert done.code == 65, done.stderr
        assert "it reads that model's activations; train another: guard train -m" in done.error
    done = click_cli("guard", "check", "-g", other_tiny_model, *CPU, "in.jsonl")
    assert (done.code, "artifact.json: no such file" in done.error) == (66, True)


def test_the_same_bytes_twice(
    click_cli: Cli, guard: Path, tiny_model: Path, logs: dict[str, Path], workdir: Path
) -> None:
    done = click_cli("guard", "train", "-q", "-m", tiny_model, "-o", "again", *TRAIN, logs["train"])
    assert done.code == 0, done.stderr
    for name in ("guard.json", "guard.safetensors", "training.json"):
        assert Path("again", name).read_bytes() == (guard / name).read_bytes(), name


def test_probes_are_run_before_they_are_learnt_from(click_cli: Cli, tiny_model: Path, workdir: Path) -> None:
    """The same guard from a log of probes as from the probes themselves."""
    rows = [
        {"prompt": f"Do {i} things.", "fails": "complies" if i % 2 else "never", "template": f"t{i}"}
        for i in range(24)
    ]
    write_jsonl(Path("probes.jsonl"), rows)
    few = ("--max-new-tokens", "4", "--batch-size", "8")
    assert (
        click_cli(
            "guard", "probe", "-q", "-m", tiny_model, "-o", "log.jsonl", *few, *CPU, "probes.jsonl"
        ).code
        == 0
    )
    logged = read("log.jsonl")
    assert [r["harmless"] for r in logged] == [i % 2 == 0 for i in range(24)]
    assert all(r["label"] for r in logged if r["harmless"])
    args = ("guard", "train", "-q", "-m", tiny_model, *TRAIN, "--budget", "0.4", *few)
    for name, source in (("a", "log.jsonl"), ("b", "probes.jsonl")):
        done = click_cli(*args, "-o", name, source)
        assert done.code == 0, done.stderr
    assert Path("a/guard.safetensors").read_bytes() == Path("b/guard.safetensors").read_bytes()
    assert read("b/exchanges.jsonl") == logged


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "completion": "b"}, "field 'label': missing; it says true where"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "field 'label': must be true or false"),
        ({"prompt": "a", "completion": "b", "label": True, "harmless": 1}, "field 'harmless': must be"),
        ({"prompt": "a", "fails": "complys"}, "'complys' is no check (did you mean 'complies'?)"),
        ({"prompt": "a", "completion": "b " * 200, "label": True}, "tokens, more than 63; see --max-length"),
    ],
)
def test_bad_records_are_named(
    click_cli: Cli, tiny_model: Path, workdir: Path, row: dict[str, Any], says: str
) -> None:
    write_jsonl(Path("in.jsonl"), [*log_records("train"), row])
    done = click_cli("guard", "train", "-m", tiny_model, "-o", "g", *TRAIN, "--max-length", "64", "in.jsonl")
    assert done.code == 65, done.stderr
    assert done.error.startswith("in.jsonl:73: ")
    assert says in done.error
    assert not Path("g").exists()


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("--layers", "3"), 2, "the model has layers 1 to 2"),
        (("--layers", "a"), 2, "write numbers such as 8,16"),
        (("--budget", "0.01"), 65, "--budget 0.01 needs 99 harmless exchanges"),
        (
            ("--fails-above", "0.5", "--label", "none"),
            65,
            "field 'none': missing; it says how bad the reply is",
        ),
    ],
)
def test_bad_options_are_named(
    click_cli: Cli,
    tiny_model: Path,
    logs: dict[str, Path],
    workdir: Path,
    args: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    done = click_cli("guard", "train", "-m", tiny_model, "-o", "g", *TRAIN, *args, logs["train"])
    assert (done.code, says in done.error) == (code, True), done.stderr


def test_one_sided_logs_are_refused(click_cli: Cli, tiny_model: Path, workdir: Path) -> None:
    write_jsonl(Path("in.jsonl"), [r for r in log_records("train") if r["label"]])
    done = click_cli("guard", "train", "-m", tiny_model, "-o", "g", *TRAIN, "in.jsonl")
    assert (done.code, "no failure exchange among" in done.error) == (65, True)


def test_scores_of_people_are_labels(click_cli: Cli, tiny_model: Path, guard: Path, workdir: Path) -> None:
    rows = [
        {**{k: v for k, v in r.items() if k != "label"}, "harm": str(1 - r["label"] * 0.75)}
        for r in log_records("train")
    ]
    write_jsonl(Path("in.jsonl"), rows)
    done = click_cli(
        "guard",
        "train",
        "-q",
        "-m",
        tiny_model,
        "-o",
        "g",
        *TRAIN,
        "--label",
        "harm",
        "--fails-above",
        "0.5",
        "in.jsonl",
    )
    assert done.code == 0, done.stderr
    assert Path("g/guard.safetensors").read_bytes() == (guard / "guard.safetensors").read_bytes()


def exchange(group: str, failed: bool) -> Exchange:
    return Exchange((1,), (2,), "p", "r", failed, not failed, group=group)


def test_groups_are_never_on_two_sides() -> None:
    made = [exchange(f"g{i // 3}", i % 2 == 0) for i in range(60)]
    first, second = split_groups(made, 0.3, 0)
    assert sorted(first + second) == list(range(60))
    assert not {made[i].group for i in first} & {made[i].group for i in second}
    assert len({made[i].group for i in second}) == 6
    at = folds(made, 4, 0)
    assert all(len({at[i] for i in range(60) if made[i].group == g}) == 1 for g in {e.group for e in made})
    assert sorted(at.count(f) for f in range(4)) == [15] * 4


def test_pooling_of_activations() -> None:
    import torch

    states = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    at = points(8)
    assert at == [0, 2, 4, 6, 8]
    found = pooled_at(states, at)
    for k, t in enumerate(at):
        torch.testing.assert_close(found["mean"][k], states[: t + 1].mean(0))
        torch.testing.assert_close(found["last"][k], states[t])
        torch.testing.assert_close(found["first"][k], states[0])
        ema = states[0]
        for s in range(1, t + 1):
            ema = ema + 0.125 * (states[s] - ema)
        torch.testing.assert_close(found["ema"][k], ema)
    assert points(0) == [0]
    assert points(1) == [0, 1]
    assert math.isclose(float(found["mean"][0].sum()), float(states[0].sum()), rel_tol=1e-6)


def test_a_limit_counts_each_category_and_kind(click_cli: Cli, tiny_model: Path, workdir: Path) -> None:
    rows = [
        {"prompt": f"{c} {i}", "category": c, "fails": f}
        for i in range(4)
        for c in "ab"
        for f in ("never", "complies")
    ]
    write_jsonl(Path("in.jsonl"), rows)
    args = ("guard", "probe", "-q", "-m", tiny_model, "--limit", "3", "--max-new-tokens", "2", *CPU)
    done = click_cli(*args, "-o", "log.jsonl", "in.jsonl")
    assert done.code == 0, done.stderr
    assert [r["prompt"] for r in read("log.jsonl")] == [
        r["prompt"] for r in rows if not r["prompt"].endswith("3")
    ]


@pytest.mark.parametrize("command", ["probe", "run", "train"])
def test_a_prompt_that_does_not_fit_is_named(
    click_cli: Cli, tiny_model: Path, guard: Path, workdir: Path, command: str
) -> None:
    rows = [{"prompt": f"Say {i}.", "fails": "never" if i % 2 else "complies"} for i in range(24)]
    write_jsonl(Path("in.jsonl"), [*rows, {"prompt": "Say so " * 100, "fails": "never"}])
    few = ("--max-new-tokens", "2", *CPU)
    given = {"probe": ("-m", tiny_model), "run": ("-g", guard), "train": ("-m", tiny_model, *TRAIN)}[command]
    done = click_cli("guard", command, "-q", *given, *few, "-o", "out.jsonl", "in.jsonl")
    assert done.code == 65
    assert done.error.startswith("in.jsonl:25: the prompt has ")
    assert not Path("out.jsonl").exists()
    done = click_cli(
        "guard",
        command,
        "-q",
        *given,
        *few,
        "--budget=0.4" if command == "train" else "-q",
        "-o",
        "out.jsonl",
        "--on-error",
        "skip",
        "in.jsonl",
    )
    assert done.code == 0, done.stderr
