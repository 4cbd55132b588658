"""The running batch: answers of different adapters, decoded one token at a time together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.adapters.base import Base
from mergeprobe.compose.logits import compose
from mergeprobe.errors import BaseModelError
from mergeprobe.serve.cache import SlotCache
from mergeprobe.serve.catalogue import Source, Target
from mergeprobe.serve.resident import Resident


@dataclass(eq=False)
class Sequenced:
    """One sequence that grows: tokens, of which all but the last are in the cache. weights: of
    the composition, where it is one."""

    target: Target
    tokens: list[int]
    weights: tuple[float, ...] = ()
    rows: list[_Row] = field(default_factory=list)


@dataclass(eq=False)
class _Row:
    owner: Sequenced
    source: Source | None
    length: int  # tokens in the cache


class Batch:
    """At most `limit` rows; a sequence takes one, of a composition one for each model in it.

    Rows 0 … n − 1 of the cache are always the n rows that run: a row that ends is replaced by the
    last one.
    """

    def __init__(self, base: Base, resident: Resident, limit: int) -> None:
        check_decoder(base)
        self.model, self.resident, self.limit = base.model, resident, limit
        self.cache = SlotCache(int(base.model.config.num_hidden_layers), limit)
        self.rows: list[_Row] = []
        self.running: list[Sequenced] = []

    def sources(self) -> set[Source]:
        """The adapters in use."""
        return {row.source for row in self.rows if row.source is not None}

    @property
    def free(self) -> int:
        return self.limit - len(self.rows)

    def join(self, coming: Sequence[Sequenced]) -> Float[Tensor, "n vocab"]:
        """Runs the prompts, in one forward pass; the logits of their next tokens.

        Their adapters must be resident. Nothing has joined if it raises.
        """
        new = [row for sequence in coming for row in _rows(sequence)]
        lengths = [len(row.owner.tokens) for row in new]
        device = self.model.device
        ids = torch.zeros(len(new), max(lengths), dtype=torch.long)
        for position, row in enumerate(new):
            ids[position, : lengths[position]] = torch.tensor(row.owner.tokens)
        last, place = torch.tensor(lengths).sub(1).unique(return_inverse=True)
        self.cache.prompts(len(self.rows), lengths)
        self.resident.choose([row.source for row in new])
        logits = self.model(
            input_ids=ids.to(device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=last.to(device),
        ).logits
        logits = logits[torch.arange(len(new)), place]
        for row, length in zip(new, lengths, strict=True):
            row.length = length
            row.owner.rows.append(row)
        first = len(self.rows)
        self.rows += new
        self.running += coming
        return self._mixed(coming, logits, first)

    def step(self) -> Float[Tensor, "running vocab"]:
        """One token further: logits of the next token of every running sequence, in order."""
        device = self.model.device
        lengths = torch.tensor([row.length for row in self.rows], device=device)
        ids = torch.tensor([[row.owner.tokens[-1]] for row in self.rows], device=device)
        self.cache.step(lengths)
        self.resident.choose([row.source for row in self.rows])
        logits = self.model(
            input_ids=ids,
            attention_mask=self.cache.mask(),
            position_ids=lengths[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        for row in self.rows:
            row.length += 1
        return self._mixed(self.running, logits, 0)

    def leave(self, sequence: Sequenced, *, spoiled: bool = False) -> None:
        """Frees its rows. spoiled: its cache may hold entries that are not finite."""
        self.running.remove(sequence)
        for row in sequence.rows:
            at, last = self.rows.index(row), len(self.rows) - 1
            if spoiled:
                self.cache.wipe(at)
            if at != last:
                self.cache.move(last, at, self.rows[last].length)
                self.rows[at] = self.rows[last]
            self.rows.pop()
        sequence.rows.clear()

    def clear(self) -> None:
        """After a failed pass: no rows, and a cache without what it may have left."""
        for sequence in self.running:
            sequence.rows.clear()
        self.rows, self.running = [], []
        self.cache.drop()

    def _mixed(
        self, sequences: Sequence[Sequenced], logits: Float[Tensor, "rows vocab"], first: int
    ) -> Float[Tensor, "n vocab"]:
        """From logits of rows to those of sequences; the rows begin at row `first`."""
        place = {id(row): at - first for at, row in enumerate(self.rows)}
        found = []
        for sequence in sequences:
            at = [place[id(row)] for row in sequence.rows]
            how = sequence.target.how
            if how is None:
                found.append(logits[at[0]].float())
                continue
            weights = torch.tensor(sequence.weights, device=logits.device)
            rows = logits[at]
            found.append(compose(rows[0], rows[1:], weights, how.mode, how.plausibility))
        return torch.stack(found)


def _rows(sequence: Sequenced) -> list[_Row]:
    target = sequence.target
    sources = target.sources if target.how is None else (None, *target.sources)
    return [_Row(sequence, source, 0) for source in sources or (None,)]


def check_decoder(base: Base) -> None:
    """BaseModelError for a model whose layers do not all see the whole text so far."""
    config = base.model.config
    kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    if kinds:
        raise BaseModelError(
            f"base model '{base.name}' has layers of type {sorted(kinds)}; the server decodes "
            "models with full attention in every layer only"
        )
    window = getattr(config, "sliding_window", None)
    if window and not hasattr(config, "layer_types"):
        raise BaseModelError(
            f"base model '{base.name}' attends to a window of {window} tokens; the server decodes "
            "models with full attention in every layer only"
        )
