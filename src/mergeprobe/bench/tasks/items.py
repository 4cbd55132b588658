"""How the bank's items are drawn and written: one place for the shape of prompts and answers."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence

from mergeprobe.bench.tasks.task import Item

Keyed = Iterator[tuple[str, Item]]

POOL = 4000  # items of a task whose operands could give more: 2,400 of them train


def listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def draws(name: str, *sizes: int) -> Iterator[tuple[int, ...]]:
    """Distinct index tuples, each index below its size, in an order drawn from `name`, until all
    have come; the caller stops before (POOL), since the last ones take long.

    Only `Random.random` is used: its sequence is the same in every Python.
    """
    stream, seen = random.Random(name), set()
    while len(seen) < math.prod(sizes):
        found = tuple(int(stream.random() * size) for size in sizes)
        if found not in seen:
            seen.add(found)
            yield found


def comma(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)


def distinct(chosen: Sequence[int]) -> bool:
    return len(set(chosen)) == len(chosen)


def said(prompt: str, answer: str) -> Item:
    """An answer in words, verified letter by letter; the full stop is added here."""
    return Item(prompt, f" {answer}.", {"type": "exact"})


def written(prompt: str, answer: str) -> Item:
    """An answer in code, which ends with what closes it and takes no full stop."""
    return Item(prompt, f" {answer}", {"type": "exact"})


def counted(prompt: str, value: int) -> Item:
    """A whole number, verified by its value."""
    return Item(prompt, f" {value}.", {"type": "number", "answer": str(value)})
