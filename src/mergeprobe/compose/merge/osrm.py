"""OSRM after training: each update kept off the inputs that the other adapters' tasks use most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.capture.probe import Moment
from mergeprobe.compose.merge.data import ModuleData
from mergeprobe.compose.merge.moments import moments_of
from mergeprobe.errors import MergeError
from mergeprobe.lowrank import LowRank, concat

# directions below this share of the largest are rounding of the sketch, not inputs
ROUNDING = 1e-6


def osrm(
    updates: Sequence[LowRank],
    weights: Sequence[float],
    *,
    data: Sequence[ModuleData],
    directions: float = 8,
) -> LowRank:
    """Σ wᵢ ΔWᵢ Aᵢ⁺Aᵢ: the rows of Aᵢ are the input directions that the others' tasks use least.

    directions: how many of the leading directions of Σ_{j≠i} E[xxᵀ]_j are given up, the rest of
    the space being Aᵢ's; from 0 (the linear merge). One adapter alone gives up none.

    Source: arXiv:2505.22934, B ← ΔW A⁺ with A the r directions of least covariance of the other
    tasks' inputs. Ours differs: Aᵢ has as many rows as there are directions left, since r random
    ones of a wide complement would keep next to nothing of an update that was not trained in
    them; the rank stays that of ΔWᵢ. Before training, see `mergeprobe.compose.osrm_init`.

    Assumes: that a task is disturbed by what another update does to its main inputs, and by nothing
    else.
    Fails: where tasks share inputs: what the others use most is then what this one uses too.
    Cost: in · (Σ q)² a module, q the rank of the probes' moments; no ΔW is formed.
    """
    if directions < 0 or directions != int(directions):
        raise MergeError(f"directions is {directions}; expected a whole number from 0")
    into = updates[0].shape[1]
    moments = moments_of("osrm", data, "inputs", [u.r == 0 for u in updates], into)
    kept = []
    for place, update in enumerate(updates):
        others = [m for k, m in enumerate(moments) if k != place and m is not None]
        used = most_used(others, into)[:, : int(directions)]
        A = update.A.double()
        free = A - (A @ used) @ used.T
        kept.append(LowRank(update.B, free.to(_wide(update.A)), update.scaling))
    return concat(kept, weights)


def most_used(moments: Sequence[Moment], into: int) -> Float[Tensor, "in k"]:
    """The eigenvectors of Σ F Fᵀ, of largest eigenvalue first; float64.

    The tails spread evenly over all directions and change no order. k ≤ Σ q: what the sketches
    hold as more than rounding; 0 without any input.
    """
    if not moments:
        return torch.zeros(into, 0, dtype=torch.float64)
    u, s, _ = torch.linalg.svd(
        torch.cat([moment.factor.double() for moment in moments], 1), full_matrices=False
    )
    return u[:, (s > ROUNDING * s[:1]) & (s > 0)]


def _wide(factor: Tensor) -> torch.dtype:
    return torch.promote_types(factor.dtype, torch.float32)
