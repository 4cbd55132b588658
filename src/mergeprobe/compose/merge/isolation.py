"""Core isolation: what matters most to each adapter is kept as it is, the rest is blended.

Source: CPI-FT, arXiv:2508.21741, which isolates core weights of full fine-tuning runs. Ours
differs: cores are taken per module (a quota each), so that a layer with large updates does not
take all; and they are sets of entries (`core_isolation`) or of rank-one directions
(`core_isolation_lowrank`). Training on with the cores frozen is not part of a merge.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mergeprobe.compose.merge.spaces import canonical
from mergeprobe.compose.merge.spherical import slerp, spherical_coefficients
from mergeprobe.compose.merge.trim import keep_largest
from mergeprobe.errors import MergeError
from mergeprobe.lowrank import LowRank, concat

# a core direction of which less than this is left after stronger ones is a copy of them
COPY = 1e-3


def core_isolation(
    updates: Float[Tensor, "n out in"],
    weights: Float[Tensor, " n"],
    *,
    core: float = 0.01,
    threshold: float = 0.1,
) -> Float[Tensor, "out in"]:
    """The largest entries of each update kept verbatim, the others blended by SLERP.

    core: the share of entries that are an update's core, in (0, 1]. Adapters whose cores overlap
    (Jaccard index of `threshold` or more, in [0, 1], directly or through others) form a group:
    an entry in several cores of one group gets their weighted mean. Between groups the larger
    magnitude wins, relative to the root mean square of its update. Non-core entries get the
    spherical mean of the updates with their cores cut out. Weights at least 0; only their ratios
    matter. Published: core 1 %, threshold 0.1.

    Assumes: that an adapter's skill sits in its few largest entries.
    Fails: on low-rank updates, whose largest entries are a small part of them; and truncation blurs
    the cores that were kept verbatim.
    Cost: a selection over each update's entries, a spherical mean of dense updates, then one
    truncated SVD.
    """
    if not (0 < core <= 1 and 0 <= threshold <= 1):
        raise MergeError(
            f"core {core} and threshold {threshold} do not fit; expected (0, 1] and [0, 1]"
        )
    # an adapter of weight 0 has no core either
    masks = core_masks(updates, core) & (weights > 0)[:, None, None]
    outside = updates * ~masks
    flat = outside.flatten(1)
    rest = spherical_coefficients((flat @ flat.T).double(), weights.tolist())
    merged = torch.einsum("n,nij->ij", rest.to(updates), outside)
    level = updates.square().mean(dim=(1, 2)).sqrt().clamp(min=1e-30)
    strongest = torch.zeros_like(merged)
    for members in groups(jaccard(masks), threshold):
        share = weights[members, None, None] * masks[members]
        mass = share.sum(dim=0)
        own = (share * updates[members]).sum(dim=0) / mass.clamp(min=1e-30)
        relative = (masks[members] * updates[members].abs() / level[members, None, None]).amax(0)
        wins = (relative > strongest) & (mass > 0)
        merged = torch.where(wins, own, merged)
        strongest = torch.where(wins, relative, strongest)
    return merged


def core_isolation_lowrank(
    updates: Sequence[LowRank], weights: Sequence[float], *, components: float = 1
) -> LowRank:
    """The largest rank-one components of each update kept verbatim, the others blended; low rank.

    components: how many of an update's singular triplets (σ, u, v) are its core, from 1. From the
    strongest (σ over its update's norm) to the weakest, each core is added on the input directions
    that stronger cores left free, σ u (v − V Vᵀv)ᵀ, V their input directions: cores with
    orthogonal inputs stay verbatim, and of a conflict the stronger one does. What is left of the
    updates is blended by SLERP and kept off the core inputs by (I − V Vᵀ). Weights at least 0,
    for the blend alone; only their ratios matter. A variant of ours, of rank at most Σ rᵢ.

    Assumes: that an adapter's skill sits in its largest components.
    Fails: where cores need the same inputs: the weaker one is cut to what the stronger left.
    Cost: (out + in) · (Σ r)² a module; no ΔW is formed.
    """
    if components < 1 or components != int(components):
        raise MergeError(f"components is {components}; expected a whole number from 1")
    count = int(components)
    parts = [canonical(update) for update in updates]
    cores = [
        (*_standing(s, k), s[k] * u[:, k], vh[k])
        for (u, s, vh), weight in zip(parts, weights, strict=True)
        for k in range(min(count, len(s)) if weight else 0)
    ]
    if not cores:
        return concat(updates, [0.0] * len(updates))
    outputs, inputs = [], []
    taken = parts[0][2].new_zeros(0, updates[0].shape[1])
    for _, _, output, direction in sorted(cores, key=lambda part: part[:2], reverse=True):
        free = direction - taken.T @ (taken @ direction)
        left = torch.linalg.vector_norm(free)
        if left > COPY:
            outputs.append(output)
            inputs.append(free)
            taken = torch.cat([taken, (free / left)[None]])
    rest = [
        LowRank((u * s)[:, count:], vh[count:]) if len(s) > count else LowRank(u[:, :0], vh[:0])
        for u, s, vh in parts
    ]
    blended = slerp(rest, weights)
    kept_off = blended.A.double() - (blended.A.double() @ taken.T) @ taken
    left = torch.cat([torch.stack(outputs, dim=1), blended.B.double()], dim=1)
    return LowRank(left.float(), torch.cat([torch.stack(inputs), kept_off]).float())


def _standing(s: Float[Tensor, " k"], k: int) -> tuple[float, float]:
    """By what cores are ordered: σ over the update's norm, among equals σ itself."""
    # rounded, or rank-one updates, all of relative size 1, would be ordered by noise
    return round(float(s[k] / torch.linalg.vector_norm(s)), 9), float(s[k])


def core_masks(updates: Float[Tensor, "n out in"], core: float) -> Bool[Tensor, "n out in"]:
    """Where each update's entries are among its largest `core` share; nowhere if it is zero."""
    return torch.stack([keep_largest(update, core) != 0 for update in updates])


def jaccard(masks: Bool[Tensor, "n *shape"]) -> Float[Tensor, "n n"]:
    """|Cᵢ ∩ Cⱼ| / |Cᵢ ∪ Cⱼ| of the cores, in [0, 1]; 0 for two empty ones, 1 with itself."""
    return _over_union(_common(masks))


def core_overlap(modules: Iterable[Sequence[LowRank]], core: float) -> Float[Tensor, "n n"]:
    """The Jaccard index of whole adapters' cores, `core` of the entries of each module.

    modules: the adapters' updates at one module after another, of rank 0 where one lacks it. For
    `groups` and `overlap_lift`: which adapters lean on the same weights. Dense, a module at a time.
    """
    common = None
    for updates in modules:
        masks = core_masks(torch.stack([update.dense() for update in updates]), core)
        common = _common(masks) + (0 if common is None else common)
    if common is None:
        raise MergeError("no module to compare; expected the updates at one at least")
    return _over_union(common)


def _common(masks: Bool[Tensor, "n *shape"]) -> Float[Tensor, "n n"]:
    flat = masks.flatten(1).float()
    return (flat @ flat.T).double()


def _over_union(common: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    size = common.diagonal()
    union = size[:, None] + size - common
    overlap = common / union.clamp(min=1)
    overlap.fill_diagonal_(1.0)
    return overlap


def overlap_lift(overlap: Float[Tensor, "n n"], core: float) -> Float[Tensor, "n n"]:
    """The overlap of cores over what chance would give, q/(2 − q) for shares of q = core.

    1 is chance: only above it do two adapters lean on the same weights. At the published 1 % chance
    is 0.005, so a Jaccard index of 0.1 is a lift of about 20.
    """
    if not 0 < core <= 1:
        raise MergeError(f"core is {core}; expected a share of entries in (0, 1]")
    return overlap * (2 - core) / core


def groups(overlap: Float[Tensor, "n n"], threshold: float) -> list[list[int]]:
    """Connected components of the adapters that overlap by `threshold` or more, in order."""
    left, found = set(range(len(overlap))), []
    while left:
        group, reached = [], [min(left)]
        left.discard(reached[0])
        while reached:
            one = reached.pop()
            group.append(one)
            near = {j for j in left if float(overlap[one, j]) >= threshold}
            left -= near
            reached.extend(sorted(near))
        found.append(sorted(group))
    return found
