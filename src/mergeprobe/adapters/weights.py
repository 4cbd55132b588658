"""The base model's weights by module name, for updates that depend on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergeprobe.adapters.base import Base, fingerprint, load_base
from mergeprobe.errors import AdapterMismatch, BaseModelError


@dataclass(frozen=True, eq=False)
class BaseWeights:
    """Reads weights out of a base model, (out, in) whichever way a module stores its own.

    model: the base, with or without PEFT layers around its modules. name: for messages.
    """

    name: str
    model: nn.Module

    @classmethod
    def of(cls, base: BaseWeights | Base | nn.Module | str | Path) -> BaseWeights:
        """From a model, or from what `load_base` takes (then it is loaded on the CPU)."""
        if isinstance(base, BaseWeights):
            return base
        if isinstance(base, str | Path):
            base = load_base(base, device="cpu")
        if isinstance(base, Base):
            return cls(base.name, base.model)
        model: Any = base.get_base_model() if hasattr(base, "peft_config") else base  # type: ignore[operator]
        return cls(type(model).__name__, model)

    def fingerprint(self) -> str:
        return fingerprint(self.model)

    def layer(self, module: str) -> Any:
        """The module itself; AdapterMismatch where the base has none of that name."""
        try:
            found = self.model.get_submodule(module)
        except AttributeError:
            raise AdapterMismatch(
                f"the base model {self.name} has no module '{module}', which the adapter changes: "
                "it was trained on another base"
            ) from None
        return getattr(found, "base_layer", getattr(found, "original_module", found))

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of a Linear or Conv1D module; AdapterMismatch for another kind."""
        layer = self.layer(module)
        if isinstance(layer, nn.Linear):
            return layer.out_features, layer.in_features
        if hasattr(layer, "nf") and hasattr(layer, "nx"):  # transformers' Conv1D
            return layer.nf, layer.nx
        raise AdapterMismatch(
            f"'{module}' is a {type(layer).__name__} in the base model {self.name}; "
            "updates are read for Linear and Conv1D modules only"
        )

    def is_linear(self, module: str) -> bool:
        """Whether a module is a Linear or Conv1D, whose weight takes updates."""
        layer = self.layer(module)
        return isinstance(layer, nn.Linear) or hasattr(layer, "nf")

    def is_upright(self, module: str) -> bool:
        """Whether a module stores its weight as (out, in); Conv1D keeps it transposed."""
        return not hasattr(self.layer(module), "nf")

    def weight(self, module: str) -> Float[Tensor, "out in"]:
        """W in float64 on the CPU; a bitsandbytes weight as it is dequantised to compute with.

        Raises BaseModelError for weights packed in another way.
        """
        layer, shape = self.layer(module), self.shape(module)
        stored = layer.weight.detach()
        if not stored.is_floating_point():
            stored = _unpacked(layer)
        if not stored.is_floating_point():
            raise BaseModelError(
                f"'{module}' is stored as {stored.dtype} in the base model {self.name}: the update "
                "depends on its values; pass the base unquantised"
            )
        weight = (stored if self.is_upright(module) else stored.T).cpu().double()
        assert tuple(weight.shape) == shape
        return weight

    def bias(self, module: str) -> Float[Tensor, " out"] | None:
        bias = getattr(self.layer(module), "bias", None)
        return None if bias is None else bias.detach().cpu().double()

    def parameter(self, name: str) -> Tensor:
        """Any parameter by its full name, as it is stored."""
        module, _, last = name.rpartition(".")
        found = getattr(self.layer(module), last, None) if module else None
        if not isinstance(found, Tensor) or not torch.is_floating_point(found):
            raise AdapterMismatch(f"the base model {self.name} has no parameter '{name}'")
        return found.detach()


def _unpacked(layer: Any) -> Tensor:
    """The weight that a quantised layer computes with, or as it is stored where PEFT knows none."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer).detach()
