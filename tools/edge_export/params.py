"""The parameters of ``edge-export``; options, schema and manifest come from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import option

#: Target → its schemes, the default first.
SCHEMES = {
    "gguf": (
        "q8-0", "f32", "f16", "bf16", "q4-0", "q4-1", "q5-0", "q5-1", "q2-k", "q3-k-s", "q3-k-m", "q3-k-l",
        "q4-k-s", "q4-k-m", "q5-k-s", "q5-k-m", "q6-k", "iq4-nl", "iq4-xs", "iq3-s", "iq3-m",
    ),
    "onnx": ("int4", "fp32", "int8"),
    "openvino": ("q8-0", "f16", "q4-0"),
    "executorch": ("int8", "fp32", "int4"),
}  # fmt: skip
TARGETS = tuple(SCHEMES)


@dataclass(frozen=True, kw_only=True)
class Params:
    """What is written, and how closely it must follow the source."""

    heldout: str = option(
        help="Held-out records on which the package must agree with the model.", metavar="FILE"
    )
    target: str = option("gguf", help="What the package is for.", choices=TARGETS)
    scheme: str | None = option(
        None,
        help="Precision of the weights; by target: "
        + "; ".join(f"{t} {', '.join(s)}" for t, s in SCHEMES.items())
        + ". The first is the default.",
    )
    block_size: int = option(32, help="Weights that share a scale in ONNX int4 and int8.", min=16, max=256)
    pure: bool = option(
        False, help="GGUF: the same type for all matrices, in place of llama.cpp's more precise embedding."
    )
    min_agreement: float | None = option(
        None, help="Refuse less top-1 agreement than this; by default by the scheme's bits.", min=0, max=1
    )
    max_kl: float | None = option(
        None, help="Refuse a higher KL(model ‖ package), in nats a token; by default by bits.", min=0
    )
    parity_tokens: int = option(2048, help="Held-out tokens to compare on.", min=16)
    max_length: int = option(512, help="Longest sequence of the comparison, in tokens.", min=8)
    template: str = option(
        "auto",
        help="Put string prompts into the chat template: if there is one, always, never.",
        choices=("auto", "chat", "none"),
    )
    threads: int = option(
        0, help="Threads of the runtime; 0: the CPUs that are there.", min=0, role="runtime"
    )


@dataclass(frozen=True, kw_only=True)
class RuntimeParams:
    """Nothing to choose: one version, one place."""
