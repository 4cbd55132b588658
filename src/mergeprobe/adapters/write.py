"""Write an adapter as one plain LoRA folder that stock PEFT loads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergeprobe.adapters.adapter import (
    CARD,
    CARD_SCHEMA,
    CONFIG,
    PLACEMENT,
    PREFIX,
    WEIGHTS,
    Adapter,
    natural,
    refuse_degenerate,
)
from mergeprobe.adapters.tensor_file import Planned, write_tensors
from mergeprobe.artefact import MADE_BY, atomic_folder, sha256
from mergeprobe.errors import AdapterError
from mergeprobe.lowrank import LowRank


def write_adapter(
    adapter: Adapter,
    path: str | Path,
    *,
    card: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    force: bool = False,
) -> Path:
    """Writes one plain LoRA that stock PEFT loads: scaling 1 (alpha = r), one uniform rank.

    Modules of lower rank are padded with zeros, the scaling is folded into B. Extras go in as PEFT
    keeps them: trained biases, and `modules_to_save` for the rest (which servers do not take).
    Beside PEFT's two files goes `mergeprobe.json`: schema, base fingerprint, what made it,
    checksum, what the reader truncated, and `card`.
    Atomic: the folder is there whole or not at all.
    """
    refuse_degenerate(adapter)
    tensors = _factors(adapter, dtype) | _extras(adapter, dtype)
    config = _config(adapter)
    with atomic_folder(path, force=force) as folder:
        write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
        _write_text(folder / CONFIG, config)
        full_card: dict[str, Any] = {
            "schema": CARD_SCHEMA,
            "made_by": MADE_BY,
            "base_fingerprint": adapter.fingerprint,
            "weights_sha256": sha256(folder / WEIGHTS),
        }
        if adapter.truncation:
            full_card["read_truncation"] = adapter.truncation
        _write_text(folder / CARD, full_card | (card or {}))
    return Path(path)


def _factors(adapter: Adapter, dtype: torch.dtype) -> dict[str, Planned]:
    rank = _rank(adapter)
    tensors = {}
    for module, update in adapter.modules.items():
        for side, shape in (("A", (rank, update.shape[1])), ("B", (update.shape[0], rank))):
            what = f"lora_{side} of '{module}' in '{adapter.name}'"
            make = partial(_factor, update, side, rank, dtype, what)
            tensors[f"{PREFIX}{module}.lora_{side}.weight"] = Planned(shape, dtype, make)
    return tensors


def _factor(update: LowRank, side: str, rank: int, dtype: torch.dtype, what: str) -> Tensor:
    value = update.A if side == "A" else update.B
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    if side == "B":
        value = value * update.scaling
    if update.r < rank:  # components of zeros
        zeros = (0, 0, 0, rank - update.r) if side == "A" else (0, rank - update.r)
        value = torch.nn.functional.pad(value, zeros)
    return _cast(value, dtype, what)


def _extras(adapter: Adapter, dtype: torch.dtype) -> dict[str, Planned]:
    tensors = {}
    for name, value in adapter.extras.items():
        module, _, last = name.rpartition(".")
        inside = f"{module}.base_layer.{last}" if module in adapter.modules else name
        make = partial(_cast, value, dtype, f"'{name}' in '{adapter.name}'")
        tensors[PREFIX + inside] = Planned(tuple(value.shape), dtype, make)
    return tensors


def _cast(value: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    stored = value.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise AdapterError(f"{what} overflows {dtype}; write it in float32")
    return stored


def _rank(adapter: Adapter) -> int:
    if not adapter.modules:
        raise AdapterError(f"'{adapter.name}' has no update to write, only {list(adapter.extras)}")
    return max(update.r for update in adapter.modules.values())


def _config(adapter: Adapter) -> dict[str, Any]:
    rank = _rank(adapter)
    biases = [name for name in adapter.extras if name.endswith(".bias")]
    saved = {name.rpartition(".")[0] for name in adapter.extras if name not in biases}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": adapter.config.get("task_type", "CAUSAL_LM"),
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": adapter.config.get("fan_in_fan_out", False),
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": _sorted(saved) or None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": _sorted(adapter.modules),
    }
    return config | {key: adapter.config[key] for key in PLACEMENT if adapter.config.get(key)}


def _sorted(names: Iterable[str]) -> list[str]:
    return sorted(names, key=natural)


def _write_text(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
