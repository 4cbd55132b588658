"""A live PEFT model: which modules it adapts, and its update right now."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from mergeprobe.adapters.checkpoint import PREFIX, natural
from mergeprobe.errors import ProbeError
from mergeprobe.lowrank import LowRank


def adapted_modules(model: nn.Module) -> dict[str, Any]:
    """Module name in the base model -> its LoRA layer.

    Raises ProbeError by name for what is not a plain LoRA: another PEFT type, DoRA, saved
    modules, several active adapters, adapted embeddings or convolutions.
    """
    adapter = active_adapter(model)
    config: Any = model.peft_config[adapter]  # type: ignore[index]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    refused = {
        f"PEFT type {kind}": kind != "LORA",
        "DoRA (use_dora)": getattr(config, "use_dora", False),
        "modules_to_save": bool(getattr(config, "modules_to_save", None)),
        "trained biases (bias)": getattr(config, "bias", "none") != "none",
        "lora_bias": getattr(config, "lora_bias", False),
        "trainable_token_indices": bool(getattr(config, "trainable_token_indices", None)),
    }
    for what, holds in refused.items():
        if holds:
            raise ProbeError(f"cannot probe this run: it uses {what}; expected a plain LoRA")
    found = {}
    for name, module in model.named_modules():
        if adapter in getattr(module, "lora_embedding_A", {}):
            raise ProbeError(f"cannot probe this run: '{name}' is an adapted embedding")
        if adapter in getattr(module, "lora_A", {}):
            if not isinstance(module.lora_A[adapter], nn.Linear):  # type: ignore[index]
                raise ProbeError(f"cannot probe this run: '{name}' is an adapted convolution")
            found[name.removeprefix(PREFIX)] = module
    if not found:
        raise ProbeError("cannot probe this run: the model has no LoRA modules")
    return {name: found[name] for name in sorted(found, key=natural)}


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


def current_update(model: nn.Module) -> dict[str, LowRank]:
    """A copy of the update as it is now, float32 on the CPU."""
    adapter = active_adapter(model)
    return {
        name: LowRank(
            layer.lora_B[adapter].weight.detach().float().cpu().clone(),
            layer.lora_A[adapter].weight.detach().float().cpu().clone(),
            float(layer.scaling[adapter]),
        )
        for name, layer in adapted_modules(model).items()
    }


def init_hash(model: nn.Module) -> str:
    """Names the A matrices as they are now: equal for runs that share their init."""
    adapter = active_adapter(model)
    total = hashlib.sha256()
    for name, layer in adapted_modules(model).items():
        weight = layer.lora_A[adapter].weight.detach().float().cpu().contiguous()
        total.update(f"{name}|{tuple(weight.shape)}|".encode())
        total.update(weight.numpy().tobytes())
    return total.hexdigest()[:16]


def weight_norms(model: nn.Module) -> dict[str, float]:
    """‖W‖ of each adapted module's frozen weight (packed weights are left out)."""
    return {
        name: float(torch.linalg.vector_norm(layer.base_layer.weight.detach().float()))
        for name, layer in adapted_modules(model).items()
        if layer.base_layer.weight.is_floating_point()
    }


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
def as_base(model: Any) -> Iterator[None]:
    """The base model alone. PEFT makes an adapter trainable when it switches it on again; inside
    `measuring` it has to stay frozen."""
    with model.disable_adapter():
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
