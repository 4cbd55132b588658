"""Rules on the singular values and vectors of the merge, computed from the factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.errors import MergeError
from mergeprobe.lowrank import LowRank, concat, factored_svd

# a response below this share of its update's norm is rounding of float32 factors, not a response
RESPONSE_FLOOR = 1e-6


def svc(updates: Sequence[LowRank], weights: Sequence[float], *, alpha: float = 0.1) -> LowRank:
    """Singular value calibration: undo the over-counting of directions that adapters share.

    M = Σ wᵢ ΔWᵢ = U Σ Vᵀ (wᵢ = 1 unless given). With s_ir = ⟨u_rᵀM, u_rᵀΔWᵢ⟩ / ‖u_rᵀΔWᵢ‖² each
    σ_r becomes σ_r · T / Σᵢ max(alpha, s_ir): an identical pair, summed, is the adapter again.
    An update that does not respond along u_r (0/0 in the formula) counts as s_ir = 0, so alpha.
    alpha > 0. The published rule divides by a tiny response without bound; so do we, down to
    RESPONSE_FLOOR. Source: arXiv:2602.05536.

    u_rᵀM = σ_r v_rᵀ and u_rᵀΔWᵢ = (u_rᵀ sᵢBᵢ) Aᵢ, so a module costs (out + in) · (Σ r)².
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise MergeError(f"alpha is {alpha}; expected a finite number above 0, such as 0.1")
    merged = concat(updates, weights)
    u, s, vh = factored_svd(merged)
    along_merge = s[:, None] * vh
    counted = torch.zeros_like(s)
    for update in updates:
        counted += _coefficient(u, along_merge, update).clamp(min=alpha)
    root = (s * (len(updates) / counted)).sqrt()
    dtype = merged.B.dtype
    return LowRank((u * root).to(dtype), (root[:, None] * vh).to(dtype))


def _coefficient(
    u: Float[Tensor, "out k"], along_merge: Float[Tensor, "k in"], update: LowRank
) -> Float[Tensor, " k"]:
    """s_r of one update: how often the merge counts what this update does along each u_r."""
    response = (u.T @ update.B.double() * update.scaling) @ update.A.double()
    size = response.square().sum(dim=1)
    silent = size <= RESPONSE_FLOOR**2 * size.sum()
    return torch.where(
        silent, 0.0, (along_merge * response).sum(dim=1) / size.masked_fill(silent, 1.0)
    )
