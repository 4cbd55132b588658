"""merge_into_base: the base model's own weights with the merge added, as a model folder.

For whoever serves whole models. Nothing is truncated: the certificate says what rounding to the
base's dtype cost, relative to the update, which for bfloat16 is not little.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergeprobe.adapters.adapter import CARD, CARD_SCHEMA
from mergeprobe.adapters.base import resolve_base
from mergeprobe.adapters.checkpoint import Adapter, check_same_base
from mergeprobe.adapters.tensor_file import Planned, write_tensors
from mergeprobe.adapters.weights import BaseWeights
from mergeprobe.artefact import MADE_BY, atomic_folder, refuse_existing
from mergeprobe.compose.merge.data import Probes, probes_for
from mergeprobe.compose.merge.recipe import Recipe, recipe
from mergeprobe.compose.merge.run import (
    Certificate,
    Errors,
    check_adapters,
    merged_module,
    module_names,
)
from mergeprobe.compose.merge.stream import (
    Progress,
    Written,
    open_adapters,
    refuse_untrained,
    trained,
)
from mergeprobe.compose.merge.weights import Weights, depth_of
from mergeprobe.errors import AdapterMismatch, BaseModelError
from mergeprobe.lowrank import LowRank

WEIGHT = ".weight"


def merge_into_base(
    folders: Sequence[str | Path],
    method: str = "mean",
    *,
    base: str | Path,
    out: str | Path,
    weights: Weights | None = None,
    space: str = "full",
    probes: Probes | None = None,
    seed: int = 0,
    scaling: float = 1.0,
    stated: dict[str, Any] | None = None,
    force: bool = False,
    progress: Progress = lambda done, of, module: None,
    **options: Any,
) -> Written:
    """Merges PEFT folders and adds the exact result to the weights of `base`, in its own dtype.

    base: a folder with safetensors, or what `load_base` takes. One tensor is in memory at a time;
    where a card records its base's fingerprint, the base is loaded once to compare it.
    `out` holds every file of the base's folder, whole or not at all. Written.rank is 0: there
    is none. Raises what `merge_folders` raises, and BaseModelError for a base without safetensors
    or one that is quantised.
    """
    out, source = Path(out), base_folder(base)
    refuse_existing(out, force=force)
    adapters = open_adapters(folders, base)
    names = [adapter.name for adapter in adapters]
    check_adapters(adapters)
    check_same_base(adapters)
    _check_base(adapters, base)
    asked = recipe(names, method, options, weights=weights, space=space, seed=seed, scaling=scaling)
    given = probes_for(method, asked.row.needs, names, probes)
    total = module_names(adapters)
    shards = {path.name: _headers(path) for path in sorted(source.glob("*.safetensors"))}
    places = _places(shards, total, source)
    errors, done, depth = Errors(), iter(range(1, len(total) + 1)), depth_of(total)
    untrained = set(names)

    def added(path: Path, key: str, module: str) -> Tensor:
        weight = _tensor(path, key)
        exact = merged_module(adapters, asked, given, module, depth)
        changed, error, size = _add(weight, exact, _transposed(adapters), module)
        errors.add(module, error, size)
        untrained.difference_update({a.name for a in adapters if trained(a, module)})
        progress(next(done), len(total), module)
        return changed

    with atomic_folder(out, force=force) as folder:
        for file in sorted(source.iterdir()):
            if file.name in shards:
                planned = _planned(file, shards[file.name], places, added)
                write_tensors(folder / file.name, planned, {"format": "pt"})
            elif file.is_file() and not file.name.startswith("."):
                shutil.copyfile(file, folder / file.name)
        refuse_untrained(untrained)
        certificate = errors.certificate()
        _write_card(folder, asked, adapters, certificate, stated or {})
    return Written(out, tuple(names), certificate, 0, 0, _entries(shards))


def _check_base(adapters: Sequence[Adapter], base: str | Path) -> None:
    """Adapters whose card names another base; those without a card can't be checked."""
    recorded = [adapter for adapter in adapters if adapter.fingerprint]
    given = BaseWeights.of(base).fingerprint() if recorded else None
    for adapter in recorded:
        if adapter.fingerprint != given:
            raise AdapterMismatch(
                f"'{adapter.name}' was trained on base {adapter.fingerprint}, but '{base}' is "
                f"{given}"
            )


def base_folder(base: str | Path) -> Path:
    """A folder of safetensors for a base; one on the hub is fetched into the user's cache."""
    found = Path(resolve_base(base))
    if not found.is_dir():
        from huggingface_hub import snapshot_download

        try:
            found = Path(snapshot_download(str(base)))
        except Exception as problem:  # offline, unknown, gated: its own errors, all of them ours
            first = str(problem).strip().splitlines()[0]
            raise BaseModelError(f"base model '{base}' cannot be fetched: {first}") from None
    if not any(found.glob("*.safetensors")):
        raise BaseModelError(
            f"'{found}' holds no .safetensors; save the base once with save_pretrained"
        )
    return found


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Key -> (shape, dtype), without reading any tensor's entries."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: _kind(file.get_tensor(key)) for key in file.keys()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as problem:
        raise BaseModelError(f"'{path}' is truncated or damaged: {problem}") from None


def _kind(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def _tensor(path: Path, key: str) -> Tensor:
    with safe_open(str(path), framework="pt") as file:
        return file.get_tensor(key)


def _places(
    shards: Mapping[str, Mapping[str, tuple[tuple[int, ...], torch.dtype]]],
    modules: Sequence[str],
    source: Path,
) -> dict[str, str]:
    """Tensor key -> module; some models store their keys without a first part of the name."""
    keys = {key: dtype for header in shards.values() for key, (_, dtype) in header.items()}
    found = {}
    for module in modules:
        parts = (module + WEIGHT).split(".")
        key = next(
            (k for k in (".".join(parts[i:]) for i in range(len(parts) - 1)) if k in keys), ""
        )
        if not key:
            raise AdapterMismatch(
                f"'{source}' has no weight '{module + WEIGHT}', which the adapters change: "
                "they were trained on another base"
            )
        if not keys[key].is_floating_point or keys[key].itemsize < 2:
            raise BaseModelError(
                f"'{key}' of '{source}' is stored as {keys[key]}: nothing can be added to a "
                "quantised base; write a LoRA instead"
            )
        found[key] = module
    return found


def _planned(
    path: Path,
    header: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    places: Mapping[str, str],
    added: Callable[[Path, str, str], Tensor],
) -> dict[str, Planned]:
    return {
        key: Planned(
            shape,
            dtype,
            partial(added, path, key, places[key])
            if key in places
            else partial(_tensor, path, key),
        )
        for key, (shape, dtype) in header.items()
    }


def _add(
    weight: Tensor, exact: LowRank | Tensor, transposed: bool, module: str
) -> tuple[Tensor, float, float]:
    """(W + ΔW in W's dtype, relative error of the ΔW that this amounts to, ‖ΔW‖)."""
    update: Float[Tensor, "out in"] = exact if isinstance(exact, Tensor) else exact.dense()
    update = update.T if transposed else update
    if update.shape != weight.shape:
        raise AdapterMismatch(
            f"'{module}' is {tuple(weight.shape)} in the base but the adapters change "
            f"{tuple(update.shape)}: they were trained on another base"
        )
    changed = (weight.float() + update).to(weight.dtype)
    size = float(torch.linalg.vector_norm(update))
    lost = float(torch.linalg.vector_norm(changed.double() - weight.double() - update.double()))
    return changed, lost / size if size > 0 else 0.0, size


def _transposed(adapters: Sequence[Adapter]) -> bool:
    """Whether the base stores weights (in, out), as GPT-2's Conv1D does."""
    return any(adapter.config.get("fan_in_fan_out") for adapter in adapters)


def _write_card(
    folder: Path,
    asked: Recipe,
    adapters: Sequence[Adapter],
    certificate: Certificate,
    stated: Mapping[str, Any],
) -> None:
    card = {
        "schema": CARD_SCHEMA,
        "made_by": MADE_BY,
        "base": next((a.base for a in adapters if a.base), ""),
        **asked.card(),
        **stated,
        "certificate": asdict(certificate),
    }
    text = json.dumps(card, indent=2, ensure_ascii=False)
    (folder / CARD).write_text(text + "\n", "utf-8")


def _entries(shards: Mapping[str, Mapping[str, tuple[tuple[int, ...], torch.dtype]]]) -> int:
    shapes = (shape for header in shards.values() for shape, _ in header.values())
    return sum(torch.Size(shape).numel() for shape in shapes)
