"""What a model says at one point of weight space, and how far two such states are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.adapters.attach import attached
from mergeprobe.adapters.base import Base
from mergeprobe.adapters.checkpoint import Adapter
from mergeprobe.capture.batch import Batch, takes_logits_to_keep

LATE = 28 / 30  # the depth at which "late" states are read


@dataclass(frozen=True, eq=False)
class State:
    """A model at one point on one batch, at answer positions. late, final: hidden states after
    layer ⌊0.93 L⌉ and after the final norm; logprob: next-token log-probabilities; loss: nats."""

    late: Float[Tensor, "tokens hidden"]
    final: Float[Tensor, "tokens hidden"]
    logprob: Float[Tensor, "tokens vocab"]
    loss: float


@torch.no_grad()
def state_of(base: Base, batch: Batch, update: Adapter | None) -> State:
    model = base.model
    batch = batch.to(base.device)
    predicts = batch.completion_mask[:, 1:].bool()
    needed = predicts.any(0).nonzero().squeeze(1)
    kept = {"logits_to_keep": needed} if takes_logits_to_keep(model) else {}
    with attached(model, update.modules if update else {}):
        out = model(
            input_ids=batch.ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
            output_hidden_states=True,
            **kept,
        )
    logits = out.logits if kept else out.logits[:, needed]
    logprob = logits[predicts[:, needed]].float().log_softmax(-1)
    targets = batch.ids[:, 1:][predicts]
    layers = len(out.hidden_states) - 1
    return State(
        late=out.hidden_states[round(LATE * layers)][:, :-1][predicts].float(),
        final=out.hidden_states[-1][:, :-1][predicts].float(),
        logprob=logprob,
        loss=_mean_item_loss(logprob, targets, predicts),
    )


def _mean_item_loss(logprob: Tensor, targets: Tensor, predicts: Tensor) -> float:
    """Mean over items of the mean token loss, as item_scores counts it."""
    picked = -logprob.gather(-1, targets[:, None]).squeeze(-1).double()
    items = torch.arange(len(predicts), device=predicts.device)[:, None].expand_as(predicts)
    total = torch.zeros(len(predicts), dtype=torch.float64, device=predicts.device)
    total.index_add_(0, items[predicts], picked)
    return float((total / predicts.sum(1)).mean())


def distance(a: Tensor, b: Tensor) -> float:
    return max(float(torch.linalg.vector_norm(a - b)), 1e-9)


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p ‖ q) from log-probabilities, mean over tokens, nats."""
    return float((p.exp() * (p - q)).sum(-1).mean())


def js(p: Tensor, q: Tensor) -> float:
    middle = torch.logaddexp(p, q) - math.log(2)
    return (kl(p, middle) + kl(q, middle)) / 2


def top1_disagreement(p: Tensor, q: Tensor) -> float:
    return float((p.argmax(-1) != q.argmax(-1)).float().mean())
