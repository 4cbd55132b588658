"""WUDI: the merge should do on each update's own rows what that update does there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.compose.merge.spaces import core_coordinates
from mergeprobe.errors import MergeError
from mergeprobe.lowrank import LowRank

# directions whose share of Σ ΔWᵢᵀΔWᵢ/‖ΔWᵢ‖² is below this are left out of its inverse
GRAM_FLOOR = 1e-8
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


def wudi(
    updates: Float[Tensor, "n out in"],
    weights: Float[Tensor, " n"],
    *,
    steps: float = 300,
    learning_rate: float = 1e-5,
) -> Float[Tensor, "out in"]:
    """WUDI: from the sum, Adam on Σᵢ ‖(M − ΔWᵢ) ΔWᵢᵀ‖² / ‖ΔWᵢ‖², data-free.

    An update's own rows stand for the inputs of its task. steps: a whole number from 0;
    learning_rate: above 0, in units of the entries (Adam moves each by about that much a step, so
    how far M gets depends on the updates' scale). Weights are not taken. Source: arXiv:2503.08099,
    whose rule, optimiser and defaults these are; `wudi_closed` is where it is heading. The slowest
    rule: seconds for one module of a small model.

    Assumes: that the rows of an update span the inputs of its task.
    Fails: where updates are much larger or smaller than Adam's steps of about the learning rate: it
    then overshoots, or stays at the sum.
    Cost: steps · 2 N out · in² a module, by far the most of all rules; then one truncated SVD.
    """
    if steps < 0 or steps != int(steps) or not learning_rate > 0:
        raise MergeError(
            f"steps {steps} and learning_rate {learning_rate} do not fit; expected a whole "
            "number from 0 and a rate above 0"
        )
    start = updates.sum(dim=0)
    pull, gram = torch.zeros_like(start), start.new_zeros(start.shape[1], start.shape[1])
    for update in updates:
        if size := float(update.square().sum()):
            own = update.T @ update
            pull.addmm_(start - update, own, alpha=2 / size)
            gram.add_(own, alpha=2 / size)
    push = _product(gram)
    moved, moment, energy = (torch.zeros_like(start) for _ in range(3))
    for step in range(1, int(steps) + 1):
        # the gradient at start + moved; exactly zero for a single update
        gradient = push(moved).add_(pull)
        moment.lerp_(gradient, 1 - BETA_1)
        energy.mul_(BETA_2).addcmul_(gradient, gradient, value=1 - BETA_2)
        root = energy.sqrt().mul_((1 - BETA_2**step) ** -0.5).add_(EPSILON)
        moved.addcdiv_(moment, root, value=-learning_rate / (1 - BETA_1**step))
    return start.add_(moved)


def _product(
    gram: Float[Tensor, "in in"],
) -> Callable[[Float[Tensor, "out in"]], Float[Tensor, "out in"]]:
    """M ↦ M · gram, through its few directions where it has few: low-rank updates' has."""
    size, axes = torch.linalg.eigh(gram)
    real = size > 1e-6 * size[-1]
    if 2 * int(real.sum()) >= len(size):
        return lambda matrix: matrix @ gram
    axes, size = axes[:, real].contiguous(), size[real]
    return lambda matrix: (matrix @ axes).mul_(size) @ axes.T


def wudi_closed(
    updates: Sequence[LowRank], weights: Sequence[float], *, ridge: float = 0.1
) -> LowRank:
    """WUDI's loss minimised in closed form: (Σ wᵢ ΔWᵢ Gᵢ + λ mean)(Σ wᵢ Gᵢ + λI)⁻¹.

    Gᵢ = ΔWᵢᵀΔWᵢ/‖ΔWᵢ‖²: it is RegMean with the updates' own rows for inputs. λ is `ridge` ≥ 0 times
    the mean diagonal of Σ wᵢ Gᵢ over the rows' directions; at 0 it is the exact minimum, which
    for updates that share their init is far too long (five random ones of rank 16 whose A's had
    moved by a tenth: 22 × their mean norm, at ridge 0.1 2 ×; without a common init 2.4 ×). Gᵢ lies
    in the core space, so no ΔW is formed. Only the ratios of the weights matter, at least 0 each.
    A zero update asks for nothing.

    Loss: arXiv:2503.08099. Ours differs: the minimum instead of 300 steps towards it, and the
    ridge towards the weighted mean.

    Assumes: that the rows of an update span the inputs of its task.
    Fails: where adapters share their init without a ridge: the merge is then far too long.
    Cost: (out + in) · (Σ r)² a module; no ΔW is formed.
    """
    if min(weights) < 0:
        raise MergeError(f"a weight is {min(weights):g}; wudi_closed needs weights from 0 up")
    if not (math.isfinite(ridge) and ridge >= 0):
        raise MergeError(f"ridge is {ridge}; expected a finite number from 0, such as 0.1")
    left, right, matrices = core_coordinates(updates)
    target, mean = torch.zeros_like(matrices[0]), torch.zeros_like(matrices[0])
    gram, mass = target.T @ target, 0.0
    for matrix, weight in zip(matrices, weights, strict=True):
        size = float(matrix.square().sum())
        if size > 0:
            own = matrix.T @ matrix * (weight / size)
            target += matrix @ own
            gram += own
            mean += weight * matrix
            mass += weight
    penalty = ridge * float(gram.diagonal().mean())
    if mass > 0:
        target += mean * (penalty / mass)
    gram.diagonal().add_(penalty)
    solved = target @ torch.linalg.pinv(gram, rtol=GRAM_FLOOR, hermitian=True)
    return LowRank((left @ solved).float(), right.float())
