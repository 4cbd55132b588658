"""From an exact merge to factors of the rank that is written, with the error that this costs."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.lowrank import LowRank, factor, norm, pad, truncate

# above this condition number of B the Cholesky route loses digits that float32 factors still have
WORST_CONDITION = 1e4
# eigenvalues below this share of the largest are rounding of float64: no direction at all
NO_DIRECTION = 1e-14


def recompress(
    update: LowRank, rank: int, *, exactly: bool = False
) -> tuple[LowRank, float, float]:
    """(the best rank-`rank` approximation, its relative Frobenius error, the update's norm).

    Without forming ΔW while Σ rᵢ is below the module's sides. From there on ΔW itself is smaller
    than its factors: then it is formed, one module at a time, and cut by `lowrank.factor`, whose
    sampled SVD comes within a few percent of the best error; `exactly` keeps to the best.
    """
    if update.r <= rank:
        return pad(update, rank), 0.0, norm(update)
    if update.r >= min(update.shape):
        return (cut_exactly if exactly else cut)(update.dense(), rank)
    found = _by_gram(update, rank)
    if found is None:
        best, error = truncate(update, rank)
        found = best, error, norm(update)
    return found


def cut(matrix: Float[Tensor, "out in"], rank: int) -> tuple[LowRank, float, float]:
    """The same of a dense matrix: exact for small ones, else by a sampled SVD."""
    found, error = factor(matrix, rank)
    return found, error, float(torch.linalg.vector_norm(matrix))


def cut_exactly(matrix: Float[Tensor, "out in"], rank: int) -> tuple[LowRank, float, float]:
    """The same by a full SVD, in float64: slower, and the best there is."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    root, size = s[:rank].sqrt(), float(s.square().sum().sqrt())
    found = LowRank((u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float())
    lost = float(s[rank:].square().sum().sqrt())
    found = pad(found, rank) if found.r < rank else found
    return found, lost / size if size > 0 else 0.0, size


def _by_gram(update: LowRank, rank: int) -> tuple[LowRank, float, float] | None:
    """Through r × r products in float64, three times as fast as two QRs; None where B is too close
    to dependent columns for it.

    With B = Q R (R by Cholesky of BᵀB) the eigenvectors of R (A Aᵀ) Rᵀ are the left singular
    vectors of ΔW within Q, its eigenvalues the squares of the singular values.
    """
    b, a = update.B.double() * update.scaling, update.A.double()
    r, failed = torch.linalg.cholesky_ex((b.T @ b).contiguous(), upper=True)
    diagonal = r.diagonal()
    if int(failed) or not float(diagonal.min()) * WORST_CONDITION > float(diagonal.max()):
        return None
    values, vectors = torch.linalg.eigh(r @ (a @ a.T) @ r.T)
    squares = values.flip(0).clamp(min=0)
    u = vectors.flip(1)[:, :rank]
    total, lost = float(squares.sum()), float(squares[rank:].sum())
    kept = squares[:rank]
    real = kept > NO_DIRECTION * squares[0]
    # B A = (Q U) (Uᵀ R A), each side scaled so that they share the singular value evenly
    root = torch.where(real, kept, 0.0).pow(0.25)
    away = torch.where(real, 1.0 / root.masked_fill(~real, 1.0), 0.0)
    into = torch.linalg.solve_triangular(r, u, upper=True) * (root * update.scaling)
    onto = away[:, None] * (u.T @ r)
    wide = torch.promote_types(update.B.dtype, torch.float32)  # of what is written
    found = LowRank(update.B.to(wide) @ into.to(wide), onto.to(wide) @ update.A.to(wide))
    return found, math.sqrt(lost / total) if total > 0 else 0.0, math.sqrt(total)
