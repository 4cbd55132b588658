"""The planner against brute force, and its words against cases worked by hand."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeprobe.errors import PlanError
from mergeprobe.plan import Action, Forecast, Group, plan_dict, read_plan, write_plan
from mergeprobe.predict.costs import rank_for_budget, resident_parameters
from mergeprobe.predict.options import measured
from mergeprobe.predict.partition import BILLION, exact
from mergeprobe.predict.planner import AdapterInfo, group_names, make_plan
from mergeprobe.predict.search import local_search

SIZE = 1_200_000  # one adapter at rank 8


def info(*names: str, parameters: int = SIZE) -> list[AdapterInfo]:
    return [AdapterInfo(name, 8, parameters, f"adapters/{name}", "0" * 64) for name in names]


def forecast(retention: float, half_width: float = 0.0) -> Forecast:
    return Forecast(retention=retention, low=retention - half_width, high=retention + half_width)


def routed(name: str, *, retention: float = 1.0, rank: int | None = None) -> Group:
    return Group(
        name="c",
        adapters=(name,),
        action=Action.route,
        rank=rank,
        forecast={name: forecast(retention)},
        resident_parameters=SIZE if rank is None else SIZE * rank // 8,
    )


def merged(kept: dict[str, float], *, method="mean", parameters=SIZE, half_width=0.0) -> Group:
    return Group(
        name="c",
        adapters=tuple(kept),
        action=Action.merge,
        method=method,
        rank=8,
        forecast={name: forecast(value, half_width) for name, value in kept.items()},
        resident_parameters=parameters,
        reasons=("from the surrogate",),
    )


def offer(table: dict[str, list[Group]]):
    """Candidates from a table by joined names; sets it does not hold cannot be merged."""

    def candidates(names: tuple[str, ...]):
        return table.get("+".join(names), [routed(names[0])] if len(names) == 1 else [])

    return candidates


# --- the search -----------------------------------------------------------------------------


def set_partitions(items: list[int]):
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            left = [x for x in rest if x not in others]
            for parts in set_partitions(left):
                yield [(first, *others), *parts]


COSTS = {"adapters": 10**15, "parameters": 0}  # what an adapter costs beside its parameters


def brute_force(names, candidates, an_adapter):
    """(cost, worst, mean) of every choice of candidates over every set partition."""
    for parts in set_partitions(list(range(len(names)))):
        offers = [candidates(tuple(names[i] for i in part)) for part in parts]
        for groups in itertools.product(*offers):
            kept = [round(f.retention, 9) for group in groups for f in group.forecast.values()]
            cost = sum(an_adapter + g.resident_parameters for g in groups)
            yield (cost, min(kept), sum(kept) / len(kept))


def check_against_brute_force(names, candidates, floor, cost="adapters"):
    plan = make_plan(info(*names), candidates, min_retention=floor, cost=cost, tier="file")
    assert plan.cost == cost
    an_adapter = COSTS[cost]
    everything = list(brute_force(names, candidates, an_adapter))
    reaching = [row for row in everything if row[1] >= floor]
    assert reaching, "singles are routed at 1"
    least, worst, mean = min(reaching, key=lambda r: (r[0], -r[1], -round(r[2], 7)))
    kept = [f.retention for group in plan.groups for f in group.forecast.values()]
    assert an_adapter * len(plan.groups) + plan.resident_parameters == least
    assert min(kept) == pytest.approx(worst, abs=1e-9)
    assert sum(kept) / len(kept) == pytest.approx(mean, abs=1e-7)

    pareto = {
        (r, w)
        for r, w, _ in everything
        if not any((s <= r and v > w) or (s < r and v >= w) for s, v, _ in everything)
    }
    best_mean = {key: max(m for r, w, m in everything if (r, w) == key) for key in pareto}
    full = ((an_adapter + SIZE) * len(names), 1.0)

    def at(point):
        cost = an_adapter * len(point.groups) + point.resident_parameters
        return cost, point.worst_retention

    assert {at(point) for point in plan.frontier} == pareto | {full}
    for key in pareto:
        means = [point.mean_retention for point in plan.frontier if at(point) == key]
        assert max(means) == pytest.approx(best_mean[key], abs=1e-7)


@st.composite
def offers(draw):
    """A table of candidates for 1 to 4 adapters, on a coarse grid so that ties are common."""
    names = "abcd"[: draw(st.integers(1, 4))]
    retention = st.integers(-2, 11).map(lambda tenths: tenths / 10)
    table = {}
    for size in range(1, len(names) + 1):
        for members in itertools.combinations(names, size):
            groups = [routed(members[0])] if size == 1 else []
            for _ in range(draw(st.integers(0, 2))):
                kept = {name: draw(retention) for name in members}
                groups.append(merged(kept, parameters=SIZE // 4 * draw(st.integers(1, 9))))
            table["+".join(members)] = groups
    return list(names), offer(table), draw(st.integers(0, 10)) / 10


@pytest.mark.parametrize("cost", COSTS)
@settings(max_examples=100, deadline=None)
@given(case=offers())
def test_the_plan_and_its_frontier_equal_brute_force(cost, case):
    check_against_brute_force(*case, cost)


def test_what_is_made_small():
    """A merge that takes more parameters than its two adapters at a small rank."""
    table = {
        "a": [routed("a"), routed("a", retention=0.99, rank=2)],
        "b": [routed("b"), routed("b", retention=0.99, rank=2)],
        "a+b": [merged({"a": 0.95, "b": 0.95})],
    }
    plan = make_plan(info("a", "b"), offer(table), tier="model")
    assert [group.adapters for group in plan.groups] == [("a", "b")]
    small = make_plan(info("a", "b"), offer(table), cost="parameters", tier="model")
    assert [(group.action, group.rank) for group in small.groups] == [(Action.route, 2)] * 2
    assert small.resident_parameters == SIZE // 2
    assert (plan.cost, small.cost) == ("adapters", "parameters")


@settings(max_examples=60, deadline=None)
@given(offers(), st.integers(1, 4))
def test_a_limit_on_adapters_equals_brute_force(case, most):
    names, candidates, floor = case
    choices = []
    for parts in set_partitions(list(range(len(names)))):
        if len(parts) <= most:
            for groups in itertools.product(
                *(candidates(tuple(names[i] for i in p)) for p in parts)
            ):
                kept = [round(f.retention, 9) for group in groups for f in group.forecast.values()]
                choices.append((sum(g.resident_parameters for g in groups), min(kept)))
    if not choices:
        with pytest.raises(PlanError, match=f"no way to merge {len(names)} adapters into {most}"):
            make_plan(info(*names), candidates, max_adapters=most, tier="file")
        return
    plan = make_plan(
        info(*names),
        candidates,
        min_retention=floor,
        max_adapters=most,
        cost="parameters",
        tier="file",
    )
    assert len(plan.groups) <= most
    kept = min(f.retention for group in plan.groups for f in group.forecast.values())
    reaching = [row for row in choices if row[1] >= floor]
    if reaching:  # else the best worst case
        assert plan.resident_parameters == min(row[0] for row in reaching)
        assert kept >= floor
    else:
        assert kept == pytest.approx(max(row[1] for row in choices))


def random_offer(names, seed, *, methods=1):
    draw = random.Random(seed)
    harm = {pair: draw.random() ** 3 * 0.4 for pair in itertools.permutations(names, 2)}
    table = {}
    for size in range(2, len(names) + 1):
        for members in itertools.combinations(names, size):
            groups = []
            for method in range(methods):
                kept = {
                    a: 1 - sum(harm[a, b] for b in members if b != a) * (1 - method / 9)
                    for a in members
                }
                groups.append(merged(kept, parameters=SIZE + SIZE // 2 * method))
            table["+".join(members)] = groups
    return offer(table)


def test_eight_adapters_equal_brute_force_and_ask_once_per_set():
    names = list("abcdefgh")
    asked = []
    candidates = random_offer(names, seed=3)
    check_against_brute_force(names, candidates, 0.85)
    make_plan(info(*names), lambda s: (asked.append(s), candidates(s))[1], tier="file")
    assert len(asked) == len(set(asked)) == 255


def test_local_search_is_within_one_group_of_exact_on_ten():
    names = tuple("abcdefghij")
    missed = {True: 0, False: 0}
    for seed in range(3):
        options = measured(names, random_offer(names, seed, methods=2), "point", "parameters")
        for floor in (round(share * BILLION) for share in (0.6, 0.8, 0.9)):
            best = exact(options, 10)(floor)
            assert best is not None
            for thorough in missed:
                found = local_search(options, 10, thorough=thorough)(floor)
                assert found is not None
                assert found.worst >= floor
                assert best.parameters <= found.parameters <= best.parameters + SIZE
                missed[thorough] += found.parameters > best.parameters
    assert missed == {True: 2, False: 3}


def test_a_limit_holds_beyond_the_exact_search_too():
    names = [f"t{i:02}" for i in range(12)]
    candidates = random_offer(names[:8], seed=5)

    def any_size(members):
        if len(members) == 1:
            return [routed(members[0])]
        short = tuple(sorted({names[names.index(m) % 8] for m in members}))
        worst = min((f.retention for f in candidates(short)[0].forecast.values()), default=1.0)
        return [merged(dict.fromkeys(members, worst - 0.01 * len(members)))]

    for most in (1, 3, 5):
        plan = make_plan(info(*names), any_size, min_retention=0.99, max_adapters=most, tier="file")
        assert len(plan.groups) <= most
    with pytest.raises(PlanError, match="max_adapters is 0; expected at least 1"):
        make_plan(info(*names), any_size, max_adapters=0, tier="file")


def test_planted_families_are_found_beyond_the_exact_limit():
    """Twelve adapters of three families: 0.95 within a family, 0.2 across."""
    names = [f"{family}{i}" for i in range(4) for family in "xyz"]

    def candidates(members):
        if len(members) == 1:
            return [routed(members[0]), routed(members[0], retention=0.92, rank=4)]
        alike = len({name[0] for name in members}) == 1
        return [merged(dict.fromkeys(members, 0.95 if alike else 0.2))]

    plan = make_plan(info(*names), candidates, tier="file")
    assert {frozenset(group.adapters) for group in plan.groups} == {
        frozenset(f"{family}{i}" for i in range(4)) for family in "xyz"
    }
    assert plan.resident_parameters == 3 * SIZE
    parameters = [point.resident_parameters for point in plan.frontier]
    worsts = [point.worst_retention for point in plan.frontier]
    assert parameters == sorted(parameters)
    assert worsts == sorted(set(worsts))
    assert (parameters[0], worsts[0]) == (SIZE, 0.2)  # all in one
    assert (parameters[-1], worsts[-1]) == (12 * SIZE, 1.0)  # full routing
    assert plan == make_plan(info(*names), candidates, tier="file")


def test_ties_go_to_the_worst_case_then_the_mean():
    table = {
        "a+b": [
            merged({"a": 0.95, "b": 0.91}, method="low-worst"),
            merged({"a": 0.93, "b": 0.93}, method="low-mean"),
            merged({"a": 0.99, "b": 0.93}, method="best"),
        ]
    }
    plan = make_plan(info("a", "b"), offer(table), tier="file")
    assert [group.method for group in plan.groups] == ["best"]
    # where another group is the worst anyway, the mean decides: 0.91 and 0.99 beat 0.93 twice
    table["a+b"][2:] = [merged({"a": 0.91, "b": 0.99}, method="high-mean")]
    table["c"] = [routed("c", retention=0.9, rank=4), routed("c")]
    plan = make_plan(info("a", "b", "c"), offer(table), tier="file")
    assert [group.method for group in plan.groups] == ["high-mean", None]


def test_between_equally_cheap_partitions_the_more_certain_one_wins():
    """b merges with a, with more certainty, or with c, with a higher forecast; not with both."""
    table = {
        "a+b": [merged({"a": 0.93, "b": 0.93}, half_width=0.05)],
        "b+c": [merged({"b": 0.97, "c": 0.97}, half_width=0.4)],
        "a+c": [merged({"a": 0.89, "c": 0.89}, half_width=0.01)],  # certain to fall short
    }
    plan = make_plan(info(*"abc"), offer(table), tier="file")
    assert [group.name for group in plan.groups] == ["a+b", "c"]
    assert plan.frontier[0].worst_retention == 0.97  # the frontier is in the point forecast


def test_merging_all_can_pay_where_merging_two_does_not():
    """Ten alone at rank 1 hold 10/8 of what all ten merged at rank 8 hold, two only 2/8."""
    names = [f"t{i}" for i in range(10)]

    def candidates(members):
        if len(members) == 1:
            return [routed(members[0]), routed(members[0], retention=0.95, rank=1)]
        return [merged(dict.fromkeys(members, 0.95))]

    plan = make_plan(info(*names), candidates, tier="file")
    assert [group.name for group in plan.groups] == ["+".join(names)]


# --- what the plan says ---------------------------------------------------------------------

FIVE = {
    "math+code": [merged({"math": 0.98, "code": 0.97}, half_width=0.05)],
    "math+safety": [merged({"math": 0.9, "safety": 0.5})],
    "code+safety": [merged({"code": 0.8, "safety": 0.6})],
    "math+instruction": [merged({"math": 0.95, "instruction": 0.3})],
    "code+instruction": [merged({"code": 0.95, "instruction": 0.4})],
    "instruction+safety": [merged({"instruction": 0.8, "safety": 0.41}, half_width=0.31)],
}
NAMES = ("math", "code", "instruction", "safety")


def test_conflict_apart_harmony_together_and_why():
    plan = make_plan(
        info(*NAMES),
        offer(FIVE),
        tier="model",
        base="tiny",
        base_fingerprint="f" * 16,
        missing=("drift of 'math'",),
    )
    assert [group.name for group in plan.groups] == ["math+code", "instruction", "safety"]
    assert [group.method for group in plan.groups] == ["mean", None, None]
    assert plan.resident_parameters == 3 * SIZE
    assert plan.full_routing_parameters == 4 * SIZE
    assert (plan.tier, plan.base, plan.missing) == ("model", "tiny", ("drift of 'math'",))
    assert plan.adapters[0].path == "adapters/math"
    shared, *apart, own = plan.groups[0].reasons
    assert shared == (
        "'math' and 'code' share one adapter, merged by mean: forecast 0.97 worst-case "
        "('code', 0.97 (0.92 to 1.02)), saves 1.2 M parameters"
    )
    assert len(apart) == 2
    assert own == "from the surrogate"
    assert (
        plan.groups[1].reasons[0]
        == "'instruction' is kept whole and routed, so it keeps all of its gain"
    )
    conflict = (
        "'instruction' and 'safety' stay apart: merged by mean, 'safety' would keep 0.41 "
        "(0.10 to 0.72) of its gain, below the floor 0.90"
    )
    assert conflict in plan.groups[1].reasons
    assert conflict in plan.groups[2].reasons
    assert plan.reasons[:4] == (
        "4 adapters in 3 groups: 'math' and 'code' merged by mean; 'instruction' and 'safety' "
        "each routed",
        "forecast retention at worst 0.97 ('code'), on average 0.99",
        "holds 3.6 M parameters, 75 % of full routing's 4.8 M parameters",
        "the next cheaper choice (2.4 M parameters: math+code | instruction+safety) was refused: "
        "merged by mean, 'safety' would keep 0.41 (0.10 to 0.72) of its gain, below the floor 0.90",
    )
    assert "uncalibrated" in plan.reasons[-1]


def test_the_low_end_is_asked_for_when_confidence_is_lower(tmp_path):
    table = {"a+b": [merged({"a": 0.95, "b": 0.97}, half_width=0.1)]}
    assert len(make_plan(info("a", "b"), offer(table), tier="file").groups) == 1
    plan = make_plan(info("a", "b"), offer(table), tier="file", confidence="lower")
    assert len(plan.groups) == 2
    assert plan.confidence == "lower"
    assert [point.worst_retention for point in plan.frontier] == [0.85, 1.0]
    assert any("low end below the floor 0.90" in reason for reason in plan.reasons)
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan


def test_when_all_stay_alone_the_closest_pair_is_named():
    table = {
        "a+b": [merged({"a": 0.8, "b": 0.95}, half_width=0.1)],
        "a+c": [merged({"a": 0.95, "c": 0.897}, half_width=0.1)],
        "b+c": [merged({"b": 0.1, "c": 0.2})],
    }
    plan = make_plan(info("a", "b", "c"), offer(table), tier="file", calibrated=lambda group: True)
    assert [group.action for group in plan.groups] == ["route"] * 3
    # "0.90 below the floor 0.90" would read as a fault, so it says as many digits as it takes
    assert plan.reasons[3] == (
        "every adapter stays on its own: the closest pair was 'a' and 'c'; merged by mean, 'c' "
        "would keep 0.897 (0.797 to 0.997) of its gain, below the floor 0.900"
    )


@pytest.mark.parametrize("kept", [0.99, 0.9])  # 0.9: the floor itself is good enough
def test_a_merge_that_saves_nothing_is_not_chosen_and_said(kept):
    table = {"a+b": [merged({"a": kept, "b": kept}, parameters=2 * SIZE)]}
    plan = make_plan(info("a", "b"), offer(table), cost="parameters", tier="file")
    assert len(plan.groups) == 2
    assert plan.groups[0].reasons[1] == (
        f"'a' and 'b' could share one adapter: merged by mean, forecast {kept:.2f} worst-case; "
        "but that takes 2.4 M parameters, no less than apart (2.4 M parameters)"
    )
    assert any("closest pair was 'a' and 'b'" in reason for reason in plan.reasons)


def test_sets_that_cannot_be_merged_and_truncated_routing():
    table = {"a": [routed("a"), routed("a", retention=0.95, rank=2)]}
    plan = make_plan(info("a", "b"), offer(table), tier="weights")
    assert plan.resident_parameters == SIZE + SIZE // 4
    assert plan.groups[0].reasons[:2] == (
        "'a' is routed at rank 2 of 8: forecast 0.95 (0.95 to 0.95), saves 900 k parameters",
        "'a' and 'b' stay apart: there is no way to merge them",
    )
    assert plan.frontier[-1].resident_parameters == 2 * SIZE


def test_three_that_fit_in_pairs_only():
    pair = lambda a, b: [merged({a: 0.95, b: 0.95})]  # noqa: E731
    table = {
        "a+b": pair("a", "b"),
        "a+c": pair("a", "c"),
        "b+c": pair("b", "c"),
        "a+b+c": [merged({"a": 0.7, "b": 0.8, "c": 0.8})],
    }
    plan = make_plan(info("a", "b", "c"), offer(table), tier="file")
    assert sorted(len(group.adapters) for group in plan.groups) == [1, 2]
    assert any(
        "'a', 'b' and 'c' stay apart: merged by mean, 'a' would keep 0.70" in reason
        for reason in plan.groups[0].reasons
    )


def test_when_nothing_keeps_the_floor_the_best_worst_case_is_taken():
    table = {
        "a": [routed("a", retention=0.7, rank=4)],
        "b": [routed("b", retention=0.8, rank=4)],
        "a+b": [merged({"a": 0.75, "b": 0.75}), merged({"a": 0.1, "b": 0.2}, parameters=9)],
    }
    plan = make_plan(info("a", "b"), offer(table), tier="file")
    assert [group.adapters for group in plan.groups] == [("a", "b")]
    assert plan.resident_parameters == SIZE
    assert any(
        reason.startswith("no partition is forecast to keep the floor 0.90")
        for reason in plan.reasons
    )


def test_one_adapter():
    plan = make_plan(info("only"), offer({}), tier="file")
    assert [group.name for group in plan.groups] == ["only"]
    assert "there is only one adapter, so there is nothing to merge" in plan.reasons


def test_group_names():
    assert group_names([("math", "code"), ("safety",)], ["math", "code", "safety"]) == [
        "math+code",
        "safety",
    ]
    long = tuple(c * 30 for c in "abc")
    assert group_names([long, ("d",)], [*long, "d"]) == ["group-1", "d"]
    # an adapter may itself be called like a group
    assert group_names([("a", "b"), ("a+b",), ("group-1",)], ["a", "b", "a+b", "group-1"]) == [
        "group-2",
        "a+b",
        "group-1",
    ]
    assert group_names([("数学", "código pt")], ["数学", "código pt"]) == ["数学+código pt"]


@pytest.mark.parametrize(
    ("adapters", "options", "said"),
    [
        ([], {}, "no adapters"),
        (info("a", "a"), {}, "two adapters are called 'a'"),
        (info("../a"), {}, "'../a' cannot name"),
        (info("a"), {"min_retention": 90}, "min_retention is 90"),
        (info("a"), {"min_retention": float("nan")}, "min_retention is nan"),
    ],
)
def test_bad_input_is_one_line(adapters, options, said):
    with pytest.raises(PlanError, match=r"\A[^\n]+\Z") as caught:
        make_plan(adapters, offer({}), tier="file", **options)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("group", "said"),
    [
        (merged({"a": 1.0, "c": 1.0}), "is for ['a', 'c'] instead"),
        (
            merged({"a": 1.0, "b": 1.0}).model_copy(update={"forecast": {"a": forecast(1.0)}}),
            "has no forecast for 'b'",
        ),
        (
            merged({"a": 1.0, "b": 1.0}).model_copy(update={"resident_parameters": None}),
            "does not say its resident_parameters",
        ),
    ],
)
def test_a_candidate_that_cannot_be_judged_is_refused(group, said):
    with pytest.raises(PlanError, match="candidate") as caught:
        make_plan(info("a", "b"), offer({"a+b": [group]}), tier="file")
    assert said in str(caught.value)
    with pytest.raises(PlanError, match="'a' has no candidate of its own"):
        make_plan(info("a"), offer({"a": []}), tier="file")


# --- routing by prompt ----------------------------------------------------------------------


def test_routing_by_prompt_only_where_groups_separate():
    # math and code have the same prompts, but they share a group
    aucs = dict.fromkeys(itertools.combinations(NAMES, 2), 1.0) | {("math", "code"): 0.5}
    ask: dict[str, Any] = {"tier": "file", "route_by": "prompt"}
    plan = make_plan(info(*NAMES), offer(FIVE), prompt_auc=aucs, **ask)
    assert plan.route.by == "prompt"
    assert any("AUC 1.00 at worst" in reason for reason in plan.reasons)

    aucs["instruction", "safety"] = 0.9499
    with pytest.raises(PlanError, match=r"'instruction' and 'safety' cannot be told apart \(AUC 0"):
        make_plan(info(*NAMES), offer(FIVE), prompt_auc=aucs, **ask)
    aucs["safety", "instruction"] = 0.95  # either way round
    del aucs["instruction", "safety"]
    assert make_plan(info(*NAMES), offer(FIVE), prompt_auc=aucs, **ask).route.by == "prompt"
    del aucs["safety", "instruction"]
    with pytest.raises(PlanError, match="'instruction' or 'safety' has none"):
        make_plan(info(*NAMES), offer(FIVE), prompt_auc=aucs, **ask)
    assert make_plan(info(*NAMES), offer(FIVE), tier="file").route.by == "name"


# --- sets that one answer needs -------------------------------------------------------------


def logits(kept: dict[str, float]) -> Group:
    group = merged(kept, method="mixture", parameters=SIZE * len(kept))
    return group.model_copy(update={"action": Action.logits, "rank": None})


def test_adapters_that_must_stay_together_compose_logits_where_their_merge_fails():
    table = {
        "a+b": [merged({"a": 0.2, "b": 0.95}), logits({"a": 0.92, "b": 0.97})],
        "a+c": [merged({"a": 0.99, "c": 0.99})],
        "a+b+c": [merged({"a": 0.1, "b": 0.9, "c": 0.9})],
    }
    apart = make_plan(info("a", "b", "c"), offer(table), tier="model")
    assert [group.adapters for group in apart.groups] == [("a", "c"), ("b",)]
    plan = make_plan(info("a", "b", "c"), offer(table), together=[("b", "a")], tier="model")
    assert [(g.adapters, g.action) for g in plan.groups] == [
        (("a", "b"), Action.logits),
        (("c",), Action.route),
    ]
    assert plan.resident_parameters == 3 * SIZE
    # a lower floor takes the merge, which holds one adapter
    plan = make_plan(
        info("a", "b", "c"), offer(table), together=[("a", "b")], min_retention=0.2, tier="model"
    )
    assert plan.groups[0].action is Action.merge
    # sets that overlap are one
    plan = make_plan(
        info("a", "b", "c"), offer(table), together=[("a", "b"), ("b", "c")], tier="model"
    )
    assert [group.adapters for group in plan.groups] == [("a", "b", "c")]
    with pytest.raises(PlanError, match=r"'d' is to stay .* not planned for; known are a, b, c"):
        make_plan(info("a", "b", "c"), offer(table), together=[("a", "d")], tier="model")
    with pytest.raises(PlanError, match=r"\['a'\] are to stay together: name at least two"):
        make_plan(info("a", "b", "c"), offer(table), together=[("a",)], tier="model")
    with pytest.raises(PlanError, match="no way to merge 3 adapters with b, c together"):
        make_plan(info("a", "b", "c"), offer({}), together=[("b", "c")], tier="model")


def test_together_in_a_local_search():
    """Twelve adapters: every pair merges at 0.99, but for k0 and k1, which must be together."""
    names = [f"k{i}" for i in range(12)]

    def candidates(group):
        if len(group) == 1:
            return [routed(group[0])]
        clash = {"k0", "k1"} <= set(group)
        found = [merged(dict.fromkeys(group, 0.3 if clash else 0.99))]
        return [*found, logits(dict.fromkeys(group, 0.95))] if set(group) == {"k0", "k1"} else found

    plan = make_plan(info(*names), candidates, together=[("k0", "k1")], tier="model")
    assert [(g.adapters, g.action) for g in plan.groups] == [
        (("k0", "k1"), Action.logits),
        (tuple(names[2:]), Action.merge),
    ]


# --- costs ----------------------------------------------------------------------------------


def test_costs_by_hand():
    shapes = {"q": (10, 6), "up": (20, 10)}
    assert resident_parameters(shapes, 4) == 4 * 16 + 4 * 30
    assert resident_parameters(shapes, {"q": 8, "up": 4}) == 8 * 16 + 4 * 30
    with pytest.raises(PlanError, match="module 'up'"):
        resident_parameters(shapes, {"q": 8})
    # two adapters cost 92 per rank: 8 ranks fit in 739, 7 in 735
    assert rank_for_budget([shapes, shapes], 736) == 8
    assert rank_for_budget([shapes, shapes], 735) == 7
    assert rank_for_budget([shapes], 3) == 1
    with pytest.raises(PlanError, match="no adapter has a module"):
        rank_for_budget([{}], 10)


def test_the_planner_needs_no_torch():
    code = "import sys, mergeprobe.predict.planner as p; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_plan_is_json_ready():
    plan = make_plan(info(*NAMES), offer(FIVE), tier="file")
    assert plan_dict(plan)["groups"][0]["reasons"]
