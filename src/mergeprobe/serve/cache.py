"""Keys and values of a batch whose rows come and go: every row has a length of its own.

Rows start at position 0, so that nothing is padded on the left: a row of length n has its keys at
0 … n − 1 and its next token writes at n. What lies beyond a row's length is masked, never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

BLOCK = 256  # positions that the cache grows by


@dataclass
class _Where:
    """What the next forward pass is: the prompts of new rows, or one token for every row.

    prompts: lengths of the new rows, which begin at row `first`; empty for a step. lengths: of
    every row before the step.
    """

    first: int = 0
    prompts: tuple[int, ...] = ()
    lengths: Int[Tensor, " rows"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    longest: int = 0


class SlotCache(Cache):
    """A cache of at most `rows` rows, as transformers' decoder models take it.

    Say what comes with `prompts` or `step` before each forward pass; for a step give the model
    `mask()` and `positions()`. Grows by blocks to the longest row; never shrinks.
    """

    def __init__(self, layers: int, rows: int) -> None:
        self.where = _Where()
        super().__init__(layers=[_SlotLayer(self.where, rows) for _ in range(layers)])

    def prompts(self, first: int, lengths: Sequence[int]) -> None:
        """Next come prompts, padded on the right, for the rows from `first` on."""
        self.where.first, self.where.prompts = first, tuple(lengths)
        self.where.longest = 0

    def step(self, lengths: Int[Tensor, " rows"]) -> None:
        """Next comes one token for each row 0 … rows − 1, of these lengths so far."""
        self.where.prompts, self.where.lengths = (), lengths
        self.where.longest = int(lengths.max())

    def mask(self) -> Int[Tensor, "rows longest"]:
        """1 where a row may look, its new token included."""
        lengths = self.where.lengths
        return (
            torch.arange(self.where.longest + 1, device=lengths.device) <= lengths[:, None]
        ).long()

    def move(self, source: int, target: int, length: int) -> None:
        """Row `source` is kept as row `target`."""
        for layer in self.layers:
            for held in (layer.keys, layer.values):  # type: ignore[union-attr]
                assert held is not None
                held[target, :, :length] = held[source, :, :length]

    def wipe(self, row: int) -> None:
        """Zeros, after entries that are not finite: a masked NaN still spoils a sum."""
        for layer in self.layers:
            if layer.keys is not None:  # type: ignore[union-attr]
                layer.keys[row], layer.values[row] = 0, 0  # type: ignore[union-attr, index]

    def drop(self) -> None:
        """Gives all memory back; the next prompts start anew."""
        for layer in self.layers:
            layer.keys = layer.values = None  # type: ignore[union-attr]
            layer.is_initialized = False  # type: ignore[union-attr]


class _SlotLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, where: _Where, rows: int) -> None:
        super().__init__()
        self.where, self.rows = where, rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # zeros, not whatever was in memory: masked entries are multiplied by 0, and must be finite
        def empty(like: Tensor) -> Tensor:
            return like.new_zeros(self.rows, like.shape[1], 0, like.shape[3])

        self.keys, self.values = empty(key_states), empty(value_states)
        self.is_initialized = True

    def update(
        self,
        key_states: Float[Tensor, "rows heads tokens width"],
        value_states: Float[Tensor, "rows heads tokens width"],
        *args: Any,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        where = self.where
        self._reserve(max(where.prompts, default=where.longest + 1))
        assert self.keys is not None
        assert self.values is not None
        if where.prompts:  # prompts see only themselves
            for offset, length in enumerate(where.prompts):
                row = where.first + offset
                self.keys[row, :, :length] = key_states[offset, :, :length]
                self.values[row, :, :length] = value_states[offset, :, :length]
            return key_states, value_states
        count = len(where.lengths)
        rows = torch.arange(count, device=key_states.device)
        self.keys[rows, :, where.lengths] = key_states[:, :, 0]
        self.values[rows, :, where.lengths] = value_states[:, :, 0]
        seen = where.longest + 1
        return self.keys[:count, :, :seen], self.values[:count, :, :seen]

    def _reserve(self, length: int) -> None:
        assert self.keys is not None
        assert self.values is not None
        if length <= self.keys.shape[2]:
            return
        capacity = -(-length // BLOCK) * BLOCK

        def grown(old: Tensor) -> Tensor:
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : old.shape[2]] = old
            return new

        self.keys, self.values = grown(self.keys), grown(self.values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self.where.prompts else self.where.longest

    def get_max_length(self) -> int:
        return -1
