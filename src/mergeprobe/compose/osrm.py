"""OSRM before training: LoRA started in the input directions that the other tasks use least.

    init = osrm_init([read_probe(path) for path in probes_of_the_other_tasks], rank=8)
    model = get_peft_model(base_model, LoraConfig(r=8, target_modules=...))
    start_from(model, init)  # and train as usual

Source: arXiv:2505.22934 (there from 100 samples of each other task; here from their probes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.capture.probe import Probe
from mergeprobe.compose.merge.module import module_generator
from mergeprobe.compose.merge.osrm import most_used
from mergeprobe.errors import AdapterMismatch, ProbeError

PREFIX = "base_model.model."


def osrm_init(
    others: Sequence[Probe], rank: int, *, seed: int = 0
) -> dict[str, Float[Tensor, "rank in"]]:
    """Module -> A with orthonormal rows (A Aᵀ = I) on which the others' inputs fall least; float32.

    others: probes of the tasks to stay clear of, with moments of their inputs. The sketches hold
    the leading directions of each; outside of their span all directions are equally little used,
    so `seed` draws among those. Only where they are fewer than `rank` does A take used
    directions too, the least used first. Without others there is nothing to avoid: ProbeError; so
    too for a probe without input moments, and a rank beyond a module's width.
    """
    if not others:
        raise ProbeError("OSRM needs the probes of the other tasks; got none")
    if lacking := [probe.name for probe in others if not probe.has("inputs")]:
        raise ProbeError(
            f"probe '{lacking[0]}' has no input moments; measure it again with moments"
        )
    found = {}
    for module in dict.fromkeys(module for probe in others for module in probe.inputs):
        moments = [probe.inputs[module] for probe in others if module in probe.inputs]
        into = moments[0].factor.shape[0]
        if not 1 <= rank <= into:
            raise ProbeError(f"rank is {rank}; '{module}' takes 1 to {into}")
        used = most_used(moments, into)
        drawn = torch.randn(into, rank, generator=module_generator(seed, module)).double()
        # twice, since one projection leaves rounding of the order of what it removes
        free = _clear_of(used, _clear_of(used, drawn))
        rows = torch.linalg.qr(free[:, : into - used.shape[1]]).Q
        short = rank - rows.shape[1]
        if short > 0:
            rows = torch.cat([rows, used[:, used.shape[1] - short :].flip(1)], 1)
        found[module] = rows.T.float().contiguous()
    return found


def _clear_of(used: Float[Tensor, "in k"], vectors: Float[Tensor, "in r"]) -> Float[Tensor, "in r"]:
    return vectors - used @ (used.T @ vectors)


def start_from(
    model: Any, init: Mapping[str, Float[Tensor, "rank in"]], adapter: str = "default"
) -> None:
    """Puts `init` into the A factors of a PEFT LoRA model's `adapter`, in place, before training.

    B stays zero, so the model answers as the base still. Raises AdapterMismatch, with the model
    untouched, where a LoRA module has no init or another shape, or is trained already (B ≠ 0).
    """
    targets = {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if adapter in getattr(module, "lora_A", ())
    }
    if not targets:
        raise AdapterMismatch(f"the model has no LoRA modules of an adapter '{adapter}'")
    for name, module in targets.items():
        if name not in init:
            raise AdapterMismatch(
                f"no init for '{name}': the other tasks' probes do not cover it; "
                "leave it out of target_modules or probe adapters that have it"
            )
        theirs = module.lora_A[adapter].weight
        if theirs.shape != init[name].shape:
            raise AdapterMismatch(
                f"A of '{name}' is {tuple(theirs.shape)} in the model but "
                f"{tuple(init[name].shape)} in the init; use one rank, and the base of the probes"
            )
        if bool(module.lora_B[adapter].weight.any()):
            raise AdapterMismatch(f"'{name}' is trained already (B is not 0); start anew")
    with torch.no_grad():
        for name, module in targets.items():
            module.lora_A[adapter].weight.copy_(init[name])
