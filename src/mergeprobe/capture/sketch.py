"""Seeded projections, one draw per (module, side), the same for every run.

Two runs that never met can compare full-weight gradients through them: with R_out (out, k) and
R_in (in, k), E[R Rᵀ] = I, the sketch of a matrix M is R_outᵀ M R_in, and ⟨sketch(M), sketch(N)⟩
is an unbiased estimate of ⟨M, N⟩ (arXiv:2401.06118 uses such pairs for gradients; the Johnson-
Lindenstrauss argument is textbook). The draw depends on nothing but its arguments.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.lowrank import LowRank

SKETCH_SIZE = 32


@lru_cache(maxsize=1024)
def projection(module: str, side: str, size: int, k: int = SKETCH_SIZE) -> Float[Tensor, "size k"]:
    """Gaussian (size, k) with E[R Rᵀ] = I, seeded by (module, side, size, k); float32 on CPU."""
    digest = hashlib.sha256(f"mergeprobe|{module}|{side}|{size}|{k}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(size, k, generator=generator) / k**0.5


def sketch_update(module: str, update: LowRank, k: int = SKETCH_SIZE) -> Float[Tensor, "k k"]:
    """R_outᵀ ΔW R_in, from the factors."""
    out, into = update.folded()
    left = projection(module, "out", update.shape[0], k).to(out).T @ out
    right = into @ projection(module, "in", update.shape[1], k).to(into)
    return left @ right
