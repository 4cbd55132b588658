"""Hooks on the adapted modules: what goes in (x), and the gradient at what comes out (δ)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mergeprobe.capture.batch import Batch, completion_logits, token_losses
from mergeprobe.capture.moments import MomentSketch
from mergeprobe.capture.probe import Moment
from mergeprobe.capture.sketch import SKETCH_SIZE, projection
from mergeprobe.errors import ProbeError

BATCH_SIZE = 8


@dataclass
class Recording:
    """What the hooks gathered over some backward passes of summed token losses.

    gradient: module -> (k, k) sketch of Σ_t δ_t x_tᵀ. inputs, outputs: module -> moment sketch.
    tokens: completion tokens seen; padding enters nothing, prompt tokens enter no output moment.
    item_loss: (items,) mean completion loss of each item, nats per token.
    """

    gradient: dict[str, Float[Tensor, "k k"]] = field(default_factory=dict)
    inputs: dict[str, MomentSketch] = field(default_factory=dict)
    outputs: dict[str, MomentSketch] = field(default_factory=dict)
    tokens: int = 0
    loss_sum: float = 0.0
    item_loss: Float[Tensor, " items"] = field(default_factory=lambda: torch.zeros(0).double())

    def mean_gradient(self) -> dict[str, Float[Tensor, "k k"]]:
        """Sketches of the gradient of the mean token loss."""
        return {name: value.cpu() / max(1, self.tokens) for name, value in self.gradient.items()}

    def input_moments(self) -> dict[str, Moment]:
        """E[x xᵀ]; modules that read one input share one Moment."""
        done: dict[int, Moment] = {}
        for sketch in self.inputs.values():
            if id(sketch) not in done:
                done[id(sketch)] = sketch.moment()
        return {name: done[id(sketch)] for name, sketch in self.inputs.items()}

    def output_moments(self) -> dict[str, Moment]:
        return {name: sketch.moment() for name, sketch in self.outputs.items()}


def record(
    model: Any,
    modules: Mapping[str, nn.Module],
    batch: Batch,
    *,
    moments: bool = True,
    batch_size: int = BATCH_SIZE,
) -> Recording:
    """Runs forward and backward over `batch` and returns what the hooks saw.

    The loss is the plain sum of completion-token losses, so nothing has to be undone: no mean, no
    division by accumulation steps, no loss scale. Call it inside `measuring(model)`, or on a model
    whose parameters are frozen. Gradient checkpointing is fine, of either kind.
    """
    recording, losses = Recording(), []
    device = next(model.parameters()).device
    # an adapted LM head is measured at every token, as other modules are
    head = any(module is model.get_output_embeddings() for module in modules.values())
    with _gradient_from_embeddings(model), torch.enable_grad():
        for start in range(0, len(batch), batch_size):
            part = batch.rows(start, start + batch_size).to(device)
            hooks = _Pass(recording, part, moments)
            with hooks.on(modules):
                logits, targets, items = completion_logits(model, part, everywhere=head)
                loss = token_losses(logits, targets)
                hooks.backward = True
                loss.sum().backward()
            loss, items = loss.detach().cpu().double(), items.cpu()
            sums = torch.zeros(len(part), dtype=torch.float64).index_add_(0, items, loss)
            losses.append(sums / torch.bincount(items, minlength=len(part)))
            recording.tokens += targets.numel()
            recording.loss_sum += float(loss.sum())
    recording.item_loss = torch.cat(losses)
    return recording


class _Pass:
    """The hooks of one forward and backward pass over a micro-batch.

    Of x only its projection outlives the forward pass: (tokens, k) instead of (tokens, in), so a
    model that checkpoints its activations keeps that saving. A checkpointed module runs again in
    the backward pass; that second run is not counted, but it is where the reentrant kind of
    checkpointing builds its graph.
    """

    def __init__(self, recording: Recording, part: Batch, moments: bool) -> None:
        self.recording, self.moments, self.backward = recording, moments, False
        self.shape = tuple(part.ids.shape)
        real = part.attention_mask.bool()
        # position t carries the loss of token t + 1
        scored = torch.zeros_like(real)
        scored[:, :-1] = part.completion_mask[:, 1:].bool()
        self.real, self.scored = _positions(real), _positions(scored)
        self.last: tuple[Tensor, str] | None = None
        self.hooked: set[str] = set()

    @contextmanager
    def on(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        handles = [m.register_forward_hook(self._hook(name)) for name, m in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self.backward and name in self.hooked:
                return
            # sums over many tokens: in full precision even where the model runs under autocast
            with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
                self._forward(name, args[0].detach(), output)

        return forward

    def _forward(self, name: str, x: Tensor, output: Tensor) -> None:
        if tuple(x.shape[:-1]) != self.shape:
            raise ProbeError(
                f"'{name}' was given rows of shape {tuple(x.shape[:-1])} where the batch has "
                f"{self.shape}: which of them are padding cannot be told; take it out of the "
                "adapter's target modules, or train without the callback"
            )
        rows = _taken(x, self.real)
        if self.moments and not self.backward:
            self._add_input(name, x, rows)
        if output.requires_grad:
            self.hooked.add(name)
            seen = rows @ projection(name, "in", x.shape[-1], SKETCH_SIZE).to(x.device)
            output.register_hook(lambda delta: self._backward(name, seen, delta.detach()))

    def _add_input(self, name: str, x: Tensor, rows: Tensor) -> None:
        # q, k and v read one tensor, one after the other: one sketch
        if self.last is not None and self.last[0].data_ptr() == x.data_ptr():
            first = self.last[1]
            if self.last[0].shape == x.shape and first != name:
                self.recording.inputs.setdefault(name, self.recording.inputs[first])
                return
        sketch = self.recording.inputs.get(name)
        if sketch is None:
            sketch = self.recording.inputs[name] = MomentSketch(x.shape[-1], device=x.device)
        sketch.add(rows)
        self.last = (x, name)

    def _backward(self, name: str, seen: Float[Tensor, "tokens k"], delta: Tensor) -> None:
        with torch.autocast(delta.device.type, enabled=False):
            out = delta.shape[-1]
            r_out = projection(name, "out", out, SKETCH_SIZE).to(delta.device)
            sketch = (_taken(delta, self.real) @ r_out).T @ seen
            self.recording.gradient[name] = self.recording.gradient.get(name, 0.0) + sketch
            if self.moments:
                moment = self.recording.outputs.get(name)
                if moment is None:
                    moment = self.recording.outputs[name] = MomentSketch(out, device=delta.device)
                moment.add(_taken(delta, self.scored))


def _positions(mask: Bool[Tensor, "items tokens"]) -> Int[Tensor, " chosen"] | None:
    """Flat indices where the mask holds; None where it holds everywhere."""
    return None if bool(mask.all()) else mask.flatten().nonzero().squeeze(1)


def _taken(values: Tensor, positions: Tensor | None) -> Float[Tensor, "chosen dim"]:
    rows = values.reshape(-1, values.shape[-1])
    return (rows if positions is None else rows.index_select(0, positions)).float()


@contextmanager
def _gradient_from_embeddings(model: Any) -> Iterator[None]:
    """Starts the graph at the embeddings, so activations have gradients and parameters none."""

    def start(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.detach().requires_grad_(True)

    handle = model.get_input_embeddings().register_forward_hook(start)
    try:
        yield
    finally:
        handle.remove()
