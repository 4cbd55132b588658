"""Decisions on held-out cohorts: what the plan from early forecasts keeps and costs, against every
other way to deploy all its adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import polars as pl

from mergeprobe.bench.tables.bank import Bank
from mergeprobe.bench.tables.forecasters import FILE, MODEL
from mergeprobe.bench.tables.measured import (
    HALVES,
    JOINT,
    Cohort,
    Names,
    Part,
    Serving,
    best_within,
    known,
    planned,
    read_cohort,
    scored,
    serving_of,
    truncated_ranks,
    truncated_retentions,
)
from mergeprobe.errors import NotForecastable
from mergeprobe.plan import Forecast
from mergeprobe.predict.baselines import Fitted
from mergeprobe.predict.feature_rows import feature_matrix
from mergeprobe.predict.learning import Rows
from mergeprobe.predict.weighing import WEIGHTED

POINT = 0.05
FLOOR = 0.9
PLAN_METHODS = WEIGHTED
"""What the planner may choose from: the merges whose sets are forecast in both tiers."""
PLANS: dict[str, tuple[str, Literal["point", "lower"]]] = {
    "plan, model tier": (MODEL, "point"),
    "plan, file tier": (FILE, "point"),
    "plan, model tier, by the interval's low end": (MODEL, "lower"),
    "plan, file tier, by the interval's low end": (FILE, "lower"),
}
ROUTING = "full routing by name"
BEST = {
    "worst": "best merge method, chosen by worst case on the other half",
    "mean": "best merge method, chosen by mean on the other half",
}
TUNED = "one merge of all, its length chosen by worst case on the other half"
ORACLE = "oracle plan, cheapest that keeps 0.9 on the other half"


@dataclass(frozen=True)
class Result:
    """One strategy in one cohort. on_halves: scored on the half that it was not chosen on, both
    ways, averaged. half_mean, half_worst: of a plan, the same average, to compare with those (the
    worst of fewer items is lower). forecast: a plan's forecast worst. groups: in words."""

    strategy: str
    cohort: str
    mean: float
    worst: float
    parameters: float
    full: int
    on_halves: bool = False
    half_mean: float = np.nan
    half_worst: float = np.nan
    forecast: float = np.nan
    groups: str = ""

    @property
    def share(self) -> float:
        return self.parameters / self.full


@dataclass(frozen=True)
class Decided:
    """results: of every strategy and cohort. needs: strategy -> what is lacking to compute it."""

    results: Sequence[Result]
    needs: Mapping[str, str]

    def of(self, strategy: str) -> dict[str, Result]:
        return {r.cohort: r for r in self.results if r.strategy == strategy}

    @property
    def strategies(self) -> list[str]:
        return list(dict.fromkeys(result.strategy for result in self.results))


def decide(bank: Bank, models: Mapping[str, Fitted], *, point: float = POINT) -> Decided:
    """Every strategy on every held-out cohort. models: forecasters by name, fitted without
    them."""
    results: list[Result] = []
    needs: dict[str, str] = {}
    for name in bank.held_out:
        tables = bank.cohort(name)
        cohort = read_cohort(tables, name)
        if not cohort.defined:
            needs[f"cohort {name}"] = "an adapter whose own gain is clear of its noise"
            continue
        results += without_a_plan(cohort, needs)
        for label, (forecaster, confidence) in PLANS.items():
            said = forecasts_of(cohort, tables, models[forecaster], point)
            if said is None:
                needs[label] = f"probes at {point:.0%} of training in {name}"
                continue
            plan = planned(cohort, said, PLAN_METHODS, floor=FLOOR, confidence=confidence)
            results += with_a_plan(cohort, label, serving_of(plan), _worst(plan), needs)
    return Decided(results, needs)


def _worst(plan) -> float:
    """The lowest point forecast of the plan's merged adapters; 1 where nothing is merged."""
    return min(f.retention for group in plan.groups for f in group.forecast.values())


def forecasts_of(cohort: Cohort, tables: Mapping[str, pl.DataFrame], model: Fitted, point: float):
    """Forecasts of every measured merge from the probes at `point`; None without rows there."""
    wanted: list[tuple[str, Names, str]] = [
        (name, group, method)
        for method, group, _ in cohort.kept
        if method in PLAN_METHODS and len(group) > 1
        for name in group
    ]
    pairs = tables["pairs"].filter((pl.col("point") - point).abs() < 1e-9)
    if not pairs.height or not wanted:
        return None
    requests = pl.DataFrame(
        {
            "cohort": [cohort.name] * len(wanted),
            "point": [pairs["point"][0]] * len(wanted),
            "i": [name for name, _, _ in wanted],
            "others": [[o for o in group if o != name] for name, group, _ in wanted],
            "method": [method for _, _, method in wanted],
            "size": [len(group) for _, group, _ in wanted],
        }
    )
    values = feature_matrix(requests, pairs)
    nothing = np.full(len(wanted), np.nan)
    guess = model(Rows(requests, values, nothing, np.ones(len(wanted))))
    if not np.isfinite(guess.retention).all():
        raise NotForecastable(f"cohort '{cohort.name}': some merges have no forecast")
    found: dict[tuple[str, Names, str], Forecast] = {}
    for key, said in zip(wanted, guess.forecasts(), strict=True):
        found[key] = said

    def forecast(name: str, group: Names, method: str) -> Forecast:
        return found[name, group, method]

    return forecast


# ------------------------------------------------------------------------------------- strategies
def without_a_plan(cohort: Cohort, needs: dict[str, str]) -> list[Result]:
    """Every merge of all adapters, the best of them, the joint adapter, full routing, the oracle
    by the planner's rule."""
    everyone = cohort.names
    found = []
    methods = cohort.methods(everyone)
    if not methods:
        needs["merges of all adapters"] = f"the whole set measured in {cohort.name}"
    for method in methods:
        serving = [(everyone, method)]
        found.append(_result(cohort, f"{method} of all", serving))
    for criterion, label in BEST.items():
        if methods and _halves(cohort):
            choices = [[(everyone, method)] for method in methods]
            found.append(_chosen(cohort, label, choices, criterion))
    if _halves(cohort) and cohort.tuned:
        found += _tuned(cohort)
    else:
        needs[TUNED] = f"merges at other lengths in {cohort.name}"
    if cohort.has(JOINT, everyone):
        serving = [(everyone, JOINT)]
        found.append(_result(cohort, "joint adapter", serving))
    else:
        needs["joint adapter"] = f"a joint adapter in {cohort.name}"
    alone: Serving = [((name,), None) for name in everyone]
    found.append(_result(cohort, ROUTING, alone))
    if _halves(cohort):
        found.append(_oracle(cohort))
    else:
        needs[ORACLE] = f"retention on halves of the test items in {cohort.name}"
    return found


def with_a_plan(
    cohort: Cohort, label: str, serving: Serving, forecast: float, needs: dict[str, str]
) -> list[Result]:
    """The plan, and what else its parameters could buy."""
    halves = [cohort.score(serving, on) for _, on in HALVES] if _halves(cohort) else []
    own = replace(
        _result(cohort, label, serving),
        half_mean=_mean([score.mean for score in halves]),
        half_worst=_mean([score.worst for score in halves]),
        forecast=forecast,
    )
    found, budget = [own], cohort.cost(serving)
    ranks = truncated_ranks(cohort, budget)
    cut = f"routing truncated to the parameters of: {label}"
    if ranks is None:
        needs[cut] = f"adapters measured at smaller ranks in {cohort.name}"
    else:
        score = scored(truncated_retentions(cohort, ranks))
        cost = sum(cohort.single(name, rank) for name, rank in ranks.items())
        found.append(Result(cut, cohort.name, score.mean, score.worst, cost, cohort.full))
    if _halves(cohort):
        found.append(_best_within(cohort, label, budget))
    return found


def _result(cohort: Cohort, label: str, serving: Serving) -> Result:
    score, cost = cohort.score(serving), cohort.cost(serving)
    groups = " | ".join(f"{'+'.join(names)}{f' ({m})' if m else ''}" for names, m in serving)
    return Result(label, cohort.name, score.mean, score.worst, cost, cohort.full, groups=groups)


def _chosen(cohort: Cohort, label: str, choices: Sequence[Serving], criterion: str) -> Result:
    """The best choice on one half, scored on the other, both ways, averaged."""
    servings = {}
    for choose, _ in HALVES:
        scores = [getattr(cohort.score(choice, choose), criterion) for choice in choices]
        servings[choose] = choices[int(np.nanargmax(scores))]
    return _over_halves(cohort, label, servings)


def _tuned(cohort: Cohort) -> list[Result]:
    """Each rule that was measured at several lengths, the length with the best worst case on one
    half scored on the other; and the best of all of them, chosen alike."""
    everyone = cohort.names
    rules: dict[str, list[Mapping[Part, Mapping[str, float]]]] = {}
    for (method, _), kept in cohort.tuned.items():
        own = [cohort.kept[method, everyone, None]] if cohort.has(method, everyone) else []
        rules.setdefault(method, own).append(kept)
    found = [(f"{method} of all, length tuned", choices) for method, choices in rules.items()]
    found.append((TUNED, [kept for choices in rules.values() for kept in choices]))
    results = []
    for label, choices in found:
        scores = []
        for choose, on in HALVES:
            best = max(choices, key=lambda kept, part=choose: scored(kept[part]).worst)
            scores.append(scored(best[on]))
        mean, worst = (_mean([getattr(s, field) for s in scores]) for field in ("mean", "worst"))
        cost = cohort.costs[next(iter(rules)), everyone]
        results.append(Result(label, cohort.name, mean, worst, cost, cohort.full, on_halves=True))
    return results


def _oracle(cohort: Cohort) -> Result:
    servings = {
        choose: serving_of(planned(cohort, known(cohort, choose), PLAN_METHODS, floor=FLOOR))
        for choose, _ in HALVES
    }
    return _over_halves(cohort, ORACLE, servings)


def oracle_label(plan: str) -> str:
    return f"oracle of at most the parameters of: {plan}"


def _best_within(cohort: Cohort, plan: str, budget: int) -> Result:
    servings = {choose: best_within(cohort, PLAN_METHODS, choose, budget) for choose, _ in HALVES}
    return _over_halves(cohort, oracle_label(plan), servings)


def _over_halves(cohort: Cohort, label: str, servings: Mapping) -> Result:
    scores = [cohort.score(servings[choose], on) for choose, on in HALVES]
    costs = [cohort.cost(serving) for serving in servings.values()]
    return Result(
        label,
        cohort.name,
        mean=_mean([score.mean for score in scores]),
        worst=_mean([score.worst for score in scores]),
        parameters=_mean(costs),
        full=cohort.full,
        on_halves=True,
    )


def _halves(cohort: Cohort) -> bool:
    """Whether retention on halves is known."""
    return any(parts["even"] for parts in cohort.kept.values())


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else np.nan
