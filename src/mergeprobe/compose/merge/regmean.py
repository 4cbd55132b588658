"""RegMean: the update whose outputs are nearest to each adapter's own, on each one's inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.adapters.inits import INDEPENDENT, input_overlap
from mergeprobe.capture.probe import Moment
from mergeprobe.compose.merge.data import ModuleData
from mergeprobe.compose.merge.fisher import diagonal
from mergeprobe.compose.merge.linear import linear
from mergeprobe.compose.merge.moments import moments_of, shares, stood_in
from mergeprobe.errors import MergeError
from mergeprobe.lowrank import LowRank


def regmean(
    updates: Sequence[LowRank],
    weights: Sequence[float],
    *,
    data: Sequence[ModuleData],
    ridge: float = 0.01,
    shared_ridge: float = 0.1,
    shrink: float = 0.9,
) -> LowRank:
    """(Σ pᵢ ΔWᵢ (Sᵢ + λI)) (Σ pᵢ (Sᵢ + λI))⁻¹, pᵢ = wᵢ / Σ w, Sᵢ = E[xxᵀ], off-diagonals shrunk.

    The least-squares answer to ΔW x ≈ ΔWᵢ x on the inputs x of every adapter i, with a ridge
    towards the mean: a direction that no input covers gets the mean. λ = ridge · the mean of
    tr Sᵢ / in. Updates that share their init overlap in input space by the init alone, which the
    solve takes for agreement or conflict of tasks; there λ takes shared_ridge (`init_ridge`). The
    merge can be much longer than the updates (2 times on five adapters of SmolLM2-135M, with
    shrink 0 half as long): look at its norm.
    shrink: what is left of the off-diagonal entries, in [0, 1]; 0 is a diagonal RegMean.
    Only the ratios of the weights matter; none below 0.

    Source: arXiv:2212.09849. Ours differs: the ridge (the published rule has only the shrinkage),
    and S from the probe: its leading directions exactly, the rest of the trace spread evenly.

    Exact and in factors: S is diagonal plus low rank, so by Woodbury a module costs
    in · (Σr + Σq)² and nothing (in × in) is formed; ΔW keeps the Bᵢ, of rank Σ rᵢ.

    Assumes: that a module which reproduces every adapter's outputs on its own inputs reproduces the
    adapter.
    Fails: where the adapters' inputs differ from what they see in the merged model, whose earlier
    layers are merged too.
    Cost: in · (Σ r + Σ q)² a module, q the rank of the probes' moments; no ΔW is formed.
    """
    for name, value in {"ridge": ridge, "shared_ridge": shared_ridge}.items():
        if not (math.isfinite(value) and value > 0):
            raise MergeError(f"{name} is {value}; expected a finite number above 0, such as 0.01")
    if not 0 <= shrink <= 1:
        raise MergeError(f"shrink is {shrink}; expected the share that is left, in [0, 1]")
    into = updates[0].shape[1]
    moments = moments_of("regmean", data, "inputs", [u.r == 0 for u in updates], into)
    portions = shares("regmean", weights)
    counted = stood_in(portions, [moment is not None for moment in moments])
    known = [(c, moment) for c, moment in zip(counted, moments, strict=True) if moment is not None]
    level = sum(count * moment.trace for count, moment in known) / into
    if level == 0:  # no input anywhere, so every direction is one that nothing covers
        return linear(updates, portions)
    penalty = level * init_ridge(updates, ridge, shared_ridge)
    solve = _inverse(known, penalty, shrink)
    rows, columns = [], []
    for update, portion, moment in zip(updates, portions, moments, strict=True):
        if moment is not None and update.r > 0:
            rows.append(_seen(update.A.double(), moment, penalty, shrink))
            columns.append(portion * update.scaling * update.B.double())
    dtype = torch.promote_types(updates[0].B.dtype, torch.float32)
    return LowRank(torch.cat(columns, 1).to(dtype), solve(torch.cat(rows)).to(dtype))


def init_ridge(updates: Sequence[LowRank], ridge: float, shared_ridge: float) -> float:
    """shared_ridge where the updates' row spaces overlap beyond what independent inits give.

    By the mean over pairs of `input_overlap`, from chance (0) to identity (1), against the bound
    of `mergeprobe.adapters.inits`; an unclear overlap takes the larger ridge too.
    """
    found = []
    for one, other in combinations([u for u in updates if u.r > 0 and bool(u.B.any())], 2):
        chance = max(one.r, other.r) / one.shape[1]
        if chance < 1:
            found.append((input_overlap(one.A, other.A) - chance) / (1 - chance))
    shared = bool(found) and sum(found) / len(found) > INDEPENDENT
    return max(ridge, shared_ridge) if shared else ridge


def _seen(
    rows: Float[Tensor, "r in"], moment: Moment, penalty: float, shrink: float
) -> Float[Tensor, "r in"]:
    """rows (S + λI), S with its off-diagonals shrunk: shrink · F Fᵀ + a diagonal."""
    factor = moment.factor.double()
    return shrink * (rows @ factor) @ factor.T + rows * _spread(moment, penalty, shrink)


def _spread(moment: Moment, penalty: float, shrink: float) -> Float[Tensor, " in"]:
    """The diagonal part: of shrunk S what is not shrink · F Fᵀ, and λ."""
    return (1 - shrink) * (diagonal(moment) - moment.tail) + moment.tail + penalty


def _inverse(
    known: Sequence[tuple[float, Moment]], penalty: float, shrink: float
) -> Callable[[Float[Tensor, "k in"]], Float[Tensor, "k in"]]:
    """rows -> rows (Σ c (S + λI))⁻¹, by Woodbury: the sum is diagonal plus low rank."""
    spread = torch.stack([count * _spread(moment, penalty, shrink) for count, moment in known]).sum(
        0
    )
    low = torch.cat(
        [math.sqrt(count * shrink) * moment.factor.double() for count, moment in known], 1
    )
    scaled = low / spread[:, None]
    core = torch.eye(low.shape[1], dtype=torch.float64) + low.T @ scaled

    def solve(rows: Float[Tensor, "k in"]) -> Float[Tensor, "k in"]:
        straight = rows / spread
        return straight - torch.linalg.solve(core, (straight @ low).T).T @ scaled.T

    return solve
