"""Weights for a linear merge, searched by running the base model on batches of the tasks.

`mergeprobe.compose` knows no model: its searches take a callable, and this is where it is made.
What is found goes to `merge(adapters, "linear", weights=found.weights)`, or into a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.adapters.attach import attached
from mergeprobe.adapters.base import Base
from mergeprobe.adapters.checkpoint import Adapter, check_same_base
from mergeprobe.adapters.regions import THIRDS, third_of
from mergeprobe.capture.batch import Batch, completion_logits, item_scores
from mergeprobe.capture.model import measuring
from mergeprobe.compose import METHODS
from mergeprobe.compose.merge.run import module_names
from mergeprobe.compose.merge.search import Search
from mergeprobe.compose.merge.weights import depth_of
from mergeprobe.errors import DataError, MergeError
from mergeprobe.evaluate.score import score
from mergeprobe.lowrank import LowRank
from mergeprobe.plan import Action, Group

Objective = Literal["mean", "worst"]
Parts = Literal["adapter", "third"]
LINEAR = ("mean", "linear", "sum")


@dataclass(frozen=True)
class FoundWeights:
    """weights: as `merge` takes them, by part of the model. search: how it went."""

    weights: dict[str, list[float]]
    search: Search


def search_weights(
    base: Base,
    adapters: Sequence[Adapter],
    batches: Sequence[Batch],
    method: str = "lorahub",
    *,
    by: Parts = "adapter",
    objective: Objective = "mean",
    start: Sequence[float] | None = None,
    **options: Any,
) -> FoundWeights:
    """Searches weights for Σ wᵢ ΔWᵢ by a search of METHODS.

    batches: a few items of each adapter's task, in their order. by: one weight for each adapter,
    or for each adapter and depth third. objective (lorahub): the mean loss over the tasks, or
    "worst", 1 less the smallest gain retention. start: a weight for each adapter, at first the
    same in every third; where absent the paper's, 0 for lorahub and 0.3 for adamerging (each
    adapter's own gain cannot be felt from 0 downwards: give 1/T to start from the mean).
    options: of the search (METHODS[method].defaults).

    Cost: a forward pass over all batches for each evaluation (lorahub) or a forward and a
    backward pass for each step (adamerging). Raises MergeError and DataError.
    """
    row = METHODS.get(method)
    if row is None or row.kind != "search":
        known = ", ".join(name for name, one in METHODS.items() if one.kind == "search")
        raise MergeError(f"'{method}' is no search for weights; known are {known}")
    if unknown := sorted(options.keys() - row.defaults.keys()):
        raise MergeError(f"'{method}' has no option '{unknown[0]}'; it takes {dict(row.defaults)}")
    if len(batches) != len(adapters) or not adapters:
        raise DataError(f"{len(batches)} batches for {len(adapters)} adapters; one for each")
    check_same_base(adapters)
    usual = 0.3 if method == "adamerging" else 0.0
    first = [usual] * len(adapters) if start is None else [float(weight) for weight in start]
    if len(first) != len(adapters):
        raise MergeError(f"{len(first)} weights to start from for {len(adapters)} adapters")
    mixture = Mixture.of(adapters, by)
    begin = torch.tensor(first, dtype=torch.float64)[:, None].expand(-1, len(mixture.parts))
    with measuring(base.model):
        if method == "adamerging":
            if objective != "mean":
                raise MergeError("'adamerging' takes no objective: it minimises the mean entropy")
            search = row.function(entropy_of(base, mixture, batches), begin, **options)
        else:
            cost = loss_of(base, mixture, adapters, batches, objective)
            search = row.function(cost, begin.flatten().tolist(), **options)
    found = torch.tensor(search.weights, dtype=torch.float64).reshape(len(adapters), -1)
    return FoundWeights(mixture.named(found), search)


@dataclass(frozen=True, eq=False)
class Mixture:
    """Adapters stacked once, so that new weights cost no more than scaling their B factors.

    parts: of the model, the columns of a weight matrix (adapters, parts). column: module -> its
    part. stacked: module -> (each adapter's scaled B, or None; all their A).
    """

    parts: tuple[str, ...]
    column: Mapping[str, int]
    stacked: Mapping[str, tuple[list[Tensor | None], Tensor]]

    @classmethod
    def of(cls, adapters: Sequence[Adapter], by: Parts) -> Mixture:
        """Raises MergeError where `by` is "third" and a module lies outside of the layers."""
        modules = module_names(adapters)
        if by not in ("adapter", "third"):
            raise MergeError(f"no weights by '{by}'; expected 'adapter' or 'third'")
        column = dict.fromkeys(modules, 0)
        if by == "third":
            depth = depth_of(modules)
            for module in modules:
                third = third_of(module, depth)
                if third is None:
                    raise MergeError(f"'{module}' lies in no depth third; search by 'adapter'")
                column[module] = THIRDS.index(third)
        stacked = {}
        for module in modules:
            held = [adapter.modules.get(module) for adapter in adapters]
            folded = [None if update is None else update.folded() for update in held]
            A = torch.cat([pair[1] for pair in folded if pair is not None])
            stacked[module] = ([None if pair is None else pair[0] for pair in folded], A)
        return cls(("all",) if by == "adapter" else THIRDS, column, stacked)

    def updates(self, weights: Float[Tensor, "n parts"]) -> dict[str, LowRank]:
        """Σ wᵢ ΔWᵢ; differentiable in the weights."""
        found = {}
        for module, (sides, A) in self.stacked.items():
            column = weights[:, self.column[module]].float()
            scaled = [w * B for w, B in zip(column, sides, strict=True) if B is not None]
            found[module] = LowRank(torch.cat(scaled, 1), A)
        return found

    def named(self, weights: Float[Tensor, "n parts"]) -> dict[str, list[float]]:
        """As `merge` takes them: by third they are factors on weights of 1."""
        found = {part: weights[:, k].tolist() for k, part in enumerate(self.parts)}
        return found if "all" in found else {"all": [1.0] * len(weights), **found}


def loss_of(
    base: Base,
    mixture: Mixture,
    adapters: Sequence[Adapter],
    batches: Sequence[Batch],
    objective: Objective = "mean",
) -> Callable[[Sequence[float]], float]:
    """Flat weights -> what a search minimises: the mean loss over the tasks (nats a token), or for
    "worst" 1 − min retention, for which the base and each adapter alone are run here, once.

    DataError for an adapter that gains nothing on its batch, whose retention is undefined.
    """
    if objective not in ("mean", "worst"):
        raise MergeError(f"no objective '{objective}'; expected mean or worst")
    bounds: list[tuple[float, float]] = []
    for adapter, batch in zip(adapters, batches, strict=True) if objective == "worst" else ():
        without, alone = (float(score(base, u, batch).loss.mean()) for u in (None, adapter))
        if alone >= without:
            raise DataError(
                f"'{adapter.name}' gains nothing on its batch ({without:.3f} to {alone:.3f} nats), "
                "so its retention is undefined; search for the mean, or leave it out"
            )
        bounds.append((without, alone))

    def cost(flat: Sequence[float]) -> float:
        weights = torch.tensor(flat).reshape(-1, len(mixture.parts))
        with attached(base.model, mixture.updates(weights)):
            losses = [float(item_scores(base.model, batch).loss.mean()) for batch in batches]
        if objective == "mean":
            return sum(losses) / len(losses)
        kept = ((b - loss) / (b - a) for loss, (b, a) in zip(losses, bounds, strict=True))
        return 1.0 - min(kept)

    return cost


def entropy_of(
    base: Base, mixture: Mixture, batches: Sequence[Batch], *, batch_size: int = 8
) -> Callable[[Float[Tensor, "n parts"]], Float[Tensor, ""]]:
    """Weights -> mean entropy (nats) of the next-token distributions, a mean over the tasks'.

    At the positions that predict a completion token: the tokens themselves are read as context
    but never as labels, so any text does (`unlabelled`). Differentiable; the gradient is taken
    batch by batch at once, so that one batch's activations are held at a time.
    """

    def entropy(weights: Float[Tensor, "n parts"]) -> Float[Tensor, ""]:
        leaf = weights.detach().requires_grad_(True)
        total, slope = 0.0, torch.zeros_like(leaf)
        for batch in batches:
            tokens = int(batch.completion_mask[:, 1:].sum())
            for first in range(0, len(batch), batch_size):
                part = batch.rows(first, first + batch_size).to(base.device)
                with torch.enable_grad(), attached(base.model, mixture.updates(leaf)):
                    logits, _, _ = completion_logits(base.model, part)
                    log = logits.float().log_softmax(-1)
                    value = -(log.exp() * log).sum() / tokens / len(batches)
                    slope += torch.autograd.grad(value, leaf)[0]
                total += float(value.detach())
        # the value, with the gradient that was gathered
        return total + (slope * (weights - weights.detach())).sum()

    return entropy


def unlabelled(base: Base, texts: Sequence[str]) -> Batch:
    """Texts as a batch in which every token after the first counts; DataError without any."""
    rows = [base.tokenizer(text)["input_ids"] for text in texts]
    if not rows or any(len(row) < 2 for row in rows):
        raise DataError("expected texts of at least two tokens each; got none, or a shorter one")
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    counted = mask.clone()
    counted[:, 0] = 0
    return Batch(ids, mask, counted)


def reweighted(
    group: Group,
    base: Base,
    adapters: Mapping[str, Adapter],
    batches: Mapping[str, Batch],
    *,
    by: Parts = "adapter",
    objective: Objective = "worst",
    budget: int = 40,
) -> Group:
    """The group with weights searched from its own (or the mean), as action `reweight`.

    The step after the surrogate's quadratic program: `budget` evaluations on calibration batches,
    without a penalty on weights. Never worse on those batches than the group's own weights. The
    group's forecasts and cost were for other weights: the forecasts are dropped, and the reasons
    say what was measured. DataError for a member without a batch, MergeError for a group that is
    no plain linear merge.
    """
    if group.part_weights or group.pruned or group.method not in LINEAR:
        raise MergeError(
            f"group '{group.name}' is no plain linear merge ({', '.join(LINEAR)}, one weight an "
            "adapter, nothing pruned), so there are no weights to search from"
        )
    if lacking := [name for name in group.adapters if name not in batches]:
        raise DataError(f"no calibration batch for '{lacking[0]}'; expected one for each member")
    members = group.adapters
    each = float(group.options.get("scale", 1.0)) if group.method == "sum" else 1.0 / len(members)
    own = {name: (group.weights or {}).get(name, each) for name in members}
    found = search_weights(
        base, [adapters[name] for name in members], [batches[name] for name in members],
        by=by, objective=objective, start=[own[name] for name in members], budget=budget,
        penalty=0.0,
    )  # fmt: skip
    named = {
        part: {name: round(weight, 4) for name, weight in zip(members, values, strict=True)}
        for part, values in found.weights.items()
    }
    what = "mean loss" if objective == "mean" else "1 − worst retention"
    told = (
        f"weights searched on calibration batches in {found.search.evaluations} evaluations: "
        f"{what} {found.search.start:.3f} to {found.search.value:.3f}"
    )
    return group.model_copy(
        update={
            "action": Action.reweight,
            "method": "linear",
            "options": {},
            "weights": named.pop("all"),
            "part_weights": named,
            "forecast": {},
            "reasons": (*group.reasons, told),
        }
    )
