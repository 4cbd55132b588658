"""Rules that scale and add updates: exact in factored form, so nothing dense is formed.

Every rule here takes one module's updates, one per adapter (rank 0 for an adapter that lacks the
module), and a weight for each, and returns the exact merge of rank Σ rᵢ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergeprobe.errors import MergeError
from mergeprobe.lowrank import LowRank, concat, norm


def linear(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Σ wᵢ ΔWᵢ, the weights taken as they are (they need not sum to 1).

    Never the product of averaged factors, (Σ wᵢBᵢ)(Σ wᵢAᵢ): its cross terms BᵢAⱼ cost a relative
    error of about √(N − 1) for N independent adapters.

    Assumes: that the loss is close to quadratic around the base, so that weights mix as effects do.
    Fails: where adapters ask for opposite changes of the same directions, and with many adapters:
    each keeps 1/T of its own.
    Cost: copying the factors; a truncation costs (out + in) · (Σ r)² a module; no ΔW is formed.
    """
    return concat(updates, weights)


def total(updates: Sequence[LowRank], weights: Sequence[float], *, scale: float = 1.0) -> LowRank:
    """Task arithmetic: scale · Σ wᵢ ΔWᵢ, with every wᵢ = 1 unless given.

    Source: arXiv:2212.04089, whose λ is `scale`; the paper searches λ in 0.3…1.

    Assumes: that the adapters act in nearly orthogonal directions, so that each is kept whole.
    Fails: where they share directions, which are then counted T times, and where the sum leaves the
    region in which the base's loss is flat.
    Cost: copying the factors; a truncation costs (out + in) · (Σ r)² a module; no ΔW is formed.
    """
    if not math.isfinite(scale):
        raise MergeError(f"scale is {scale}; expected a finite number, such as 0.3 to 1")
    return concat(updates, [scale * weight for weight in weights])


def norm_preserving_mean(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """The mean, stretched to the mean of the norms: M · (Σ|wᵢ|‖ΔWᵢ‖ / Σ|wᵢ|) / ‖M‖, M = Σ wᵢ ΔWᵢ.

    A mean of N independent updates is √N too short; this undoes only that. Per module; only the
    ratios of the weights matter. Where the updates cancel to zero there is no direction to
    stretch, and the merge is zero. The baseline that SLERP and its kin have to beat.

    Assumes: that the direction of the mean is right and only its length is not.
    Fails: where updates nearly cancel: what is left of them is stretched to full length.
    Cost: (out + in) · (Σ r)² a module; no ΔW is formed.
    """
    merged = concat(updates, weights)
    length = norm(merged)
    mass = sum(abs(weight) for weight in weights)
    # rounding leaves cancelled updates a little above zero: noise must not be stretched
    longest = max(
        abs(weight) * norm(update) for update, weight in zip(updates, weights, strict=True)
    )
    if length <= 1e-6 * longest or mass == 0:
        return merged * 0.0
    target = sum(abs(w) * norm(update) for update, w in zip(updates, weights, strict=True)) / mass
    return merged * (target / length)


def equal_norm_mean(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """The mean of the updates after each is scaled to one norm: Σ wᵢ (n̄ / ‖ΔWᵢ‖) ΔWᵢ / Σ wᵢ,
    n̄ = Σ |wᵢ| ‖ΔWᵢ‖ / Σ |wᵢ| over the updates that are not zero.

    Learning rate, steps and rank decide how long an update is, not how much its task needs; in a
    plain mean a long one drowns a short one. Per module; only the ratios of the weights matter; a
    zero update stays zero, and its share of the mean is empty.

    Assumes: that an update serves its task over a range of lengths (a finished adapter at half its
    length keeps nearly all of its gain).
    Fails: where a module of one adapter is short because it hardly matters: its noise is stretched.
    Cost: (out + in) · (Σ r)² a module; no ΔW is formed.
    Source: none known to us; measured in docs/LOG.md.
    """
    norms = [norm(update) for update in updates]
    heard = [
        abs(weight) if length > 0 else 0.0 for weight, length in zip(weights, norms, strict=True)
    ]
    if sum(heard) == 0 or sum(weights) == 0:
        return concat(updates, [0.0 for _ in updates])
    # an adapter that lacks the module keeps its share of the mean but says nothing of the length
    target = sum(w * length for w, length in zip(heard, norms, strict=True)) / sum(heard)
    shares = [weight / sum(weights) for weight in weights]
    factors = [
        share * target / length if length > 0 else 0.0
        for share, length in zip(shares, norms, strict=True)
    ]
    return concat(updates, factors)
