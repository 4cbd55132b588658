"""What was written, judged by the files alone, as the server that reads them would."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mergeprobe.adapters.checkpoint import CONFIG, PREFIX, WEIGHTS
from mergeprobe.adapters.doctor import TRAITS
from mergeprobe.adapters.regions import layer_of
from mergeprobe.export.base_shape import BaseShape
from mergeprobe.export.targets import Target

SIDES = ("lora_A.weight", "lora_B.weight")


@dataclass(frozen=True)
class Check:
    """ok: None where it could not be told, with what would tell in `said`."""

    name: str
    ok: bool | None
    said: str


def check_folder(folder: Path, target: Target, shape: BaseShape | None) -> list[Check]:
    """A PEFT folder against what `target` takes; reads the config and the tensors' shapes."""
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    with safe_open(str(folder / WEIGHTS), framework="pt") as file:
        sizes = {key.removeprefix(PREFIX): file.get_slice(key).get_shape() for key in file.keys()}
    factors = {key: size for key, size in sizes.items() if key.endswith(SIDES)}
    modules = {key.rpartition(".lora_")[0]: size for key, size in factors.items()}
    return [
        _plain(config, sorted(sizes.keys() - factors.keys()), target),
        _rank(config, factors, target),
        _modules(config, list(modules), target),
        _whole(list(modules), target, shape),
        _base(config),
        _shapes(factors, shape),
    ]


def _plain(config: Mapping[str, Any], others: Sequence[str], target: Target) -> Check:
    found = [TRAITS[key] for key in TRAITS if config.get(key)]
    found += ["trained biases"] if config.get("bias", "none") != "none" else []
    if target.extras:  # as stock PEFT takes them
        found = [name for name in found if name not in ("saved modules", "trained biases")]
        others = ()
    if others:
        found.append(f"tensors other than LoRA factors ({others[0]})")
    if config.get("peft_type") != "LORA":
        found.append(f"PEFT type {config.get('peft_type')}")
    said = "no DoRA, rsLoRA, rank or alpha pattern, bias or saved module"
    return Check("plain LoRA", not found, ", ".join(found) or said)


def _rank(config: Mapping[str, Any], factors: Mapping[str, Sequence[int]], target: Target) -> Check:
    ranks = {size[0 if key.endswith(SIDES[0]) else 1] for key, size in factors.items()}
    r, alpha = config["r"], config["lora_alpha"]
    if ranks != {r}:
        return Check("one rank", False, f"tensors have ranks {sorted(ranks)}, the config says {r}")
    if target.ranks and r > target.ranks[-1]:
        return Check("one rank", False, f"{r}; {target.name} takes {target.ranks[-1]} at most")
    bucket = f" in bucket {target.bucket(r)}" if target.ranks else ""
    return Check("one rank", True, f"{r}{bucket}, alpha {alpha}: scaling {alpha / r:g}")


def _modules(config: Mapping[str, Any], modules: Sequence[str], target: Target) -> Check:
    last = sorted({module.rpartition(".")[2] for module in modules})
    stated = config.get("target_modules")
    if target.suffixes and (not isinstance(stated, list) or sorted(stated) != last):
        return Check("target modules", False, f"the config says {stated}, the tensors {last}")
    if target.modules is not None and (stray := set(last) - target.modules):
        return Check("target modules", False, f"{sorted(stray)} are not taken")
    return Check("target modules", True, ", ".join(last))


def _whole(modules: Sequence[str], target: Target, shape: BaseShape | None) -> Check:
    """That what must be adapted together, or in every layer, is."""
    name, has = "complete", set(modules)
    for module in modules:
        parent, _, last = module.rpartition(".")
        for group in target.together:
            if last in group and (lack := {f"{parent}.{one}" for one in group} - has):
                return Check(name, False, f"'{module}' is adapted but not '{min(lack)}'")
    if not target.every_layer:
        return Check(name, True, f"{len(has)} modules")
    layers = {layer for module in modules if (layer := layer_of(module)) is not None}
    depth = shape.layers if shape else 1 + max(layers, default=-1)
    for module in modules:
        layer = layer_of(module)
        for other in range(depth) if layer is not None else ():
            twin = f".{module}".replace(f".{layer}.", f".{other}.", 1)[1:]
            if twin not in has:
                return Check(name, False, f"'{module}' is adapted but not '{twin}'")
    if shape is None:
        return Check(name, None, f"layers 0 to {depth - 1}; --base tells whether there are more")
    return Check(name, True, f"every one of {depth} layers")


def _base(config: Mapping[str, Any]) -> Check:
    base = config.get("base_model_name_or_path")
    return Check("base named", bool(base), str(base or "no base_model_name_or_path"))


def _shapes(factors: Mapping[str, Sequence[int]], shape: BaseShape | None) -> Check:
    name = "fits the base"
    if shape is None:
        return Check(name, None, "not compared; --base compares every module's shape")
    for key, size in factors.items():
        module, side = key.rpartition(".lora_")[0], key[-len("A.weight")]
        known = shape.modules.get(module)
        if known is None:
            return Check(name, False, f"the base has no '{module}'")
        if known[side == "A"] != size[side == "A"]:
            return Check(name, False, f"'{module}' is {known} in the base")
    return Check(name, True, f"{len(factors) // 2} modules have the base's shapes")
