"""A model in training: measured without a trace, with and without what it has learned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from mergeprobe.capture.start import StartWeights
from mergeprobe.errors import ProbeError


def active_adapter(model: nn.Module) -> str:
    if not hasattr(model, "peft_config"):
        raise ProbeError(
            f"cannot probe {type(model).__name__}: it is no PEFT model; "
            "wrap it with get_peft_model, or give the trainer a peft_config"
        )
    active = model.active_adapter
    names = [active] if isinstance(active, str) else list(active)  # type: ignore[arg-type]
    if len(names) != 1:
        raise ProbeError(f"cannot probe a run with {len(names)} active adapters: {names}")
    return names[0]


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode, no parameter collecting gradients, global random state put back afterwards.

    So a measurement inside a training run leaves no trace in it: dropout draws nothing, and a
    backward pass reaches activations but no `.grad`. An autocast that is on around the call is
    off inside; one that is part of the model's forward (as accelerate does it) stays. Layers that
    checkpoint their activations go on doing so: their dropout does not follow from that.
    """
    modes = {module: module.training for module in model.modules()}
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    device = next(model.parameters()).device.type
    with (
        torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))),
        torch.autocast(device, enabled=False),
    ):
        try:
            model.eval()
            for module, mode in modes.items():
                # transformers checkpoints a layer where its own flag says "training"
                if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                    module.training = mode
            frozen(model)
            yield
        finally:
            for parameter, want in wanted:
                parameter.requires_grad_(want)
            for module, mode in modes.items():
                module.training = mode


def frozen(model: nn.Module) -> None:
    """No parameter collects gradients from here on."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


@contextmanager
def as_base(model: Any, start: StartWeights | None = None) -> Iterator[None]:
    """The base model alone; start: where a model without adapters began. PEFT makes an adapter
    trainable when it switches it on again; inside `measuring` it has to stay frozen."""
    with model.disable_adapter() if start is None else start.in_place(model):
        yield
    frozen(model)


def plain(model: Any) -> Any:
    """The PEFT model inside what DistributedDataParallel or torch.compile made of it."""
    while isinstance(model, DistributedDataParallel | nn.DataParallel):
        model = model.module
    return getattr(model, "_orig_mod", model)


def check_whole(model: nn.Module) -> None:
    """Raises ProbeError if this process holds only a part of the weights."""
    for name, parameter in model.named_parameters():
        flat = "_flat_param" in name or hasattr(parameter, "ds_id")
        if flat or isinstance(parameter, DTensor):
            raise ProbeError(
                f"cannot probe this run: '{name}' is spread over processes (FSDP, ZeRO-3 or tensor "
                "parallel); expected whole weights in each, as with DDP"
            )
