"""Skill elsewhere: in larger sets, and at learning rates, ranks and horizons that were not trained
on; with what cross_validation adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mergeprobe.bench.tables.bank import Bank, near
from mergeprobe.bench.tables.by_setting import SIMPLE, by_setting, caption, scored
from mergeprobe.bench.tables.ceiling import CEILING, repeated
from mergeprobe.bench.tables.cross_validation import cross_validated, one_task_unseen, other_base
from mergeprobe.bench.tables.forecasters import FILE, MODEL, OWN, capped, not_own, part_of, plain
from mergeprobe.bench.tables.page import (
    DASH,
    Needs,
    Page,
    Part,
    Table,
    estimate,
    listed,
    number,
    percent,
)
from mergeprobe.bench.tables.skill import METHODS, POINTS, SCORED, UNCONDITIONAL, Options, cells
from mergeprobe.errors import NotForecastable
from mergeprobe.predict.baselines import BASELINES, Fitter
from mergeprobe.predict.learning import Rows
from mergeprobe.predict.scores import Tested
from mergeprobe.predict.splits import Fold, unseen_cohorts
from mergeprobe.predict.validate import out_of_fold

AS_MEASURED = ("early merge, as measured", "extrapolated merge, as measured")
PAIRED = ("Spearman", "within partners", "R2", "MAE")
PAIRED_NAMES = ("Spearman", "within partners", "R²", "MAE")


def transfer_page(
    bank: Bank, tested: Mapping[str, Tested] | None, options: Options, say: Callable[[str], None]
) -> Page:
    """tested: the held-out forecasts of skill_page, for larger sets."""
    rows = bank.rows
    early = np.any([near(rows, point) for point in POINTS], axis=0)
    pairs = rows.pick(early & (rows.size == 2))
    parts: list[Part] = larger_sets(bank, tested, options)
    say("unseen learning rates, ranks, horizons, domains and sizes")
    parts += settings(bank, early, options)
    say("cohorts apart")
    parts.append(cohorts_apart(bank, pairs, options))
    say("cross-validation over all cohorts")
    parts += cross_validated(pairs, bank.measured, options)
    say("one task unseen")
    parts.append(one_task_unseen(pairs, options))
    say("unseen base")
    parts.append(other_base(pairs, options))
    return Page("transfer.md", "Transfer", INTRO, parts)


INTRO = (
    "Where the forecast is used on more than the frozen pairs. Tables that compare many fits take "
    "one fixed mix of ridge and trees that sees every signal (“fixed mix”), without the nested "
    "choice of the shipped predictor and so without intervals of its own."
)


# ------------------------------------------------------------------------------------ larger sets
def larger_sets(bank: Bank, tested: Mapping[str, Tested] | None, options: Options) -> list[Part]:
    title = "Sets of three, five and six: held-out cohorts"
    if tested is None:
        return [Needs(title, "held-out cohorts (h…)")]
    names = (MODEL, FILE, OWN, *SIMPLE)
    sizes = [size for size in sorted(set(tested[MODEL].rows.size.tolist())) if size > 2]
    out, differences = [], []
    for size in sizes:
        for point in POINTS:
            rows = tested[MODEL].rows
            mask = (rows.size == size) & near(rows, point) & np.isin(rows.method, METHODS)
            if mask.sum() < 3:
                continue
            part = part_of({n: t for n, t in tested.items() if n in names}, mask)
            found = scored(part, options)
            label = f"{size} adapters, {percent(point)}"
            shown = dict(found)
            if (twins := _twins(bank, size, point)) is not None:
                shown[CEILING] = scored({CEILING: twins}, options)[CEILING]
            for name, each in shown.items():
                out.append([f"{label}, {name}", *cells(each, found[UNCONDITIONAL])])
            for name in (OWN, *SIMPLE):
                each = [found[MODEL].estimate(m, against=found[name]) for m in PAIRED]
                differences.append([f"{label}, {name}", *map(estimate, each)])
    if not out:
        return [Needs(title, "held-out rows of sets of three or more")]
    said = caption(f"{bank.said('All tasks unseen')}; mean and sum together.", options)
    lacking = [str(size) for size in (3, 5, 6) if size not in sizes]
    said += f" No sets of {', '.join(lacking)} in the rows." if lacking else ""
    against = ("model tier against", *PAIRED_NAMES)
    return [
        Table(title, said, ("size, point, forecast", *SCORED), out),
        Table("The same: paired differences", said, against, differences),
    ]


def _twins(bank: Bank, size: int, point: float) -> Tested | None:
    twins = repeated(bank.rows, bank.measured)
    if twins is None:
        return None
    rows = twins.rows
    mask = (rows.size == size) & near(rows, point) & np.isin(rows.method, METHODS)
    return twins.pick(mask) if mask.sum() > 2 else None


# ---------------------------------------------------------------------- settings never trained on
SETTINGS = {
    "learning_rates": "learning rate",
    "ranks": "rank",
    "steps": "horizon (steps)",
    "domains": "domain",
}


def settings(bank: Bank, early: np.ndarray, options: Options) -> list[Part]:
    """Held-out rows whose i has a learning rate (rank, …): forecast with and without training
    rows that have it in any role. Both tasks are unseen in either."""
    title = "Unseen learning rate, rank, horizon, domain, set size: held-out cohorts"
    fold = bank.held_out_fold()
    if fold is None:
        return [Needs(title, "held-out cohorts (h…)")]
    rows = bank.rows
    fit = plain("model", seed=options.seed)
    pairs = early & (rows.size == 2)
    train, test = fold.train & pairs, fold.test & pairs
    out = []
    for column, name in SETTINGS.items():
        without = list(_without(rows, column, train, test))
        if not without:
            needs = f"needs two values of it, both in training and in held-out rows, {name}"
            out.append([needs, DASH, *(DASH for _ in range(3 * len(PAIRED)))])
            continue
        out.append(_compared(name, rows, fit, train, without, options))
    small, larger = early & (rows.size == 2), early & (rows.size > 2)
    if (fold.test & larger).any():
        folds = [Fold("larger sets", fold.train & small, fold.test & larger)]
        out.append(
            _compared("set size (from pairs)", rows, fit, fold.train & early, folds, options)
        )
    columns = ["unseen", "rows"]
    columns += [f"{m}: {how}" for m in PAIRED_NAMES for how in ("seen", "unseen", "difference")]
    said = caption(
        f"{bank.said('Both tasks unseen')}; {', '.join(map(percent, POINTS))} of training, all "
        "methods; fixed mix. Seen: trained on all rows; unseen: on those without the tested "
        "value in any role, which are fewer; difference: unseen − seen, paired.",
        options,
    )
    return [Table(title, said, columns, out)]


def _without(rows: Rows, column: str, train: np.ndarray, test: np.ndarray) -> Sequence[Fold]:
    values, held = rows.holds(column)
    own = np.array([row[0] for row in rows.table[column].to_list()])
    folds = []
    for place, value in enumerate(values):
        mine, left = test & (own == value), train & ~held[:, place]
        if mine.any() and left.sum() > 30 and (train & held[:, place]).any():
            folds.append(Fold(f"{column} {value}", left, mine))
    return folds


def _compared(
    name: str,
    rows: Rows,
    fit: Fitter,
    train: np.ndarray,
    folds: Sequence[Fold],
    options: Options,
) -> list[str]:
    seen = [Fold(fold.name, train, fold.test) for fold in folds]
    same_train = fit(rows.pick(train))  # one fit serves every fold of "seen"
    both = {
        "unseen": out_of_fold(rows, folds, fit),
        "seen": out_of_fold(rows, seen, lambda _: same_train),
    }
    found = scored(both, options)
    cells_ = []
    for metric in PAIRED:
        cells_ += [number(found["seen"].value[metric]), number(found["unseen"].value[metric])]
        cells_.append(estimate(found["unseen"].estimate(metric, against=found["seen"])))
    return [name, str(len(both["seen"].rows)), *cells_]


# ---------------------------------------------------------------------------------- cohorts apart
def cohorts_apart(bank: Bank, pairs: Rows, options: Options) -> Part:
    """pairs: at POINTS, of every cohort."""
    title, apart = "Cohorts apart: real data", bank.apart()
    if not apart:
        return Needs(title, "a cohort that is neither trained on (t…) nor held out (h…)")
    others = (*bank.trained, *bank.held_out)
    try:
        folds = unseen_cohorts(pairs, [(name,) for name in apart], among=others)
    except NotForecastable as problem:
        return Needs(title, f"cohorts that differ in all families ({problem})")
    fitters = {
        MODEL: capped("model", seed=options.seed),
        FILE: capped("file", seed=options.seed),
        OWN: plain("model", without=not_own(), seed=options.seed),
        **{name: BASELINES[name] for name in (*SIMPLE, *AS_MEASURED)},
    }
    rows = []
    for fold in folds:
        tested = {name: out_of_fold(pairs, [fold], fitter) for name, fitter in fitters.items()}
        rows += [[f"{fold.name}, {row[0]}", *row[1:]] for row in by_setting(tested, options)]
    said = caption(
        f"Forecast by pairs of {listed(others)} that share no family with it. Cohort `real`: "
        "items of public data sets, longer than all others. The predictor chooses among three "
        "candidates, inside.",
        options,
    )
    return Table(title, said, ("cohort, point, method, forecast", *SCORED), rows)
