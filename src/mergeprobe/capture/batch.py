"""A batch of prompt–completion items, and the loss of each item under a model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mergeprobe.errors import DataError


@dataclass(frozen=True, eq=False)
class Batch:
    """ids: (items, tokens) right-padded token ids; attention_mask: 1 where no padding;
    completion_mask: 1 where a token counts in the loss (never at position 0)."""

    ids: Int[Tensor, "items tokens"]
    attention_mask: Int[Tensor, "items tokens"]
    completion_mask: Int[Tensor, "items tokens"]

    def __len__(self) -> int:
        return self.ids.shape[0]

    def rows(self, start: int, stop: int) -> Batch:
        """Items start … stop − 1, cut to their own longest length."""
        longest = int(self.attention_mask[start:stop].sum(1).max())
        return Batch(
            self.ids[start:stop, :longest],
            self.attention_mask[start:stop, :longest],
            self.completion_mask[start:stop, :longest],
        )

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            self.ids.to(device), self.attention_mask.to(device), self.completion_mask.to(device)
        )


@dataclass(frozen=True, eq=False)
class ItemScores:
    """loss: (items,) mean completion loss (nats per token), float64. exact: (items,) whether every
    completion token is the model's first choice, that is, whether greedy decoding gives it."""

    loss: Float[Tensor, " items"]
    exact: Bool[Tensor, " items"]


def encode(tokenizer: Any, pairs: Sequence[tuple[str, str]], *, max_tokens: int = 1024) -> Batch:
    """(prompt, completion) texts as one batch: both tokenised apart, an end token appended.

    Raises DataError if a completion has no token or an item is longer than max_tokens.
    """
    rows = []
    for index, (prompt, completion) in enumerate(pairs):
        before = tokenizer(prompt)["input_ids"]
        after = tokenizer(completion, add_special_tokens=False)["input_ids"]
        if not before or not after:
            raise DataError(f"item {index} has an empty prompt or completion: {prompt[:40]!r}")
        after = [*after, tokenizer.eos_token_id]
        if len(before) + len(after) > max_tokens:
            raise DataError(
                f"item {index} has {len(before) + len(after)} tokens, at most {max_tokens}"
            )
        rows.append((before, after))
    if not rows:
        raise DataError("no items: expected at least one prompt and completion")
    longest = max(len(before) + len(after) for before, after in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    attention, completion = ids.clone(), ids.clone()
    for row, (before, after) in enumerate(rows):
        length = len(before) + len(after)
        ids[row, :length] = torch.tensor(before + after)
        attention[row, :length] = 1
        completion[row, len(before) : length] = 1
    return Batch(ids, attention, completion)


def completion_logits(
    model: Any, batch: Batch, *, everywhere: bool = False
) -> tuple[Float[Tensor, "tokens vocab"], Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """(logits, target ids, item index) at the completion tokens, in item order.

    The LM head runs on the positions that some item needs; everywhere=True: on all.
    """
    predicts = batch.completion_mask[:, 1:].bool()  # position t predicts token t + 1
    needed = predicts.any(0).nonzero().squeeze(1)
    fewer = takes_logits_to_keep(model) and not everywhere
    kept = {"logits_to_keep": needed} if fewer else {}
    logits = model(
        input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False, **kept
    ).logits
    if not kept:
        logits = logits[:, needed]
    chosen = predicts[:, needed]
    items = torch.arange(len(batch), device=batch.ids.device)[:, None].expand_as(chosen)[chosen]
    return logits[chosen], batch.ids[:, 1:][:, needed][chosen], items


def takes_logits_to_keep(model: Any) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def token_losses(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """Cross-entropy of each token in nats, computed in float32."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


@torch.no_grad()
def item_scores(model: Any, batch: Batch, *, batch_size: int = 32) -> ItemScores:
    """Loss and exact match of every item. The model's mode (train or eval) is left as it is."""
    device = next(model.parameters()).device
    losses, exact = [], []
    for start in range(0, len(batch), batch_size):
        part = batch.rows(start, start + batch_size).to(device)
        logits, targets, items = completion_logits(model, part)
        hits = (logits.argmax(-1) == targets).double()
        count = torch.zeros(len(part), dtype=torch.float64, device=device)
        total, right = count.clone(), count.clone()
        count.index_add_(0, items, torch.ones_like(hits))
        total.index_add_(0, items, token_losses(logits, targets).double())
        right.index_add_(0, items, hits)
        losses.append((total / count).cpu())
        exact.append((right == count).cpu())
    return ItemScores(torch.cat(losses), torch.cat(exact))
