"""Fisher merging: each entry averaged by how much each adapter's loss minds it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.capture.probe import Moment
from mergeprobe.compose.merge.data import ModuleData
from mergeprobe.compose.merge.moments import moments_of, shares, stood_in
from mergeprobe.errors import MergeError

Sides = tuple[Float[Tensor, " out"], Float[Tensor, " in"]]


def fisher(
    updates: Float[Tensor, "n out in"],
    weights: Float[Tensor, " n"],
    *,
    data: Sequence[ModuleData],
    floor: float = 1e-6,
    normalise: float = 1.0,
) -> Float[Tensor, "out in"]:
    """Σ wᵢ Fᵢ ∘ ΔWᵢ / Σ wᵢ Fᵢ, Fᵢ the diagonal of adapter i's empirical Fisher.

    Fᵢ[o, k] = E[δ_o²] · E[x_k²], K-FAC's diagonal, from the probe's moments of the loss gradients
    at the module's outputs and of its inputs. normalise: 1 divides each Fᵢ by its own mean over
    the module, so that no adapter outweighs another only because its loss gradients are larger;
    0 takes them raw. floor: the least Fᵢ, as a share (> 0) of the mean of all Fᵢ. Only the ratios
    of the weights matter; none below 0.

    Source: arXiv:2111.09832. Ours differs: K-FAC's product of two expectations stands for the
    expectation of the product; the published code normalises over the whole model, ours per
    module, and its floor is absolute; the Fisher is empirical, from the data's own labels.

    Assumes: that each adapter's loss is quadratic around it, with a diagonal curvature.
    Fails: where the loss is far from quadratic between the adapters, and where probes were taken
    too early to know what matters to the finished adapter.
    Cost: the dense updates and Fishers of one module, then one truncated SVD.
    """
    if not (math.isfinite(floor) and floor > 0):
        raise MergeError(f"floor is {floor}; expected a share of the mean Fisher, such as 1e-6")
    if normalise not in (0, 1):
        raise MergeError(f"normalise is {normalise}; expected 1 or 0")
    absent = [not bool(update.any()) for update in updates]
    portions = shares("fisher", [float(weight) for weight in weights])
    outputs = moments_of("fisher", data, "outputs", absent, updates.shape[1])
    inputs = moments_of("fisher", data, "inputs", absent, updates.shape[2])
    sides = [
        None if delta is None or x is None else _sides(delta, x, scaled=normalise == 1)
        for delta, x in zip(outputs, inputs, strict=True)
    ]
    known = [one for one in sides if one is not None]
    least = floor * sum(float(out.mean() * into.mean()) for out, into in known) / len(known)
    counted = stood_in(portions, [one is not None for one in sides])
    total, mass = torch.zeros_like(updates[0]), torch.zeros_like(updates[0])
    for update, one, portion, count in zip(updates, sides, portions, counted, strict=True):
        if one is None:
            continue  # a zero update: nothing to add, and `counted` has its weight
        # with no importance anywhere every entry is the mean
        importance = torch.outer(*one).to(updates).clamp_(min=least or 1.0)
        total.addcmul_(importance, update, value=portion)
        mass.add_(importance, alpha=count)
    return total / mass.clamp_(min=torch.finfo(mass.dtype).tiny)


def _sides(outputs: Moment, inputs: Moment, *, scaled: bool) -> Sides:
    """(E[δ²], E[x²]) by coordinate, float64; each divided by its mean where `scaled`."""
    out, into = diagonal(outputs), diagonal(inputs)
    if scaled and out.any() and into.any():
        return out / out.mean(), into / into.mean()
    return out, into


def diagonal(moment: Moment) -> Float[Tensor, " dim"]:
    """E[v²] by coordinate, without forming the moment; float64."""
    return moment.factor.double().square().sum(1) + moment.tail
