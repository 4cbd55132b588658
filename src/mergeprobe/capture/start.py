"""Where full fine-tuning began: the base's weights of the modules that a run trains directly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mergeprobe.adapters.stored import Contents
from mergeprobe.adapters.weights import BaseWeights
from mergeprobe.artefact import atomic_file
from mergeprobe.errors import ProbeError


@dataclass(frozen=True, eq=False)
class StartWeights:
    """weights: module -> its weight before the first step, on the CPU and as the module stores it
    (a Conv1D keeps it as (in, out))."""

    weights: dict[str, Tensor]

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """`model` with the weights that training began from; afterwards it has its own again.

        Only the parameters' storage is exchanged, so nothing is rounded or copied back.
        """
        with exchanged(model, self.weights):
            yield

    def contents(self, model: nn.Module, rank: int) -> Contents:
        """W − W_start by module, cut to `rank`; differences are taken in float64."""
        base, contents = BaseWeights.of(model), Contents(rank)
        for module, before in self.weights.items():
            now = model.get_submodule(module).weight.detach()  # type: ignore[union-attr]
            change = now.cpu().double() - before.double()  # type: ignore[operator]
            contents.add(module, change if base.is_upright(module) else change.T)
        return contents

    def keep(self, path: Path) -> None:
        """For a run that is resumed: its model no longer holds them."""
        with atomic_file(path) as temporary:
            save_file({name: value.contiguous() for name, value in self.weights.items()}, temporary)


@contextmanager
def exchanged(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block each named module has that weight; afterwards its own, untouched."""
    kept: list[tuple[Any, Tensor]] = []
    try:
        for module, value in weights.items():
            parameter: Any = model.get_submodule(module).weight
            kept.append((parameter, parameter.data))
            parameter.data = value.to(parameter.device, parameter.dtype)
        yield
    finally:
        for parameter, own in kept:
            parameter.data = own


def start_weights(model: nn.Module) -> StartWeights:
    """A copy of the weights that a model without adapters trains, taken before its first step.

    Raises ProbeError by name for a trained parameter that is no Linear's or Conv1D's weight: its
    change is no update of a module, and the probe would not show it.
    """
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    if not trained:
        raise ProbeError(
            f"cannot probe {type(model).__name__}: it is no PEFT model and trains no weight of its "
            "own; wrap it with get_peft_model, or let the modules to fine-tune require gradients"
        )
    base, found = BaseWeights.of(model), {}
    for name in sorted(trained):
        module, _, last = name.rpartition(".")
        if last != "weight" or not base.is_linear(module):
            raise ProbeError(
                f"cannot probe {type(model).__name__}: it is no PEFT model and trains '{name}', "
                "which is no Linear's weight; freeze it (full fine-tuning of chosen Linear modules "
                "can be probed), or wrap the model with get_peft_model"
            )
        found[module] = model.get_submodule(module).weight.detach().cpu().clone()  # type: ignore[union-attr,operator]
    return StartWeights(found)


def read_start(path: Path, model: nn.Module) -> StartWeights:
    """What `keep` wrote; ProbeError where it is gone, damaged or of other modules."""
    wanted = {
        name.removesuffix(".weight"): value
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    try:
        with safe_open(str(path), framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError):
        found = {}
    if {n: v.shape for n, v in found.items()} != {n: v.shape for n, v in wanted.items()}:
        raise ProbeError(
            f"cannot probe this run: it is resumed, and '{path}', which holds the weights that it "
            "began from, is gone, damaged or of another run; start anew, or train without the "
            "callback"
        )
    assert all(isinstance(value, torch.Tensor) for value in found.values())
    return StartWeights(found)
