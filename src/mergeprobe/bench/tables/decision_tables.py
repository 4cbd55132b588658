"""The page of decisions: strategies, and what the plan gains or loses against each."""

from __future__ import annotations

import numpy as np

from mergeprobe.bench.tables.bank import Bank
from mergeprobe.bench.tables.decisions import (
    BEST,
    FLOOR,
    ORACLE,
    PLAN_METHODS,
    PLANS,
    POINT,
    ROUTING,
    TUNED,
    Decided,
    Result,
    oracle_label,
)
from mergeprobe.bench.tables.page import (
    DASH,
    Figure,
    Needs,
    Page,
    Part,
    Table,
    between,
    listed,
    number,
    percent,
    with_error,
)
from mergeprobe.bench.tables.picture import Mark, Panel, Series, drawn
from mergeprobe.bench.tables.resample import cluster_interval
from mergeprobe.bench.tables.skill import Options

NEVER = {
    "Latency per token": "timed runs, which rows do not hold; what each way to deploy costs in "
    "tokens a second is measured by benchmarks/deployments.py ([page](deployments.md))",
}
CUT = "routing truncated to the parameters of: "


def decisions_page(bank: Bank, decided: Decided | None, options: Options) -> Page:
    title = "Decisions"
    if decided is None or not decided.results:
        needs = "frozen cohorts (h…) with outcomes, and cohorts to train on (t…)"
        lacking = [Needs(what, why) for what, why in decided.needs.items()] if decided else []
        return Page("decisions.md", title, "", [Needs("Plan against rivals", needs), *lacking])
    parts: list[Part] = [strategies_table(bank, decided, options)]
    picture = trade_off(bank, decided, options)
    parts += [picture] if picture else []
    parts += [differences(bank, decided, plan, options) for plan in PLANS if decided.of(plan)]
    parts += [regret(bank, decided, options), plans(bank, decided, options)]
    parts += [Needs(what, why) for what, why in decided.needs.items()]
    parts += [Needs(what, why) for what, why in NEVER.items()]
    return Page("decisions.md", title, INTRO, parts)


INTRO = (
    f"The plan made from forecasts at {percent(POINT)} of training, with the floor {FLOOR} for the "
    "worst-case retention, against other ways to deploy all adapters of a held-out cohort. "
    f"Partitions are restricted to measured sets; merges to {' and '.join(PLAN_METHODS)}. "
    "Retention is clipped to [−1, 1.2]; adapters whose own gain is not clear of its noise are left "
    "out of a cohort's mean and worst case. What is chosen by measured retention is chosen on one "
    "half of the test items and scored on the other, both ways. Forecasts are the predictor's own; "
    "in use, at the model tier, those of sets are averaged with the set's own early merge, which "
    "these rows do not hold."
)


def _caption(bank: Bank, options: Options) -> str:
    repeats = [name for name in bank.held_out if name.endswith("-again")]
    said = f" {listed(repeats)} repeats another one's tasks." if repeats else ""
    return (
        f"`{options.command}`, seed {options.seed}. {len(bank.held_out)} held-out cohorts "
        f"({listed(bank.held_out)}), one run an adapter; the predictor was "
        f"trained on {listed(bank.trained)}.{said}"
    )


def _mean_and_error(values: list[float]) -> str:
    """Mean ± standard error over cohorts."""
    known = np.array([value for value in values if np.isfinite(value)])
    if not len(known):
        return DASH
    error = known.std(ddof=1) / np.sqrt(len(known)) if len(known) > 1 else np.nan
    return with_error(float(known.mean()), float(error))


def strategies_table(bank: Bank, decided: Decided, options: Options) -> Table:
    rows = []
    for name in decided.strategies:
        found = list(decided.of(name).values())
        kept = sum(result.worst >= FLOOR for result in found)
        rows.append(
            [
                name,
                _mean_and_error([r.mean for r in found]),
                _mean_and_error([r.worst for r in found]),
                _mean_and_error([r.forecast for r in found]),
                f"{kept} of {len(found)}",
                number(float(np.mean([r.parameters for r in found])) / 1e6, 3),
                _mean_and_error([r.share for r in found]),
            ]
        )
    columns = (
        *("strategy", "mean retention", "worst retention", "forecast worst"),
        *(f"cohorts that keep {FLOOR}", "resident parameters, millions"),
        "share of full routing's",
    )
    caption = f"{_caption(bank, options)} Mean ± SE over cohorts."
    return Table("Strategies", caption, columns, rows)


def rivals(decided: Decided, plan: str) -> list[str]:
    """The strategies that a plan is compared with: all but other plans and what belongs to them."""
    own = (CUT + plan, oracle_label(plan))
    others = {*PLANS, *(CUT + p for p in PLANS), *(oracle_label(p) for p in PLANS)}
    return [name for name in decided.strategies if name in own or name not in others]


def _paired(mine: Result, other: Result) -> tuple[float, float, float]:
    """(mean, worst, share of parameters): plan − rival, on the same items."""
    ours = (mine.half_mean, mine.half_worst) if other.on_halves else (mine.mean, mine.worst)
    return ours[0] - other.mean, ours[1] - other.worst, mine.share - other.share


def differences(bank: Bank, decided: Decided, plan: str, options: Options) -> Table:
    mine, rows = decided.of(plan), []
    for name in rivals(decided, plan):
        other = decided.of(name)
        shared = [cohort for cohort in mine if cohort in other]
        each = [_paired(mine[cohort], other[cohort]) for cohort in shared]
        if not each:
            continue
        columns = [list(column) for column in zip(*each, strict=True)]
        shown = [_difference(column, options) for column in columns]
        rows.append([name, *shown, str(len(shared))])
    columns = ("plan −", "mean retention", "worst retention", "share of parameters", "cohorts")
    caption = (
        f"{_caption(bank, options)} In brackets 90 % intervals: {options.runs} bootstrap samples "
        "of whole cohorts; with so few they are rough; no SD or SE."
    )
    return Table(f"Differences: {plan}", caption, columns, rows)


def _difference(values: list[float], options: Options) -> str:
    known = [value for value in values if np.isfinite(value)]
    if not known:
        return DASH
    low, high = cluster_interval(known, runs=options.runs, seed=options.seed)
    shown = number(float(np.mean(known)))
    return f"{shown} {between(low, high)}" if np.isfinite(low) else shown


def regret(bank: Bank, decided: Decided, options: Options) -> Table:
    """Best measured partition of at most the plan's parameters − plan; and what the plan saves."""
    rows = []
    for plan in PLANS:
        mine, best = decided.of(plan), decided.of(oracle_label(plan))
        shared = [cohort for cohort in mine if cohort in best]
        each = [_paired(mine[cohort], best[cohort]) for cohort in shared]
        saved = [1.0 - result.share for result in mine.values()]
        if mine:
            rows.append(
                [
                    plan,
                    _difference([-pair[0] for pair in each], options),
                    _difference([-pair[1] for pair in each], options),
                    _difference(saved, options),
                ]
            )
    columns = ("plan", "regret, mean", "regret, worst case", "share of parameters saved")
    caption = (
        f"{_caption(bank, options)} Regret: the best measured partition of at most the plan's "
        "parameters, chosen on one half and scored on the other, minus the plan on that half. In "
        f"brackets 90 % intervals: {options.runs} bootstrap samples of whole cohorts; no SD or SE."
    )
    return Table("Regret and savings", caption, columns, rows)


def plans(bank: Bank, decided: Decided, options: Options) -> Table:
    rows = []
    for plan in PLANS:
        for cohort, result in decided.of(plan).items():
            scores = (result.forecast, result.worst, result.mean, result.share)
            rows.append([f"{cohort}, {plan}", result.groups, *map(number, scores)])
    columns = (
        *("cohort, plan", "groups", "forecast worst", "worst", "mean"),
        "share of full routing's parameters",
    )
    return Table(
        "The plans", f"{_caption(bank, options)} No SD or SE: single plans.", columns, rows
    )


FAMILIES = {
    "plan": ("plan, model tier", "plan, file tier"),
    "one merge of all": (),
    "best merge method": (*BEST.values(), TUNED),
    "joint adapter": ("joint adapter",),
    "routing": (ROUTING, CUT + "plan, model tier"),
    "oracle": (ORACLE,),
}


def trade_off(bank: Bank, decided: Decided, options: Options) -> Figure | None:
    series = []
    merges = tuple(name for name in decided.strategies if name.endswith(" of all"))
    for label, names in FAMILIES.items():
        marks = []
        for name in names or merges:
            found = list(decided.of(name).values())
            if found:
                worst = np.array([r.worst for r in found])
                error = worst.std(ddof=1) / np.sqrt(len(worst)) if len(worst) > 1 else 0.0
                y, x = float(worst.mean()), float(np.mean([r.share for r in found]))
                marks.append(Mark(x, y, y - error, y + error, name))
        if marks:
            series.append(Series(label, marks))
    if not series:
        return None
    panel = Panel(
        "Worst-case retention against cost",
        "share of full routing's parameters",
        "worst retention of a cohort",
        series,
        x_range=(0.0, 1.05),
        y_range=(-1.0, 1.1),
        x_ticks=[(v, f"{v:g}") for v in (0.0, 0.25, 0.5, 0.75, 1.0)],
        y_ticks=[(v, f"{v:g}".replace("-", "−")) for v in (-1.0, -0.5, 0.0, 0.5, 1.0)],
    )
    caption = f"{_caption(bank, options)} Means over cohorts; whiskers: ± SE."
    return Figure("decisions.svg", "What is kept at what cost", caption, drawn([panel]))
