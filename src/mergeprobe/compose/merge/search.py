"""Weights by search: without gradients on a few-shot loss, or down the gradient of an entropy.

Neither knows a model: the caller says what weights cost (mergeprobe.evaluate.weights does, for a
base model and batches). What is found is carried out as a linear merge.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor

from mergeprobe.errors import MergeError


@dataclass(frozen=True)
class Search:
    """What a search found.

    weights: the best of those tried. value, start: what was minimised, at them and at the start.
    evaluations: how often the caller's function was called.
    """

    weights: tuple[float, ...]
    value: float
    start: float
    evaluations: int


def lorahub(
    loss: Callable[[Sequence[float]], float],
    start: Sequence[float],
    *,
    budget: int = 40,
    bound: float = 1.5,
    penalty: float = 0.05,
) -> Search:
    """The weights in [−bound, bound] with the least loss + penalty · Σ|w|, without gradients.

    loss: nats per token on a few examples, called `budget` times at most; first at `start` (zeros
    in the paper: the base model). A loss that is not finite counts as worse than all seen. Of all
    weights tried the best are given, so the value never exceeds the start's. Deterministic.

    Source: LoraHub, arXiv:2307.13269, with its bounds, penalty and 40 steps. Ours differs in what
    is weighed, true updates, Σ wᵢ ΔWᵢ, where the paper composes (Σ wᵢBᵢ)(Σ wᵢAᵢ); and in the
    optimiser: quadratic models in a trust region (COBYQA, scipy) for nevergrad's NGOpt, which at
    40 steps and few weights is COBYLA, its linear forerunner.

    Assumes: that a few examples tell good weights from bad ones.
    Fails: with many adapters, for whose weights the budget is too small, and where the examples are
    few: it fits them.
    Cost: `budget` forward passes over the examples of all tasks; the merge itself is linear.
    """
    first = [float(weight) for weight in start]
    _check_search(first, budget, bound, penalty)
    tried: list[tuple[float, tuple[float, ...]]] = []

    def cost(weights: Sequence[float]) -> float:
        if len(tried) == budget:
            raise _Spent
        point = tuple(float(weight) for weight in weights)
        found = float(loss(point)) + penalty * sum(map(abs, point))
        if not math.isfinite(found):
            # an infinity would leave the optimiser's model without a slope
            found = max((value for value, _ in tried), default=0.0) + 1.0
        tried.append((found, point))
        return found

    # the model needs 2n + 1 points; below n + 2 it cannot be built, and the start stays
    with contextlib.suppress(_Spent):
        minimize(
            cost,
            np.array(first),
            method="COBYQA",
            bounds=[(-bound, bound)] * len(first),
            options={"maxfev": max(budget, len(first) + 2), "initial_tr_radius": bound / 3},
        )
    least, best = min(tried, key=lambda pair: pair[0])
    return Search(best, least, tried[0][0], len(tried))


class _Spent(Exception):
    """The budget of evaluations is used up."""


def _check_search(start: Sequence[float], budget: int, bound: float, penalty: float) -> None:
    if budget < 1:
        raise MergeError(f"the budget is {budget}; expected at least 1 evaluation")
    if not start:
        raise MergeError("nothing to search: no weights to start from, expected at least one")
    if not (math.isfinite(bound) and bound > 0 and math.isfinite(penalty) and penalty >= 0):
        raise MergeError(
            f"bound is {bound} and penalty {penalty}; expected a bound above 0 and a penalty of at "
            "least 0, such as 1.5 and 0.05"
        )
    if wrong := [weight for weight in start if not abs(weight) <= bound]:
        raise MergeError(f"the search starts at {wrong[0]}, outside of [-{bound}, {bound}]")


def adamerging(
    entropy: Callable[[Float[Tensor, "n groups"]], Float[Tensor, ""]],
    start: Float[Tensor, "n groups"],
    *,
    steps: int = 500,
    rate: float = 1e-3,
) -> Search:
    """Weights that make the merged model surest of its own predictions: Adam on the entropy.

    entropy: of the model's predictions on unlabelled text as a differentiable function of the
    weights, nats; called steps + 1 times. start: 0.3 everywhere in the paper; a column for each
    group of modules (one for all is its task-wise variant, one a layer its layer-wise one).
    The result is `start`'s shape, flattened row by row. Being sure is not being right: entropy
    falls too where a model collapses onto one answer, so measure before you trust it.

    Source: arXiv:2310.02575 (Adam, rate 1e-3, 500 steps). Ours differs: of all weights tried those
    of least entropy are given, not the last; next-token distributions stand for its classes.

    Assumes: that a merged model which is sure of its answers is right about them.
    Fails: where the model collapses onto one sure answer.
    Cost: steps + 1 forward and backward passes over the texts of all tasks; the merge itself is
    linear.
    """
    if steps < 1 or not (math.isfinite(rate) and rate > 0):
        raise MergeError(
            f"steps is {steps} and rate {rate}; expected at least 1 and a rate above 0"
        )
    weights = start.detach().clone().double().requires_grad_(True)
    optimiser = torch.optim.Adam([weights], lr=rate)
    best, least, started = weights.detach().clone(), math.inf, math.nan
    for step in range(steps + 1):
        optimiser.zero_grad()
        value = entropy(weights)
        found = float(value.detach())
        if not math.isfinite(found):
            raise MergeError(f"the entropy is {found} at step {step}: lower the rate ({rate})")
        if step == 0:
            started = found
        if found < least:
            best, least = weights.detach().clone(), found
        if step < steps:
            value.backward()
            optimiser.step()
    return Search(tuple(best.flatten().tolist()), least, started, steps + 1)
