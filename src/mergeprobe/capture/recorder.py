"""Hooks on the adapted modules: what goes in (x), and the gradient at what comes out (δ)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mergeprobe.capture.batch import Batch, completion_logits, token_losses
from mergeprobe.capture.moments import MomentSketch
from mergeprobe.capture.probe import Moment
from mergeprobe.capture.sketch import SKETCH_SIZE, projection


@dataclass
class Recording:
    """What the hooks gathered over some backward passes of summed token losses.

    gradient: module -> (k, k) sketch of Σ_t δ_t x_tᵀ. inputs, outputs: module -> moment sketch.
    tokens: completion tokens seen; padding enters nothing, prompt tokens enter no output moment.
    """

    gradient: dict[str, Float[Tensor, "k k"]] = field(default_factory=dict)
    inputs: dict[str, MomentSketch] = field(default_factory=dict)
    outputs: dict[str, MomentSketch] = field(default_factory=dict)
    tokens: int = 0
    loss_sum: float = 0.0

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
    batch_size: int = 8,
) -> Recording:
    """Runs forward and backward over `batch` and returns what the hooks saw.

    The loss is the plain sum of completion-token losses, so nothing has to be undone: no mean, no
    division by accumulation steps, no loss scale. Call it inside `measuring(model)`, or on a model
    whose parameters are frozen.
    """
    recording = Recording()
    device = next(model.parameters()).device
    with _gradient_from_embeddings(model), torch.enable_grad():
        for start in range(0, len(batch), batch_size):
            part = batch.rows(start, start + batch_size).to(device)
            with _hooks(modules, part, recording, moments):
                logits, targets, _ = completion_logits(model, part)
                loss = token_losses(logits, targets).sum()
                loss.backward()
            recording.tokens += targets.numel()
            recording.loss_sum += float(loss.detach())
    return recording


@contextmanager
def _hooks(
    modules: Mapping[str, nn.Module], part: Batch, recording: Recording, moments: bool
) -> Iterator[None]:
    real = part.attention_mask.bool()
    # position t carries the loss of token t + 1
    scored = torch.zeros_like(real)
    scored[:, :-1] = part.completion_mask[:, 1:].bool()
    inputs_seen: dict[int, tuple[Tensor, str]] = {}
    handles = []
    for name, module in modules.items():
        hook = _forward_hook(name, recording, real, scored, moments, inputs_seen)
        handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forward_hook(
    name: str,
    recording: Recording,
    real: Bool[Tensor, "items tokens"],
    scored: Bool[Tensor, "items tokens"],
    moments: bool,
    inputs_seen: dict[int, tuple[Tensor, str]],
) -> Callable[..., None]:
    def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach()
        if moments:
            first = inputs_seen.setdefault(x.data_ptr(), (x, name))[1]
            if first == name:
                sketch = recording.inputs.get(name)
                if sketch is None:
                    sketch = recording.inputs[name] = MomentSketch(x.shape[-1], device=x.device)
                sketch.add(x[real])
            else:  # q, k and v read one tensor: one sketch
                recording.inputs.setdefault(name, recording.inputs[first])
        if output.requires_grad:
            output.register_hook(lambda delta: backward(x, delta.detach()))

    def backward(x: Tensor, delta: Tensor) -> None:
        out, into = delta.shape[-1], x.shape[-1]
        r_out = projection(name, "out", out, SKETCH_SIZE).to(delta.device)
        r_in = projection(name, "in", into, SKETCH_SIZE).to(x.device)
        rows, cols = delta[real].float(), x[real].float()
        sketch = (rows @ r_out).T @ (cols @ r_in)
        recording.gradient[name] = recording.gradient.get(name, 0.0) + sketch
        if moments:
            moment = recording.outputs.get(name)
            if moment is None:
                moment = recording.outputs[name] = MomentSketch(out, device=delta.device)
            moment.add(delta[scored])

    return forward


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
