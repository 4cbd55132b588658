"""Plans for many adapters: searched within neighbourhoods, put together as one."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
from builders import tiny_probe

from mergeprobe.errors import NotForecastable, PlanError, ProbeError
from mergeprobe.plan import Action, Forecast, Group
from mergeprobe.predict import forecast as module
from mergeprobe.predict.forecast import forecast_probes
from mergeprobe.predict.neighbourhoods import neighbourhoods, update_norms
from mergeprobe.predict.planner import AdapterInfo, make_plan
from mergeprobe.signals import adapter_rows

NAMES = ("a", "b", "c", "d", "e", "f")


def test_neighbours_are_of_a_like_size():
    sizes = {"a": 5.0, "b": 1.0, "c": 4.0, "d": 2.0, "e": 6.0, "f": 3.0}
    assert neighbourhoods(sizes, size=3) == [("b", "d", "f"), ("c", "a", "e")]
    # seven by three: an even share each, none of one adapter alone
    assert [len(n) for n in neighbourhoods(sizes | {"g": 7.0}, size=3)] == [3, 2, 2]
    assert neighbourhoods(sizes, size=6) == [("b", "d", "f", "c", "a", "e")]


def test_neighbours_hold_what_must_stay_together():
    sizes = {"a": 5.0, "b": 1.0, "c": 4.0, "d": 2.0, "e": 6.0, "f": 3.0}
    # b and e meet through a, at the place of the largest of the three
    assert neighbourhoods(sizes, [("b", "a"), ("a", "e")], 3) == [("d", "f", "c"), ("a", "b", "e")]


def test_norms_are_those_of_the_signals():
    probes = [tiny_probe(seed) for seed in range(3)]
    rows = adapter_rows(probes)
    wanted = dict(rows.select("a", "update_norm").iter_rows())
    assert update_norms(probes, modules=None) == pytest.approx(wanted)
    # of two modules alike in size: their share
    half = update_norms(probes, modules=6)
    assert all(0.5 * wanted[name] < half[name] < wanted[name] for name in wanted)


def _pair_kept(values):
    """Candidates by hand: a set keeps the lowest value among its pairs."""

    def found(names):
        common = {"name": names[0], "adapters": names, "resident_parameters": 100}
        if len(names) == 1:
            kept = {names[0]: Forecast(retention=1.0, low=1.0, high=1.0)}
            return [Group(action=Action.route, forecast=kept, **common)]
        pairs = [values.get(frozenset(pair)) for pair in permutations(names, 2)]
        if None in pairs:
            return []
        low = min(pairs)
        kept = {name: Forecast(retention=low, low=low, high=low) for name in names}
        return [Group(action=Action.merge, method="mean", forecast=kept, **common)]

    return found


VALUES = {
    frozenset("ab"): 0.95, frozenset("ac"): 0.7, frozenset("bc"): 0.6,
    frozenset("de"): 0.92, frozenset("df"): 0.93, frozenset("ef"): 0.91,
    # better than any of them, and across
    frozenset("cf"): 0.99,
}  # fmt: skip


def planned(**options):
    infos = [AdapterInfo(name, 8, 100) for name in NAMES]
    options = {"within": [("a", "b", "c"), ("d", "e", "f")], **options}
    return make_plan(infos, _pair_kept(VALUES), tier="hand", **options)


def test_no_group_reaches_across():
    plan = planned(min_retention=0.9)
    assert [group.adapters for group in plan.groups] == [("a", "b"), ("c",), ("d", "e", "f")]
    assert plan.resident_parameters == 300
    # what was not measured is no reason for anything
    said = " ".join(reason for group in plan.groups for reason in group.reasons)
    assert "'c' and 'f'" not in said
    assert "no way to merge" not in said


def test_the_frontier_adds_up():
    # the first block holds one group at 0.6, two at 0.95, three at 1; the second one group at
    # 0.91, two at 0.93 (d and f), three at 1
    found = {
        point.worst_retention: point.resident_parameters for point in planned().frontier
    }  # of equals the cheapest
    assert found == {0.6: 200, 0.91: 300, 0.93: 400, 0.95: 500, 1.0: 600}


def test_groups_are_shared_out():
    plan = planned(max_adapters=2)
    assert [group.adapters for group in plan.groups] == [("a", "b", "c"), ("d", "e", "f")]
    # the third goes where it helps: to the first block, though the second could use one as well
    plan = planned(max_adapters=3, min_retention=0.95)
    assert [group.adapters for group in plan.groups] == [("a", "b"), ("c",), ("d", "e", "f")]
    with pytest.raises(PlanError, match="max_adapters is 1, but the adapters are planned for in 2"):
        planned(max_adapters=1)


def test_sets_of_one_adapter_leave_nothing_to_merge():
    plan = planned(within=[(name,) for name in NAMES])
    assert [group.adapters for group in plan.groups] == [(name,) for name in NAMES]
    assert "every adapter stays on its own: no two of them may share a group" in plan.reasons


def test_together_across_is_refused():
    with pytest.raises(PlanError, match="2 adapters are to stay together, but they are planned"):
        planned(together=[("a", "f")])


@pytest.fixture
def many(monkeypatch):
    monkeypatch.setattr(module, "MANY", 5)
    monkeypatch.setattr(module, "SIZE", 3)
    return [tiny_probe(seed) for seed in range(7)]


def test_many_probes_are_forecast_within_neighbourhoods(many):
    # by size: the norms are turned into an order by hand
    scaled = []
    for place, probe in enumerate(many):
        factor = 1.0 + (3 * place % 7)  # 1 4 7 3 6 2 5
        updates = {m: replace(u, B=factor * u.B) for m, u in probe.updates.items()}
        scaled.append(replace(probe, name=f"n{factor:.0f}", updates=updates))
    norms = update_norms(scaled)
    order = sorted(norms, key=norms.get)
    found = forecast_probes(scaled, predictor="none")
    sets = [tuple(p.name for p in one.probes) for one in found.each]
    assert [len(names) for names in sets] == [3, 2, 2]
    assert [name for names in sets for name in names] == order
    assert len(list(found.pairs())) == 6 + 2 + 2
    plan = found.plan(min_retention=0.5)
    assert {name for group in plan.groups for name in group.adapters} == set(norms)
    assert all(any(set(g.adapters) <= set(names) for names in sets) for g in plan.groups)
    assert any(
        "7 adapters: merges were looked for within 3 sets of up to 3" in r for r in plan.reasons
    )
    # each neighbourhood's forecasts are those of its adapters alone
    alone = forecast_probes(found.each[0].probes, predictor="none")
    one, other = sets[0][:2]
    assert found.forecast(one, (one, other), "mean") == alone.forecast(one, (one, other), "mean")
    assert len(found.signal_rows()) == 10
    assert set(found.forecast_rows()["adapter"]) == set(norms)
    with pytest.raises(NotForecastable, match="no adapter 'typo' here; there are"):
        found.forecast("typo", ("typo", one), "mean")
    with pytest.raises(NotForecastable, match="are in different neighbourhoods of 7 adapters"):
        found.forecast(one, (one, sets[1][0]), "mean")


def test_two_of_one_name_are_refused(many):
    with pytest.raises(ProbeError, match="a3"):
        forecast_probes([*many, many[3]], predictor="none")


def test_all_pairs_can_be_asked_for(many):
    found = forecast_probes(many, predictor="none", all_pairs=True)
    assert len(list(found.pairs())) == 42
    assert len(found.each) == 1


def test_few_groups_make_large_neighbourhoods(many):
    found = forecast_probes(many, predictor="none", max_adapters=2)
    assert [len(one.probes) for one in found.each] == [4, 3]
    assert len(found.plan(max_adapters=2, min_retention=0.5).groups) <= 2
