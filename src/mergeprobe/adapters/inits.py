"""Inits: did two LoRA runs start from the same random A?

It matters, because a shared A makes updates look aligned that are not: cosines of ΔW between
adapters of one init measure the init as much as the tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.adapters.checkpoint import Adapter, is_zero

Init = Literal["shared", "independent", "unclear"]

# of the way from chance (0) to the same row space (1). SmolLM2-135M, r = 8, AdamW at lr 1e-3:
# three tasks of one init are at 0.91-0.92 after 30 to 40 steps, of two inits at 0.002-0.004
SHARED, INDEPENDENT = 0.5, 0.25


def input_overlap(a: Float[Tensor, "ra in"], b: Float[Tensor, "rb in"]) -> float:
    """Mean squared cosine of the principal angles between the row spaces of two A factors.

    In [0, 1]: 1 if one row space holds the other; max(ra, rb)/in is chance, for random rows.
    Does not change if a factor pair (B, A) is written as (B G⁻¹, G A).
    """
    qa, qb = _rows(a), _rows(b)
    return _mean_squared_cosine(qa, qb)


def input_overlaps(adapters: Sequence[Adapter]) -> dict[tuple[int, int], float | None]:
    """For each pair i < j, how far `input_overlap` is from chance (0) to identity (1).

    The mean over modules with the same input width that are not zero; None without any.
    LoRA draws A at random and starts at B = 0, so runs that share the seed start from the same
    A, and A moves less than B: their row spaces stay close. Runs of other seeds start at chance
    and their row spaces drift towards each other only as far as their gradients agree.
    """
    sums = {pair: [0.0, 0] for pair in combinations(range(len(adapters)), 2)}
    names = sorted({module for adapter in adapters for module in adapter.modules})
    for module in names:  # module by module, so that one set of bases is held at a time
        rows = {
            i: _rows(adapter.modules[module].A)
            for i, adapter in enumerate(adapters)
            if module in adapter.modules and not is_zero(adapter.modules[module])
        }
        for i, j in combinations(rows, 2):
            if rows[i].shape[1] != rows[j].shape[1]:
                continue
            chance = max(len(rows[i]), len(rows[j])) / rows[i].shape[1]
            if chance < 1:
                found = _mean_squared_cosine(rows[i], rows[j])
                sums[i, j][0] += (found - chance) / (1 - chance)
                sums[i, j][1] += 1
    return {pair: total / count if count else None for pair, (total, count) in sums.items()}


def init_of(overlap: float) -> Init:
    """What an overlap of `input_overlaps` says about two adapters' inits."""
    if overlap >= SHARED:
        return "shared"
    return "independent" if overlap <= INDEPENDENT else "unclear"


def _rows(a: Float[Tensor, "r in"]) -> Float[Tensor, "k in"]:
    """An orthonormal basis of the row space, k = min(r, in)."""
    return torch.linalg.qr(a.float().T).Q.T


def _mean_squared_cosine(qa: Tensor, qb: Tensor) -> float:
    return float((qa @ qb.T).square().sum()) / min(len(qa), len(qb))
