"""Ranks of a plan: cut as far as the snapshots allow, and no farther."""

from types import SimpleNamespace

import pytest
import torch

from mergeprobe.adapters.checkpoint import Adapter
from mergeprobe.compose import merge
from mergeprobe.errors import NotForecastable
from mergeprobe.lowrank import LowRank
from mergeprobe.plan import Action, AdapterRef, Forecast, Group, Plan
from mergeprobe.predict.trimming import ABOVE, BELOW, cuts, trimmed

OUT, INTO = 10, 6


def adapter(name, seed):
    draw = torch.Generator().manual_seed(seed)
    factors = torch.randn(OUT, 8, generator=draw), torch.randn(8, INTO, generator=draw)
    return Adapter(name, {"m": LowRank(*factors)}, base="tiny")


class Tier:
    """Snapshots, and a share kept by rank (of nonzero directions) instead of a model."""

    def __init__(self, kept, passes=99):
        self.kept, self.passes = kept, passes
        updates = {name: adapter(name, seed) for seed, name in enumerate("abc")}
        self.snapshots = {n: SimpleNamespace(update=u) for n, u in updates.items()}

    def early_retention(self, name, update):
        if self.passes == 0:
            raise NotForecastable("the budget of 99 forward passes is used up")
        self.passes -= 1
        return self.kept[name][int(torch.linalg.matrix_rank(update.modules["m"].dense()))]


class Forecaster:
    def __init__(self, kept, **options):
        self.model = Tier(kept, **options)

    def of(self, name):
        return self

    def rank(self, names):
        return 8

    def parameters(self, names, rank):
        return rank * (OUT + INTO)


def forecast(retention):
    return Forecast(retention=retention, low=retention - 0.1, high=min(1.0, retention + 0.1))


def plan(*groups, floor=0.9, **options):
    names = [name for group in groups for name in group.adapters]
    return Plan(
        adapters=tuple(AdapterRef(name=name) for name in names),
        groups=groups,
        min_retention=floor,
        resident_parameters=sum(group.resident_parameters for group in groups),
        **options,
    )


def alone(name):
    kept = {name: Forecast(retention=1.0, low=1.0, high=1.0)}
    return Group(
        name=name,
        adapters=(name,),
        action=Action.route,
        forecast=kept,
        resident_parameters=8 * (OUT + INTO),
    )


def merged(retention=0.95, **options):
    return Group(
        name="b+c",
        adapters=("b", "c"),
        action=Action.merge,
        method="mean",
        rank=8,
        forecast={name: forecast(retention) for name in "bc"},
        resident_parameters=8 * (OUT + INTO),
        **options,
    )


FINE = {6: 1.0, 4: 1.02, 2: 0.99, 1: 0.97}


def test_a_single_adapter_is_offered_at_every_rank_that_does():
    found = list(cuts(Forecaster({"a": FINE}), alone("a")))
    assert [group.rank for group in found] == [4, 2]  # 1 would keep 0.97 < 0.98
    assert [group.resident_parameters for group in found] == [4 * (OUT + INTO), 2 * (OUT + INTO)]
    assert found[1].forecast["a"].retention == pytest.approx(0.99)
    assert not list(cuts(Forecaster({"a": FINE}, passes=0), alone("a")))


def test_the_smallest_rank_that_keeps_its_share():
    found = trimmed(Forecaster({"a": FINE}), plan(alone("a")))
    (group,) = found.groups
    assert group.rank == 2  # 1 would keep 0.97 < 0.98
    assert group.resident_parameters == found.resident_parameters == 2 * 16
    kept = group.forecast["a"]
    assert (kept.retention, kept.low, kept.high) == (0.99, 0.99 - BELOW, 1.0)
    assert "cut to rank 2: the snapshots keep 99%" in group.reasons[-1]
    assert "32 resident parameters instead of 128" in found.reasons[-1]


def test_a_merge_is_judged_against_itself_uncut():
    # uncut it keeps 0.8 and 0.6 early; cut to rank 4 that is 0.98 of each, to rank 2 0.9 of c's
    kept = {"b": {6: 0.8, 4: 0.784, 2: 0.8}, "c": {6: 0.6, 4: 0.594, 2: 0.54}}
    (group,) = trimmed(Forecaster(kept), plan(merged())).groups
    assert group.rank == 4
    assert group.forecast["b"].retention == pytest.approx(0.95 * 0.98)
    assert group.forecast["c"].retention == pytest.approx(0.95 * 0.99)
    assert group.forecast["c"].low == pytest.approx(0.85 * (0.99 - BELOW))
    assert group.forecast["c"].high == pytest.approx(max(0.95 * 0.99, 1.0 * min(1, 0.99 + ABOVE)))


def test_the_floor_goes_before_parameters():
    kept = {name: {6: 1.0, 4: 0.99, 2: 0.985, 1: 0.9} for name in "bc"}
    (group,) = trimmed(Forecaster(kept), plan(merged(0.905))).groups
    assert group.rank == 8  # 0.905 · 0.99 is below 0.9
    (group,) = trimmed(Forecaster(kept), plan(merged(0.92))).groups
    assert group.rank == 2
    # what is below the floor already must not fall farther
    (group,) = trimmed(Forecaster(kept), plan(merged(0.5))).groups
    assert group.rank == 8
    low = plan(merged(0.97), confidence="lower")
    assert trimmed(Forecaster(kept), low).groups[0].rank == 8  # the low end 0.87 is below


def test_what_is_pruned_or_isolated_keeps_its_rank():
    group = merged(options={}).model_copy(update={"action": Action.isolate})
    kept = dict.fromkeys("bc", FINE)
    before = plan(group)
    assert trimmed(Forecaster(kept), before) is before


def test_without_a_model_or_with_its_budget_spent_nothing_is_cut():
    before = plan(alone("a"), merged())
    bare = Forecaster({})
    bare.model = None
    assert trimmed(bare, before) is before
    assert trimmed(Forecaster({}, passes=0), before) is before


def test_the_cut_is_the_best_of_that_rank():
    tier = Tier({})
    found = merge([tier.snapshots["a"].update], "mean", rank=2).adapter.modules["m"].dense()
    u, s, vh = torch.linalg.svd(tier.snapshots["a"].update.modules["m"].dense())
    assert torch.allclose(found, u[:, :2] * s[:2] @ vh[:2], atol=1e-5)
