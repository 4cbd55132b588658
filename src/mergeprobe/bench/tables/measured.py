"""One cohort's measured merges: what is kept under anything that was measured, and what it costs.

Retention is clipped to [−1, 1.2] as for the forecasts; an adapter whose own gain is not clear of
its noise has none and is left out. A half is the even or the odd test items: to choose on one and
score on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import polars as pl

from mergeprobe.plan import Action, Forecast, Group, Plan
from mergeprobe.predict.learning import HIGHEST, LOWEST, MIN_GAIN_SE
from mergeprobe.predict.planner import AdapterInfo, make_plan

Part = Literal["all", "even", "odd"]
HALVES: tuple[tuple[Part, Part], ...] = (("even", "odd"), ("odd", "even"))
COLUMN = {
    "all": "gain_retention",
    "even": "gain_retention_even",
    "odd": "gain_retention_odd",
}
TRUNCATED, JOINT = "truncated", "joint"
Names = tuple[str, ...]
Serving = Sequence[tuple[Names, str | None]]
"""Groups and the method that merges each; None for an adapter on its own."""


@dataclass(frozen=True)
class Scored:
    """mean, worst: retention over the adapters that have one; NaN if none has."""

    mean: float
    worst: float


@dataclass(frozen=True, eq=False)
class Cohort:
    """kept: (method, set, rank if truncated) -> part -> adapter -> retention. per_rank: resident
    parameters of one rank. costs: parameters of the measured sets by method. tuned: (method,
    length) -> part -> adapter -> retention, of all adapters merged and made so much longer."""

    name: str
    ranks: Mapping[str, int]
    kept: Mapping[tuple[str, Names, int | None], Mapping[Part, Mapping[str, float]]]
    costs: Mapping[tuple[str, Names], int]
    per_rank: float
    defined: frozenset[str]
    tuned: Mapping[tuple[str, float], Mapping[Part, Mapping[str, float]]] = field(
        default_factory=dict
    )

    @property
    def names(self) -> Names:
        return tuple(sorted(self.ranks))

    @property
    def full(self) -> int:
        """Parameters of full routing."""
        return sum(self.single(name) for name in self.ranks)

    def single(self, name: str, rank: int | None = None) -> int:
        return round(self.per_rank * (self.ranks[name] if rank is None else rank))

    def has(self, method: str, group: Names) -> bool:
        return (method, group, None) in self.kept

    def methods(self, group: Names) -> list[str]:
        return sorted({m for m, g, _ in self.kept if g == group} - {TRUNCATED, JOINT})

    def cost(self, serving: Serving) -> int:
        return sum(
            self.single(group[0]) if method is None else self.costs[method, group]
            for group, method in serving
        )

    def retentions(self, serving: Serving, part: Part = "all") -> dict[str, float]:
        found: dict[str, float] = {}
        for group, method in serving:
            if method is None:
                found |= {name: 1.0 for name in group if name in self.defined}
            else:
                found |= self.kept[method, group, None][part]
        return found

    def score(self, serving: Serving, part: Part = "all") -> Scored:
        return scored(self.retentions(serving, part))


def scored(kept: Mapping[str, float]) -> Scored:
    values = list(kept.values())
    if not values:
        return Scored(np.nan, np.nan)
    return Scored(float(np.mean(values)), float(min(values)))


def read_cohort(tables: Mapping[str, pl.DataFrame], name: str) -> Cohort:
    """tables: of this cohort only (bank.Bank.cohort)."""
    adapters, outcomes = tables["adapters"], tables["outcomes"]
    ranks = {row["adapter"]: int(row.get("rank") or 1) for row in adapters.iter_rows(named=True)}
    kept: dict[tuple, dict[Part, dict[str, float]]] = {}
    costs: dict[tuple[str, Names], int] = {}
    each_rank: list[float] = []
    defined: set[str] = set()
    for row in outcomes.iter_rows(named=True):
        group, method, rank = tuple(sorted(row["set"].split("+"))), row["method"], row.get("rank")
        key = (method, group, rank if method == TRUNCATED else None)
        parts = kept.setdefault(key, {"all": {}, "even": {}, "odd": {}})
        cost = row.get("resident_parameters")
        largest = rank or max(ranks[member] for member in group)
        costs[method, group] = largest if cost is None else cost
        if cost is not None and rank:
            each_rank.append(cost / rank)
        if not _clear(row):
            continue
        defined.add(row["adapter"])
        _add(parts, row)
    tuned: dict[tuple[str, float], dict[Part, dict[str, float]]] = {}
    for row in tables["tuned"].iter_rows(named=True) if "tuned" in tables else ():
        parts = tuned.setdefault((row["method"], row["length"]), {"all": {}, "even": {}, "odd": {}})
        if _clear(row):
            _add(parts, row)
    per_rank = float(np.median(each_rank)) if each_rank else 1.0
    return Cohort(name, ranks, kept, costs, per_rank, frozenset(defined), tuned)


def _add(parts: dict[Part, dict[str, float]], row: Mapping[str, Any]) -> None:
    for part, column in COLUMN.items():
        value = row.get(column)
        if value is not None and np.isfinite(value):
            parts[part][row["adapter"]] = float(np.clip(value, LOWEST, HIGHEST))  # type: ignore[index]


def _clear(row: Mapping[str, Any]) -> bool:
    gain, noise = row["own_gain"], row["own_gain_se"]
    return gain is not None and gain > 0 and gain >= MIN_GAIN_SE * (noise or 0.0)


# ----------------------------------------------------------------------------------------- plans
Forecasts = Callable[[str, Names, str], Forecast]
"""(adapter, set, method) -> its forecast in that merge."""


def planned(
    cohort: Cohort,
    forecasts: Forecasts,
    methods: Sequence[str],
    *,
    floor: float,
    confidence: Literal["point", "lower"] = "point",
) -> Plan:
    """The planner's plan; sets that were not measured cannot be merged."""

    def candidates(names: Names) -> list[Group]:
        if len(names) == 1:
            kept = {names[0]: Forecast(retention=1.0, low=1.0, high=1.0)}
            cost = cohort.single(names[0])
            group = {"name": names[0], "adapters": names, "resident_parameters": cost}
            return [Group(action=Action.route, forecast=kept, **group)]
        return [
            Group(
                name=names[0],
                adapters=names,
                action=Action.merge,
                method=method,
                rank=max(cohort.ranks[name] for name in names),
                forecast={name: forecasts(name, names, method) for name in names},
                resident_parameters=cohort.costs[method, names],
            )
            for method in methods
            if cohort.has(method, names)
        ]

    infos = [AdapterInfo(name, cohort.ranks[name], cohort.single(name)) for name in cohort.names]
    return make_plan(
        infos,
        candidates,
        min_retention=floor,
        confidence=confidence,
        tier="hand",
        calibrated=lambda group: True,
    )


def serving_of(plan: Plan) -> Serving:
    return [
        (tuple(sorted(group.adapters)), group.method if len(group.adapters) > 1 else None)
        for group in plan.groups
    ]


def known(cohort: Cohort, part: Part) -> Forecasts:
    """Measured retention as the forecast: what the oracle knows. 1 where it is not defined."""

    def forecast(name: str, group: Names, method: str) -> Forecast:
        value = cohort.kept[method, group, None][part].get(name, 1.0)
        return Forecast(retention=value, low=value, high=value)

    return forecast


def best_within(cohort: Cohort, methods: Sequence[str], part: Part, budget: int) -> Serving:
    """The measured partition of at most `budget` parameters with the best worst case on `part`,
    then the best mean."""
    plan = planned(cohort, known(cohort, part), methods, floor=0.0)
    within = [p for p in plan.frontier if p.resident_parameters <= budget]
    best = max(within, key=lambda p: (p.worst_retention, p.mean_retention))
    return [
        (tuple(sorted(group)), method if len(group) > 1 else None)
        for group, method in zip(best.groups, best.methods, strict=True)
    ]


# ------------------------------------------------------------------------------ truncated routing
def truncated_ranks(cohort: Cohort, budget: int) -> dict[str, int] | None:
    """Ranks to cut each adapter to so that all fit in `budget`: all at the smallest measured one,
    then the lowest is raised as long as it fits. Even the smallest can exceed a small budget.
    None where some adapter was not measured at smaller ranks."""
    steps: dict[str, list[int]] = {name: [] for name in cohort.names}
    for method, group, rank in cohort.kept:
        if method == TRUNCATED and rank is not None:
            steps[group[0]].append(rank)
    if not all(steps.values()):
        return None
    for name, ranks in steps.items():
        ranks[:] = sorted({*ranks, cohort.ranks[name]})
    chosen = {name: ranks[0] for name, ranks in steps.items()}

    def parameters(ranks: Mapping[str, int]) -> int:
        return sum(cohort.single(name, rank) for name, rank in ranks.items())

    while True:
        for name in sorted(chosen, key=lambda n: (chosen[n], n)):
            higher = [rank for rank in steps[name] if rank > chosen[name]]
            if higher and parameters(chosen | {name: higher[0]}) <= budget:
                chosen[name] = higher[0]
                break
        else:
            return chosen


def truncated_retentions(
    cohort: Cohort, ranks: Mapping[str, int], part: Part = "all"
) -> dict[str, float]:
    found = {}
    for name, rank in ranks.items():
        if name not in cohort.defined:
            continue
        whole = rank == cohort.ranks[name]
        value = 1.0 if whole else cohort.kept[TRUNCATED, (name,), rank][part].get(name)
        if value is not None:
            found[name] = value
    return found
