"""Rows of signals as the learned predictor reads them, from the tables of both tiers.

One row for every ordered pair (i, j), what j does to i; one for every (adapter, set) of three or
more. A bank's Parquet tables and a forecast of today's probes hold the same columns, made here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from mergeprobe.compose import merge
from mergeprobe.errors import NotForecastable
from mergeprobe.predict import surrogate
from mergeprobe.predict.weighing import WEIGHTED, weights_of

if TYPE_CHECKING:
    from mergeprobe.predict.early import ModelTier


@dataclass(frozen=True, eq=False)
class SignalRows:
    """The file tier's tables by key; early signals are handed in row by row.

    pairs: (i, j) -> the pair signals of j on i. adapters: by name. sets: (adapter, "a+b+c") with
    names sorted -> set signals. facts: by name, with step and planned_steps. quadratic, lengths:
    the surrogate and how far it takes the updates; None where they cannot be made. norms: ‖ΔW‖ at
    the end of training, by name.
    """

    pairs: Mapping[tuple[str, str], Mapping[str, Any]]
    adapters: Mapping[str, Mapping[str, Any]]
    sets: dict[tuple[str, str], Mapping[str, Any]]
    facts: Mapping[str, Mapping[str, Any]]
    norms: Mapping[str, float]
    quadratic: surrogate.QuadraticModel | None = None
    lengths: np.ndarray | None = None

    def pair(self, i: str, j: str, early: Mapping[str, float]) -> dict[str, Any]:
        """Row (i, j); early: model-tier signals of i beside j, empty at the file tier."""
        return {
            "i": i,
            "j": j,
            **self._progress(i),
            **_without(self.pairs[i, j], "a", "b"),
            **{f"i_{key}": value for key, value in _without(self.adapters[i], "a").items()},
            **{f"j_{key}": value for key, value in _without(self.adapters[j], "a").items()},
            **self._surrogate(i, (i, j)),
            **early,
        }

    def group(self, name: str, group: Sequence[str], early: Mapping[str, float]) -> dict[str, Any]:
        """Row (adapter, set) of three or more; group: names in any order, `name` among them."""
        members = sorted(group)
        label = "+".join(members)
        return {
            "adapter": name,
            "set": label,
            "size": len(members),
            **self._progress(name),
            **_without(self.sets[name, label], "a", "set"),
            **self._surrogate(name, members),
            **early,
        }

    def _progress(self, name: str) -> dict[str, Any]:
        """A folder that no training record came with counts as finished."""
        step, planned = self.facts[name]["step"], self.facts[name]["planned_steps"]
        if step is None and planned is None:
            step = planned = 1
        return {"step": step, "planned_steps": planned}

    def _surrogate(self, name: str, group: Sequence[str]) -> dict[str, float | None]:
        """The closed-form forecast under WEIGHTED; null where it cannot be made."""
        found: dict[str, float | None] = dict.fromkeys(f"surrogate_{m}" for m in WEIGHTED)
        if self.quadratic is None or self.lengths is None:
            return found
        norms = {one: self.norms[one] for one in group}
        for method in WEIGHTED:
            try:
                kept = surrogate.set_retentions(
                    self.quadratic, group, weights_of(method, norms), self.lengths
                )
            except NotForecastable:
                continue
            found[f"surrogate_{method}"] = kept[name]
        return found


def signal_rows(
    tables: Mapping[str, pl.DataFrame],
    facts: pl.DataFrame,
    quadratic: surrogate.QuadraticModel | None,
    lengths: np.ndarray | None,
) -> SignalRows:
    """From the tables of mergeprobe.signals (pairs, adapters, perhaps sets) and the surrogate's."""
    sets = tables["sets"].to_dicts() if "sets" in tables else []
    return SignalRows(
        pairs={(row["b"], row["a"]): row for row in tables["pairs"].to_dicts()},
        adapters={row["a"]: row for row in tables["adapters"].to_dicts()},
        sets={(row["a"], "+".join(sorted(row["set"]))): row for row in sets},
        facts={row["adapter"]: row for row in facts.to_dicts()},
        norms=final_norms(tables["adapters"], facts, lengths),
        quadratic=quadratic,
        lengths=lengths,
    )


def final_norms(
    adapters: pl.DataFrame, facts: pl.DataFrame, lengths: np.ndarray | None
) -> dict[str, float]:
    """‖ΔW‖ at the end of training, by name: the snapshots' own, as much longer as `lengths` says
    (in the order of `facts`, surrogate.lengths)."""
    now = dict(adapters.select("a", "update_norm").iter_rows())
    names = facts["adapter"].to_list()
    grown = [1.0] * len(names) if lengths is None else lengths.tolist()
    return {name: now[name] * length for name, length in zip(names, grown, strict=True)}


def early_row(
    tier: ModelTier, name: str, group: Sequence[str], methods: Sequence[str] = WEIGHTED
) -> dict[str, float]:
    """The model tier's signals of `name` in `group` (itself included), under rules of WEIGHTED."""
    found: dict[str, float] = {}
    norms = tier.final_norms(group)
    for method in methods:
        found |= tier.set_features(name, group, method)
        weights = weights_of(method, norms)
        found[f"extrapolated_{method}"] = tier.extrapolated_merge(name, weights)
    return found


def merged_retentions(
    tier: ModelTier, names: Sequence[str], method: str, rank: int | None
) -> dict[str, float]:
    """Early retention of each of `names`, merged once for all: for rules that do more than weigh
    whole updates."""
    merged = merge([tier.snapshots[name].update for name in sorted(names)], method, rank=rank)
    return {name: tier.early_retention(name, merged.adapter) for name in names}


def _without(row: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in keys}
