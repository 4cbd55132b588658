"""A light trained classifier over prompts' states: multinomial logistic regression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1.0  # on the weights, against the summed log-loss: half of it times their square
STEPS = 200


@dataclass(frozen=True, eq=False)
class Classifier:
    """weight: (k, d), bias: (k,); scores are x Wᵀ + b, log-probabilities up to a constant."""

    weight: Float[Tensor, "k d"]
    bias: Float[Tensor, " k"]

    def __call__(self, points: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        return points @ self.weight.T + self.bias


def fit_classifier(parts: Sequence[Float[Tensor, "n d"]]) -> Classifier:
    """Minimises Σ −log p(task | x) + RIDGE/2 ‖W‖² over the points of every task, by L-BFGS in
    float64; the bias is not penalised. Deterministic."""
    points = torch.cat([part.double() for part in parts])
    labels = torch.cat([torch.full((len(part),), k) for k, part in enumerate(parts)])
    weight = torch.zeros(len(parts), points.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(parts), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=STEPS,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = points @ weight.T + bias
        total = torch.nn.functional.cross_entropy(scores, labels, reduction="sum")
        total = total + RIDGE / 2 * weight.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[arg-type]
    return Classifier(weight.detach(), bias.detach())
