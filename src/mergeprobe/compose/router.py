"""Router: which adapter a prompt is for, from the base model's own states.

A prompt is read by the base model once; the mean of its hidden states two thirds up is compared
with each task's centroid, in units of how prompts of one task differ among themselves. No second
model, nothing to train. What lies farther from every task than that task's own prompts do goes to
the base; tasks whose prompts can't be told apart are named, and nothing is promised for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mergeprobe.capture.batch import Batch
from mergeprobe.capture.probe import Calibration
from mergeprobe.compose.classifier import Classifier, fit_classifier
from mergeprobe.errors import DataError, DeploymentError
from mergeprobe.plan import SEPARABLE

DEPTH = 2 / 3  # of the layers; near the output states mostly hold the next token
SHRINKAGE = 0.2  # of the within-task covariance towards its diagonal
FOLDS = 4
SLACK = 1.15  # on the largest distance of a task's own prompts, cross-fitted
FEWEST = 8  # prompts a task


@dataclass(frozen=True)
class Choice:
    """Where one prompt goes. name: the adapter, or None for the base model.

    distances: squared, by adapter, nearest first, over each one's own threshold: above 1 is
    farther than that task's own prompts. certain: False where the nearest adapter's prompts look
    like another's (`rivals`), so that the prompt alone can't decide.
    """

    name: str | None
    distances: dict[str, float]
    certain: bool
    rivals: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Whitening:
    """x -> (x / spread) stretched by the shrunk inverse root of the within-task covariance.

    spread: (d,) standard deviations inside tasks. basis: (q, d) directions in which prompts of one
    task differ; along them the factor is `within`, (q,), elsewhere 1/√SHRINKAGE.
    """

    spread: Float[Tensor, " d"]
    basis: Float[Tensor, "q d"]
    within: Float[Tensor, " q"]

    def __call__(self, states: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        scaled = states.double() / self.spread
        elsewhere = 1 / math.sqrt(SHRINKAGE)
        return scaled * elsewhere + (scaled @ self.basis.T * (self.within - elsewhere)) @ self.basis


@dataclass(frozen=True, eq=False)
class Router:
    """Names and their whitened centroids (k, d); thresholds: (k,) squared distances.

    layer: whose states are read, 1 … layers. separation: (k, k) AUC between the prompts of two
    tasks, cross-fitted; 1 on the diagonal. base_fingerprint: of the model that it was made with.
    classifier: chooses among the tasks in place of the distances, which still say what is too far
    from the chosen one.
    """

    names: tuple[str, ...]
    layer: int
    whitening: Whitening
    centroids: Float[Tensor, "k d"]
    thresholds: Float[Tensor, " k"]
    separation: Float[Tensor, "k k"]
    base_fingerprint: str | None = None
    classifier: Classifier | None = None

    def distances(self, states: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Squared distances to every centroid over that task's threshold; ≥ 0."""
        return squared(self.whitening(states), self.centroids) / self.thresholds

    def choose(self, states: Float[Tensor, "n d"]) -> list[Choice]:
        found = []
        distances = self.distances(states)
        scores = self._scores(self.whitening(states)) if self.classifier else -distances
        for row, near in zip(distances, scores.argmax(1).tolist(), strict=True):
            order = row.argsort().tolist()
            rivals = self.rivals(self.names[near])
            known = {self.names[k]: float(row[k]) for k in order}
            name = self.names[near] if row[near] <= 1 else None
            found.append(Choice(name, known, name is None or not rivals, rivals))
        return found

    def gates(
        self,
        states: Float[Tensor, "n d"],
        *,
        among: Sequence[str] | None = None,
        top: int | None = None,
    ) -> Float[Tensor, "k n"]:
        """Weights of a mixture for each prompt: the posterior of equally likely Gaussian tasks,
        of those in `among` (in that order; None: all), of the `top` nearest only; columns sum to 1.
        DeploymentError for a name that the router does not know."""
        names = self.names if among is None else tuple(among)
        if unknown := sorted(set(names) - set(self.names)):
            raise DeploymentError(f"the router knows no {unknown}; it knows {list(self.names)}")
        wanted = [self.names.index(name) for name in names]
        halves = self._scores(self.whitening(states))[:, wanted]
        if top is not None:
            least = halves.topk(min(top, len(names)), dim=1).values[:, -1:]
            halves = halves.masked_fill(halves < least, -math.inf)
        return halves.softmax(1).T

    def _scores(self, white: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Log-probabilities of the tasks, each as likely as any other, up to a constant."""
        if self.classifier is not None:
            return self.classifier(white)
        return -squared(white, self.centroids) / 2

    def rivals(self, name: str) -> tuple[str, ...]:
        """The tasks whose prompts can't be told from this one's."""
        row = self.separation[self.names.index(name)]
        return tuple(other for other, auc in zip(self.names, row, strict=True) if auc < SEPARABLE)


def fit_router(
    states: Mapping[str, Float[Tensor, "n d"]],
    *,
    layer: int,
    fingerprint: str | None = None,
    trained: bool = False,
) -> Router:
    """From `prompt_states` of some prompts of every task, at least FEWEST each, better 32.

    trained: a classifier on the whitened states chooses, not the nearest centroid.

    Thresholds and separation are cross-fitted in FOLDS parts: each prompt is judged by centroids
    and a covariance that never saw it.
    """
    for name, rows in states.items():
        if len(rows) < FEWEST:
            raise DataError(
                f"'{name}' has {len(rows)} example prompts; a router needs at least {FEWEST}"
            )
    if not states:
        raise DataError("no tasks to route between: got no example prompts")
    parts = [rows.double() for rows in states.values()]
    held = [torch.zeros(len(rows), len(parts), dtype=torch.float64) for rows in parts]
    against = [rows.clone() for rows in held]  # lower: more likely of that task
    for fold in range(FOLDS):
        inside = [torch.arange(len(rows)) % FOLDS == fold for rows in parts]
        kept = [rows[~own] for rows, own in zip(parts, inside, strict=True)]
        whitening, centroids = _fitted(kept)
        classifier = fit_classifier([whitening(rows) for rows in kept]) if trained else None
        for distances, score, rows, own in zip(held, against, parts, inside, strict=True):
            white = whitening(rows[own])
            distances[own] = squared(white, centroids)
            score[own] = distances[own] if classifier is None else -classifier(white)
    whitening, centroids = _fitted(parts)
    own = [float(distances[:, k].max()) for k, distances in enumerate(held)]
    return Router(
        tuple(states),
        layer,
        whitening,
        centroids,
        torch.tensor(own, dtype=torch.float64) * SLACK,
        _separation(against),
        fingerprint,
        fit_classifier([whitening(rows) for rows in parts]) if trained else None,
    )


def _fitted(parts: Sequence[Float[Tensor, "n d"]]) -> tuple[Whitening, Float[Tensor, "k d"]]:
    means = torch.stack([rows.mean(0) for rows in parts])
    inside = torch.cat([rows - mean for rows, mean in zip(parts, means, strict=True)])
    inside = inside / math.sqrt(max(1, len(inside) - len(parts)))
    spread = inside.square().sum(0).sqrt()
    # a state that never changes inside tasks may still tell them apart, but not infinitely well
    spread = spread.clamp_min(1e-3 * float(spread.mean()) or 1.0)
    _, values, basis = torch.linalg.svd(inside / spread, full_matrices=False)
    within = ((1 - SHRINKAGE) * values.square() + SHRINKAGE).rsqrt()
    whitening = Whitening(spread, basis, within)
    return whitening, whitening(means)


def squared(points: Float[Tensor, "n d"], centroids: Float[Tensor, "k d"]) -> Float[Tensor, "n k"]:
    return (points[:, None] - centroids[None]).square().sum(-1)


def _separation(held: Sequence[Float[Tensor, "n k"]]) -> Float[Tensor, "k k"]:
    """AUC of the difference of two distances (or of two negated scores of a classifier) between the
    two tasks' own prompts."""
    found = torch.ones(len(held), len(held), dtype=torch.float64)
    for a, b in combinations(range(len(held)), 2):
        ours, theirs = (rows[:, b] - rows[:, a] for rows in (held[a], held[b]))
        above = (ours[:, None] > theirs[None]).double() + 0.5 * (ours[:, None] == theirs[None])
        found[a, b] = found[b, a] = above.mean()
    return found


# --------------------------------------------------------------------------------- from the model
def router_layer(model: nn.Module) -> int:
    """The layer whose output is read: two thirds up."""
    return max(1, round(DEPTH * int(model.config.num_hidden_layers)))  # type: ignore[union-attr]


@torch.no_grad()
def prompt_states(
    model: nn.Module,
    ids: Int[Tensor, "items tokens"],
    mask: Int[Tensor, "items tokens"] | Bool[Tensor, "items tokens"],
    *,
    layer: int,
    batch_size: int = 16,
) -> Float[Tensor, "items d"]:
    """Mean hidden state of the prompt's tokens after `layer`, in float64; padding on any side.

    The first token is left out where there are others: in most models it is a sink of large
    norm that says nothing about the prompt.
    """
    found = []
    for start in range(0, len(ids), batch_size):
        here, seen = ids[start : start + batch_size], mask[start : start + batch_size].bool()
        states = _states(model, here, seen, layer)
        counted = seen & (seen.long().cumsum(1) > (seen.sum(1, keepdim=True) > 1).long())
        counted = counted.to(states.device)
        total = (states.double() * counted[..., None]).sum(1)
        found.append((total / counted.sum(1, keepdim=True)).cpu())
    return torch.cat(found)


def _states(model: nn.Module, ids: Tensor, mask: Tensor, layer: int) -> Tensor:
    """Hidden states after one layer; the layers above and the LM head are not run."""
    device = next(model.parameters()).device
    # not through the model itself, whose forward pass may be a composition's
    decoder: Any = model.get_decoder()  # type: ignore[operator, union-attr]
    kept: list[Tensor] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)
        raise _Enough

    handle = decoder.layers[layer - 1].register_forward_hook(stop)
    try:
        decoder(input_ids=ids.to(device), attention_mask=mask.long().to(device), use_cache=False)
    except _Enough:
        return kept[0]
    finally:
        handle.remove()
    raise DeploymentError(f"layer {layer} did not run; the model is not a plain decoder")


class _Enough(Exception):
    """The layer that was asked for has run."""


def prompts_of(
    batch: Batch | Calibration,
) -> tuple[Int[Tensor, "items tokens"], Bool[Tensor, "items tokens"]]:
    """(ids, mask) of the prompts in a batch of prompts and completions, such as a probe's."""
    mask = batch.attention_mask.bool() & ~batch.completion_mask.bool()
    longest = int(mask.sum(1).max())
    return batch.ids[:, :longest], mask[:, :longest]
