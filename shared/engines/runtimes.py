"""Where the runtimes are, and how they are installed.

llama.cpp has no wheel. Its library is taken, prebuilt, from the npm package that node-llama-cpp publishes for
each platform; the content is pinned by hash. ONNX Runtime GenAI and OpenVINO GenAI are ordinary wheels.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tuneutils.shared.errors import ExitCode, ToolError

LLAMA_CPP_VERSION = "0.5.0"
INSTALL_LLAMA_CPP = "edge-export runtime"


@dataclass(frozen=True)
class Prebuilt:
    """An npm package with llama.cpp's shared libraries.

    Attributes:
        package: npm name and version.
        folder: of the libraries inside the package.
        sha256: of the listing of that folder (``sources.listing_sha256``).
    """

    package: str
    folder: str
    sha256: str

    @property
    def source(self) -> str:
        return f"npm:{self.package}!/{self.folder}/*#sha256={self.sha256}"


#: (system, machine) → the library for it. ``llama.h`` of another version has other structs.
PREBUILT = {
    ("Linux", "x86_64"): Prebuilt(
        "@node-llama-cpp/linux-x64@3.22.1",
        "bins/linux-x64",
        "ef55eff40027f91668aac841e6c5b6528e4130d3c7db5a6a394b50ca0d49bd0f",
    ),
    ("Linux", "aarch64"): Prebuilt(
        "@node-llama-cpp/linux-arm64@3.22.1",
        "bins/linux-arm64",
        "eb2338794becab86f228d2ece0a449672d970e7e7bc4b6c75400f4a62d9d909e",
    ),
}

#: Engine → (import name, extra).
WHEELS = {
    "onnxruntime-genai": ("onnxruntime_genai", "edge"),
    "openvino-genai": ("openvino_genai", "edge"),
    "executorch": ("executorch", "executorch"),
}


def llama_cpp_folder() -> Path:
    """Where llama.cpp's libraries are or go: ``$TUNEUTILS_LLAMA_CPP``, or inside the Python environment."""
    given = os.environ.get("TUNEUTILS_LLAMA_CPP")
    return Path(given or Path(sys.prefix) / "share" / "tuneutils" / f"llama.cpp-{LLAMA_CPP_VERSION}")


def find_llama_cpp() -> Path:
    """The folder of llama.cpp's libraries.

    Raises:
        ToolError: they are not installed (69), with the line that installs them.
    """
    folder = llama_cpp_folder()
    if not any(folder.glob("libllama.*")):
        raise ToolError(
            f"llama.cpp {LLAMA_CPP_VERSION} is not installed ({folder}); run: {INSTALL_LLAMA_CPP}",
            code=ExitCode.UNAVAILABLE,
        )
    return folder


def install_llama_cpp() -> tuple[Path, bool]:
    """Fetch, check and put in place; returns the folder and whether it was there already.

    Raises:
        ToolError: no library for this platform (69), other content than pinned (65), no network (75).
    """
    from tuneutils.shared.sources import resolve

    folder = llama_cpp_folder()
    if any(folder.glob("libllama.*")):
        return folder, True
    here = platform.system(), platform.machine()
    if here not in PREBUILT:
        raise ToolError(
            f"no prebuilt llama.cpp for {' '.join(here)}; build version {LLAMA_CPP_VERSION} and name its "
            "folder in TUNEUTILS_LLAMA_CPP",
            code=ExitCode.UNAVAILABLE,
        )
    found = resolve(PREBUILT[here].source, "dataset")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".llama.cpp.", dir=folder.parent))
        for path in found.paths:
            if ".so" in path.name or path.suffix in (".dylib", ".dll"):
                shutil.copyfile(path, temporary / path.name)
        temporary.chmod(0o755)
        temporary.rename(folder)
    except OSError as exc:
        if not any(folder.glob("libllama.*")):  # another process may have won the race
            raise ToolError(
                f"{folder}: cannot write: {exc.strerror}; name a folder in TUNEUTILS_LLAMA_CPP",
                code=ExitCode.CANNOT_WRITE,
            ) from exc
        shutil.rmtree(temporary, ignore_errors=True)
    return folder, False


def installed(name: str) -> bool:
    """Whether an engine's runtime is here."""
    if name == "llama.cpp":
        return any(llama_cpp_folder().glob("libllama.*"))
    return importlib.util.find_spec(WHEELS[name][0]) is not None


def require_engine(name: str) -> None:
    """Raise with the install line, exit 69, when an engine's runtime is absent."""
    if name == "llama.cpp":
        find_llama_cpp()
    elif not installed(name):
        raise ToolError(
            f"the runtime {name} is not installed; run: pip install 'tuneutils[{WHEELS[name][1]}]'",
            code=ExitCode.UNAVAILABLE,
        )
