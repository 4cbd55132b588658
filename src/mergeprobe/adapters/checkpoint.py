"""Read PEFT folders, exactly or not at all; the door to what adapters are and how they are kept.

A folder is `adapter_config.json` + `adapter_model.safetensors`, as PEFT writes it. Every type of
PEFT_TYPES becomes ΔW = scaling · B A by module; what cannot is refused by name. A folder with a
whole fine-tuned model is read against its base (`finetuned.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mergeprobe.adapters.adapter import (
    CARD,
    CARD_SCHEMA,
    CONFIG,
    PLACEMENT,
    PREFIX,
    WEIGHTS,
    Adapter,
    check_same_base,
    is_zero,
    natural,
    refuse_degenerate,
    shared_placement,
)
from mergeprobe.adapters.base import Base
from mergeprobe.adapters.extras import ASK, saved_linears, trained_extras
from mergeprobe.adapters.finetuned import finetuned_contents, is_model_folder
from mergeprobe.adapters.refusals import refuse_unreadable
from mergeprobe.adapters.stored import FLOATS, Contents, Stored
from mergeprobe.adapters.variants import PEFT_TYPES, PeftType, kind_of
from mergeprobe.adapters.weights import BaseWeights
from mergeprobe.adapters.write import write_adapter
from mergeprobe.artefact import check_schema, read_json, sha256
from mergeprobe.errors import AdapterError, AdapterMismatch

__all__ = [
    "CARD",
    "CARD_SCHEMA",
    "CONFIG",
    "PLACEMENT",
    "PREFIX",
    "WEIGHTS",
    "Adapter",
    "check_same_base",
    "contents_of",
    "is_zero",
    "natural",
    "read_adapter",
    "read_tensors",
    "refuse_degenerate",
    "shared_placement",
    "write_adapter",
]


def read_adapter(
    path: str | Path,
    base: BaseWeights | Base | nn.Module | str | Path | None = None,
    *,
    rank: int | None = None,
    extras: bool = False,
    name: str | None = None,
    strict: bool = True,
) -> Adapter:
    """Reads a PEFT folder of any type of PEFT_TYPES, or a fine-tuned model's folder.

    base: the base model, or what `load_base` takes; needed where the update depends on its weights
    (DoRA, (IA)³, OFT, a whole model) or shapes (VeRA). Those updates have full rank, unless `rank`
    truncates every module to it; `Adapter.truncation` says what that lost.
    extras: also read trained embeddings, biases and saved modules (see `extras.py`); without it an
    adapter that has some is refused. With `strict` (the default) an adapter with a NaN or infinite
    entry, or one that is zero everywhere, is refused; `doctor` reads with strict=False to say what
    is wrong. Raises AdapterError with one line that names the folder and the reason, or
    AdapterMismatch if `base` was needed and is another model than the adapter's.
    """
    folder = Path(path)
    if rank is not None and rank < 1:
        raise AdapterError(f"'{folder}' cannot be read at rank {rank}; the smallest is 1")
    if not folder.is_dir():
        raise AdapterError(f"'{folder}' is not a folder; expected a PEFT adapter with {CONFIG}")
    weights = None if base is None else BaseWeights.of(base)
    config, card = {}, {}
    if is_model_folder(folder):
        contents = finetuned_contents(folder, weights, rank)
        named = base.name if isinstance(base, Base) else base
        base_name = str(named) if isinstance(named, str | Path) else ""
    else:
        config, card = _read_config(folder), _read_card(folder)
        base_name = str(config.get("base_model_name_or_path") or "")
        tensors = read_tensors(folder / WEIGHTS)
        contents = contents_of(tensors, config, folder, weights, rank=rank, extras=extras)
        if contents.widened or PEFT_TYPES[kind_of(config)].base:
            _check_base(folder, card, weights)
        if contents.widened:  # its own placement would miss what is now an update or a value
            config = {key: value for key, value in config.items() if key not in PLACEMENT}
    if contents.extras and not extras:
        raise AdapterError(f"'{folder}' also trained '{next(iter(contents.extras))}': {ASK}")
    adapter = Adapter(
        name=name or folder.resolve().name,
        modules={module: contents.modules[module] for module in _sorted(contents.modules)},
        base=base_name,
        fingerprint=card.get("base_fingerprint"),
        config=config,
        card=card,
        path=folder,
        extras=contents.extras,
        truncation=contents.truncation,
    )
    if strict:
        refuse_degenerate(adapter)
    return adapter


def contents_of(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    folder: Path,
    base: BaseWeights | None,
    *,
    rank: int | None = None,
    dense_rank: int | None = None,
    extras: bool = False,
) -> Contents:
    """Updates and extras from a PEFT state dict and its config; `folder` is for messages.

    rank: every update is cut to it. dense_rank: only those that have no low rank.
    """
    refuse_unreadable(config, folder, extras=extras or base is not None)
    row = PEFT_TYPES[kind_of(config)]
    if row.base and base is None:
        raise AdapterError(
            f"'{folder}' is {row.name}, whose update depends on the base model's {row.base}; pass "
            "the base with --base (base=... in Python)"
        )
    groups, shared, rest = _split(tensors, row, folder)
    if rest and not extras and base is None:
        raise AdapterError(
            f"'{folder / WEIGHTS}' holds '{next(iter(rest))}', which is no LoRA factor "
            f"(trained embeddings, biases and saved modules are refused; {ASK})"
        )
    contents = Contents(rank, dense_rank, extras=trained_extras(rest, config, folder, base))
    contents.widened = bool(contents.extras)
    if base is not None:
        for module, update in saved_linears(contents.extras, groups, base, folder):
            contents.add(module, update)
            del contents.extras[f"{module}.weight"]
    for module in groups:
        stored = Stored(folder, module, groups[module], config, shared, tuple(groups), base)
        contents.add(module, row.read(stored))
        if row.biases and (bias := row.biases(stored)) is not None:
            contents.extras[f"{module}.bias"] = bias
    if not groups and not contents.modules:
        raise AdapterError(f"'{folder / WEIGHTS}' holds no {row.name} factors")
    return contents


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, memory-mapped; AdapterError if missing or damaged."""
    if not path.exists():
        pickled = path.with_suffix(".bin")
        if pickled.exists():
            raise AdapterError(
                f"'{pickled}' is a pickle, which is never loaded; "
                f"save it again as {WEIGHTS} with PEFT's save_pretrained"
            )
        raise AdapterError(f"'{path}' does not exist; the adapter has a config but no weights")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as problem:
        raise AdapterError(f"'{path}' is truncated or damaged: {problem}") from None


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG, AdapterError)
    if not isinstance(config, dict):
        raise AdapterError(f"'{folder / CONFIG}' holds no JSON object")
    return config


def _read_card(folder: Path) -> dict[str, Any]:
    """Our own card, checked against the weights' checksum; {} for a stock PEFT folder."""
    card = read_json(folder / CARD, AdapterError) if (folder / CARD).exists() else {}
    if not isinstance(card, dict):
        raise AdapterError(f"'{folder / CARD}' holds no JSON object")
    if not card:
        return {}
    check_schema(card.get("schema"), CARD_SCHEMA, f"'{folder / CARD}'", AdapterError)
    if not isinstance(card.get("base_fingerprint"), str | None):
        raise AdapterError(f"'{folder / CARD}': base_fingerprint is no text")
    recorded = card.get("weights_sha256")
    if recorded and (folder / WEIGHTS).is_file() and recorded != sha256(folder / WEIGHTS):
        raise AdapterError(
            f"'{folder / WEIGHTS}' does not match the checksum in {CARD}: "
            "the file is damaged or was changed; merge again"
        )
    return card


def _check_base(folder: Path, card: Mapping[str, Any], base: BaseWeights | None) -> None:
    recorded = card.get("base_fingerprint")
    if base is not None and recorded and recorded != base.fingerprint():
        raise AdapterMismatch(
            f"'{folder}' was trained on base {recorded}, but the base given is "
            f"{base.fingerprint()} ({base.name})"
        )


def _split(
    tensors: Mapping[str, Tensor], row: PeftType, folder: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """(module -> its parts, what all modules share, the rest), without PEFT's prefix."""
    groups: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise AdapterError(
                f"'{folder / WEIGHTS}': '{key}' is {tensor.dtype} {tuple(tensor.shape)}; "
                "expected floating numbers of 16, 32 or 64 bits"
            )
        name = key.removeprefix(PREFIX)
        part = next((p for p in row.needed | row.optional if name.endswith(f".{p}")), None)
        if part is not None:
            into, label = groups.setdefault(name.removesuffix(f".{part}"), {}), part
        elif name.removeprefix("base_model.") in row.shared:
            into, label = shared, name.removeprefix("base_model.")
        else:
            into, label = rest, name
        if label in into:
            raise AdapterError(
                f"'{folder / WEIGHTS}' holds {label.removesuffix('.weight')} of "
                f"'{name.removesuffix(f'.{label}')}' twice, with and without the prefix '{PREFIX}'"
            )
        into[label] = tensor
    for module, parts in groups.items():
        if missing := row.needed - parts.keys():
            has = " and ".join(sorted(part.removesuffix(".weight") for part in parts))
            raise AdapterError(
                f"'{folder}': '{module}' has {has} but not "
                f"{' and '.join(sorted(part.removesuffix('.weight') for part in missing))}, "
                f"which {row.name} needs"
            )
    return groups, shared, rest


def _sorted(names: Iterable[str]) -> list[str]:
    return sorted(names, key=natural)
