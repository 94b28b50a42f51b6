"""Which options go together, and which share of each matrix goes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.models import ModelRef, load_config, resolve
from tuneutils.tools.prune.params import SPARSE, STRUCTURED, Params


@dataclass(frozen=True)
class Shares:
    """The share of each matrix that goes, by its full name; the first pattern that fits decides."""

    default: float
    patterns: tuple[tuple[re.Pattern[str], float], ...] = ()

    def of(self, name: str) -> float:
        return next((share for pattern, share in self.patterns if pattern.search(name)), self.default)


def shares_of(params: Params) -> Shares:
    """The shares asked for.

    Raises:
        ToolError: exit 2: not REGEX=SHARE, or no share.
    """
    made = []
    for given in params.layer_sparsity:
        pattern, equals, share = given.rpartition("=")
        try:
            value = float(share)
            if not equals or not 0 <= value < 1:
                raise ValueError("must be REGEX=SHARE, a share from 0 to below 1")
            made.append((re.compile(pattern), value))
        except (ValueError, re.error) as exc:
            raise ToolError(f"--layer-sparsity {given}: {exc}", code=ExitCode.USAGE) from exc
    return Shares(params.sparsity, tuple(made))


def check_options(params: Params) -> ModelRef:
    """Refuse options that do not go together; gives the model.

    Raises:
        ToolError: exit 2, or what ``models.resolve`` raises.
    """
    structured = params.method in STRUCTURED
    refused = {
        "--pattern": structured and params.pattern != "unstructured",
        "--layer-sparsity": bool(params.layer_sparsity) and (structured or params.pattern != "unstructured"),
        "--budget global": params.budget == "global"
        and (params.method != "magnitude" or params.pattern != "unstructured"),
        "--importance taylor": params.importance == "taylor" and not structured,
    }
    for name, bad in refused.items():
        if bad:
            raise ToolError(
                f"{name}: does not go with --method {params.method}"
                + (f" --pattern {params.pattern}" if params.pattern != "unstructured" else ""),
                code=ExitCode.USAGE,
            )
    if params.method in SPARSE:
        from tuneutils.tools.prune.sparse import Pattern

        Pattern.parse(params.pattern)
    return resolve(params.model)


def plan(run: Run[Params]) -> dict[str, Any]:
    """What is there, and what would go."""
    params = run.params
    text = load_config(check_options(params), trust_remote_code=params.trust_remote_code).get_text_config()
    there = {
        "heads": getattr(text, "num_key_value_heads", None),
        "mlp": getattr(text, "intermediate_size", None),
        "layers": text.num_hidden_layers,
    }
    made: dict[str, Any] = {"there": there}
    if params.method in STRUCTURED:
        made["stays"] = units_left(there[params.method], params.sparsity)
    return made


def units_left(count: int | None, share: float) -> int:
    """Of ``count`` units, how many stay; at least one."""
    return max(1, round((count or 1) * (1 - share)))
