"""Means on the sphere: SLERP, for any number of updates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.errors import MergeError
from mergeprobe.lowrank import LowRank, concat, inner

# cosines within this of −1, and means this much shorter than their parts, have no direction
OPPOSITE = 1e-6
STEPS, STILL = 500, 1e-10


def slerp(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """The weighted mean of the directions on the sphere, as long as the mean of the norms.

    For two updates an angle Ω apart and t = w₂/(w₁ + w₂): the direction is sin((1−t)Ω)/sin Ω ·
    ΔW₁/‖ΔW₁‖ + sin(tΩ)/sin Ω · ΔW₂/‖ΔW₂‖, the norm (1−t)‖ΔW₁‖ + t‖ΔW₂‖. For more, the direction
    with the smallest Σ wᵢ · angle² (the Fréchet mean), whatever the order. Per module. Weights of
    at least 0; only their ratios matter. A zero update has no direction but counts in the norm.
    Updates that are opposite, or cancel, have no shortest path between them: then it is the mean.

    Source: Shoemake 1985 (doi:10.1145/325165.325242), by way of mergekit. Ours differs: on
    updates, not on full weights, where the angle is next to nothing and slerp is linear; and the
    norm is interpolated too. For updates of equal norm it is mergekit's formula.

    Assumes: that directions carry the task and norms are only lengths.
    Fails: where updates of different tasks are nearly orthogonal, as most are: then it is the mean,
    made longer.
    Cost: a Gram matrix of the updates, (out + in) · (Σ r)² a module; no ΔW is formed.
    """
    gram = torch.tensor([[inner(a, b) for b in updates] for a in updates], dtype=torch.float64)
    return concat(updates, spherical_coefficients(gram, weights).tolist())


def spherical_coefficients(
    gram: Float[Tensor, "n n"], weights: Sequence[float]
) -> Float[Tensor, " n"]:
    """The coefficients cᵢ with which Σ cᵢ xᵢ is the spherical mean of vectors of this Gram matrix.

    float64. MergeError for a weight below 0.
    """
    share = torch.tensor([float(weight) for weight in weights], dtype=torch.float64)
    if bool((share < 0).any()):
        raise MergeError(f"a weight is {share.min():g}; a spherical mean needs weights from 0 up")
    share = share / share.sum()
    lengths = gram.diagonal().clamp(min=0).sqrt()
    has_direction = lengths > 1e-12 * lengths.max()
    if not bool(has_direction.any()):
        return share
    inverse = torch.where(has_direction, 1 / lengths.clamp(min=1e-300), 0.0)
    cosines = (inverse[:, None] * gram * inverse).clamp(-1, 1)
    direction = _frechet(cosines, share * has_direction)
    if direction is None:
        return share
    return direction * inverse * float(share @ lengths)


def _frechet(
    cosines: Float[Tensor, "n n"], share: Float[Tensor, " n"]
) -> Float[Tensor, " n"] | None:
    """Coefficients of the unit vectors in their mean direction; None where there is none."""
    if float(share.sum()) == 0:
        return None
    share = share / share.sum()
    start = math.sqrt(max(0.0, float(share @ cosines @ share)))
    if start <= OPPOSITE or bool((cosines[share > 0][:, share > 0] < OPPOSITE - 1).any()):
        return None
    mean = share / start
    for _ in range(STEPS):
        along = (cosines @ mean).clamp(-1, 1)
        angle = torch.arccos(along)
        # θ/sin θ, by its series where both vanish
        stretch = torch.where(angle < 1e-4, 1 + angle**2 / 6, angle / angle.sin().clamp(min=1e-12))
        pull = share * stretch
        tangent = pull - float(pull @ along) * mean
        length = math.sqrt(max(0.0, float(tangent @ cosines @ tangent)))
        if length < STILL:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * tangent
        mean = mean / math.sqrt(float(mean @ cosines @ mean))
    return mean
