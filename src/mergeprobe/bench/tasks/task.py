"""What a task is: a finite pool of items, and how it is split.

An item has a key (its operands, its verb and noun), and the hash of the key says whether it is a
train, calibration or test item. So the splits are disjoint for any number of items and any seed,
and two tasks over the same keys (the sums of the demo's `math` and `code`, the divisions of the
bank's `quotient` and `remainder`) agree on which of them are held out.

Completions start with a space and end with a full stop, or with what closes a piece of code. The
stop matters: after it the base model expects the end of the text, without it learning to stop is
up to half of the gain (15 of 26 nats for "Add 23 and 45." -> " 68"), and that half hides
interference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

from mergeprobe.errors import DataError
from mergeprobe.evaluate.data import Example as Item

Split = Literal["train", "calibration", "test"]
SHARES: dict[Split, int] = {"train": 60, "calibration": 20, "test": 20}  # percent of a pool

Pool = Callable[[], Iterator[tuple[str, Item]]]


@dataclass(frozen=True)
class Task:
    """A named pool of (key, item) pairs. summary: one line for people.

    family: what near-duplicates share (the same task in another surface, or from another draw);
    honest evaluation holds out whole families. A task without one is its own family.
    """

    name: str
    domain: str
    summary: str
    pool: Pool
    family: str = ""

    def __post_init__(self) -> None:
        if not self.family:
            object.__setattr__(self, "family", self.name)

    def size(self, split: Split) -> int:
        """How many distinct items a split holds."""
        return len(_splits(self.pool)[split])

    def generate(self, split: Split, n: int, seed: int) -> list[Item]:
        """`n` distinct items of one split, in an order drawn from `seed`.

        Fewer items with the same seed are a prefix of more. Raises DataError if the split is
        unknown or holds fewer than `n` items: none is repeated, since a repeated test item
        counts as new evidence.
        """
        if split not in SHARES:
            raise DataError(f"unknown split {split!r}; expected one of {', '.join(SHARES)}")
        items = _splits(self.pool)[split]
        if not 0 <= n <= len(items):
            raise DataError(f"task '{self.name}' has {len(items)} {split} items; {n} were asked")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(items), generator=generator)[:n]
        chosen = [items[k] for k in order.tolist()]
        return [replace(item, source=item.source or f"mergeprobe/{self.name}") for item in chosen]


def split_of(key: str) -> Split:
    """The split that a key belongs to, from its hash alone."""
    percent = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100
    if percent < SHARES["train"]:
        return "train"
    return "calibration" if percent < SHARES["train"] + SHARES["calibration"] else "test"


@cache
def _splits(pool: Pool) -> dict[Split, list[Item]]:
    items: dict[Split, list[Item]] = {split: [] for split in SHARES}
    for key, item in pool():
        items[split_of(key)].append(item)
    return items
