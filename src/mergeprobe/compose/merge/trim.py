"""Rules that keep entries by their magnitude and add what is left."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.errors import MergeError


def keep_largest(update: Float[Tensor, "*shape"], density: float) -> Float[Tensor, "*shape"]:
    """The update with all but its round(density · size), at least one, largest entries at zero.

    Entries as large as the smallest one kept stay too, so that the result does not depend on
    the order of the entries.
    """
    if not 0 < density <= 1:
        raise MergeError(f"density is {density}; expected the share of entries to keep, in (0, 1]")
    kept = max(1, round(density * update.numel()))
    if kept == update.numel():
        return update
    magnitude = update.abs().flatten().cpu().numpy()
    magnitude.partition(magnitude.size - kept)  # in place: it is ours
    threshold = magnitude[magnitude.size - kept]
    # hardshrink drops what is at most its bound: the next number down keeps the threshold itself
    below = np.nextafter(threshold, np.zeros_like(threshold))
    return torch.nn.functional.hardshrink(update, float(below))


def kth_largest(values: Float[Tensor, "*shape"], k: int) -> np.floating:
    """The k-th largest value, counted from 1."""
    # numpy's selection is an order of magnitude faster than torch.kthvalue or topk here
    flat = values.flatten().cpu().numpy()
    return np.partition(flat, flat.size - k)[flat.size - k]


def magnitude_prune(
    updates: Float[Tensor, "n out in"],
    weights: Float[Tensor, " n"],
    *,
    density: float = 0.5,
) -> Float[Tensor, "out in"]:
    """Σ wᵢ · (the largest entries of ΔWᵢ): a baseline, and PEFT's `magnitude_prune`.

    density: the share of entries kept in each update, in (0, 1]. Source: PEFT, which publishes no
    default. Ours differs: it trims true updates, not A and B.

    Assumes: that small entries do not matter.
    Fails: on low-rank updates, which are not sparse: what is trimmed is most of the update's rank.
    Cost: a selection over each update's entries, the dense updates of one module, and one truncated
    SVD of the result.
    """
    merged = torch.zeros_like(updates[0])
    for update, weight in zip(updates, weights, strict=True):
        merged.add_(keep_largest(update, density), alpha=float(weight))
    return merged


def breadcrumbs(
    updates: Float[Tensor, "n out in"],
    weights: Float[Tensor, " n"],
    *,
    density: float = 0.09,
    gamma: float = 0.01,
) -> Float[Tensor, "out in"]:
    """Σ wᵢ · (the entries of ΔWᵢ of middling magnitude).

    Of each update the largest `gamma` share is dropped as outliers, the next `density` share
    kept, the rest dropped. density > 0, gamma ≥ 0, together at most 1. Source: arXiv:2312.06795,
    whose β = 1 − density − gamma is 0.9; its scale α (0.3 to 0.5) is the weights here.

    Assumes: that the largest entries are outliers and the smallest are noise.
    Fails: on low-rank updates, where the largest entries are the update; with 9 % of entries kept,
    most of it is gone.
    Cost: two selections over each update's entries, the dense updates of one module, and one
    truncated SVD of the result.
    """
    if not (density > 0 and gamma >= 0 and density + gamma <= 1):
        raise MergeError(
            f"density {density} and gamma {gamma} do not fit; expected density above 0, gamma "
            "from 0, and a sum of at most 1"
        )
    merged = torch.zeros_like(updates[0])
    for update, weight in zip(updates, weights, strict=True):
        middle = keep_largest(update, density + gamma)
        if round(gamma * update.numel()) > 0:
            middle = middle - keep_largest(update, gamma)
        merged.add_(middle, alpha=float(weight))
    return merged
