"""Lowering: from what a deployment holds to what a server takes, with each step named."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mergeprobe.adapters.checkpoint import Adapter, natural
from mergeprobe.adapters.regions import layer_of
from mergeprobe.compose.deployment import Deployment
from mergeprobe.errors import ExportError
from mergeprobe.export.base_shape import BaseShape
from mergeprobe.export.targets import Target
from mergeprobe.lowrank import LowRank, concat, spectrum, truncate

KEPT = ("task_type", "fan_in_fan_out")  # of the config, where placement is stated anew


@dataclass(frozen=True)
class Fitted:
    """An adapter as it will be written. lowered: what was changed for the server, in words."""

    adapter: Adapter
    lowered: tuple[str, ...]


def unsaid(deployment: Deployment, target: Target) -> list[str]:
    """What the deployment says that no file for `target` can: one line each."""
    found = []
    for name, group in deployment.compositions.items():
        found.append(
            f"group '{name}' composes the logits of {', '.join(group.adapters)}, which "
            f"{target.name} cannot; each of them is served alone, by its name"
        )
    if deployment.route.by == "prompt":
        found.append(
            f"prompts are routed, which {target.name} cannot; the caller names the adapter"
        )
    return found


def fit(
    adapter: Adapter,
    target: Target,
    *,
    base: str,
    max_rank: int | None = None,
    shape: BaseShape | None = None,
    others: Sequence[Adapter] = (),
) -> Fitted:
    """`adapter` with what `target` needs. others: of the deployment, whose shapes help where the
    base's are not known. ExportError for what cannot be lowered."""
    said: list[str] = []
    if adapter.extras and not target.extras:
        raise ExportError(
            f"'{adapter.name}' also trained '{next(iter(adapter.extras))}', which {target.name} "
            "does not take; export to peft, or train it without"
        )
    _check_modules(adapter, target)
    modules = dict(adapter.modules)
    scalings = sorted({update.scaling for update in modules.values()})
    if scalings != [1.0]:
        said.append(f"scaling folded into B (it was {_range(scalings)})")
    if len(adapter.ranks) > 1:
        said.append(f"padded with zeros to one rank (ranks were {_range(adapter.ranks)})")
    largest = min(max_rank or math.inf, max(target.ranks, default=math.inf))
    if max(adapter.ranks) > largest:
        if max_rank is None:
            raise ExportError(
                f"'{adapter.name}' has rank {max(adapter.ranks)}, but {target.name} takes "
                f"{max(target.ranks)} at most; --max-rank {max(target.ranks)} truncates it"
            )
        modules = {
            name: truncate(update, int(largest))[0] if update.r > largest else update
            for name, update in modules.items()
        }
        said.append(f"truncated from rank {max(adapter.ranks)} to {int(largest)}")
    if missing := _missing(modules, target, shape):
        known = _known_shapes(shape, [adapter, *others])
        modules |= {name: _zeros(name, known, target) for name in missing}
        said.append(f"{len(missing)} modules of zeros added, such as '{missing[0]}'")
    ordered = {name: modules[name] for name in sorted(modules, key=natural)}
    config = adapter.config
    if target.suffixes:
        names = {name.rpartition(".")[2] for name in ordered}
        config = {key: config[key] for key in KEPT if key in config}
        config["target_modules"] = sorted(names, key=natural)
    fitted = replace(adapter, modules=ordered, base=base, config=config, truncation={})
    return Fitted(fitted, tuple(said))


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _check_modules(adapter: Adapter, target: Target) -> None:
    if target.modules is None:
        return
    for module in adapter.modules:
        if module.rpartition(".")[2] not in target.modules:
            raise ExportError(
                f"'{adapter.name}' adapts '{module}', which {target.name} takes no LoRA on; it "
                f"takes {', '.join(sorted(target.modules))}"
            )


def _missing(modules: Mapping[str, LowRank], target: Target, shape: BaseShape | None) -> list[str]:
    """Modules without an update that the server must find all the same."""
    wanted = set(modules)
    if target.every_layer:
        layers = shape.layers if shape else 1 + max(layer_of(m) or 0 for m in modules)
        for module in modules:
            if (layer := layer_of(module)) is not None:
                wanted |= {_in_layer(module, layer, other) for other in range(layers)}
    for module in set(wanted):
        parent, _, last = module.rpartition(".")
        for together in target.together:
            if last in together:
                wanted |= {f"{parent}.{name}" for name in together}
    return sorted(wanted - modules.keys(), key=natural)


def _in_layer(module: str, layer: int, other: int) -> str:
    return f".{module}".replace(f".{layer}.", f".{other}.", 1)[1:]


def _known_shapes(
    shape: BaseShape | None, adapters: Sequence[Adapter]
) -> dict[str, tuple[int, int]]:
    """(out, in) by full name where the base is known, else by last name where an adapter has it."""
    if shape is not None:
        return shape.modules
    return {
        name.rpartition(".")[2]: update.shape
        for adapter in adapters
        for name, update in adapter.modules.items()
    }


def _zeros(module: str, known: Mapping[str, tuple[int, int]], target: Target) -> LowRank:
    size = known.get(module) or known.get(module.rpartition(".")[2])
    if size is None:
        raise ExportError(
            f"{target.name} needs '{module}' beside what is adapted, as zeros, and its shape is "
            "not known; give the base model with --base"
        )
    return LowRank(torch.zeros(size[0], 1), torch.zeros(1, size[1]))


def written_error(
    true: Mapping[str, LowRank], written: Mapping[str, LowRank]
) -> tuple[float, float]:
    """‖ΔW_written − ΔW‖ / ‖ΔW‖ in Frobenius norm, of the whole and of the worst module; ≥ 0.

    A module that only one has counts with its norm; a module of zeros that stays zero with 0.
    Float64, through the factors: it resolves about 1e-15.
    """
    lost, size, worst = 0.0, 0.0, 0.0
    for name in true.keys() | written.keys():
        parts = [held[name].to(torch.float64) for held in (true, written) if name in held]
        off = concat(parts, [1.0, -1.0][: len(parts)])
        here = float(spectrum(off).square().sum())
        own = float(spectrum(parts[0]).square().sum()) if name in true else 0.0
        lost, size = lost + here, size + own
        if here > 0.0:
            worst = max(worst, math.sqrt(here / own) if own > 0.0 else math.inf)
    return (math.sqrt(lost / size) if size > 0.0 else 0.0), worst
