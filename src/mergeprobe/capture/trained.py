"""What a run trains, of every kind that has an update: its modules, and the update right now.

A PEFT model of any type that the readers know (adapters/variants.py), or a model without adapters
of which chosen Linear modules are fine-tuned; the latter needs the weights it began from
(`StartWeights`), as `start`. Everything else is refused by name.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from mergeprobe.adapters.base import fingerprint
from mergeprobe.adapters.checkpoint import PREFIX, Adapter, contents_of, natural
from mergeprobe.adapters.refusals import refuse_unreadable
from mergeprobe.adapters.stored import Contents
from mergeprobe.adapters.variants import PEFT_TYPES, kind_of
from mergeprobe.adapters.weights import BaseWeights
from mergeprobe.capture.model import active_adapter
from mergeprobe.capture.start import StartWeights
from mergeprobe.errors import AdapterError, AdapterMismatch, BaseModelError, ProbeError
from mergeprobe.lowrank import LowRank

# kept at their own rank; every other update is a whole weight, or a product of many components
OWN_RANK = ("LORA", "ADALORA", "VERA")
TRUNCATED_RANK = 32
ROUNDING = 1e-6  # relative; what is cut below it is lost in float32 anyway
FULL = "full fine-tuning"
RUN = Path("the adapter in training")  # for the readers' messages


def adapted_modules(model: Any, start: StartWeights | None = None) -> dict[str, Any]:
    """Module name in the base model -> the module whose input and output the update maps.

    For PEFT that is its layer around the base's module, adapter included. Raises ProbeError by
    name for what has no update: unknown PEFT types and options, adapted embeddings and
    convolutions, trained biases or tokens, several active adapters.
    """
    if start is not None:
        return {name: model.get_submodule(name) for name in start.weights}
    adapter, config = active_adapter(model), peft_config(model)
    _refuse(config)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and adapter in _adapters(module):
            _refuse_layer(name, module, kind_of(config))
            found[name] = module
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            found[name] = module
    if not found:
        raise ProbeError("cannot probe this run: the model has no adapted modules")
    plain = {name.removeprefix(PREFIX): module for name, module in found.items()}
    return {name: plain[name] for name in sorted(plain, key=natural)}


def peft_config(model: Any) -> dict[str, Any]:
    """The active adapter's config as PEFT would write it into its file."""
    told = model.peft_config[active_adapter(model)].to_dict()
    # sets become lists as in PEFT's file; what JSON has no word for says nothing of the update
    return json.loads(json.dumps(told, default=lambda v: list(v) if isinstance(v, set) else str(v)))


def _adapters(layer: BaseTunerLayer) -> set[str]:
    parts = (getattr(layer, name, None) for name in layer.adapter_layer_names)
    held = (nn.ModuleDict, nn.ParameterDict)
    return {name for part in parts if isinstance(part, held) for name in part.keys()}


def _refuse(config: dict[str, Any]) -> None:
    try:
        refuse_unreadable(config, RUN, extras=True)
    except AdapterError as problem:
        raise ProbeError(f"cannot probe this run: {problem}") from None
    bias = config.get("bias", "none")
    for what, holds in {
        f"biases (bias={bias!r})": bias != "none",
        "tokens (trainable_token_indices)": config.get("trainable_token_indices"),
    }.items():
        if holds:
            raise ProbeError(f"cannot probe this run: it trains {what}, which no update shows")


def _refuse_layer(name: str, layer: Any, kind: str) -> None:
    base = layer.get_base_layer()
    if isinstance(base, nn.Embedding | nn.modules.conv._ConvNd):
        raise ProbeError(
            f"cannot probe this run: '{name}' is an adapted {type(base).__name__}; updates are "
            "those of Linear and Conv1D modules"
        )
    scaled = kind == "IA3" and not layer.is_feedforward
    if scaled and getattr(base, "bias", None) is not None:
        raise ProbeError(
            f"cannot probe this run: IA³ scales the bias of '{name}' too, which no update shows; "
            "name it in feedforward_modules"
        )


def _refuse_hidden(model: nn.Module) -> None:
    """What is trained beside the updates would be missing in the probe."""
    wrapped = (BaseTunerLayer, ModulesToSaveWrapper)
    found = {name: module for name, module in model.named_modules() if isinstance(module, wrapped)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        owner = next((o for k in range(len(parts)) if (o := ".".join(parts[:k])) in found), None)
        inside = [] if owner is None else parts[owner.count(".") + 1 :]
        if owner is None or inside[0] == "base_layer":
            raise ProbeError(
                f"cannot probe this run: it trains '{name}' beside the adapter, which no update "
                "shows; freeze it"
            )
        layer = found[owner]
        if isinstance(layer, ModulesToSaveWrapper):
            base: Any = layer.original_module
            linear = isinstance(base, nn.Linear) or hasattr(base, "nf")
            if not linear or inside[-1] != "weight":
                raise ProbeError(
                    f"cannot probe this run: it trains '{name}' (modules_to_save), which is no "
                    "Linear's weight; leave it out, or freeze it"
                )


def check_readable(model: Any, start: StartWeights | None = None) -> None:
    """Raises ProbeError, by name, where the update could not be read at a probe point."""
    modules = adapted_modules(model, start)
    if start is None:
        _refuse_hidden(model)
        first = f"{PREFIX}{next(iter(modules))}."
        one = {
            key: value
            for key, value in _state(model).items()
            if key.startswith(first) or not key.startswith(PREFIX)
        }
        _read(model, one, 1)


def snapshot(model: Any, *, rank: int | None = None, start: StartWeights | None = None) -> Adapter:
    """A copy of the update as it is now, float32 on the CPU, and what truncation cost.

    rank: every module's update is cut to it. By default LoRA, AdaLoRA and VeRA keep their own
    rank, every other update (DoRA, LoHa, LoKr, (IA)³, OFT, fine-tuned weights) is cut to 32; a rank
    no smaller than the weights' is exact. `Adapter.truncation` has each module's relative error.
    """
    if start is not None:
        contents = start.contents(model, rank or TRUNCATED_RANK)
    else:
        _refuse_hidden(model)
        contents = _read(model, _state(model), rank)
    if contents.extras:
        named = next(iter(contents.extras))
        raise ProbeError(f"cannot probe this run: it changes '{named}', which no update shows")
    names = sorted(contents.modules, key=natural)
    return Adapter(
        "snapshot",
        {name: _copy(contents.modules[name]) for name in names},
        truncation=contents.truncation,
    )


def _read(model: Any, tensors: dict[str, Tensor], rank: int | None) -> Contents:
    config, other = peft_config(model), rank or TRUNCATED_RANK
    own = rank if kind_of(config) in OWN_RANK else other
    try:
        base = BaseWeights.of(model)
        return contents_of(tensors, config, RUN, base, rank=own, dense_rank=other)
    except (AdapterError, AdapterMismatch, BaseModelError) as problem:
        raise ProbeError(f"cannot probe this run: {problem}") from None


def current_update(
    model: Any, *, rank: int | None = None, start: StartWeights | None = None
) -> dict[str, LowRank]:
    """The modules of `snapshot`."""
    return snapshot(model, rank=rank, start=start).modules


def _state(model: Any) -> dict[str, Tensor]:
    """What PEFT would save of the active adapter."""
    adapter = active_adapter(model)
    config = model.peft_config[adapter]
    pattern = getattr(config, "rank_pattern", None)
    try:
        return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    finally:
        if hasattr(config, "rank_pattern"):
            config.rank_pattern = pattern  # of AdaLoRA: saving rewrites it, measuring must not


def _copy(update: LowRank) -> LowRank:
    B, A = (side.detach().float().cpu().clone() for side in (update.B, update.A))
    return LowRank(B.contiguous(), A.contiguous(), float(update.scaling))


def described(adapter: Adapter, model: Any, start: StartWeights | None) -> dict[str, Any]:
    """What the probe says of its update: the PEFT type, and how exact it is.

    peft_type: as docs/peft-types.md names it. exact: whether nothing was lost. truncation: module
    -> relative Frobenius error of the cut. truncation_error: the same of the whole update.
    """
    config, lost = {} if start is not None else peft_config(model), adapter.lost()
    return {
        "peft_type": FULL if start is not None else PEFT_TYPES[kind_of(config)].name,
        "variant": "full" if start is not None else _variant(config),
        "ranks": adapter.ranks,
        "exact": lost < ROUNDING,
        "truncation": adapter.truncation,
        "truncation_error": lost,
    }


def _variant(config: dict[str, Any]) -> str:
    kind = kind_of(config).lower()
    kind = "rslora" if kind == "lora" and config.get("use_rslora") else kind
    # AdaLoRA's pattern is where its pruning stands, not what the user set
    set_ranks = kind != "adalora" and config.get("rank_pattern")
    return kind + ("+patterns" if set_ranks or config.get("alpha_pattern") else "")


def init_hash(model: Any, start: StartWeights | None = None) -> str | None:
    """Names what the adapter drew before its first step: equal for runs that share their init.

    Of LoRA and DoRA the A matrices, of other types everything that PEFT saves; None for full
    fine-tuning, which draws nothing.
    """
    if start is not None:
        return None
    adapter, total = active_adapter(model), hashlib.sha256()
    modules = adapted_modules(model)
    if kind_of(peft_config(model)) in ("LORA", "DORA"):
        drawn = {
            name: layer.lora_A[adapter].weight
            for name, layer in modules.items()
            if not isinstance(layer, ModulesToSaveWrapper)
        }
    else:
        drawn = dict(sorted(_state(model).items()))
        total.update(f"{peft_config(model).get('projection_prng_key')}|".encode())
    for name, value in drawn.items():
        weight = value.detach().float().cpu().contiguous()
        total.update(f"{name}|{tuple(weight.shape)}|".encode())
        total.update(weight.numpy().tobytes())
    return total.hexdigest()[:16]


def weight_norms(model: Any, start: StartWeights | None = None) -> dict[str, float]:
    """‖W‖ of the base's weight in each adapted module (packed weights are left out)."""
    if start is not None:
        weights = start.weights
    else:
        base = BaseWeights.of(model)
        weights = {name: base.layer(name).weight.detach() for name in adapted_modules(model)}
    return {
        name: float(torch.linalg.vector_norm(weight.float()))
        for name, weight in weights.items()
        if weight.is_floating_point()
    }


def base_fingerprint(model: Any, start: StartWeights | None = None) -> str | None:
    """None for a quantised base: its packed weights cannot be read, so the base is unverified."""
    try:
        if start is None:
            return fingerprint(model)
        with start.in_place(model):
            return fingerprint(model)
    except BaseModelError:
        return None


def base_name(model: Any, start: StartWeights | None = None) -> str:
    """As the adapter's config gives it, or the model's own."""
    if start is None:
        return model.peft_config[active_adapter(model)].base_model_name_or_path or ""
    return getattr(model.config, "_name_or_path", "") or ""
