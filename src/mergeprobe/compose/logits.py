"""Composing behaviour instead of weights: next-token logits of several adapters, mixed.

Where adapters collide in weight space their predictions can still be combined, at the price of
one forward pass for each of them. Here that is one batch: every prompt becomes N + 1 rows, the
base and the N adapters, with one key-value cache.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mergeprobe.adapters.rows import NONE, Rows, attached_rows
from mergeprobe.errors import DataError, MergeError
from mergeprobe.lowrank import LowRank

Mode = Literal["sum", "geometric", "mixture"]
MODES: dict[str, str] = {
    "sum": "z₀ + Σ αᵢ (zᵢ − z₀): offsets of the logits add up",
    "geometric": "Σ wᵢ log pᵢ, renormalised: a product of experts, w ≥ 0 with sum 1",
    "mixture": "log Σ wᵢ pᵢ: an average of probabilities, w ≥ 0 with sum 1",
}


def compose(
    base: Float[Tensor, "*rows vocab"],
    experts: Float[Tensor, "n *rows vocab"],
    weights: Float[Tensor, "n *rows"] | Float[Tensor, " n"],
    mode: Mode = "sum",
    plausibility: float | None = None,
) -> Float[Tensor, "*rows vocab"]:
    """Logits of the composition; log-probabilities for "geometric" and "mixture".

    weights: one for each expert, or one for each expert and row (a router's gates). One expert of
    weight 1 is that expert in every mode. plausibility: in (0, 1]; tokens that no expert of weight
    above 0 gives at least this share of its own largest probability get −inf. In float32 or wider.
    Sources: arXiv:2401.08565 (sum), arXiv:2210.15097 (plausibility).
    """
    wide = torch.promote_types(base.dtype, torch.float32)
    base, experts = base.to(wide), experts.to(wide)
    shaped = weights.to(base).reshape(*weights.shape, *[1] * (experts.ndim - weights.ndim))
    if mode == "sum":
        found = base + (shaped * (experts - base)).sum(0)
    else:
        check_mixture(weights, mode)
        logs = experts.log_softmax(-1)
        if mode == "geometric":
            found = (shaped * logs).sum(0).log_softmax(-1)
        else:
            found = (logs + shaped.clamp_min(0).log()).logsumexp(0)
    if plausibility is None:
        return found
    return found.masked_fill(~plausible(experts, shaped > 0, plausibility), -math.inf)


def plausible(
    experts: Float[Tensor, "n *rows vocab"], counted: Bool[Tensor, "n *rows 1"], share: float
) -> Bool[Tensor, "*rows vocab"]:
    """Tokens of probability ≥ share · the largest one, under at least one expert that counts."""
    if not 0 < share <= 1:
        raise MergeError(f"plausibility is {share}; expected a share in (0, 1]")
    near = experts >= experts.amax(-1, keepdim=True) + math.log(share)
    return (near & counted).any(0)


def check_mixture(weights: Tensor, mode: str) -> None:
    """MergeError unless the weights are those of a mixture: none below 0, sum 1 over experts."""
    total = weights.double().sum(0)
    if bool((weights < 0).any()) or bool(((total - 1).abs() > 1e-4).any()):
        shown = [round(w, 4) for w in weights.flatten()[:4].tolist()]
        raise MergeError(
            f"mode '{mode}' needs weights of at least 0 that sum to 1; got {shown}"
            f"{'…' if weights.numel() > 4 else ''}"
        )


def proxy(
    large: Float[Tensor, "*rows vocab"],
    tuned: Float[Tensor, "*rows vocab"],
    untuned: Float[Tensor, "*rows vocab"],
    alpha: float = 1.0,
) -> Float[Tensor, "*rows vocab"]:
    """Proxy-tuning: z_M + α (z_M+ − z_M−), a small tuned pair steering a larger model of the same
    vocabulary. Source: arXiv:2401.08565."""
    wide = torch.promote_types(large.dtype, torch.float32)
    return large.to(wide) + alpha * (tuned.to(wide) - untuned.to(wide))


@dataclass(frozen=True)
class Composition:
    """How experts are composed, in the order of their updates.

    weights: one for each. gate: (prompts' token ids, attention mask) -> (experts, prompts) weights
    instead, asked once for each new batch of prompts (a router).
    """

    weights: tuple[float, ...]
    mode: Mode = "sum"
    plausibility: float | None = None
    gate: Callable[[Tensor, Tensor | None], Float[Tensor, "n prompts"]] | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise MergeError(f"unknown mode '{self.mode}'; known are {', '.join(MODES)}")
        if not self.weights or not all(math.isfinite(weight) for weight in self.weights):
            raise MergeError(f"weights are {list(self.weights)}; expected one finite number each")
        if self.mode != "sum" and self.gate is None:
            check_mixture(torch.tensor(self.weights), self.mode)


@contextmanager
def composed(
    model: nn.Module, updates: Sequence[Mapping[str, LowRank]], how: Composition
) -> Iterator[nn.Module]:
    """Within the block the model's logits, and so its `generate`, are those of the composition.

    A batch of P prompts runs as P · (N + 1) rows, the base first and then every adapter; a cache
    made inside the block holds them all. Greedy search, sampling and every logits processor work
    as ever; beams do not (the cache has other rows than the beams), and are refused. The model is
    itself again on any exit. Raises MergeError where weights and updates differ in number.
    """
    if len(updates) != len(how.weights):
        raise MergeError(
            f"{len(how.weights)} weights for {len(updates)} adapters; expected one for each"
        )
    with attached_rows(model, updates) as rows:
        forward = _Composed(model.forward, rows, how)
        with _replaced(model, forward):
            yield model


@contextmanager
def proxied(
    large: nn.Module, tuned: nn.Module, untuned: nn.Module, alpha: float = 1.0
) -> Iterator[nn.Module]:
    """Within the block `large` answers as steered by the small pair; so does its `generate`.

    The small models keep caches of their own. Raises MergeError where the vocabularies differ.
    """
    sizes = {name: _vocabulary(m) for name, m in (("large", large), ("tuned", tuned))}
    sizes["untuned"] = _vocabulary(untuned)
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise MergeError(f"vocabularies differ ({shown} tokens); logits can be added over one only")
    with _replaced(large, _Proxied(large.forward, tuned, untuned, alpha)):
        yield large


class _Composed:
    """The forward pass of a composition, in place of the model's own."""

    def __init__(self, forward: Callable[..., Any], rows: Rows, how: Composition) -> None:
        self.forward, self.rows, self.how = forward, rows, how
        self.__signature__ = inspect.signature(forward)  # `generate` asks for it
        self.gates: Tensor | None = None

    def __call__(self, input_ids: Any = None, attention_mask: Any = None, **others: Any) -> Any:
        if input_ids is None or others.get("labels") is not None:
            raise DataError("a composition takes token ids and no labels; score its logits instead")
        prompts, each = input_ids.shape[0], self.rows.count + 1
        past = others.get("past_key_values")
        if _length(past) == 0 or self.gates is None:
            self.gates = self._weights(input_ids, attention_mask)
        elif _cached_rows(past) not in (None, prompts * each):
            raise DataError(
                f"the cache holds {_cached_rows(past)} rows, expected {prompts} prompts times "
                f"{each}; a composition searches greedily or samples, without beams"
            )
        self.rows.choose([NONE, *range(self.rows.count)] * prompts)

        def many(value: Any) -> Any:
            batched = isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == prompts
            return value.repeat_interleave(each, 0) if batched else value

        output = self.forward(
            input_ids=many(input_ids),
            attention_mask=many(attention_mask),
            **{key: many(value) for key, value in others.items()},
        )
        logits = output.logits.unflatten(0, (prompts, each)).transpose(0, 1)
        gates = self.gates if self.gates.ndim == 1 else self.gates[:, :, None]
        output.logits = compose(logits[0], logits[1:], gates, self.how.mode, self.how.plausibility)
        return output

    def _weights(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        if self.how.gate is None:
            return torch.tensor(self.how.weights, device=ids.device)
        self.rows.choose([NONE] * len(ids))  # the gate sees the base model
        gates = self.how.gate(ids, mask).to(ids.device)
        if gates.shape != (self.rows.count, ids.shape[0]):
            raise MergeError(
                f"the gate gave weights of shape {tuple(gates.shape)}; expected "
                f"({self.rows.count} adapters, {ids.shape[0]} prompts)"
            )
        return gates


class _Proxied:
    """The large model's forward pass, steered by a small pair with caches of its own."""

    def __init__(
        self, forward: Callable[..., Any], tuned: nn.Module, untuned: nn.Module, alpha: float
    ) -> None:
        self.forward, self.pair, self.alpha = forward, (tuned, untuned), alpha
        self.__signature__ = inspect.signature(forward)
        self.caches: list[Any] = [None, None]

    def __call__(self, input_ids: Any = None, attention_mask: Any = None, **others: Any) -> Any:
        if input_ids is None or others.get("labels") is not None:
            raise DataError("a composition takes token ids and no labels; score its logits instead")
        fresh = _length(others.get("past_key_values")) == 0
        caching = bool(others.get("use_cache", others.get("past_key_values") is not None))
        output = self.forward(input_ids=input_ids, attention_mask=attention_mask, **others)
        kept = others.get("logits_to_keep", 0)
        found = []
        for position, model in enumerate(self.pair):
            past = None if fresh or not caching else self.caches[position]
            small = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=others.get("position_ids"),
                past_key_values=past,
                use_cache=caching,
                logits_to_keep=kept,
            )
            self.caches[position] = small.past_key_values if caching else None
            found.append(small.logits)
        output.logits = proxy(output.logits, found[0], found[1], self.alpha)
        return output


@contextmanager
def _replaced(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The instance's forward pass is another one within the block."""
    before = model.__dict__.get("forward")
    model.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del model.__dict__["forward"]
        else:
            model.forward = before  # type: ignore[method-assign]


def _length(past: Any) -> int:
    return 0 if past is None else int(past.get_seq_length())


def _cached_rows(past: Any) -> int | None:
    """Rows of the first layer's cached keys; None where that can't be seen."""
    layers = getattr(past, "layers", None)
    keys = getattr(layers[0], "keys", None) if layers else None
    return int(keys.shape[0]) if isinstance(keys, Tensor) and keys.numel() else None


def _vocabulary(model: nn.Module) -> int:
    return int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator, union-attr]
