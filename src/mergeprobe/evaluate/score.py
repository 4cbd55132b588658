"""Utility of anything that runs: the base, one adapter, or what a deployment serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergeprobe.adapters.attach import attached
from mergeprobe.adapters.base import Base
from mergeprobe.adapters.checkpoint import Adapter
from mergeprobe.capture.batch import Batch, ItemScores, encode, item_scores
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
