"""A dense merged module back to factors, with an exact certificate."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.lowrank import LowRank, pad

OVERSAMPLING, POWER_ITERATIONS, SEED = 10, 2, 0
# below this side, or for ranks near full, the exact SVD is as fast as the sampled one
SMALL_SIDE = 160


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
