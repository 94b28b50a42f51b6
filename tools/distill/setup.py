"""What a run works on: teacher, student, their tokenizers, and whether they share a vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tuneutils.shared.artifact import Input, library_versions
from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name, resolve_device, resolve_dtype
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.models import (
    ModelRef,
    load_adapter,
    load_base,
    load_config,
    load_tokenizer,
    model_input,
)
from tuneutils.tools.distill.data import same_tokenizer
from tuneutils.tools.distill.params import Params


@dataclass
class Setup:
    """What a run works on.

    Attributes:
        other: teacher and student have different vocabularies.
        limit: longest example, in tokens.
    """

    run: Run[Params]
    teacher_ref: ModelRef
    student_ref: ModelRef | None
    teacher_input: Input
    teacher_tokenizer: Any
    tokenizer: Any
    other: bool
    limit: int
    where: Any
    dtype: Any


def prepare(run: Run[Params], teacher: ModelRef, student: ModelRef | None, teacher_input: Input) -> Setup:
    params = run.params
    trust = params.trust_remote_code
    theirs = load_tokenizer(teacher, trust_remote_code=trust)
    ours = load_tokenizer(student, trust_remote_code=trust) if student else theirs
    configs = [
        load_config(ref, trust_remote_code=trust).get_text_config() for ref in (teacher, student or teacher)
    ]
    other = not same_tokenizer(ours, theirs) or configs[0].vocab_size != configs[1].vocab_size
    if other and params.loss not in ("uld", "ce"):
        raise ToolError(
            f"{params.model}: another vocabulary ({len(theirs)} tokens, {configs[0].vocab_size} logits) than "
            f"the student's ({len(ours)}, {configs[1].vocab_size}); --loss uld distils across vocabularies"
        )
    if other and params.data == "student":
        raise ToolError("--data student needs one vocabulary for both", code=ExitCode.USAGE)
    positions = [getattr(c, "max_position_embeddings", None) or 1 << 40 for c in configs]
    where = resolve_device(run.device)
    return Setup(
        run,
        teacher,
        student,
        teacher_input,
        theirs,
        ours,
        other,
        min(params.max_length, *positions),
        where,
        resolve_dtype(run.dtype, where),
    )


def load(ref: ModelRef, setup: Setup, precision: str) -> Any:
    """A plain model, its adapter merged in; refused when its weights are no numbers."""
    import torch

    dtype = {"float32": torch.float32}.get(precision, setup.dtype)
    model = load_base(ref.root, setup.where, dtype, None, setup.run.params.trust_remote_code)
    if ref.kind == "adapter":
        model = load_adapter(model, ref.path).merge_and_unload()
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ToolError(f"{ref.given}: {name} holds NaN or infinity; import the model again")
    return model.requires_grad_(False).eval()


def teacher_identity(setup: Setup) -> dict[str, Any]:
    """What a teacher's answers and distributions depend on, besides what it is asked."""
    root = setup.teacher_ref.root
    versions = library_versions()
    return {
        "teacher": setup.teacher_input.sha256,
        "base": None if root is setup.teacher_ref else model_input(root.given).sha256,
        "dtype": dtype_name(setup.dtype),
        "device": setup.where.type,
        "torch": versions.get("torch"),
        "transformers": versions.get("transformers"),
    }
