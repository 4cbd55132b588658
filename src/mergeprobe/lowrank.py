"""LowRank: one module's update ΔW = scaling · B A, kept as its factors.

Nothing here forms an (out, in) matrix except `dense()`, which tests and row blocks use; `factor`
and `full_rank` take one.
Small products are taken in float64: they cost r² entries and cancel often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.errors import AdapterMismatch

# of the randomised SVD of a dense matrix
OVERSAMPLING, POWER_ITERATIONS, SEED = 10, 2, 0
# below this side, or for ranks near full, the exact SVD is as fast as the sampled one
SMALL_SIDE = 160


@dataclass(frozen=True, eq=False)
class LowRank:
    """An (out, in) matrix `scaling * B @ A` of rank at most r.

    B: (out, r), A: (r, in), any floating dtype; scaling: a finite float.
    """

    B: Float[Tensor, "out r"]
    A: Float[Tensor, "r in"]
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise AdapterMismatch(
                f"factors do not chain: B is {tuple(self.B.shape)}, A is {tuple(self.A.shape)}; "
                "expected (out, r) and (r, in)"
            )

    @property
    def r(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def parameters(self) -> int:
        return self.B.numel() + self.A.numel()

    def __mul__(self, factor: float) -> LowRank:
        return replace(self, scaling=self.scaling * float(factor))

    __rmul__ = __mul__

    def to(self, *args, **kwargs) -> LowRank:
        return replace(self, B=self.B.to(*args, **kwargs), A=self.A.to(*args, **kwargs))

    def dense(self) -> Float[Tensor, "out in"]:
        """The matrix itself, in float32 or wider. For tests, row blocks and small modules."""
        wide = torch.promote_types(self.B.dtype, torch.float32)
        product = self.B.to(wide) @ self.A.to(wide)
        return product if self.scaling == 1.0 else self.scaling * product

    def folded(self) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        """(B, A) with the scaling multiplied into B, so that ΔW = B A."""
        wide = torch.promote_types(self.B.dtype, torch.float32)
        return self.scaling * self.B.to(wide), self.A.to(wide)


def inner(a: LowRank, b: LowRank) -> float:
    """Frobenius inner product ⟨ΔW_a, ΔW_b⟩ = s_a s_b Σ (B_aᵀB_b) ∘ (A_a A_bᵀ)."""
    _same_shape(a, b)
    left = a.B.double().T @ b.B.double()
    right = a.A.double() @ b.A.double().T
    return float((left * right).sum()) * a.scaling * b.scaling


def norm(a: LowRank) -> float:
    """Frobenius norm ‖ΔW‖."""
    return math.sqrt(max(0.0, inner(a, a)))


def factored_svd(
    a: LowRank,
) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "k in"]]:
    """Thin SVD (U, S, Vh) of ΔW from two QRs and one k × k SVD, k = min(r, out, in); float64."""
    q_out, r_out = torch.linalg.qr(a.B.double())
    q_in, r_in = torch.linalg.qr(a.A.double().T)
    u, s, vh = torch.linalg.svd(a.scaling * (r_out @ r_in.T), full_matrices=False)
    return q_out @ u, s, vh @ q_in.T


def spectrum(a: LowRank) -> Float[Tensor, " k"]:
    """Singular values of ΔW, largest first; float64."""
    r_out = torch.linalg.qr(a.B.double(), mode="r").R
    r_in = torch.linalg.qr(a.A.double().T, mode="r").R
    return torch.linalg.svdvals(a.scaling * (r_out @ r_in.T))


def concat(parts: Sequence[LowRank], weights: Sequence[float] | None = None) -> LowRank:
    """The exact Σ wᵢ ΔWᵢ, of rank Σ rᵢ and scaling 1. Weights default to 1."""
    if not parts:
        raise AdapterMismatch("nothing to concatenate: got no updates, expected at least one")
    weights = [1.0] * len(parts) if weights is None else list(weights)
    if len(weights) != len(parts):
        raise AdapterMismatch(f"{len(parts)} updates but {len(weights)} weights; one for each")
    for other in parts[1:]:
        _same_shape(parts[0], other)
    wide = torch.float32
    for part in parts:
        wide = torch.promote_types(wide, torch.promote_types(part.B.dtype, part.A.dtype))
    return LowRank(
        torch.cat([w * p.scaling * p.B.to(wide) for p, w in zip(parts, weights, strict=True)], 1),
        torch.cat([p.A.to(wide) for p in parts], 0),
    )


def truncate(a: LowRank, rank: int) -> tuple[LowRank, float]:
    """The best rank-`rank` approximation, and its certificate.

    The certificate is the relative Frobenius error √(Σ_{k>rank} σ_k²) / √(Σ σ_k²), in [0, 1];
    0 for a zero update. The result has scaling 1 and the singular values split evenly
    between B and A; where ΔW has fewer than `rank` directions the rest are zeros.
    """
    if rank < 1:
        raise AdapterMismatch(f"cannot truncate to rank {rank}; the smallest is 1")
    u, s, vh = factored_svd(a)
    total = float((s * s).sum())
    dropped = float((s[rank:] * s[rank:]).sum())
    root = s[:rank].sqrt()
    wide = torch.promote_types(a.B.dtype, torch.float32)
    kept = LowRank(
        (u[:, :rank] * root).to(wide).contiguous(),
        (root[:, None] * vh[:rank]).to(wide).contiguous(),
    )
    if kept.r < rank:
        kept = pad(kept, rank)
    return kept, math.sqrt(dropped / total) if total > 0 else 0.0


def factor(matrix: Float[Tensor, "out in"], rank: int) -> tuple[LowRank, float]:
    """A rank-`rank` approximation and its relative Frobenius error, in [0, 1]; 0 for a zero matrix.

    Exact SVD for small matrices; otherwise a randomised range finder with power iterations
    (arXiv:0909.4061, algorithm 4.4) from a fixed seed, so the result repeats. The error is that of
    the factors returned, ‖M − BA‖/‖M‖, not a bound. Beyond full rank the components are zeros.
    """
    side = min(matrix.shape)
    if side <= SMALL_SIDE or 2 * (rank + OVERSAMPLING) >= side:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, vh = _sampled_svd(matrix, rank + OVERSAMPLING)
    root = s[:rank].sqrt()
    found = LowRank((u[:, :rank] * root).contiguous(), (root[:, None] * vh[:rank]).contiguous())
    size = float(torch.linalg.vector_norm(matrix))
    left = float(torch.linalg.vector_norm(torch.addmm(matrix, found.B, found.A, alpha=-1)))
    if found.r < rank:
        found = pad(found, rank)
    return found, left / size if size > 0 else 0.0


def _sampled_svd(
    matrix: Float[Tensor, "out in"], samples: int
) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "k in"]]:
    generator = torch.Generator().manual_seed(SEED)
    start = torch.randn(matrix.shape[1], samples, generator=generator)
    basis = torch.linalg.qr(matrix @ start.to(matrix)).Q
    for _ in range(POWER_ITERATIONS):
        # without a QR after each half step float32 would lose the small directions
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    inside, triangle = torch.linalg.qr(matrix.T @ basis)
    u, s, vh = torch.linalg.svd(triangle.T, full_matrices=False)
    return basis @ u, s, vh @ inside.T


def full_rank(matrix: Float[Tensor, "out in"]) -> LowRank:
    """A dense matrix as factors of its own, float32: the identity and the matrix, exact."""
    dense = matrix.float().contiguous()
    if dense.shape[0] <= dense.shape[1]:
        return LowRank(torch.eye(dense.shape[0]).to(dense), dense)
    return LowRank(dense, torch.eye(dense.shape[1]).to(dense))


def pad(a: LowRank, rank: int) -> LowRank:
    """The same update with zero components up to `rank` (servers want one uniform rank)."""
    missing = rank - a.r
    if missing < 0:
        raise AdapterMismatch(f"cannot pad rank {a.r} down to {rank}; truncate it instead")
    return LowRank(
        torch.cat([a.B, a.B.new_zeros(a.B.shape[0], missing)], 1),
        torch.cat([a.A, a.A.new_zeros(missing, a.A.shape[1])], 0),
        a.scaling,
    )


def _same_shape(a: LowRank, b: LowRank) -> None:
    if a.shape != b.shape:
        raise AdapterMismatch(
            f"updates of other shapes: {a.shape} and {b.shape}; both must adapt the same weight"
        )
