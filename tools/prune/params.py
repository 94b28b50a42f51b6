"""The parameters of ``prune``; options, schema and manifest come from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import option

SPARSE = ("magnitude", "wanda", "sparsegpt")
STRUCTURED = ("heads", "mlp", "layers")


@dataclass(frozen=True, kw_only=True)
class Params:
    """What is removed, and by which score."""

    model: str = option(help="The model to prune: artifact, folder, GGUF, adapter or Hub id.", short="-m")
    method: str = option(
        "wanda",
        help="Single weights by magnitude, wanda or sparsegpt; or whole heads, mlp channels, layers.",
        choices=(*SPARSE, *STRUCTURED),
    )
    sparsity: float = option(0.5, help="Share removed: of weights, heads, channels, layers.", min=0, max=0.99)
    pattern: str = option(
        "unstructured",
        help="Or N:M: at most N of M neighbouring weights stay.",
        metavar="unstructured|N:M",
    )
    budget: str = option(
        "layer",
        help="The share holds in each matrix, or over all of them (magnitude only).",
        choices=("layer", "global"),
    )
    layer_sparsity: tuple[str, ...] = option(
        (), help="Another share for matrices whose name fits; 0 leaves them whole.", metavar="REGEX=SHARE"
    )
    rounds: int = option(1, help="Remove in so many rounds, each scored anew on what is left.", min=1)
    importance: str = option(
        "activation",
        help="Scores heads, channels, layers: by activations (layers: block influence) or by Taylor.",
        choices=("activation", "taylor"),
    )
    damping: float = option(0.01, help="sparsegpt: share of its mean added to the Hessian's diagonal.", min=0)
    calibration_rows: int = option(32, help="Rows of calibration text.", min=1)
    calibration_length: int = option(256, help="Tokens of a row.", min=2)
    heldout: str | None = option(None, help="Records on which the cost is measured.")
    max_length: int = option(256, help="Tokens of a held-out record.", min=4)
    template: str = option(
        "auto",
        help="Put string prompts into the chat template: if there is one, always, never.",
        choices=("auto", "chat", "none"),
    )
    trust_remote_code: bool = option(False, help="Run code that a model's folder brings along.")
    speed: bool = option(True, help="Time the result beside the original, into the run log.", role="runtime")
