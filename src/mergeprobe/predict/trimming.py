"""Ranks of a plan: the smallest that the early snapshots say will do.

Cutting is judged like merging: on the snapshots, at their best lengths, on each adapter's own
items. A finished adapter keeps at least about as much at a smaller rank as its snapshot does
(docs/forecast.md has the figures), so the snapshot's share is a careful forecast.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mergeprobe.compose import merge
from mergeprobe.errors import NotForecastable
from mergeprobe.plan import Action, Forecast, Group, Plan

if TYPE_CHECKING:
    from mergeprobe.predict.forecaster import Forecaster
    from mergeprobe.predict.planning import Forecasts

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# the share of its retention that cutting may cost an adapter; merging is what the floor is for
KEPT = 0.98
# how far finished adapters lay from their snapshots' shares at 5 and 10 % of training:
# benchmarks/truncation.py, cohort t1
BELOW, ABOVE = 0.015, 0.04
CUT = (Action.route, Action.merge, Action.reweight)


def trimmed(forecasts: Forecasts, plan: Plan) -> Plan:
    """The plan with every group at the smallest of RANKS that costs no member more than 1 − KEPT
    of its retention and none the floor; unchanged without the model tier.

    Each rank tried takes one forward pass a member, within the model tier's budget.
    """
    if forecasts.model is None:
        return plan
    groups = tuple(_smallest(forecasts.of(group.adapters[0]), group, plan) for group in plan.groups)
    resident = sum(group.resident_parameters or 0 for group in groups)
    before = plan.resident_parameters or 0
    if resident == before:
        return plan
    said = (
        f"smaller ranks do: {resident:,} resident parameters instead of {before:,}; the frontier "
        "is that of uncut ranks"
    )
    update = {"groups": groups, "resident_parameters": resident}
    return plan.model_copy(update={**update, "reasons": (*plan.reasons, said)})


def _smallest(forecaster: Forecaster, group: Group, plan: Plan) -> Group:
    def kept(one: Group) -> float:
        return min(f.retention if plan.confidence == "point" else f.low for f in _all(one))

    chosen = group
    for found in cuts(forecaster, group):
        if kept(found) < min(kept(group), plan.min_retention or 0.0):
            break
        chosen = found
    return chosen


def cuts(forecaster: Forecaster, group: Group) -> Iterator[Group]:
    """The group at every smaller rank of RANKS, from the largest, until one costs a member more
    than 1 − KEPT of its retention or the budget is spent. A pass a member and rank."""
    if group.action not in CUT:
        return
    largest = group.rank or forecaster.rank(group.adapters)
    for rank in reversed([rank for rank in RANKS if rank < largest]):
        try:
            shares = _shares(forecaster, group, rank)
        except NotForecastable:  # the budget is spent
            return
        if min(shares.values()) < KEPT:
            return
        yield _cut(forecaster, group, rank, shares)


def _all(group: Group) -> list[Forecast]:
    return [group.forecast[name] for name in group.adapters]


def _shares(forecaster: Forecaster, group: Group, rank: int) -> dict[str, float]:
    """What each member's snapshot keeps of its own or the merged gain at a rank, at most 1."""
    assert forecaster.model is not None
    tier = forecaster.model
    updates = [tier.snapshots[name].update for name in group.adapters]
    if len(updates) == 1:
        (name,) = group.adapters
        cut = merge(updates, "mean", rank=rank).adapter
        return {name: min(1.0, tier.early_retention(name, cut))}
    weights = [group.weights[name] for name in group.adapters] if group.weights else None
    method, options = group.method or "mean", dict[str, Any](group.options)
    whole, cut = (
        merge(updates, method, weights=weights, rank=r, **options).adapter
        for r in (group.rank or forecaster.rank(group.adapters), rank)
    )
    # against the merge as it would be written, so that merging is not counted twice
    return {
        name: min(
            1.0, tier.early_retention(name, cut) / max(0.25, tier.early_retention(name, whole))
        )
        for name in group.adapters
    }


def _cut(forecaster: Forecaster, group: Group, rank: int, shares: dict[str, float]) -> Group:
    forecast = {}
    for name in group.adapters:
        before, share = group.forecast[name], shares[name]
        retention = before.retention * share
        low, high = before.low * (share - BELOW), before.high * min(1.0, share + ABOVE)
        forecast[name] = Forecast(
            retention=retention, low=min(low, retention), high=max(high, retention)
        )
    worst = min(shares.values())
    said = f"cut to rank {rank}: the snapshots keep {worst:.0%} of their gain there at worst"
    return group.model_copy(
        update={
            "rank": rank,
            "forecast": forecast,
            "resident_parameters": forecaster.parameters(group.adapters, rank),
            "reasons": (*group.reasons, said),
        }
    )
