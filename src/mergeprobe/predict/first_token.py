"""First-token collapse of superposed tasks, measured with the base model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergeprobe.adapters.attach import attached
from mergeprobe.adapters.checkpoint import Adapter
from mergeprobe.capture.batch import completion_logits, token_losses
from mergeprobe.compose import merge
from mergeprobe.predict.early import ModelTier
from mergeprobe.signals.diagnostics import first_token_share


def first_token_collapse(
    tier: ModelTier, name: str, group: Sequence[str], method: str = "sum"
) -> float:
    """`first_token_share` of `name` when `group` (itself included) is merged by `method`, each at
    its best length, on `name`'s items. Two forward passes of the tier's budget."""
    tier.spend(2)
    others = [tier.snapshots[other].update for other in sorted(group) if other != name]
    own = tier.snapshots[name].update
    alone, items = _token_losses(tier, name, own)
    merged, _ = _token_losses(tier, name, merge([own, *others], method).adapter)
    return first_token_share(alone, merged, items)


@torch.no_grad()
def _token_losses(
    tier: ModelTier, name: str, update: Adapter
) -> tuple[Float[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    batch = tier.snapshots[name].batch.to(tier.base.device)
    with attached(tier.base.model, update.modules):
        logits, targets, items = completion_logits(tier.base.model, batch)
    return token_losses(logits, targets).cpu(), items.cpu()
