"""What could be done with each set of adapters, as the search sees it. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from mergeprobe.errors import PlanError
from mergeprobe.plan import Action, Group
from mergeprobe.predict.partition import BILLION, Option, Options, pareto
from mergeprobe.predict.reasons import Confidence

AN_ADAPTER = 10**15  # more than any adapter's parameters: adapters are counted first
Cost = Literal["adapters", "parameters"]
Candidates = Callable[[tuple[str, ...]], Sequence[Group]]


def measured(
    names: tuple[str, ...], candidates: Candidates, confidence: Confidence, cost: Cost = "adapters"
) -> Options:
    """bitmask -> the Pareto-optimal options of that set; asks `candidates` once per set."""
    known: dict[int, tuple[Option, ...]] = {}

    def options(mask: int) -> tuple[Option, ...]:
        if mask not in known:
            members = tuple(name for i, name in enumerate(names) if mask >> i & 1)
            groups = [
                group
                for group in candidates(members)
                if len(members) == 1 or group.action is not Action.route
            ]
            if len(members) == 1 and not groups:
                raise PlanError(f"'{members[0]}' has no candidate of its own; offer it as 'route'")
            known[mask] = pareto(
                [_option(group, members, mask, confidence, cost) for group in groups]
            )
        return known[mask]

    return options


def _option(
    group: Group, members: tuple[str, ...], mask: int, confidence: Confidence, cost: Cost
) -> Option:
    if set(group.adapters) != set(members):
        raise PlanError(f"a candidate for {list(members)} is for {list(group.adapters)} instead")
    if lacking := [name for name in members if name not in group.forecast]:
        raise PlanError(f"a candidate for {list(members)} has no forecast for '{lacking[0]}'")
    if group.resident_parameters is None:
        raise PlanError(f"a candidate for {list(members)} does not say its resident_parameters")
    forecasts = [group.forecast[name] for name in members]
    point = [round(forecast.retention * BILLION) for forecast in forecasts]
    low = [round(forecast.low * BILLION) for forecast in forecasts]
    kept = point if confidence == "point" else low
    resident = len(members) if group.action is Action.logits else 1
    return Option(
        mask,
        group,
        worst=min(kept),
        total=sum(kept),
        parameters=group.resident_parameters,
        cost=group.resident_parameters + (AN_ADAPTER * resident if cost == "adapters" else 0),
        low_worst=min(low),
        low_total=sum(low),
    )
