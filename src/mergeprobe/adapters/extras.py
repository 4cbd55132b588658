"""Trained weights beside the updates: saved modules, embeddings, biases.

They are values of base parameters, not differences, so no merge rule of METHODS fits them. They are
refused unless asked for; then a merge averages them. The one exception needs no asking: where the
base is given, a saved Linear is an update like any other, W_trained − W_base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergeprobe.adapters.adapter import CONFIG, WEIGHTS, Adapter
from mergeprobe.adapters.stored import Stored
from mergeprobe.adapters.variants import lora
from mergeprobe.adapters.weights import BaseWeights
from mergeprobe.errors import AdapterError, MergeError

ASK = "pass extras=True (--extras) to carry it and have it averaged in merges"
TOKENS = "token_adapter.trainable_tokens_delta"


def trained_extras(
    rest: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path, base: BaseWeights | None
) -> dict[str, Tensor]:
    """Parameter name in the base -> its trained value, from a PEFT file's further tensors.

    rest: those without PEFT's prefix that belong to no update. Raises AdapterError for one that
    the config does not account for.
    """
    found: dict[str, Tensor] = {}
    adapted: dict[str, dict[str, Tensor]] = {}
    for name, value in rest.items():
        plain = name.replace(".base_layer.", ".")
        module, _, last = plain.rpartition(".")
        if last in ("lora_embedding_A", "lora_embedding_B"):
            adapted.setdefault(module, {})[f"{last.replace('_embedding', '')}.weight"] = value
        elif name.endswith(f".{TOKENS}"):
            module = name.removesuffix(f".{TOKENS}")
            found[f"{module}.weight"] = _with_tokens(module, value, config, folder, base)
        elif _accounted(plain, name != plain, config):
            found[plain] = value
        else:
            raise AdapterError(
                f"'{folder / WEIGHTS}' holds '{name}', which is no LoRA factor and which "
                f"{CONFIG} does not account for"
            )
    for module, parts in adapted.items():
        found[f"{module}.weight"] = _with_embedding(
            module, parts, found.get(f"{module}.weight"), config, folder, base
        )
    return found


def _accounted(name: str, wrapped: bool, config: Mapping[str, Any]) -> bool:
    """Whether the config says that a parameter was trained. wrapped: saved from a LoRA layer."""
    if name.endswith(".bias") and config.get("bias", "none") != "none":
        return True
    if wrapped and name.endswith(".weight"):  # the embedding under a LoRA embedding
        return True
    saved = config.get("modules_to_save") or []
    return isinstance(saved, list) and any(f".{entry}." in f".{name}" for entry in saved)


def _with_embedding(
    module: str,
    parts: dict[str, Tensor],
    stored: Tensor | None,
    config: Mapping[str, Any],
    folder: Path,
    base: BaseWeights | None,
) -> Tensor:
    """The embedding with its LoRA in it: E + scaling · (B A)ᵀ, as (tokens, width)."""
    if parts.keys() != {"lora_A.weight", "lora_B.weight"}:
        raise AdapterError(f"'{folder}': '{module}' has one lora_embedding factor but not both")
    update = lora(Stored(folder, module, parts, config, {}, (module,), None))
    if stored is None:
        stored = _needed(base, f"'{module}' is a LoRA embedding", folder).parameter(
            f"{module}.weight"
        )
    if tuple(stored.shape) != update.shape[::-1]:
        raise AdapterError(
            f"'{folder}': the LoRA of '{module}' is {update.shape[::-1]}, the embedding "
            f"{tuple(stored.shape)}"
        )
    return stored.float().cpu() + update.dense().T


def _with_tokens(
    module: str, rows: Tensor, config: Mapping[str, Any], folder: Path, base: BaseWeights | None
) -> Tensor:
    """The embedding with its trained tokens' rows in place."""
    asked = config.get("trainable_token_indices")
    if isinstance(asked, dict):
        last = module.rpartition(".")[2]
        asked = asked.get(module, asked.get(last))
    value = _needed(base, f"'{module}' has trained tokens", folder).parameter(f"{module}.weight")
    value = value.float().cpu().clone()
    valid = (
        isinstance(asked, list)
        and all(type(index) is int and 0 <= index < len(value) for index in asked)
        and tuple(rows.shape) == (len(asked), *value.shape[1:])
    )
    if not valid:
        raise AdapterError(
            f"'{folder}': trainable_token_indices do not fit the {tuple(rows.shape)} trained rows "
            f"of '{module}'"
        )
    value[torch.tensor(asked)] = rows.float()
    return value


def _needed(base: BaseWeights | None, what: str, folder: Path) -> BaseWeights:
    if base is None:
        raise AdapterError(
            f"'{folder}': {what}, whose value depends on the base model; pass it with --base "
            "(base=... in Python)"
        )
    return base


def saved_linears(
    extras: Mapping[str, Tensor], taken: Mapping[str, Any], base: BaseWeights, folder: Path
) -> Iterator[tuple[str, Tensor]]:
    """(module, W_trained − W_base in float64) for each weight in `extras` of a Linear or Conv1D."""
    for name, value in list(extras.items()):
        module, _, last = name.rpartition(".")
        if last != "weight" or module in taken or not base.is_linear(module):
            continue
        weight = base.weight(module)
        trained = value.double().cpu() if base.is_upright(module) else value.double().cpu().T
        if trained.shape != weight.shape:
            raise AdapterError(
                f"'{folder}': '{name}' is {tuple(trained.shape)}, the base's is "
                f"{tuple(weight.shape)}: it was trained on another base"
            )
        yield module, trained - weight


def average_extras(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted average of every extra, Σ wᵢ vᵢ / Σ wᵢ; {} where no adapter carries any.

    Raises MergeError where some adapters carry an extra and others do not (these have the base's
    value, which is not here), where shapes differ, or where the weights sum to 0.
    """
    names = sorted({name for adapter in adapters for name in adapter.extras})
    found: dict[str, Tensor] = {}
    total = sum(weights)
    if names and abs(total) < 1e-12:
        raise MergeError(
            f"the weights sum to {total:g}: '{names[0]}' cannot be averaged; read the adapters "
            "without extras"
        )
    for name in names:
        without = [adapter.name for adapter in adapters if name not in adapter.extras]
        if without:
            raise MergeError(
                f"'{without[0]}' has no trained '{name}', which others have: no average is right; "
                "leave it out, or merge without extras"
            )
        values = [adapter.extras[name] for adapter in adapters]
        if len({tuple(value.shape) for value in values}) > 1:
            raise MergeError(
                f"'{name}' has different shapes: {[tuple(value.shape) for value in values]}"
            )
        summed = sum(w * v.double() for w, v in zip(weights, values, strict=True)) / total
        assert isinstance(summed, Tensor)
        found[name] = summed.float()
    return found
