"""``bias-scan data`` as a command: workers, bad input, gates, comparison, sentiment, a report's files."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Result, environment, invoke, load_tool, tool_args, write_jsonl

from tuneutils.tools.bias_scan import near as near_module
from tuneutils.tools.bias_scan import scan as scan_module

WORDS = ["nurse", "doctor", "engine", "blue", "runs", "paints", "quietly", "loud", "church", "mosque"]


def scan(*args: str | os.PathLike[str], stdin: bytes | str | None = None, out: str = "out") -> Result:
    return invoke(load_tool("bias-scan"), "data", "-o", out, *args, stdin=stdin)


def report(out: str | Path = "out") -> dict[str, Any]:
    return json.loads(Path(out, "report.json").read_text())


def value(name: str, out: str = "out") -> float | None:
    axis, *group, metric = name.split(".")
    rows = [r for r in report(out)["rows"] if (r["axis"], r["metric"]) == (axis, metric)]
    return next(r["value"] for r in rows if r["group"] == ".".join(group))


def records(count: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    heads = ["He", "She", "A Muslim", "John", "Mary", "An elderly man", "Nobody", "The"]
    return [{"text": " ".join([rng.choice(heads), *rng.choices(WORDS, k=9)])} for _ in range(count)]


def numbers(out: str) -> dict[str, Any]:
    """A report without the names of files, which stand in quotes alone."""
    return {k: v for k, v in report(out).items() if k != "quotes"}


@pytest.fixture
def data(workdir: Path) -> Path:
    return write_jsonl(Path("in.jsonl"), records(2000))


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_workers_change_nothing(data: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_module, "MAX_WORDS", 8)  # words are forgotten in this
    monkeypatch.setattr(scan_module, "ROUND_ROWS", 100)
    assert scan("-q", data, out="one").code == 0
    assert scan("-q", data, "--workers", str(workers), out="many").code == 0
    for name in ("report.json", "index.html"):
        assert Path("one", name).read_bytes() == Path("many", name).read_bytes()
    assert "rare words forgotten" in report("one")["facts"]


def test_order_and_files_change_nothing(data: Path) -> None:
    rows = records(2000)
    random.Random(1).shuffle(rows)
    write_jsonl(Path("a.jsonl"), rows[:700])
    write_jsonl(Path("b.jsonl"), rows[700:])
    assert scan("-q", data, out="one").code == 0
    assert scan("-q", "a.jsonl", "b.jsonl", out="two").code == 0
    assert numbers("one") == numbers("two")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_other_streams_give_the_same(data: Path, suffix: str) -> None:
    from tuneutils.shared.records import write

    write(f"in{suffix}", records(2000))
    assert scan("-q", data, out="one").code == 0
    assert scan("-q", f"in{suffix}", out="two").code == 0
    ours, theirs = (
        {(r["axis"], r["group"], r["metric"]): r["value"] for r in report(o)["rows"]} for o in ("one", "two")
    )
    assert ours == theirs


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_first_bad_line_is_named(workdir: Path, workers: str) -> None:
    rows = [json.dumps(r) for r in records(300)]
    rows[40], rows[250] = '{"text": 3}', "garbage"
    Path("in.jsonl").write_text("\n".join(rows))
    done = scan("in.jsonl", "--workers", workers)
    assert (done.code, done.error) == (65, "in.jsonl:41: field 'text': must be a string, is a number")
    assert not Path("out").exists()
    done = scan("-q", "in.jsonl", "--workers", workers, "--on-error", "quarantine")
    assert done.code == 0
    kept = [json.loads(line) for line in Path(".work/out/quarantine.jsonl").read_text().splitlines()]
    assert [(k["line"], k["raw"]) for k in kept] == [(41, '{"text": 3}'), (251, "garbage")]
    assert report()["facts"]["rows"] == 298


def test_traps_of_input(workdir: Path) -> None:
    """Emoji, other scripts, a very long line, texts without terms, a BOM, and one line in Latin-1."""
    long = "blah " * 300_000 + "he"
    rows = [{"text": "👩‍🚀 she 🚀"}, {"text": "東京 他"}, {"text": "\u0130stanbul HE"}, {"text": long}]
    good = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
    Path("in.jsonl").write_bytes(b"\xef\xbb\xbf" + good + '{"text": "she fühlt"}\n'.encode("latin-1"))
    done = scan("in.jsonl")
    assert (done.code, done.error) == (65, "in.jsonl:5: not UTF-8: byte 0xfc at byte 16")
    assert scan("-q", "in.jsonl", "--on-error", "skip", "--min-mentions", "1").code == 0
    shares = [value(f"gender.{g}.share") for g in ("female", "male")]
    assert shares == pytest.approx([1 / 3, 2 / 3])
    assert (
        max(len(q["text"]) for part in report()["quotes"] for q in part["rows"] or [{"text": ""}]) < 500
        if report()["quotes"]
        else True
    )


def test_gate_answers_no_each_time(data: Path) -> None:
    gate = ("--fail-above", "gender.representation=0.1", "--min-mentions", "10")
    for _ in range(2):  # the second run finds the report up to date
        done = scan("-q", data, *gate)
        assert (done.code, "gender.representation = 0.3333 is above 0.1" in done.error) == (1, True)
        assert Path("out", "report.json").exists()
    assert scan("-q", data, *gate[:1], "gender.representation=0.9", out="ok").code == 0
    assert scan("-q", data, *gate[:1], "gender.representation", out="no").code == 2
    assert not Path("no").exists()
    refused = scan("-q", data, "--fail-above", "ses.representation=0.9", out="refused")
    assert (refused.code, "ses.representation has no value (refused: n=0 is below 100)" in refused.error) == (
        1,
        True,
    )


def test_fields(workdir: Path) -> None:
    row = {"prompt": "She asks.", "completion": "He says he left.", "other": "his her"}
    write_jsonl(Path("in.jsonl"), [row])
    assert scan("-q", "in.jsonl", "--field", "completion", "--min-mentions", "1").code == 0
    assert value("gender.male.share") == 1.0
    done = scan("in.jsonl", "--field", "complet", out="x")
    assert (done.code, "did you mean 'completion'" in done.error) == (2, True)
    done = scan("in.jsonl", "--field", "chosen", out="x")
    assert (done.code, "in.jsonl:1: has none of the fields chosen" in done.error) == (65, True)


def test_chat_roles_are_no_text(workdir: Path) -> None:
    messages = [{"role": "sister", "content": "he"}, {"role": "user", "content": "he"}]
    write_jsonl(Path("in.jsonl"), [{"messages": messages}])
    assert scan("-q", "in.jsonl", "--min-mentions", "1").code == 0
    assert value("gender.male.share") == 1.0


def test_own_lexicon(workdir: Path) -> None:
    write_jsonl(Path("in.jsonl"), [{"text": "A vegan and a steak eater met a steak  eater."}])
    Path("diet.tsv").write_text("term\tgroup\nvegan\tplants\nsteak eater\tmeat\n")
    assert (
        scan("-q", "in.jsonl", "--lexicon", "diet.tsv", "--axis", "gender", "--min-mentions", "1").code == 0
    )
    assert value("diet.plants.share") == 0.5
    Path("gender.tsv").write_text("term\tgroup\nvegan\tplants\n")
    done = scan("in.jsonl", "--lexicon", "gender.tsv", out="x")
    assert (done.code, "two lists are named 'gender'" in done.error) == (2, True)
    Path("bad.tsv").write_text("term\tgroup\nvegan\n")
    done = scan("in.jsonl", "--lexicon", "bad.tsv", out="x")
    assert (done.code, done.error.startswith("bad.tsv:2: needs a term and a group")) == (65, True)


def test_another_language(workdir: Path) -> None:
    write_jsonl(Path("in.jsonl"), [{"text": "Der Vater und die Mutter, eine Mutter."}])
    assert scan("-q", "in.jsonl", "--lang", "de", "--min-mentions", "1").code == 0
    assert value("gender.female.share") == pytest.approx(2 / 3)
    done = scan("in.jsonl", "--lang", "de", "--axis", "religion", out="x")
    assert (done.code, done.error) == (2, "--lang de: no lexicon of religion")


def test_quotes_are_escaped_and_the_page_needs_no_network(workdir: Path) -> None:
    evil = [{"text": f"she <script>alert(1)</script> paints quietly softly {i}"} for i in range(60)]
    plain = [{"text": f"he repairs engine loudly {i}"} for i in range(60)]
    # 31 rare words, so that the eight above are the upper fifth of counts.
    plain += [{"text": f"he {chr(97 + i // 9) + chr(97 + i % 9)}"} for i in range(31)]
    write_jsonl(Path("in.jsonl"), evil + plain)
    assert scan("-q", "in.jsonl", "--min-mentions", "10").code == 0
    page = Path("out", "index.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not [s for s in ("http://", "https://", 'src="//') if s in page]
    quoted = {part["title"]: part["rows"] for part in report()["quotes"]}
    assert all(r["text"].startswith("she") for r in quoted["gender, female (gender.male:female)"])
    assert quoted["gender, male (gender.male:female)"][0]["place"].startswith("in.jsonl:")
    words = next(t for t in report()["tables"] if t["title"].startswith("gender.male:female"))
    assert {row[0] for row in words["rows"] if row[1] > 0} == {"repairs", "engine", "loudly"}


def test_before_and_after(data: Path) -> None:
    write_jsonl(Path("before.jsonl"), records(2000, seed=9))
    assert scan("-q", "before.jsonl", out="before").code == 0
    assert scan("-q", data, "--compare", "before", out="after").code == 0
    compared = {r["axis"] + r["group"] + r["metric"]: r for r in report("after/compare")["rows"]}
    row = compared["genderfemaleshare"]
    ours, theirs = (value("gender.female.share", o) for o in ("after", "before"))
    assert row["value"] == pytest.approx(ours - theirs)
    assert row["low"] < 0 < row["high"]  # the same distribution
    done = invoke(load_tool("bias-scan"), "compare", "-q", "before", "after", "-o", "compared")
    assert done.code == 0, done.stderr
    assert report("compared")["rows"] == report("after/compare")["rows"]
    gate = ("--fail-above", "gender.female.share=-0.9")
    assert invoke(load_tool("bias-scan"), "compare", "-q", "before", "after", "-o", "no", *gate).code == 1
    assert invoke(load_tool("bias-scan"), "compare", "-q", "before", "-o", "no").code == 2


def test_sentiment_is_vaders(workdir: Path) -> None:
    vader = pytest.importorskip("vaderSentiment.vaderSentiment")
    good, bad = "She is a wonderful, happy friend", "He is a horrible, angry liar"
    write_jsonl(Path("in.jsonl"), [{"text": f"{t} {i}."} for i in range(40) for t in (good, bad)])
    assert scan("-q", "in.jsonl", "--sentiment", "--min-mentions", "10").code == 0
    scored = [vader.SentimentIntensityAnalyzer().polarity_scores(f"{t} 1.")["compound"] for t in (good, bad)]
    assert [value(f"gender.{g}.sentiment") for g in ("female", "male")] == pytest.approx(scored)
    assert value("gender.male:female.sentiment-gap") == pytest.approx(scored[0] - scored[1])


def test_a_worker_that_is_killed_is_an_error_not_a_hang(workdir: Path) -> None:
    write_jsonl(Path("in.jsonl"), records(120_000))
    line = [sys.executable, *tool_args("bias-scan"), "data", "in.jsonl", "-o", "out", "--workers", "2"]
    process = subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, text=True)
    children: list[str] = []
    while process.poll() is None and len(children) < 2:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        time.sleep(0.01)
    if process.poll() is None:
        os.kill(int(children[0]), signal.SIGKILL)
    assert process.wait(120) == 75
    assert "a worker ended before its work was done" in process.stderr.read()
    assert not Path("out").exists()


def test_ray_gives_the_same(data: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'tuneutils[ray]'")
    done = scan("-q", data, out="one")
    assert done.code == 0, done.stderr
    line = [sys.executable, *tool_args("bias-scan"), "data", "in.jsonl", "-o", "two", "--ray", "local", "-q"]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=550)
    if done.returncode == 69:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert Path("one", "report.json").read_bytes() == Path("two", "report.json").read_bytes()


def test_rows_fall_to_groups_as_they_were_made(data: Path) -> None:
    """Shares of a sample of known make-up lie in their own intervals, and n is what was made."""
    assert scan("-q", data).code == 0
    texts = [r["text"] for r in records(2000)]
    male = sum(t.split()[0] in ("He", "John") or t.startswith("An elderly man") for t in texts)
    female = sum(t.split()[0] in ("She", "Mary") for t in texts)
    row = next(r for r in report()["rows"] if (r["group"], r["metric"]) == ("male", "share"))
    assert (row["n"], row["value"]) == (male + female, pytest.approx(male / (male + female)))
    half = 1.96 * np.sqrt(row["value"] * (1 - row["value"]) / row["n"])
    assert row["high"] - row["low"] == pytest.approx(2 * half, rel=0.15)
