"""Utility of anything that runs: the base, one adapter, or what a deployment serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.adapters.attach import attached
from mergeprobe.adapters.base import Base
from mergeprobe.adapters.checkpoint import Adapter
from mergeprobe.capture.batch import Batch, ItemScores, encode, item_scores
from mergeprobe.compose.deployment import Deployment
from mergeprobe.compose.logits import Composition, composed
from mergeprobe.compose.router import Router, prompt_states, prompts_of
from mergeprobe.errors import DeploymentError
from mergeprobe.evaluate.data import Example
from mergeprobe.lowrank import LowRank


def batch_of(base: Base, examples: Sequence[Example]) -> Batch:
    return encode(base.tokenizer, [(item.prompt, item.completion) for item in examples])


def score(base: Base, served: Adapter | Mapping[str, LowRank] | None, batch: Batch) -> ItemScores:
    """Loss and exact match of every item under the base (None) or with an update attached."""
    if served is None:
        return item_scores(base.model, batch)
    updates = served.modules if isinstance(served, Adapter) else served
    with attached(base.model, updates):
        return item_scores(base.model, batch)


ROWS = 32  # of a batch under composition


def score_composed(
    base: Base,
    updates: Sequence[Mapping[str, LowRank]],
    how: Composition,
    batch: Batch,
    gates: Float[Tensor, "adapters items"] | None = None,
) -> ItemScores:
    """Loss and exact match of every item under composed logits, teacher-forced.

    gates: every item's own weights in place of those in `how`, such as `prompt_gates`.
    """
    size = max(1, ROWS // (len(updates) + 1))
    found = []
    for start in range(0, len(batch), size):
        part = batch.rows(start, min(start + size, len(batch)))
        mine = how
        if gates is not None:
            here = gates[:, start : start + size]
            mine = replace(how, gate=lambda ids, mask, here=here: here)
        with composed(base.model, updates, mine):
            found.append(item_scores(base.model, part, batch_size=size))
    return ItemScores(*(torch.cat(parts) for parts in zip(*map(_parts, found), strict=True)))


def _parts(scores: ItemScores) -> tuple[Tensor, Tensor]:
    return scores.loss, scores.exact


def score_each(
    base: Base,
    adapters: Mapping[str, Adapter],
    chosen: Sequence[str | None],
    batch: Batch,
) -> ItemScores:
    """Loss and exact match of every item under the adapter chosen for it, None for the base."""
    loss = torch.zeros(len(batch), dtype=torch.float64)
    exact = torch.zeros(len(batch), dtype=torch.bool)
    for name in dict.fromkeys(chosen):
        mine = torch.tensor([one == name for one in chosen])
        part = Batch(batch.ids[mine], batch.attention_mask[mine], batch.completion_mask[mine])
        found = score(base, None if name is None else adapters[name], part)
        loss[mine], exact[mine] = found.loss, found.exact
    return ItemScores(loss, exact)


def score_deployed(base: Base, deployment: Deployment, name: str, batch: Batch) -> ItemScores:
    """Loss and exact match of every item under what the deployment serves for adapter `name`."""
    group = deployment.composition_of(name)
    if group is None:
        return score(base, deployment.serving[name], batch)
    updates = [deployment.serving[one].modules for one in group.adapters]
    gates = None
    if group.gated:
        gates = prompt_gates(base, deployment.router, group.adapters, batch)
    return score_composed(base, updates, group.composition(), batch, gates)


def prompt_gates(
    base: Base, router: Router | None, adapters: Sequence[str], batch: Batch
) -> Float[Tensor, "adapters items"]:
    """The weights that the router gives each item's prompt; columns sum to 1."""
    if router is None:
        raise DeploymentError("logits are gated by a router, but the deployment has none")
    ids, mask = prompts_of(batch)
    states = prompt_states(base.model, ids, mask, layer=router.layer)
    return router.gates(states, among=adapters).float()
