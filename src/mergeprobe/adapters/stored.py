"""One module as its adapter's file stores it, and what the config and the base say of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.adapters.adapter import CONFIG, WEIGHTS
from mergeprobe.adapters.weights import BaseWeights
from mergeprobe.errors import AdapterError
from mergeprobe.lowrank import LowRank, factor, full_rank, truncate

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# a hostile file of some kilobytes can declare a Kronecker product of any size; with the base given
# its shape is the bound, without it this many numbers for one module's factors
LARGEST = 2**27


@dataclass(frozen=True, eq=False)
class Stored:
    """One module's tensors by their part's name, and what else its type needs to be read.

    shared: tensors that all modules share (VeRA's projections). modules: all adapted modules.
    """

    folder: Path
    module: str
    parts: Mapping[str, Tensor]
    config: Mapping[str, Any]
    shared: Mapping[str, Tensor]
    modules: tuple[str, ...]
    base: BaseWeights | None

    def matrix(self, part: str) -> Float[Tensor, "rows columns"]:
        value = self.parts[part]
        if value.ndim != 2 or not value.numel():
            raise self.refusal(
                f"{part} is {tuple(value.shape)}; expected a (rows, columns) matrix "
                "(convolutions are refused)"
            )
        return value

    def vector(self, part: str, length: int | None = None) -> Float[Tensor, " length"]:
        value = self.parts[part]
        if value.ndim != 1 or (length is not None and len(value) != length):
            wanted = "a vector" if length is None else f"({length},)"
            raise self.refusal(f"{part} is {tuple(value.shape)}; expected {wanted}")
        return value

    def weights(self) -> BaseWeights:
        """The base's; the reader has seen to it that a type which needs them has them."""
        assert self.base is not None
        return self.base

    def weight(self) -> Float[Tensor, "out in"]:
        return self.weights().weight(self.module)

    def refusal(self, reason: str) -> AdapterError:
        return AdapterError(f"'{self.folder / WEIGHTS}': '{self.module}': {reason}")


Update = LowRank | Float[Tensor, "out in"]


@dataclass(eq=False)
class Contents:
    """What a reader has found so far. A full-rank update is a whole weight, so each becomes factors
    (cut to `rank`, where one was asked for) as soon as it is there.

    dense_rank: the same for updates without a low rank only. widened: some of it came from beside
    the updates, so the config's placement does not hold.
    """

    rank: int | None = None
    dense_rank: int | None = None
    modules: dict[str, LowRank] = field(default_factory=dict)
    truncation: dict[str, float] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    widened: bool = False

    def add(self, module: str, update: Update) -> None:
        if isinstance(update, LowRank):
            if update.r == 0:  # AdaLoRA pruned it away: no update, and no shape to trust
                return
            if self.rank is not None and update.r > self.rank:
                _refuse_diverged(module, update.B, update.A)
                update, self.truncation[module] = truncate(update, self.rank)
            self.modules[module] = update
            return
        rank = self.dense_rank if self.rank is None else self.rank
        if rank is None or rank >= min(update.shape):
            self.modules[module] = full_rank(update)
        else:
            _refuse_diverged(module, update)
            cut, self.truncation[module] = factor(update, rank)
            self.modules[module] = cut.to(torch.float32)


def _refuse_diverged(module: str, *values: Tensor) -> None:
    """Before a truncation, which has no answer for it and would end in an error of torch's."""
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise AdapterError(
            f"'{module}' has NaN or infinite entries: its training diverged, and it cannot be cut "
            "to a rank"
        )


def check_rank(stored: Stored, rank: int) -> None:
    said = number(stored, "r", "rank_pattern")
    if said != rank:
        raise AdapterError(
            f"'{stored.folder}': '{stored.module}' has rank {rank} in the weights but {said:g} in "
            f"{CONFIG}; its scaling cannot be trusted"
        )


def check_shape(stored: Stored, shape: tuple[int, int]) -> None:
    """Against the base's module, where the base was given."""
    if stored.base is not None and stored.base.shape(stored.module) != tuple(shape):
        raise stored.refusal(
            f"adapts a {tuple(shape)} weight, the base {stored.base.name} has "
            f"{stored.base.shape(stored.module)}: it was trained on another base"
        )


def check_size(stored: Stored, numbers: int) -> None:
    if stored.base is None and numbers > LARGEST:
        raise stored.refusal(
            f"its update takes {numbers:,} numbers, more than {LARGEST:,}; pass the base model to "
            "confirm its shape"
        )


def number(stored: Stored, key: str, pattern: str | None = None) -> float:
    """A finite number of the config, or what its pattern has for the module."""
    config = stored.config
    value = config.get(key)
    if pattern is not None:
        table = config.get(pattern) or {}
        if not isinstance(table, Mapping):
            raise AdapterError(
                f"'{stored.folder / CONFIG}': {pattern} is {table!r}; expected an object"
            )
        value = by_pattern(table, stored.module, value)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        raise AdapterError(f"'{stored.folder / CONFIG}': {key} is {value!r}; expected a number")
    if not math.isfinite(value):
        raise AdapterError(f"'{stored.folder / CONFIG}': {key} is {value!r}; expected a number")
    return float(value)


def by_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's own rule: the first key that matches the module name or a dotted suffix of it as a
    regular expression; failing that, a key that is the name itself.
    """
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except (re.error, OverflowError, RecursionError):
            continue
    return pattern.get(module, default)
