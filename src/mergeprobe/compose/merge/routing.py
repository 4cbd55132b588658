"""SSR: all adapters side by side, with a router between their input and output factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mergeprobe.compose.merge.data import ModuleData
from mergeprobe.compose.merge.moments import moments_of, shares
from mergeprobe.compose.merge.spaces import canonical
from mergeprobe.errors import MergeError
from mergeprobe.lowrank import LowRank, concat


def ssr(
    updates: Sequence[LowRank],
    weights: Sequence[float],
    *,
    data: Sequence[ModuleData],
    ridge: float = 1e-4,
) -> LowRank:
    """SSR-Merge: all adapters side by side, with a router that tells their signals apart.

    With A the stacked input factors and B the stacked output factors, z = A x are the signals of
    all adapters at once. The router R = Q (G + λI)⁻¹ is the least-squares map from z, on inputs of
    every task, to the signals of the task's own adapter alone: G = Σ wᵢ A Sᵢ Aᵀ, block row i of Q
    = wᵢ Aᵢ Sᵢ Aᵀ, Sᵢ = E[xxᵀ] on task i. The merge is B R A, of rank Σ rᵢ. λ is `ridge` ≥ 0 times
    the mean diagonal of G. Only the ratios of the weights matter. Adapters without this module
    are not asked; alone, an adapter stays as it is.

    Source: arXiv:2606.10617. Ours differs: Sᵢ is the probe's sketch instead of calibration
    passes; the factors are canonical (A has orthonormal rows within an adapter) and λ relative
    (published: 1e-4 absolute), so that neither factorisation nor scale matters.

    Assumes: that the probes' inputs tell the tasks apart in the adapters' own signals.
    Fails: where tasks share their inputs: no linear map can tell whose signal it is.
    Cost: (out + in) · (Σ r)² a module; no ΔW is formed.
    """
    if not (math.isfinite(ridge) and ridge >= 0):
        raise MergeError(f"ridge is {ridge}; expected a finite number from 0, such as 1e-4")
    parts = [canonical(update) for update in updates]
    absent = [len(s) == 0 for _, s, _ in parts]
    moments = moments_of("ssr", data, "inputs", absent, updates[0].shape[1])
    portions = shares("ssr", weights)
    if sum(absent) >= len(parts) - 1:
        return concat(updates)
    signals = torch.cat([vh for _, _, vh in parts])
    gram = torch.zeros(len(signals), len(signals), dtype=torch.float64)
    guide, row = torch.zeros_like(gram), 0
    for (_, s, _), moment, portion in zip(parts, moments, portions, strict=True):
        if moment is not None and len(s):
            seen = portion * moment.quadratic(signals.T, signals.T)
            gram += seen
            guide[row : row + len(s)] = seen[row : row + len(s)]
            row += len(s)
    gram.diagonal().add_(ridge * float(gram.diagonal().mean()))
    router = guide @ torch.linalg.pinv(gram, rtol=1e-12, hermitian=True)
    outputs = torch.cat([u * s for u, s, _ in parts], dim=1)
    return LowRank((outputs @ router).float(), signals.float())
