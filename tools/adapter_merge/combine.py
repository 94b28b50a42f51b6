"""Several low-rank updates of one weight into one, with the error made.

The true sum is T = Σ wᵢ·ΔWᵢ = b·a with the aᵢ stacked and the wᵢ·bᵢ side by side. Norms and singular values
of such products come from the small core R_b·R_aᵀ of two QR decompositions; T itself is never formed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tuneutils.tools.adapter_merge.adapter import Factors

DENSE = ("ties", "dare-linear", "dare-ties")
DEFAULT_DENSITY = {"ties": 0.2, "dare-linear": 0.5, "dare-ties": 0.5}


@dataclass(frozen=True)
class Weighted:
    """One adapter's share in a module: wᵢ and ΔWᵢ, and the adapter's place in the order given."""

    weight: float
    factors: Factors
    index: int


def weighted_sum(parts: Sequence[Weighted]) -> Factors:
    """T exactly, as one product: ``cat``."""
    a = torch.cat([p.factors.a for p in parts])
    b = torch.cat([p.weight * p.factors.b for p in parts], dim=1)
    return replace(parts[0].factors, a=a, b=b)


def truncate(factors: Factors, rank: int | None) -> Factors:
    """The best approximation of at most ``rank`` (Eckart and Young 1936); None keeps the numerical rank.

    The numerical rank leaves out singular values below σ₁ · max(out, in) · ε of float32, as
    ``torch.linalg.matrix_rank`` does.
    """
    q_b, r_b = torch.linalg.qr(factors.b.double())
    q_a, r_a = torch.linalg.qr(factors.a.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    tolerance = s[0] * max(factors.b.shape[0], factors.a.shape[1]) * torch.finfo(torch.float32).eps
    keep = max(1, int((s > tolerance).sum()))
    keep = keep if rank is None else min(keep, rank)
    return _balanced(q_b @ u[:, :keep], s[:keep], vh[:keep] @ q_a.T, factors)


def factorise(delta: torch.Tensor, rank: int, like: Factors) -> Factors:
    """The best approximation of a dense (out, in) matrix of at most ``rank``."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return _balanced(u[:, :rank], s[:rank], vh[:rank], like)


def _balanced(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, like: Factors) -> Factors:
    """Factors of equal norm, singular vectors' signs fixed by their largest entry."""
    largest = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    root = s.sqrt()
    a = (root[:, None] * vh * largest.T).float().contiguous()
    return replace(like, a=a, b=(u * largest * root).float().contiguous())


def product_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖b @ a‖_F without forming it; float64 throughout."""
    _, r_b = torch.linalg.qr(b.double())
    _, r_a = torch.linalg.qr(a.double().T)
    return float(torch.linalg.matrix_norm(r_b @ r_a.T))


def relative_error(made: Factors, truth: Factors) -> float | None:
    """‖ΔW − T‖_F / ‖T‖_F for two products; None where T is zero and ΔW is not."""
    difference = product_norm(torch.cat([made.a, truth.a]), torch.cat([made.b, -truth.b], dim=1))
    return _ratio(difference, product_norm(truth.a, truth.b))


def relative_error_dense(made: torch.Tensor, truth: torch.Tensor) -> float | None:
    """The same for matrices."""
    return _ratio(float((made - truth).double().norm()), float(truth.double().norm()))


def _ratio(difference: float, size: float) -> float | None:
    if size == 0:
        return 0.0 if difference == 0 else None
    return difference / size


def combine_dense(
    parts: Sequence[Weighted], method: str, density: float, seed: int, module: str
) -> torch.Tensor:
    """TIES or DARE on the matrices ΔWᵢ.

    Args:
        density: share of each ΔWᵢ's entries that is kept.
        module: its name; DARE's masks depend on it, on the seed and on the adapter's place alone.

    Returns:
        (out, in) float32.
    """
    deltas = [p.factors.b @ p.factors.a for p in parts]
    if method == "ties":
        kept = [trim(d, density) for d in deltas]
    else:
        kept = [drop(d, density, _generator(seed, p.index, module)) for d, p in zip(deltas, parts)]
    weighted = torch.stack([p.weight * d for p, d in zip(parts, kept)])
    return weighted.sum(0) if method == "dare-linear" else elect_and_mean(weighted)


def trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the largest entries by magnitude (Yadav et al. 2023, TIES-Merging, step 1), here per matrix."""
    count = int(density * delta.numel())
    kept = torch.zeros_like(delta).flatten()
    chosen = delta.abs().flatten().topk(count).indices
    kept[chosen] = delta.flatten()[chosen]
    return kept.reshape(delta.shape)


def elect_and_mean(deltas: torch.Tensor) -> torch.Tensor:
    """Elect each entry's sign by total mass and average those that agree (TIES-Merging, steps 2 and 3).

    Args:
        deltas: (n, out, in), weights applied; zeros are absent, and count in no mean.
    """
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agree = deltas.sign() == sign
    return (deltas * agree).sum(0) / agree.sum(0).clamp(min=1)


def drop(delta: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Keep each entry with probability ``density`` and divide by it (Yu et al. 2024, DARE, equation 3)."""
    mask = torch.rand(delta.shape, generator=generator) < density
    return delta * mask / density


def _generator(seed: int, index: int, module: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{index}:{module}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
