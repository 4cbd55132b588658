"""Rules that drop entries at random and rescale the rest, so that the expectation stays.

Every draw comes from the generator that the caller hands over, one number for each entry, update
after update: other orders of the same adapters are other draws.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergeprobe.compose.merge.sign import agreeing_mean
from mergeprobe.errors import MergeError

# of a 16-bit draw
LEVELS = 2**16


def dare_linear(
    updates: Float[Tensor, "n out in"],
    weights: Float[Tensor, " n"],
    *,
    generator: torch.Generator,
    density: float = 0.5,
) -> Float[Tensor, "out in"]:
    """DARE: each entry kept with probability `density` and divided by it; then Σ wᵢ ΔWᵢ.

    density in (0, 1]. Its expectation is `linear`. Source: arXiv:2311.03099, which drops 50 to
    99 %, on full-model updates; low-rank updates are far from sparse, and one draw is noise of
    relative size √((1 − density)/density).

    Assumes: that updates are redundant enough for a random part of their entries to stand for all.
    Fails: on low-rank updates, which are not: the noise of the draw has high rank, and truncation
    removes part of the noise only.
    Cost: a random number for each entry, the dense updates of one module, and one truncated SVD of
    the result.
    """
    merged = torch.zeros_like(updates[0])
    for kept, weight in zip(dropped(updates, density, generator), weights, strict=True):
        merged.add_(kept, alpha=float(weight))
    return merged


def dare_ties(
    updates: Float[Tensor, "n out in"],
    weights: Float[Tensor, " n"],
    *,
    generator: torch.Generator,
    density: float = 0.5,
    normalise: float = 1,
) -> Float[Tensor, "out in"]:
    """DARE, then TIES' election of signs and mean of those that agree, without its trimming.

    density in (0, 1]. normalise: 1 averages those that agree, so that only the ratios of the
    weights matter; 0 adds them. Source: arXiv:2311.03099 with arXiv:2306.01708.

    Assumes: what DARE and TIES assume: redundancy, and signs that a majority of mass tells.
    Fails: where DARE does; the election then acts on noise too.
    Cost: a random number for each entry, the dense updates of one module, and one truncated SVD of
    the result.
    """
    weighted = torch.empty_like(updates)
    kept = dropped(updates, density, generator)
    for place, update, weight in zip(weighted, kept, weights, strict=True):
        torch.mul(update, weight, out=place)
    return agreeing_mean(weighted, weights, normalise)


def della(
    updates: Float[Tensor, "n out in"],
    weights: Float[Tensor, " n"],
    *,
    generator: torch.Generator,
    density: float = 0.5,
    epsilon: float = 0.15,
    normalise: float = 1,
) -> Float[Tensor, "out in"]:
    """DELLA: larger entries of a row are kept more often; then signs are elected, as in TIES.

    The chance to stay rises with an entry's magnitude rank in its row, evenly from density −
    epsilon to density + epsilon, both in (0, 1]; what stays is divided by its chance. normalise: 1
    averages those that agree, so that only the ratios of the weights matter; 0 adds them.
    Source: arXiv:2406.11617. Ours differs: epsilon is half the range of the chances, as mergekit
    has it; the paper's ε is all of it.

    Assumes: that an entry's rank in its row tells how much it matters.
    Fails: where rows are of very different importance, since each keeps the same share; and where
    DARE fails.
    Cost: a sort of every row, a random number for each entry, the dense updates of one module, and
    one truncated SVD of the result.
    """
    weighted = torch.empty_like(updates)
    kept = dropped_by_rank(updates, density, epsilon, generator)
    for place, update, weight in zip(weighted, kept, weights, strict=True):
        torch.mul(update, weight, out=place)
    return agreeing_mean(weighted, weights, normalise)


def della_linear(
    updates: Float[Tensor, "n out in"],
    weights: Float[Tensor, " n"],
    *,
    generator: torch.Generator,
    density: float = 0.5,
    epsilon: float = 0.15,
) -> Float[Tensor, "out in"]:
    """DELLA's dropping, then Σ wᵢ ΔWᵢ: no signs are elected. Its expectation is `linear`.

    Options and source as for `della`.

    Assumes: that an entry's rank in its row tells how much it matters.
    Fails: where DARE fails: the noise of the draw has high rank.
    Cost: a sort of every row, a random number for each entry, the dense updates of one module, and
    one truncated SVD of the result.
    """
    merged = torch.zeros_like(updates[0])
    kept = dropped_by_rank(updates, density, epsilon, generator)
    for update, weight in zip(kept, weights, strict=True):
        merged.add_(update, alpha=float(weight))
    return merged


def dropped(
    updates: Float[Tensor, "n out in"], density: float, generator: torch.Generator
) -> Iterator[Float[Tensor, "out in"]]:
    """Each update with entries dropped at one rate, rescaled by what that rate is exactly.

    The rate is density to the nearest of LEVELS, at least one: a quarter of the random bits of a
    float draw, which is what most of the time goes to. Yields one tensor, filled anew.
    """
    if not 0 < density <= 1:
        raise MergeError(f"density is {density}; expected the chance to keep, in (0, 1]")
    level = max(1, round(density * LEVELS))
    kept = torch.empty_like(updates[0])
    for update in updates:
        if level == LEVELS:
            yield update
            continue
        draw = _draws(update.shape, generator).to(update.device)
        torch.lt(draw, level - LEVELS // 2, out=kept)
        yield kept.mul_(update).mul_(LEVELS / level)


def _draws(shape: torch.Size, generator: torch.Generator) -> Int[Tensor, "out in"]:
    """One of LEVELS whole numbers around 0 for each entry, all equally likely."""
    words = torch.empty(-(-shape.numel() // 4), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[: shape.numel()].view(shape)


def dropped_by_rank(
    updates: Float[Tensor, "n out in"], density: float, epsilon: float, generator: torch.Generator
) -> Iterator[Float[Tensor, "out in"]]:
    """Each update with entries dropped by their magnitude rank in the row, rescaled."""
    if not (epsilon >= 0 and density - epsilon > 0 and density + epsilon <= 1):
        raise MergeError(
            f"density {density} with epsilon {epsilon} gives chances to keep of "
            f"{density - epsilon:g} to {density + epsilon:g}; expected them in (0, 1]"
        )
    for update in updates:
        order = update.abs().argsort(dim=1)
        chances = torch.linspace(
            density - epsilon, density + epsilon, order.shape[1], dtype=update.dtype
        )
        chance = torch.empty_like(update).scatter_(1, order, chances.expand_as(order).to(update))
        yield update * _kept(chance, generator).div_(chance)


def _kept(chance: Float[Tensor, "out in"], generator: torch.Generator) -> Float[Tensor, "out in"]:
    """1 where a fresh uniform number falls below the chance, else 0."""
    draw = torch.rand(chance.shape, generator=generator, device=generator.device)
    return torch.sub(chance, draw.to(chance)).clamp_(min=0).sign_()
