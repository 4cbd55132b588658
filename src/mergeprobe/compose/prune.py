"""Dropping what a plan says to drop from one adapter, before it is merged."""

from __future__ import annotations

from dataclasses import replace

import torch

from mergeprobe.adapters.checkpoint import PLACEMENT, Adapter
from mergeprobe.errors import PlanError
from mergeprobe.lowrank import LowRank, factored_svd
from mergeprobe.plan import Pruned


def prune(adapter: Adapter, pruned: Pruned) -> Adapter:
    """The adapter without whole modules and without single singular components of ΔW.

    Components are counted from 0, the largest. A module that loses them all goes, and
    one that is not named stays as it is, factors and all. Raises PlanError for a module or
    component that the adapter does not have, and where nothing would be left.
    """
    if unknown := sorted(({*pruned.modules} | pruned.components.keys()) - adapter.modules.keys()):
        raise PlanError(
            f"the plan prunes '{unknown[0]}' from '{adapter.name}', which does not adapt it; "
            f"it adapts {len(adapter.modules)} modules such as '{next(iter(adapter.modules))}'"
        )
    if both := sorted(set(pruned.modules) & pruned.components.keys()):
        raise PlanError(
            f"the plan prunes '{both[0]}' of '{adapter.name}' both whole and by component; "
            "keep one of the two"
        )
    left = {}
    for module, update in adapter.modules.items():
        if module in pruned.modules:
            continue
        dropped = pruned.components.get(module, ())
        kept = _without(update, dropped, f"'{module}' of '{adapter.name}'") if dropped else update
        if kept.r > 0:
            left[module] = kept
    if not left:
        raise PlanError(f"the plan prunes everything of '{adapter.name}'; leave the adapter out")
    config = adapter.config
    if left.keys() != adapter.modules.keys():
        # its target modules and layers no longer describe where the update is
        config = {key: value for key, value in config.items() if key not in PLACEMENT}
    return replace(adapter, modules=left, config=config, card={}, path=None)


def _without(update: LowRank, dropped: tuple[int, ...], where: str) -> LowRank:
    u, s, vh = factored_svd(update)
    count = s.shape[0]
    if wrong := [index for index in dropped if not 0 <= index < count]:
        raise PlanError(
            f"the plan prunes component {wrong[0]} of {where}, which has {count}: 0 to {count - 1}"
        )
    keep = torch.tensor([k for k in range(count) if k not in set(dropped)], dtype=torch.long)
    root = s[keep].sqrt()
    dtype = torch.promote_types(update.B.dtype, torch.float32)
    return LowRank((u[:, keep] * root).to(dtype), (root[:, None] * vh[keep]).to(dtype))
