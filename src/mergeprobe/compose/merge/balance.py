"""Parameter competition: every entry is weighed by its standing within and between adapters."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.compose.merge.trim import kth_largest
from mergeprobe.errors import MergeError

# the share of outliers at either end of the magnitudes that is clipped, as published
CLIPPED = 1e-4


def pcb(
    updates: Float[Tensor, "n out in"],
    weights: Float[Tensor, " n"],
    *,
    density: float = 0.1,
) -> Float[Tensor, "out in"]:
    """PCB: Σ sᵢ wᵢ ΔWᵢ / Σ sᵢ, entry by entry, sᵢ the standing of the entry in adapter i.

    Magnitudes m are clipped at their outermost 0.01 % and scaled to [0, 1] in each update; with n
    updates the standing within is exp(n m²), the one between is tanh(ΔWᵢ · Σⱼ ΔWⱼ), below 0 where
    the adapter opposes the sum. Of their product the largest `density` share counts, scaled to
    [0, 1]; the rest has standing 0. density in (0, 1]. An entry that nobody stands for is 0.

    Source: arXiv:2410.02396, in the form of its authors' code, which has tanh of the product with
    the sum where the paper has a sum of softmaxes. Ours differs: per module, not over the model.

    Assumes: that large entries matter to an adapter and that agreement with the sum tells which of
    them to trust.
    Fails: where one adapter is much larger than the rest: agreement with the sum is then agreement
    with it.
    Cost: passes over the entries and two selections a module, the dense updates of one module, and
    one truncated SVD of the result.
    """
    if not 0 < density <= 1:
        raise MergeError(f"density is {density}; expected the share of entries to keep, in (0, 1]")
    count, total = len(updates), updates.sum(dim=0)
    merged, mass = torch.zeros_like(total), torch.zeros_like(total)
    for update, weight in zip(updates, weights, strict=True):
        clipped = _clipped(update.abs())
        within = torch.exp(count * _unit(clipped).square_())
        standing = within.mul_(torch.tanh(update * total))
        kept = max(1, round(density * standing.numel()))
        standing = _unit(standing.clamp_(min=float(kth_largest(standing, kept))))
        merged.addcmul_(clipped.mul_(update.sign()), standing, value=float(weight))
        mass += standing
    return merged / mass.clamp_(min=1e-12)


def _clipped(magnitude: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    size = magnitude.numel()
    low = kth_largest(magnitude, size - int(size * CLIPPED))
    high = kth_largest(magnitude, size - max(0, int(size * (1 - CLIPPED) - 1)))
    return magnitude.clamp(min=float(low), max=float(high))


def _unit(values: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """Scaled to [0, 1]; zeros where all are equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)
