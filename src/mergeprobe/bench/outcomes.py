"""Outcomes of a run: retention of every adapter under everything that was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from mergeprobe.bench.folder import Config, RunFolder
from mergeprobe.bench.measure import (
    BASE_MODEL,
    BY_PROMPT,
    DEPLOYED,
    LOGITS,
    Measured,
    Measurement,
    read_measured,
    result_path,
)
from mergeprobe.evaluate.retention import Retention, SetRetention, retention, set_retention
from mergeprobe.plan import Action, Plan, read_plan

WHOLE_SET_METHODS = ("norm_preserving_mean", "equal_norm_mean", "ties", "svc", "iso_c")
ROUTING = "full routing by name"
TRUNCATED = "routing, truncated to the plan's parameters"
PLAN = "plan"
ROUTER = "routing by prompt"
MIXTURE = "logits of all, mixed"


@dataclass(frozen=True)
class Strategy:
    """One way to deploy all adapters, measured. passes: rows of a forward pass for one token."""

    name: str
    retentions: dict[str, Retention]
    total: SetRetention
    resident_parameters: int
    passes: int = 1


class Outcomes:
    """A run's measurements, read once; retention on all test items or on a half of them.

    half: None for all items, 0 or 1 for the even or the odd ones (to choose on one and score on
    the other).
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.config = folder, folder.config()
        self.plan = read_plan(folder.plan)
        self._read: dict[Measurement, Measured] = {}

    def measured(self, wanted: Measurement) -> Measured:
        if wanted not in self._read:
            self._read[wanted] = read_measured(self.folder.measured, wanted)
        return self._read[wanted]

    def single(self, name: str) -> Measured:
        return self.measured(Measurement("mean", (name,)))

    def base(self, name: str) -> Measured:
        return self.measured(Measurement(BASE_MODEL, (name,)))

    def retention(self, name: str, under: Measurement, half: int | None = None) -> Retention:
        parts = (self.base(name), self.single(name), self.measured(under))
        base, single, merged = (part.losses[name] for part in parts)
        if half is not None:
            base, single, merged = (losses[half::2] for losses in (base, single, merged))
        return retention(base, single, merged)

    def full_parameters(self) -> int:
        return sum(self.single(name).parameters for name in self.config.tasks)

    def strategies(self) -> list[Strategy]:
        """The table of the demo: every merge of all adapters, the plan, and its rivals."""
        names, rank = self.config.tasks, self.config.rank
        wholes = {m: Measurement(m, names, rank) for m in ("mean", "sum", *WHOLE_SET_METHODS)}
        found = [
            self._strategy(method, dict.fromkeys(names, wanted))
            for method, wanted in wholes.items()
            if self._there(wanted)
        ]
        found.append(self._strategy(PLAN, dict.fromkeys(names, Measurement(DEPLOYED, names))))
        cut = {m.adapters[0]: m for m in truncated(self.config, self.plan)}
        found.append(self._strategy(TRUNCATED, cut))
        routed = {name: Measurement("mean", (name,)) for name in names}
        found.append(self._strategy(ROUTING, routed))
        for label, method in ((ROUTER, BY_PROMPT), (MIXTURE, LOGITS)):
            wanted = Measurement(method, names)
            if self._there(wanted):
                passes = 1 + len(names) if method == LOGITS else 1
                found.append(self._strategy(label, dict.fromkeys(names, wanted), passes))
        return found

    def routed(self) -> Measured | None:
        """What a router chose for each test prompt; None in a run that has not measured it."""
        wanted = Measurement(BY_PROMPT, self.config.tasks)
        return self.measured(wanted) if self._there(wanted) else None

    def _there(self, wanted: Measurement) -> bool:
        """False for what a run of an earlier version did not measure."""
        return result_path(self.folder.measured, wanted).exists()

    def _strategy(
        self, label: str, under: Mapping[str, Measurement], passes: int | None = None
    ) -> Strategy:
        parts = {name: self.retention(name, wanted) for name, wanted in under.items()}
        resident = sum(self.measured(wanted).parameters for wanted in set(under.values()))
        if passes is None:
            passes = self._passes() if label == PLAN else 1
        return Strategy(label, parts, set_retention(parts), resident, passes)

    def _passes(self) -> int:
        """Rows of a forward pass for one token under the plan, at most."""
        mixed = [len(g.adapters) for g in self.plan.groups if g.action is Action.logits]
        return 1 + max(mixed, default=0)

    def partitions(self, half: int | None = None) -> list[Partition]:
        """Every partition, each group of two or more under its better measured method.

        "Better" is the higher worst-case retention, on the same items (half).
        """
        return [self._partition(groups, half) for groups in set_partitions(list(self.config.tasks))]

    def _partition(self, groups: Sequence[tuple[str, ...]], half: int | None) -> Partition:
        methods: list[str | None] = []
        kept: dict[str, float] = {}
        resident = 0
        for group in groups:
            method, values, parameters = self.group(group, half)
            methods.append(method)
            kept |= values
            resident += parameters
        return Partition(tuple(groups), tuple(methods), kept, resident)

    def group(
        self, group: tuple[str, ...], half: int | None = None, method: str | None = None
    ) -> tuple[str | None, dict[str, float], int]:
        """(method, retention by name, parameters) of one group; method None: the better one."""
        if len(group) == 1:
            return None, {group[0]: 1.0}, self.single(group[0]).parameters
        best = None
        for name in (method,) if method else ("mean", "sum"):
            wanted = Measurement(name, group, self.config.rank)
            found = {member: self.retention(member, wanted, half).gain for member in group}
            values = {k: v for k, v in found.items() if v is not None}
            worst = min(values.values(), default=1.0)
            if best is None or worst > best[0]:
                best = worst, name, values, self.measured(wanted).parameters
        assert best is not None
        return best[1], best[2], best[3]


@dataclass(frozen=True)
class Partition:
    """A partition of the adapters, measured. retention: by adapter (undefined ones left out)."""

    groups: tuple[tuple[str, ...], ...]
    methods: tuple[str | None, ...]
    retention: dict[str, float]
    resident_parameters: int

    @property
    def mean(self) -> float:
        return sum(self.retention.values()) / len(self.retention)

    @property
    def worst(self) -> float:
        return min(self.retention.values())

    @property
    def label(self) -> str:
        return " | ".join(" + ".join(group) for group in self.groups)


def set_partitions(names: list[str]) -> Iterator[list[tuple[str, ...]]]:
    """All partitions of `names`, order kept inside each group."""
    if not names:
        yield []
        return
    first, rest = names[0], names[1:]
    for size in range(len(rest) + 1):
        for others in combinations(rest, size):
            left = [name for name in rest if name not in others]
            for more in set_partitions(left):
                yield [(first, *others), *more]


def truncated(config: Config, plan: Plan) -> list[Measurement]:
    """Each adapter on its own, cut to the rank at which all fit into the plan's parameters."""
    share = (plan.resident_parameters or 0) / max(1, plan.full_routing_parameters or 1)
    rank = max(1, int(config.rank * share + 1e-9))
    return [Measurement("mean", (name,), rank) for name in config.tasks]


@dataclass(frozen=True)
class Regret:
    """The plan against the best partition of at most its parameters, chosen on one half of the
    test items and scored on the other, both ways, averaged. worst, mean: best − plan (≥ 0 up to
    noise). oracle: by the planner's own rule with measured retention on one half: the cheapest
    partition whose worst case keeps the floor."""

    worst: float
    mean: float
    best: str
    oracle: str
    oracle_parameters: int
    plan_parameters: int


def regret(outcomes: Outcomes) -> Regret:
    plan = outcomes.plan
    worst, mean = [], []
    best_label = oracle_label = ""
    oracle_parameters = 0
    for choose, on in ((0, 1), (1, 0)):
        chosen_on = outcomes.partitions(choose)
        mine = _plan_partition(outcomes, on)
        within = [p for p in chosen_on if p.resident_parameters <= mine.resident_parameters]
        best = max(within, key=lambda p: (p.worst, p.mean, -p.resident_parameters))
        scored = _rescored(outcomes, best, on)
        worst.append(scored.worst - mine.worst)
        mean.append(scored.mean - mine.mean)
        floor = plan.min_retention or 0.0
        above = [p for p in chosen_on if p.worst >= floor]
        oracle = min(above, key=lambda p: (p.resident_parameters, -p.worst))
        best_label, oracle_label = best.label, oracle.label
        oracle_parameters = oracle.resident_parameters
    return Regret(
        worst=sum(worst) / 2,
        mean=sum(mean) / 2,
        best=best_label,
        oracle=oracle_label,
        oracle_parameters=oracle_parameters,
        plan_parameters=outcomes.measured(Measurement(DEPLOYED, outcomes.config.tasks)).parameters,
    )


def _plan_partition(outcomes: Outcomes, half: int) -> Partition:
    names = outcomes.config.tasks
    wanted = Measurement(DEPLOYED, names)
    found = {name: outcomes.retention(name, wanted, half).gain for name in names}
    groups = tuple(group.adapters for group in outcomes.plan.groups)
    methods = tuple(group.method for group in outcomes.plan.groups)
    kept = {name: value for name, value in found.items() if value is not None}
    return Partition(groups, methods, kept, outcomes.measured(wanted).parameters)


def _rescored(outcomes: Outcomes, partition: Partition, half: int) -> Partition:
    """The same groups and methods on the other half."""
    kept: dict[str, float] = {}
    for group, method in zip(partition.groups, partition.methods, strict=True):
        kept |= outcomes.group(group, half, method)[1]
    return Partition(partition.groups, partition.methods, kept, partition.resident_parameters)


def outcome_rows(folder: RunFolder) -> list[dict[str, Any]]:
    """One row per (measurement, adapter): losses, accuracy, both retentions, what made it."""
    outcomes = Outcomes(folder)
    rows = []
    for file in sorted(folder.measured.glob("*.json")):
        spec = json.loads(file.read_text("utf-8"))["measurement"]
        wanted = Measurement(spec["method"], tuple(spec["adapters"]), spec["rank"])
        found = outcomes.measured(wanted)
        for name in wanted.adapters:
            parts = outcomes.base(name), outcomes.single(name), found
            rows.append(outcome_row(name, wanted, *parts, seed=outcomes.config.seed))
    return rows


def outcome_row(
    name: str, wanted: Measurement, base: Measured, single: Measured, found: Measured, *, seed: int
) -> dict[str, Any]:
    """What one measurement says of one of its adapters."""
    kept = retention(base.losses[name], single.losses[name], found.losses[name])
    return {
        "adapter": name,
        "set": "+".join(wanted.adapters),
        "method": wanted.method,
        "rank": wanted.rank,
        "seed": seed,
        "items": kept.items,
        "loss": float(found.losses[name].mean()),
        "loss_base": float(base.losses[name].mean()),
        "loss_single": float(single.losses[name].mean()),
        "accuracy": found.accuracy(name),
        "gain_retention": kept.gain,
        "gain_retention_se": kept.gain_se,
        "ratio_retention": kept.ratio,
        "ratio_retention_se": kept.ratio_se,
        "own_gain": kept.own_gain,
        "own_gain_se": kept.own_gain_se,
        "excess": kept.excess,
        "resident_parameters": found.parameters,
        "error": found.error,
        "note": kept.note,
    }
