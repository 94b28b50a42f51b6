"""The adapters that a composition is made of, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.models import ModelRef, check_base, resolve


def open_adapters(given: Sequence[str]) -> list[ModelRef]:
    """What the names stand for: two or more adapters of one base, each once.

    Raises:
        ToolError: 2 fewer than two, or one twice; 66 a folder is missing; 65 no adapter, or another base.
    """
    if len(given) < 2:
        raise ToolError(f"{len(given)} adapters given; it takes two or more", code=ExitCode.USAGE)
    refs: list[ModelRef] = []
    for name in given:
        if not Path(name).is_dir():
            raise ToolError(f"{name}: no such adapter folder", code=ExitCode.MISSING_INPUT)
        ref = resolve(name)
        if ref.kind != "adapter":
            raise ToolError(f"{name}: is a model, no adapter (no adapter_config.json)")
        if any(Path(name).samefile(other.path) for other in refs):
            raise ToolError(f"{name}: given twice", code=ExitCode.USAGE)
        refs.append(ref)
    for ref in refs[1:]:
        check_base(ref, refs[0], f"that of {refs[0].given}")
        if ref.quantization != refs[0].quantization:
            raise ToolError(
                f"{ref.given}: made on a base stored as {ref.quantization or 'full precision'}, "
                f"{refs[0].given} as {refs[0].quantization or 'full precision'}"
            )
    return refs


def names_of(refs: Sequence[ModelRef]) -> list[str]:
    """The shortest ends of the paths that tell the adapters apart."""
    parts = [Path(ref.path).absolute().parts for ref in refs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]).lstrip("/") for p in parts]
        if len(set(names)) == len(names):
            return names
    return [ref.given for ref in refs]
