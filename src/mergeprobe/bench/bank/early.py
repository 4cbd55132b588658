"""The model tier of a cohort, in pieces: best lengths, one adapter among the others, one pair.

Each piece is one JSON file, so that several workers share the work and a kill loses little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mergeprobe.adapters.base import Base
from mergeprobe.artefact import read_json, write_json
from mergeprobe.bench.bank.folder import CohortFolder
from mergeprobe.capture.probe import read_probe
from mergeprobe.compose import merge
from mergeprobe.errors import DataError
from mergeprobe.predict.early import ModelTier, Snapshot, calibration_batch, open_tier, reach
from mergeprobe.predict.signal_rows import early_row, merged_retentions
from mergeprobe.predict.weighing import WEIGHTED


def write_length(folder: CohortFolder, base: Base, name: str, point: float) -> None:
    """Finds an adapter's best length c* and its items' losses there, once."""
    probe = read_probe(folder.probe(name, point))
    found = open_tier(base, [probe], items=folder.spec.forecast_items).snapshots[name]
    value = {
        "adapter": name,
        "point": point,
        "length": found.length,
        "base_loss": found.base_loss.tolist(),
        "own_loss": found.own_loss.tolist(),
    }
    write_json(folder.lengths(name, point), value)


def write_early(folder: CohortFolder, base: Base, name: str, point: float) -> None:
    """Every early signal of one adapter with each other one and, at the spec's set_points, in
    every larger set, on its own items; under the rules that weigh whole updates."""
    tier = _tier(folder, base, point, folder.spec.names)
    pairs = {
        other: early_row(tier, name, (name, other)) for other in folder.spec.names if other != name
    }
    sets = {
        "+".join(group): early_row(tier, name, group)
        for group in folder.spec.larger_sets()
        if name in group and folder.spec.sets_at(point)
    }
    value = {"adapter": name, "point": point, "pairs": pairs, "sets": sets}
    write_json(folder.early(name, point), value)


def write_pair(folder: CohortFolder, base: Base, pair: tuple[str, ...], point: float) -> None:
    """Early retention of both of a pair under the rules whose merges take seconds, each merged
    once for both; and the cosine of their gradients at the joint point."""
    tier = _tier(folder, base, point, pair)
    retention: dict[str, dict[str, float]] = {name: {} for name in pair}
    for method in folder.spec.methods:
        if method in WEIGHTED:
            continue
        kept = merged_retentions(tier, pair, method, folder.spec.rank_of(pair))
        for name in pair:
            retention[name][method] = kept[name]
    cosine = tier.joint_gradient_cosine(pair[0], pair[1])
    value = {"pair": list(pair), "point": point, "retention": retention, "cosine": cosine}
    write_json(folder.early_pair(pair[0], pair[1], point), value)


def write_cut(folder: CohortFolder, base: Base, name: str, point: float) -> None:
    """What the snapshot, at its best length, keeps of its own gain when it is cut to the ranks at
    which the finished adapter is measured; and the relative error of each cut."""
    tier = _tier(folder, base, point, (name,))
    ranks = {}
    for one, rank in folder.spec.truncations():
        if one != name:
            continue
        cut = merge([tier.snapshots[name].update], "mean", rank=rank)
        kept = tier.early_retention(name, cut.adapter)
        ranks[str(rank)] = {"early_retention": kept, "error": cut.certificate.total}
    write_json(folder.cut(name, point), {"adapter": name, "point": point, "ranks": ranks})


def _tier(folder: CohortFolder, base: Base, point: float, names: Sequence[str]) -> ModelTier:
    """The model tier of some adapters, their best lengths read and not searched again."""
    return ModelTier(base, {name: _snapshot(folder, name, point) for name in names})


def _snapshot(folder: CohortFolder, name: str, point: float) -> Snapshot:
    probe = read_probe(folder.probe(name, point))
    found: dict[str, Any] = read_json(folder.lengths(name, point), DataError)
    adapter, length = probe.to_adapter(), found["length"]
    return Snapshot(
        name,
        replace(adapter, modules={m: u * length for m, u in adapter.modules.items()}),
        calibration_batch(probe, folder.spec.forecast_items),
        length,
        reach(probe, length),
        torch.tensor(found["base_loss"], dtype=torch.float64),
        torch.tensor(found["own_loss"], dtype=torch.float64),
    )
