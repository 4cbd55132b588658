"""Rules on the rank-one units of adapters, taken from each update's SVD.

They are published for the columns of a trained B and the rows of its A, which another
factorisation of the same update would change. Here a unit is √σ u and √σ v of the update's SVD,
so what counts is the update; (u, v) and (−u, −v) are the same unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergeprobe.compose.merge.spaces import canonical
from mergeprobe.compose.merge.trim import keep_largest
from mergeprobe.errors import MergeError
from mergeprobe.lowrank import LowRank, concat

LLOYD_STEPS = 300
ORTHOGONAL = 1e-6


def lora_lego(updates: Sequence[LowRank], weights: Sequence[float], *, units: float = 0) -> LowRank:
    """LoRA-LEGO: all adapters' units, clustered into `units` centroids that make the merge.

    The units [√σ u; √σ v] are clustered by k-means; each centroid is stretched to the weighted
    mean norm of its members, and the whole update by √(r / units), r the largest rank there is.
    units: a whole number from 1, or 0 for r, the published choice, where that factor is 1. Weights
    of at least 0; only their ratios matter. An adapter of weight 0 or without this module is not
    counted.

    Source: arXiv:2409.16167. Ours differs: canonical units; a unit counts with the sign that is
    nearer to its centroid (of orthogonal ones the largest entry of v is positive); and k-means
    starts from the unit of largest norm, then from the farthest, so that nothing is drawn at
    random and the order of the adapters is free. All of it from the units' Gram matrix.

    Assumes: that rank-one units are pieces of skill, and that near units are the same piece.
    Fails: where singular values are close to each other: then the canonical units, and the
    clusters, are arbitrary.
    Cost: (out + in) · (Σ r)² a module; no ΔW is formed.
    """
    if units < 0 or units != int(units):
        raise MergeError(f"units is {units}; expected a whole number from 1, or 0 for the rank")
    if min(weights) < 0:
        raise MergeError(f"a weight is {min(weights):g}; lora_lego needs weights from 0 up")
    counted = [(update, weight) for update, weight in zip(updates, weights, strict=True) if weight]
    parts = [(*_oriented(*canonical(update)), weight) for update, weight in counted]
    largest = max((len(s) for _, s, _, _ in parts), default=0)
    if largest == 0:
        return concat(updates, [0.0] * len(updates))
    mass = torch.cat([torch.full_like(s, weight) for _, s, _, weight in parts])
    left = torch.cat([u * s.sqrt() for u, s, _, _ in parts], dim=1)
    right = torch.cat([s.sqrt()[:, None] * vh for _, s, vh, _ in parts])
    gram = left.T @ left + right @ right.T
    centroids = _kmeans(gram, mass, min(int(units) or largest, len(mass)))
    stretch = math.sqrt(largest / (int(units) or largest))
    return LowRank((left @ centroids.T * stretch).float(), (centroids @ right).float())


def _oriented(
    u: Float[Tensor, "out k"], s: Float[Tensor, " k"], vh: Float[Tensor, "k in"]
) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "k in"]]:
    """The signs of the pairs (u, v) such that the largest entry of each v is positive."""
    sign = vh.gather(1, vh.abs().argmax(dim=1, keepdim=True)).sign() if len(s) else vh[:, :1]
    return u * sign.T, s, sign * vh


def _kmeans(
    gram: Float[Tensor, "n n"], mass: Float[Tensor, " n"], clusters: int
) -> Float[Tensor, "k n"]:
    """The stretched centroids as combinations of the units; a unit may count with its sign."""
    size = gram.diagonal()
    chosen = [int(size.argmax())]
    while len(chosen) < clusters:
        apart = size[:, None] - 2 * gram[:, chosen].abs() + size[chosen]
        chosen.append(int(apart.min(dim=1).values.argmax()))
    centroids = torch.eye(len(size), dtype=gram.dtype, device=gram.device)[chosen]
    before = None
    for _ in range(LLOYD_STEPS):
        along = gram @ centroids.T
        apart = (centroids @ gram * centroids).sum(dim=1) - 2 * along.abs()
        nearest = apart.argmin(dim=1)
        # the units of one update are orthogonal, and rounding must not choose a sign
        against = along.gather(1, nearest[:, None])[:, 0] < -ORTHOGONAL * size
        sign = torch.where(against, -1.0, 1.0)
        if before is not None and torch.equal(before, nearest):
            break
        before = nearest
        centroids = _means(nearest, sign * mass, clusters)
    return centroids * _stretch(gram, mass, nearest, centroids)[:, None]


def _means(
    nearest: Int[Tensor, " n"], share: Float[Tensor, " n"], clusters: int
) -> Float[Tensor, "k n"]:
    member = torch.nn.functional.one_hot(nearest, clusters).T.to(share)
    total = (member * share.abs()).sum(dim=1, keepdim=True)
    # copies can leave a cluster empty: its centroid is zero and adds nothing
    return member * share / total.masked_fill(total == 0, 1.0)


def _stretch(
    gram: Float[Tensor, "n n"],
    mass: Float[Tensor, " n"],
    nearest: Int[Tensor, " n"],
    centroids: Float[Tensor, "k n"],
) -> Float[Tensor, " k"]:
    length = (centroids @ gram * centroids).sum(dim=1).clamp(min=0).sqrt()
    members = _means(nearest, mass, len(centroids)) @ gram.diagonal().clamp(min=0).sqrt()
    return torch.where(length > 0, members / length.clamp(min=1e-300), 0.0)


def robust_merge(
    updates: Sequence[LowRank],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    share: float = 0.2,
    scale: float = 4.0,
) -> LowRank:
    """RobustMerge: prune both factors, let each direction make up for what it lost, add.

    Of √σ u and √σ v each update keeps the largest `density` share of entries. A direction's
    coefficient is Σ|entries of √σ v| before over after pruning; all but the largest `share` of an
    update's coefficients are raised to the smallest of those; then they are divided by their sum
    over the adapters, k-th direction by k-th. The merge is scale · Σ wᵢ Bᵢ diag(cᵢ) Aᵢ, wᵢ = 1
    unless given. density and share in (0, 1].

    Source: arXiv:2502.17159 and its authors' code, whose factor 2 on each of A and B is the scale
    of 4. Ours differs: canonical units; an update's pruned factors multiply each other only,
    where that code also multiplies the B of one adapter with the A of the others.

    Assumes: that directions of small singular value belong to the task and are lost first in a
    merge.
    Fails: where small directions are noise, which it raises; and where its scale of 4 does not suit
    the updates' size.
    Cost: (out + in) · (Σ r)² a module; no ΔW is formed.
    """
    for name, value in (("density", density), ("share", share)):
        if not 0 < value <= 1:
            raise MergeError(f"{name} is {value}; expected a share in (0, 1]")
    parts = [canonical(update) for update in updates]
    rank = max(len(s) for _, s, _ in parts)
    total = torch.zeros(rank, dtype=torch.float64)
    pruned = []
    for u, s, vh in parts:
        if len(s) == 0:
            continue
        whole = s.sqrt()[:, None] * vh
        left, right = keep_largest(u * s.sqrt(), density), keep_largest(whole, density)
        coefficient = _made_up(whole, right, share)
        total[: len(s)] += coefficient.cpu()
        pruned.append((left, coefficient, right))
    left, right = [], []
    given = [w for w, (_, s, _) in zip(weights, parts, strict=True) if len(s)]
    for weight, (b, coefficient, a) in zip(given, pruned, strict=True):
        left.append(scale * weight * b * (coefficient / total[: len(coefficient)].to(b)))
        right.append(a)
    if not left:
        return concat(updates, [0.0] * len(updates))
    return LowRank(torch.cat(left, 1).float(), torch.cat(right, 0).float())


def _made_up(
    whole: Float[Tensor, "k in"], pruned: Float[Tensor, "k in"], share: float
) -> Float[Tensor, " k"]:
    left = pruned.abs().sum(dim=1)
    # a direction pruned to nothing has nothing to make up
    coefficient = torch.where(left > 0, whole.abs().sum(dim=1) / left.clamp(min=1e-300), 0.0)
    ordered = coefficient.sort().values
    return coefficient.clamp(
        min=float(ordered[min(len(ordered) - 1, int(len(ordered) * (1 - share)))])
    )
