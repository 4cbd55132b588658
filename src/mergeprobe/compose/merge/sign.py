"""Rules that settle conflicts of sign, entry by entry: they need one module's dense updates."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.compose.merge.trim import keep_largest
from mergeprobe.errors import MergeError

ROWS = 64  # settled at a time


def ties(
    updates: Float[Tensor, "n out in"],
    weights: Float[Tensor, " n"],
    *,
    density: float = 0.2,
    normalise: float = 1,
) -> Float[Tensor, "out in"]:
    """TIES: trim each update, elect a sign per entry, average those that agree.

    density: the share of entries kept in each update, in (0, 1]. normalise: 1 averages those that
    agree, so that only the ratios of the weights matter; 0 adds them. Source: arXiv:2306.01708.
    Ours differs: it trims per module, not over the whole model; the election and the average are
    weighted; the final λ is the merge's `scaling`.

    Assumes: that small entries do not matter and that a majority of mass tells the right sign.
    Fails: on low-rank updates whose information is spread over all entries: trimming leaves the
    low-rank manifold, and the truncation afterwards loses much (its certificate says how much).
    Cost: a selection over each update's entries, the dense updates of one module, and one truncated
    SVD of the result.
    """
    weighted = torch.empty_like(updates)
    for kept, update, weight in zip(weighted, updates, weights, strict=True):
        torch.mul(keep_largest(update, density), weight, out=kept)
    return agreeing_mean(weighted, weights, normalise)


def agreeing_mean(
    weighted: Float[Tensor, "n out in"], weights: Float[Tensor, " n"], normalise: float = 1
) -> Float[Tensor, "out in"]:
    """Per entry: the sign of the sum is elected, and those of that sign are averaged.

    weighted: wᵢ ΔWᵢ, already trimmed; an entry of 0 has no vote and no share in the mean.
    normalise: 0 for their sum in place of the mean.
    """
    if normalise not in (0, 1):
        raise MergeError(f"normalise is {normalise}; expected 1 for a mean, or 0 for a sum")
    merged = torch.empty_like(weighted[0])
    # a block of rows at a time stays in the cache
    for first in range(0, len(merged), ROWS):
        rows = slice(first, first + ROWS)
        _agreeing(weighted[:, rows], weights, normalise, merged[rows])
    return merged


def _agreeing(
    weighted: Float[Tensor, "n rows in"],
    weights: Float[Tensor, " n"],
    normalise: float,
    out: Float[Tensor, "rows in"],
) -> None:
    # no boolean masks: on a CPU they take ten times as long as the float operations they replace
    elected = weighted.sum(dim=0).sign_()
    agreeing, mass = torch.empty_like(elected), torch.zeros_like(elected)
    out.zero_()
    for kept, weight in zip(weighted, weights, strict=True):
        torch.mul(kept, elected, out=agreeing).clamp_(min=0)
        out += agreeing
        mass.add_(agreeing.sign_(), alpha=float(weight.abs()))
    out.mul_(elected)
    if normalise:
        # where nobody agrees the sum is 0 too, so any divisor but 0 will do
        out.div_(mass.clamp_(min=torch.finfo(mass.dtype).tiny))
