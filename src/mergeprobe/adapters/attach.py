"""Run a model with low-rank updates attached, and without a trace afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from mergeprobe.errors import AdapterMismatch
from mergeprobe.lowrank import LowRank


@contextmanager
def attached(model: nn.Module, updates: Mapping[str, LowRank]) -> Iterator[nn.Module]:
    """Within the block every named module returns its output plus x (scaling · B A)ᵀ.

    Works on Linear and transformers' Conv1D modules, through autograd too (also to the factors,
    if they require it). Nested blocks add up. The hooks go on any exit. Factors are cast once, on
    entry; `placed` does it ahead for updates that are attached often. Raises AdapterMismatch, with
    the model untouched, if a module is missing, of another kind or of another shape.
    """
    ready = placed(model, updates)
    modules = dict(model.named_modules(remove_duplicate=False))
    handles = []
    try:
        for name, update in ready.items():
            handles.append(modules[name].register_forward_hook(_adding(update.A, update.B)))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def placed(model: nn.Module, updates: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The same updates on each module's device and in its dtype, the scaling folded into B.

    Checks each against its module; AdapterMismatch names the first that does not fit.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in updates:
        if name not in modules:
            last = name.rpartition(".")[2]
            like = [known for known in modules if known.rpartition(".")[2] == last]
            raise AdapterMismatch(
                f"the model has no module '{name}', which the adapter changes"
                f"{f'; it has {like[0]!r}' if like else ''}: it was trained on another base"
            )
    return {name: _placed(modules[name], name, update) for name, update in updates.items()}


def _adding(
    down: Float[Tensor, "r in"], up: Float[Tensor, "out r"]
) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        # the casts do nothing but under a quantised or mixed-precision module
        return output + linear(linear(args[0].to(down.dtype), down), up).to(output.dtype)

    return hook


def _placed(module: nn.Module, name: str, update: LowRank) -> LowRank:
    # a PEFT layer, its adapter off, stands for the base's module inside
    module = getattr(module, "base_layer", getattr(module, "original_module", module))
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        shape = (module.out_features, module.in_features)
    elif hasattr(module, "nf") and hasattr(module, "nx"):  # Conv1D stores its weight transposed
        shape = (module.nf, module.nx)
    else:
        raise AdapterMismatch(
            f"'{name}' is a {type(module).__name__}; updates go on Linear and Conv1D modules only"
        )
    if update.shape != shape:
        raise AdapterMismatch(
            f"'{name}' is {shape} in the model but {update.shape} in the adapter: "
            "it was trained on another base"
        )
    weight = module.weight
    assert isinstance(weight, Tensor)
    # a quantised weight is stored as integers; float32 factors are cast to each input
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    B = update.B if update.scaling == 1.0 else update.folded()[0]
    return LowRank(B.to(weight.device, dtype), update.A.to(weight.device, dtype))
