"""One module under any rule of METHODS: the exact result, and factors of the rank that is written.

This is all that the engines share: in memory (run.py) and from folders (stream.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.compose.merge.data import ModuleData
from mergeprobe.compose.merge.recipe import Recipe
from mergeprobe.compose.merge.recompress import cut, cut_exactly, recompress
from mergeprobe.compose.merge.spaces import SPACES, as_lowrank
from mergeprobe.lowrank import LowRank, concat, norm, truncate

# the exact merge of one module: factors of a low-rank rule, or a dense float32 (out, in) matrix
Exact = LowRank | Tensor


def exact_merge(
    recipe: Recipe,
    module: str,
    updates: Sequence[LowRank],
    weights: Sequence[float],
    data: Sequence[ModuleData] = (),
) -> Exact:
    """What the recipe says about one module, before any truncation.

    updates: one for each adapter, of rank 0 where it lacks the module. data: for rules that need
    it, one for each update.
    """
    exact = _by_rule(recipe, module, updates, weights, data)
    return exact if recipe.scaling == 1.0 else exact * recipe.scaling


def _by_rule(
    recipe: Recipe,
    module: str,
    updates: Sequence[LowRank],
    weights: Sequence[float],
    data: Sequence[ModuleData],
) -> Exact:
    row = recipe.row
    keywords: dict[str, Any] = dict(recipe.options)
    if row.seeded:
        keywords["generator"] = module_generator(recipe.seed, module)
    if row.needs:
        keywords["data"] = data
    if recipe.space != "full":
        space = SPACES[recipe.space](updates)
        if space.stack.numel() == 0:  # every update is zero, and so is any merge of them
            return absent(updates[0])
        if row.kind == "entrywise":
            given = torch.tensor(list(weights)).to(space.stack)
            return space.back(row.function(space.stack, given, **keywords))
        inside = [as_lowrank(matrix) for matrix in space.stack]
        return space.back(row.function(inside, list(weights), **keywords).dense())
    if row.kind == "entrywise":
        stack = dense_stack(updates)
        return row.function(stack, torch.tensor(list(weights)).to(stack), **keywords)
    return row.function(updates, list(weights), **keywords)


def dense_stack(updates: Sequence[LowRank]) -> Float[Tensor, "n out in"]:
    """The updates themselves, each formed in its place; float32, or wider as the factors are."""
    wide = torch.float32
    for update in updates:
        wide = torch.promote_types(wide, torch.promote_types(update.B.dtype, update.A.dtype))
    stack = torch.empty(len(updates), *updates[0].shape, dtype=wide, device=updates[0].B.device)
    for place, update in zip(stack, updates, strict=True):
        torch.mm(update.B.to(wide), update.A.to(wide), out=place).mul_(update.scaling)
    return stack


def module_generator(seed: int, module: str) -> torch.Generator:
    """A generator of the module's own, so that the order in which modules are merged, or how many
    at once, changes nothing."""
    digest = hashlib.sha256(f"{seed}|{module}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def absent(like: LowRank) -> LowRank:
    """The update of an adapter that lacks the module: rank 0."""
    return LowRank(like.B[:, :0], like.A[:0])


def written(exact: Exact, exact_rank: int, recipe: Recipe) -> tuple[LowRank, float, float]:
    """(what is written of the exact merge, its relative error, the norm of the exact merge).

    The recipe's rank: smaller truncates, larger pads with zeros. None keeps a low-rank result
    exact; a dense one, which has no low rank, is cut to `exact_rank`.
    """
    if isinstance(exact, Tensor):
        into = cut_exactly if recipe.exact_svd else cut
        return into(exact, recipe.rank or exact_rank)
    if recipe.rank is not None:
        return recompress(exact, recipe.rank, exactly=recipe.exact_svd)
    if exact.r <= min(exact.shape):
        return exact, 0.0, norm(exact)
    # more columns than the matrix has rank: recompressing loses nothing
    found, error = truncate(exact, min(exact.shape))
    return found, error, norm(exact)


def rounded(
    update: LowRank, exact: Exact, size: float, dtype: torch.dtype
) -> tuple[LowRank, float]:
    """The update with its factors rounded to `dtype`, and the relative error against `exact`."""
    left, right = update.folded()
    found = LowRank(left.to(dtype).to(left.dtype), right.to(dtype).to(right.dtype))
    if isinstance(exact, Tensor):
        lost = float(torch.linalg.vector_norm(exact - found.dense()))
    else:
        lost = norm(concat([exact, found], [1.0, -1.0]))
    return found, lost / size if size > 0 else 0.0


def exact_rank(updates: Sequence[LowRank]) -> int:
    """Σ rᵢ, or the full rank of the module if that is less."""
    return min(*updates[0].shape, sum(update.r for update in updates))
