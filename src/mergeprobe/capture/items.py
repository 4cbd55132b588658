"""Calibration items from a training set: rows spread over it, as its own collator makes them.

Padded on either side, packed or padding-free: the same sequences come out, one an item, padded on
the right. Padding is no token of an item, so it enters nothing that is measured.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mergeprobe.capture.batch import Batch
from mergeprobe.errors import DataError

CALIBRATION_ITEMS = 32
ITEM_TOKENS = 1024
IGNORED = -100  # the label of a token that does not count in the loss

Item = tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]
"""Token ids, and 1 where a token counts in the loss."""


def spread_rows(loader: Any, count: int = CALIBRATION_ITEMS) -> Batch | None:
    """`count` items spread evenly over a loader's dataset, collated as in training.

    Draws nothing: every random state is as it was. None for a dataset without random access, and
    where no row holds a token that counts.
    """
    dataset = getattr(loader, "dataset", None)
    if dataset is None or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return None
    with _random_state_kept():
        rows = [dataset[index] for index in spread(len(dataset), count)]
        # one row a batch: a packed row has no padding then, and each row its own length
        items = [item for row in rows for item in items_of(loader.collate_fn([row]))]
    chosen = [items[index] for index in spread(len(items), count)]
    return stacked(chosen) if chosen else None


def spread(size: int, count: int) -> list[int]:
    """At most `count` indices, evenly over 0 … size − 1."""
    count = min(count, size)
    return [index * size // count for index in range(count)]


def from_features(features: Mapping[str, Any]) -> Batch:
    """A collated training batch (input_ids, labels, attention_mask or position_ids) as a Batch.

    Raises DataError if no token counts in the loss.
    """
    found = items_of(features)
    if not found:
        raise DataError("a training batch has no token that counts in the loss (labels all -100)")
    return stacked(found)


def items_of(features: Mapping[str, Any]) -> list[Item]:
    """The sequences of a collated batch; those without a token that counts are left out.

    A row whose position_ids start again holds several sequences (packing, padding-free): it is
    cut there, so none of them attends to another. Longer ones are cut to 1,024 tokens around the
    first that counts.
    """
    if "input_ids" not in features:
        raise DataError(
            f"a training batch holds {sorted(features)} but no input_ids: expected a causal "
            "language model's; pass calibration=[(prompt, completion), ...]"
        )
    ids = torch.as_tensor(features["input_ids"]).long()
    mask, labels = features.get("attention_mask"), features.get("labels")
    real = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
    counts = real.clone() if labels is None else torch.as_tensor(labels) != IGNORED
    if real.shape != ids.shape or counts.shape != ids.shape:
        raise DataError(
            f"a training batch has input_ids of {tuple(ids.shape)}, attention_mask of "
            f"{tuple(real.shape)} and labels of {tuple(counts.shape)}; expected one shape: "
            "pass calibration=[(prompt, completion), ...]"
        )
    positions = features.get("position_ids")
    if positions is None or torch.as_tensor(positions).shape != ids.shape:
        positions = torch.arange(ids.shape[1]).expand_as(ids)
    found = []
    for row, here in enumerate(real.bool()):
        starts = torch.as_tensor(positions)[row][here].cpu() == 0
        for part in _parts(starts, int(here.sum())):
            sequence = ids[row][here].cpu()[part]
            scored = counts[row][here].cpu()[part].long()
            scored[:1] = 0  # nothing predicts the first token
            if scored.any():
                found.append(_shortened(sequence, scored))
    return found


def _parts(starts: Tensor, length: int) -> Iterator[slice]:
    """Slices from one start to the next."""
    edges = sorted({0, *starts.nonzero().flatten().tolist(), length})
    for left, right in pairwise(edges):
        yield slice(left, right)


def _shortened(ids: Tensor, scored: Tensor) -> Item:
    if len(ids) <= ITEM_TOKENS:
        return ids, scored
    first = int(scored.nonzero()[0])
    start = min(max(0, first - ITEM_TOKENS // 2), len(ids) - ITEM_TOKENS)
    scored = scored[start : start + ITEM_TOKENS].clone()
    scored[0] = 0
    return ids[start : start + ITEM_TOKENS], scored


def stacked(items: Sequence[Item]) -> Batch:
    """Items as one right-padded Batch."""
    shape = (len(items), max(len(ids) for ids, _ in items))
    ids, attention, completion = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    for row, (tokens, scored) in enumerate(items):
        ids[row, : len(tokens)] = tokens
        attention[row, : len(tokens)] = 1
        completion[row, : len(tokens)] = scored
    return Batch(ids, attention, completion)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """A dataset or collator may draw; training must not see that it did."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
