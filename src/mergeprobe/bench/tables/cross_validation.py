"""Skill by cross-validation over all cohorts, with one task unseen, on another base; and the test
for leaks."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from mergeprobe.bench.tables.by_setting import SIMPLE, by_setting, caption
from mergeprobe.bench.tables.ceiling import CEILING, repeated
from mergeprobe.bench.tables.forecasters import FILE, IDENTITIES, MODEL, OWN, capped, not_own, plain
from mergeprobe.bench.tables.page import DASH, Needs, Part, Table, estimate, number
from mergeprobe.bench.tables.skill import SCORED, UNCONDITIONAL, Options
from mergeprobe.errors import NotForecastable
from mergeprobe.predict.baselines import BASELINES
from mergeprobe.predict.learning import Rows
from mergeprobe.predict.scores import Tested, bootstrap
from mergeprobe.predict.splits import one_unseen, unseen_bases, unseen_cohorts
from mergeprobe.predict.validate import interaction_skill, novelty_table, out_of_fold

CROSS_VALIDATED = (*SIMPLE, "Frobenius cosine alone", "gradient cosine alone")


def cross_validated(pairs: Rows, measured: pl.DataFrame, options: Options) -> list[Part]:
    """measured: learning.measured_rows of every cohort, for the ceiling."""
    title = "Cross-validation over all cohorts: pairs, both tasks unseen"
    try:
        folds = unseen_cohorts(pairs)
    except NotForecastable as problem:
        return [Needs(title, f"cohorts that differ in all families ({problem})")]
    cross = not_own()
    fitters = {
        MODEL: capped("model", seed=options.seed),
        FILE: capped("file", seed=options.seed),
        OWN: plain("model", without=cross, seed=options.seed),
        **{name: BASELINES[name] for name in (*CROSS_VALIDATED, *IDENTITIES)},
    }
    tested = {name: out_of_fold(pairs, folds, fitter) for name, fitter in fitters.items()}
    shown = {n: t for n, t in tested.items() if n not in IDENTITIES}
    twins = repeated(pairs, measured)
    rows = by_setting(shown, options)
    if twins is not None:
        rows += by_setting({CEILING: twins}, options)
    said = caption(
        f"Each of {len(folds)} cohorts forecast by those that share no family with it; "
        f"{len(tested[MODEL].rows)} rows. The predictor chooses among three candidates, inside.",
        options,
    )
    table = Table(title, said, ("point, method, forecast", *SCORED), rows)
    return [table, leak_test(tested, options), interaction(tested, options), novelty(tested)]


def leak_test(tested: Mapping[str, Tested], options: Options) -> Table:
    """Within folds, knowing only who the tasks are must not help where all are unseen."""
    rows = []
    for name in (*IDENTITIES, OWN, MODEL):
        found = bootstrap(
            tested[name], "within fold", runs=min(options.runs, 200), seed=options.seed
        )
        skill = estimate(found)
        verdict = DASH
        if name in IDENTITIES:
            verdict = "no skill" if not found.low > 0 else "LEAK"
        rows.append([name, skill, verdict])
    said = caption(
        "The folds of the cross-validation above, all methods. Families that training has not "
        "seen have no effect in the first three, so whatever they score above 0 would be a leak.",
        options,
    )
    columns = ("forecast", "Spearman within (fold, point, method)", "leak test")
    return Table("Leak test", said, columns, rows)


def interaction(tested: Mapping[str, Tested], options: Options) -> Table:
    rows = []
    for name, found in tested.items():
        if name not in IDENTITIES:
            rows.append([name, number(interaction_skill(found))])
    said = (
        f"`{options.command}`, seed {options.seed}. Rank correlation of forecast and truth after "
        "both lost what an adapter does on average and what a partner does on average, inside "
        "cohort, point and method: who clashes with whom. No interval, SD or SE; one run each."
    )
    return Table("Skill on the interaction", said, ("forecast", "Spearman"), rows)


def novelty(tested: Mapping[str, Tested]) -> Table:
    found = novelty_table(tested[MODEL])
    rows = [
        [
            f"{number(row['novelty from'])} to {number(row['to'])}",
            *(str(row["rows"]), number(row["MAE"]), number(row["R2"])),
            *(number(row["coverage"]), number(row["width"])),
        ]
        for row in found.iter_rows(named=True)
    ]
    said = (
        "Whether rows that look unlike the training rows are forecast worse; above 1 a row counts "
        "as far from the bank. The folds of the cross-validation above, model tier; no SD or SE."
    )
    columns = ("novelty", "rows", "MAE", "R²", "coverage", "width")
    return Table("Error by novelty", said, columns, rows)


# ------------------------------------------------------------------------- one unseen, other base
def one_task_unseen(pairs: Rows, options: Options) -> Part:
    title = "Pairs with one task unseen"
    try:
        folds = one_unseen(pairs)
    except NotForecastable as problem:
        return Needs(title, f"families in several cohorts ({problem})")
    fitters = {
        "fixed mix, model tier": plain("model", seed=options.seed),
        "fixed mix, file tier": plain("file", seed=options.seed),
        OWN: plain("model", without=not_own(), seed=options.seed),
        **{name: BASELINES[name] for name in (UNCONDITIONAL, *IDENTITIES)},
    }
    tested = {name: out_of_fold(pairs, folds, fitter) for name, fitter in fitters.items()}
    said = caption(
        f"Each of {len(folds)} families left out of training in any role and tested beside "
        f"families that were seen; {len(next(iter(tested.values())).rows)} rows. Here a name "
        "alone tells something: the partner's.",
        options,
    )
    columns = ("point, method, forecast", *SCORED)
    return Table(title, said, columns, by_setting(tested, options))


def other_base(pairs: Rows, options: Options) -> Part:
    title = "Another base model"
    try:
        folds = unseen_bases(pairs)
    except NotForecastable:
        return Needs(title, "rows of a second base model")
    rows = []
    fitters = {
        "fixed mix, model tier": plain("model", seed=options.seed),
        "fixed mix, file tier": plain("file", seed=options.seed),
        OWN: plain("model", without=not_own(), seed=options.seed),
        UNCONDITIONAL: BASELINES[UNCONDITIONAL],
        "extrapolated merge, as measured": BASELINES["extrapolated merge, as measured"],
    }
    for fold in folds:
        tested = {name: out_of_fold(pairs, [fold], fitter) for name, fitter in fitters.items()}
        rows += [[f"{fold.name}, {row[0]}", *row[1:]] for row in by_setting(tested, options)]
    said = caption(
        "Each base forecast by rows of the others that share no family with it.", options
    )
    return Table(title, said, ("base, point, method, forecast", *SCORED), rows)
