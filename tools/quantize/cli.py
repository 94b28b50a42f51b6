"""``quantize MODEL -o OUT``: see README.md."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import Run, Summary, option, tool

SCHEMES = (
    "int8",
    "int8-dynamic",
    "llm-int8",
    "nf4",
    "nf4-double",
    "fp4",
    "fp4-double",
    "rtn",
    "gptq",
    "awq",
    "mixed",
)


@dataclass(frozen=True, kw_only=True)
class Params:
    scheme: str = option("gptq", help="How weights are stored and rounded; see README.md.", choices=SCHEMES)
    bits: int = option(4, help="Bits of a weight (rtn, gptq, awq).", min=2, max=8)
    group_size: int = option(
        64, help="Neighbours of a row that share a scale (rtn, gptq, awq, mixed); 0: whole rows.", min=0
    )
    symmetric: bool = option(False, help="No zero points (rtn, gptq, awq; mixed never has any).")
    calibration: tuple[str, ...] = option(
        (),
        help="Records to calibrate on (gptq, awq, mixed need them; others report weighted errors by them).",
        metavar="RECORDS",
    )
    calibration_rows: int = option(128, help="Rows of calibration tokens.", min=1)
    calibration_length: int = option(512, help="Tokens of a row.", min=2)
    act_order: bool = option(True, help="GPTQ takes the columns with the largest inputs first.")
    damping: float = option(0.01, help="GPTQ's damping, as a share of the mean diagonal.", min=0.0)
    budget: float | None = option(
        None, help="Bits a weight on average over the quantized matrices, scales included (mixed).", min=2.0
    )
    mixed_bits: tuple[int, ...] = option((4, 8), help="Bits that mixed chooses from, for each matrix.", min=2)
    embeddings: bool = option(
        False, help="Also put the input embedding and the output projection on the grid, to nearest."
    )
    skip: tuple[str, ...] = option(
        (), help="Matrices left in full precision, by shell pattern such as '*.down_proj'.", metavar="PATTERN"
    )
    dtype_stored: str = option(
        "auto",
        help="Precision of what is not quantized; auto: as it is, but bfloat16 for float32.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    trust_remote_code: bool = option(False, help="Run code that the model's folder brings along.")


@tool(
    "quantize", Params, group="compress", inputs="MODEL", many=False, stdin=False, output="model",
)  # fmt: skip
def main(run: Run[Params]) -> Summary:
    """Store a model's weights in 4 or 8 bits.

    Reads, quantizes and writes one decoder layer at a time. What is written loads with Transformers'
    from_pretrained (compressed-tensors or bitsandbytes); the bits a weight really takes are in the manifest.
    """
    from tuneutils.tools.quantize.quantize import quantize

    return quantize(run)


if __name__ == "__main__":
    main()
