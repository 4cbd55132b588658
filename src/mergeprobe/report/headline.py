"""The page's first words: what was decided, and whether that was right, computed from the data."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from mergeprobe.report.data import PartitionRow, ReportData, StrategyRow, adapter_names, forecasts
from mergeprobe.report.wording import counted, interval, listed, number, percent, plain_error


class Verdict(NamedTuple):
    """One checked claim; "even" where the measurement does not tell."""

    outcome: Literal["right", "wrong", "even"]
    words: str


class Outcome(NamedTuple):
    """The chosen deployment: gain retention forecast and measured, and what it costs."""

    mean: float | None
    mean_se: float | None
    worst: float | None
    worst_se: float | None
    forecast_mean: float | None
    forecast_worst: float | None
    resident: int | None
    full_routing: int | None

    @property
    def share(self) -> float | None:
        return self.resident / self.full_routing if self.resident and self.full_routing else None


def chosen_strategy(data: ReportData) -> StrategyRow | None:
    return next((row for row in data.strategies if row.chosen), None)


def outcome(data: ReportData) -> Outcome:
    """From the chosen strategy where there is one, else from the adapters' own rows."""
    row = chosen_strategy(data)
    measured = [(a.measured, a.measured_se) for a in data.adapters if a.measured is not None]
    worst = min(measured, default=(None, None), key=lambda pair: pair[0])
    mean = sum(value for value, _ in measured) / len(measured) if measured else None
    mean_se = None
    if row is not None and row.mean_retention is not None:
        mean, mean_se = row.mean_retention, row.mean_se
    if row is not None and row.worst_retention is not None:
        worst = (row.worst_retention, row.worst_se)
    forecast = [value for value, _, _ in forecasts(data).values()]
    plan = data.plan
    resident = row.resident_parameters if row else None
    return Outcome(
        mean,
        mean_se,
        *worst,
        sum(forecast) / len(forecast) if forecast else None,
        min(forecast, default=None),
        resident if resident is not None else (plan.resident_parameters if plan else None),
        plan.full_routing_parameters if plan else None,
    )


def sentence(data: ReportData) -> str:
    """Such as "5 adapters → 3 groups: 0.94 worst-case retention measured (forecast 0.91) …"."""
    found, names = outcome(data), adapter_names(data)
    subject = counted(len(names), "adapter") if names else "No adapters"
    if data.plan is not None:
        subject += f" → {counted(len(data.plan.groups), 'group')}"
    parts = []
    if found.worst is not None:
        parts.append(f"{plain_error(found.worst, found.worst_se)} worst-case retention measured")
        if found.forecast_worst is not None:
            parts.append(f"(forecast {number(found.forecast_worst)})")
    elif found.forecast_worst is not None:
        parts.append(f"{number(found.forecast_worst)} worst-case retention forecast")
    if found.share is not None:
        parts.append(f"with {percent(found.share)} of the parameters of full routing")
    return f"{subject}: {' '.join(parts)}." if parts else f"{subject}; nothing measured yet."


def verdicts(data: ReportData) -> list[Verdict]:
    """What was checked against the measurements, most important first."""
    checks = (_floor, _intervals, _against_strategies, _against_partitions)
    return [verdict for check in checks if (verdict := check(data)) is not None]


def inside(data: ReportData) -> tuple[list[str], list[str]]:
    """Adapters whose measured retention lies inside their forecast interval, and those outside."""
    held, missed = [], []
    known = forecasts(data)
    for row in data.adapters:
        _, low, high = known.get(row.name, (None, None, None))
        if row.measured is None or low is None or high is None:
            continue
        (held if low <= row.measured <= high else missed).append(row.name)
    return held, missed


def _floor(data: ReportData) -> Verdict | None:
    found = outcome(data)
    if data.plan is None or data.plan.min_retention is None or found.worst is None:
        return None
    floor, gap = data.plan.min_retention, found.worst - data.plan.min_retention
    words = (
        f"The floor of {number(floor)} for the worst case was {'held' if gap >= 0 else 'missed'}"
    )
    words += f": {plain_error(found.worst, found.worst_se)} measured"
    if found.worst_se is not None and abs(gap) < 2 * found.worst_se:
        return Verdict("even", f"{words}, too close to tell apart from the floor.")
    return Verdict("right" if gap >= 0 else "wrong", words + ".")


def _intervals(data: ReportData) -> Verdict | None:
    held, missed = inside(data)
    total = len(held) + len(missed)
    if not total:
        return None
    words = f"{len(held)} of {counted(total, 'adapter')} came out inside the 90 % forecast interval"
    if not missed:
        return Verdict("right", words + ".")
    rows, known = {row.name: row for row in data.adapters}, forecasts(data)
    outside = [
        f"{name} ({number(rows[name].measured)}; forecast {interval(*known[name][1:])})"
        for name in missed[:4]
    ]
    outside += [f"{len(missed) - 4} more"] if len(missed) > 4 else []
    # one miss in ten is what a 90 % interval promises
    expected = math.ceil(0.1 * total)
    return Verdict(
        "even" if len(missed) <= expected else "wrong", f"{words}; outside: {listed(outside)}."
    )


def _against_strategies(data: ReportData) -> Verdict | None:
    row = chosen_strategy(data)
    if row is None or row.worst_retention is None or row.resident_parameters is None:
        return None
    rivals = [
        (other.worst_retention, other)
        for other in data.strategies
        if not other.chosen
        and other.worst_retention is not None
        and other.resident_parameters is not None
        and other.resident_parameters <= row.resident_parameters
    ]
    if not rivals:
        return None
    value, best = max(rivals, key=lambda pair: pair[0])
    words = (
        f"Of the other strategies with no more parameters, the best is {best.name}: "
        f"{plain_error(value, best.worst_se)} in the worst case"
    )
    gap = row.worst_retention - value
    noise = 2 * math.hypot(row.worst_se or 0.0, best.worst_se or 0.0)
    if abs(gap) <= noise:
        return Verdict("even", f"{words}, which the measurement cannot tell apart.")
    return Verdict("right" if gap > 0 else "wrong", words + ".")


def _against_partitions(data: ReportData) -> Verdict | None:
    known = [(row.worst, row) for row in data.partitions if row.worst is not None]
    chosen = next((pair for pair in known if pair[1].chosen), None)
    if chosen is None or len(known) < 2:
        return None
    value, row = chosen
    rivals = [pair for pair in known if _no_dearer(pair[1], row)]
    best, winner = max(rivals, key=lambda pair: pair[0])
    words = f"{counted(len(known), 'partition')} were measured; "
    if winner is row or best <= value:
        return Verdict("right", words + "none with no more parameters has a better worst case.")
    words += f"with no more parameters, {winner.label} does best in the worst case: {number(best)}"
    return Verdict("even", f"{words}, {number(best - value)} above the plan's {number(value)}.")


def _no_dearer(row: PartitionRow, chosen: PartitionRow) -> bool:
    if row.resident_parameters is None or chosen.resident_parameters is None:
        return True
    return row.resident_parameters <= chosen.resident_parameters
