"""A model whose weights lie on nobody's grid, and which computes what the given one computes.

    python benchmarks/rescaled.py artifacts/base -o artifacts/rescaled

A model that was stored in 4 bits once (such as the packaged SmolLM2) loses nothing when it is quantized in
the same way again, so a comparison of quantizers on it is vacuous. Here each channel between two linear maps
is multiplied by a lognormal factor on one side and divided by it on the other: RMSNorm's gain and the columns
that read it, the rows of ``up`` and the columns of ``down``, those of ``v`` and ``o``. The logits stay the
same up to rounding.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import torch

from tuneutils.shared.layerwise import decoder_of, layer_parts
from tuneutils.shared.models import load_model

SIGMA = 0.3


@torch.no_grad()
def rescale(model: Any, *, sigma: float = SIGMA, seed: int = 0) -> None:
    """Rescale a model of the Llama layout in place; ``sigma`` is the factors' standard deviation in logs."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config()
    heads, kept = config.num_attention_heads, config.num_key_value_heads

    def factors(count: int) -> torch.Tensor:
        return torch.exp(sigma * torch.randn(count, generator=generator))

    for layer in decoder_of(model).layers:
        parts: dict[str, Any] = layer_parts(layer)
        for norm, readers in (("attention_norm", "qkv"), ("mlp_norm", ("gate", "up"))):
            scale = factors(len(parts[norm].weight))
            parts[norm].weight /= scale
            for reader in readers:
                parts[reader].weight *= scale
        scale = factors(parts["up"].out_features)
        parts["up"].weight *= scale[:, None]
        parts["down"].weight /= scale
        scale = factors(parts["v"].out_features)
        parts["v"].weight *= scale[:, None]
        # Grouped-query attention: each value head is read by heads / kept query heads.
        repeated = scale.view(kept, 1, -1).expand(kept, heads // kept, -1).flatten()
        parts["o"].weight /= repeated


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--sigma", type=float, default=SIGMA)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="as stored")
    args = parser.parse_args()
    loaded = load_model(args.model, device="cpu", dtype="float32")
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        before = loaded.model(ids).logits
        rescale(loaded.model, sigma=args.sigma, seed=args.seed)
        moved = float((loaded.model(ids).logits - before).abs().max())
    print(f"logits moved by at most {moved:.1e}")
    if moved > 1e-2:
        return 1
    loaded.model.to(getattr(torch, args.dtype)).save_pretrained(args.output)
    loaded.tokenizer.save_pretrained(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
