"""The honest evaluation: forecasts of unseen families beside baselines, ceiling and ablations.

Everything here is a table (polars), deterministic under its seed. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import polars as pl

from mergeprobe.errors import NotForecastable
from mergeprobe.predict.baselines import Fitter, learned
from mergeprobe.predict.features import FEATURES, Tier, columns_of
from mergeprobe.predict.learning import Rows
from mergeprobe.predict.menus import CANDIDATES, Candidate
from mergeprobe.predict.scores import METRICS, Tested, bootstrap, scores_of, spearman
from mergeprobe.predict.splits import Fold
from mergeprobe.predict.tier import Guess

QUICK: dict[str, Candidate] = {
    name: CANDIDATES[name] for name in ("ridge, wide", "trees, wide", "mix, wide")
}
"""Candidates for ablations, which fit a predictor for every family of signals and fold."""


def out_of_fold(rows: Rows, folds: Sequence[Fold], fitter: Fitter) -> Tested:
    """Forecasts of every row that some fold tests; a row in several folds gets their mean."""
    names = list(Guess.__dataclass_fields__)
    total = {name: np.zeros(len(rows)) for name in names}
    count, where = np.zeros(len(rows)), np.full(len(rows), "", dtype=object)
    for fold in folds:
        found = fitter(rows.pick(fold.train))(rows.pick(fold.test))
        for name in names:
            total[name][fold.test] += getattr(found, name)
        count[fold.test] += 1
        where[fold.test & (where == "")] = fold.name
    tested = count > 0
    if not tested.any():
        raise NotForecastable("no fold tests any row")
    parts = {name: total[name][tested] / count[tested] for name in names}
    return Tested(rows.pick(tested), Guess(**parts), where[tested].astype(str))


def evaluate(rows: Rows, folds: Sequence[Fold], fitters: Mapping[str, Fitter]) -> dict[str, Tested]:
    """Every forecaster on the same folds."""
    return {name: out_of_fold(rows, folds, fitter) for name, fitter in fitters.items()}


def score_table(
    tested: Mapping[str, Tested],
    *,
    by: Sequence[str] = ("method", "point"),
    reference: str | None = "method mean",
    runs: int = 0,
    seed: int = 0,
) -> pl.DataFrame:
    """One row per forecaster and slice (values of `by`: columns of Rows.table) with METRICS.

    relative width: over the mean width of the `reference` forecaster's intervals, on the same
    rows. runs: bootstrap samples for `<metric> low` and `<metric> high`; 0 leaves them out.
    """
    out = []
    for name, found in tested.items():
        for label, mask in slices(found.rows, by):
            part = found.pick(mask)
            row = {"forecaster": name, **label, "rows": len(part.rows)}
            row["families"] = len(part.rows.holds()[0])
            row |= scores_of(part)
            if reference is not None and reference in tested:
                plain = scores_of(tested[reference].pick(mask))["width"]
                row["relative width"] = row["width"] / plain if plain else np.nan
            if runs:
                for metric in METRICS:
                    each = bootstrap(part, metric, runs=runs, seed=seed)
                    row |= {f"{metric} low": each.low, f"{metric} high": each.high}
            out.append(row)
    return pl.DataFrame(out)


def difference_table(
    tested: Mapping[str, Tested],
    ours: str,
    *,
    by: Sequence[str] = ("method", "point"),
    metrics: Sequence[str] = ("MAE", "R2", "Spearman", "within partners", "AUC"),
    runs: int = 500,
    seed: int = 0,
) -> pl.DataFrame:
    """`ours` minus every other forecaster on the same rows, with the paired bootstrap's interval
    over families. Above 0 is better, but for the MAE."""
    out = []
    for label, mask in slices(tested[ours].rows, by):
        mine = tested[ours].pick(mask)
        for name, other in tested.items():
            if name == ours:
                continue
            theirs = other.pick(mask)
            for metric in metrics:
                found = bootstrap(mine, metric, against=theirs, runs=runs, seed=seed)
                row = {"against": name, **label, "metric": metric, "difference": found.value}
                out.append(row | {"low": found.low, "high": found.high})
    return pl.DataFrame(out)


def novelty_table(tested: Tested, edges: Sequence[float] = (0.5, 0.75, 1.0)) -> pl.DataFrame:
    """Whether what looks unlike the training rows is forecast worse: MAE, R², coverage and width
    of rows by their novelty score (above 1: flagged as far)."""
    level = np.digitize(tested.guess.novelty, edges)
    out = []
    for k, (low, high) in enumerate(zip((0.0, *edges), (*edges, np.inf), strict=True)):
        part = tested.pick(level == k)
        if len(part.rows):
            found = scores_of(part)
            kept = {name: found[name] for name in ("MAE", "R2", "coverage", "width")}
            out.append({"novelty from": low, "to": high, "rows": len(part.rows), **kept})
    return pl.DataFrame(out)


def slices(rows: Rows, by: Sequence[str]) -> list[tuple[dict, np.ndarray]]:
    """(values of the columns, mask) of every combination that occurs, sorted."""
    if not by:
        return [({}, np.ones(len(rows), bool))]
    keys = list(zip(*(rows.table[column].to_list() for column in by), strict=True))
    return [
        (dict(zip(by, key, strict=True)), np.array([k == key for k in keys]))
        for key in sorted(set(keys))
    ]


@dataclass(frozen=True)
class Ceiling:
    """How well one run's retention forecasts another's: the most that can be asked of a forecast.

    pairs: rows matched across repeated cohorts. mae: between two single runs (a perfect forecast
    of the mean over seeds would err by about 1/√2 of it). NaN where nothing is repeated.
    """

    pairs: int
    spearman: float
    pearson: float
    mae: float


def ceiling(rows: Rows, method: str | None = None, size: int | None = None) -> Ceiling:
    """Seed-to-seed reliability of measured retention, over rows of different cohorts on one base
    with the same task of i, tasks of the others, method and point (one point is enough: the
    outcome does not depend on it)."""
    first = float(rows.point.min()) if len(rows) else 0.0
    mask = rows.point == first
    mask &= (rows.method == method) if method else True
    mask &= (rows.size == size) if size else True
    table = rows.pick(mask).table
    target = rows.target[mask]
    groups: dict[tuple, list[int]] = {}
    for k, row in enumerate(table.iter_rows(named=True)):
        tasks = row["tasks"]
        key = (row["base"], row["method"], tasks[0], *sorted(tasks[1:]))
        groups.setdefault(key, []).append(k)
    cohorts = table["cohort"].to_list()
    matched = [
        (a, b)
        for members in groups.values()
        for a, b in combinations(members, 2)
        if cohorts[a] != cohorts[b]
    ]
    if len(matched) < 3:
        return Ceiling(len(matched), np.nan, np.nan, np.nan)
    # both orders, as neither run is the forecast
    one = np.array([target[a] for a, b in matched] + [target[b] for a, b in matched])
    two = np.array([target[b] for a, b in matched] + [target[a] for a, b in matched])
    line = float(np.corrcoef(one, two)[0, 1]) if np.ptp(one) > 0 else np.nan
    return Ceiling(len(matched), spearman(one, two), line, float(np.abs(one - two).mean()))


def ablations(
    rows: Rows,
    folds: Sequence[Fold],
    tier: Tier,
    *,
    families: Sequence[str] | None = None,
    candidates: Mapping[str, Candidate] = QUICK,
    by: Sequence[str] = ("method",),
    seed: int = 0,
) -> pl.DataFrame:
    """Scores with each family of signals alone ("alone") and with all others ("without").
    families: default all of the tier."""
    names = [name for name in columns_of(tier) if name in FEATURES]
    if families is None:
        families = list(dict.fromkeys(FEATURES[name].family for name in names))
    fitters = {"all signals": learned(tier, candidates=candidates, seed=seed)}
    for family in families:
        mine = [name for name in names if FEATURES[name].family == family]
        rest = [name for name in names if FEATURES[name].family != family]
        alone = learned(tier, candidates=candidates, without=rest, seed=seed)
        fitters |= {
            f"{family} alone": alone,
            f"without {family}": learned(tier, candidates=candidates, without=mine, seed=seed),
        }
    return score_table(evaluate(rows, folds, fitters), by=by, reference=None)


def interaction_skill(tested: Tested) -> float:
    """Rank correlation of forecast and truth after both lost what an adapter does on average and
    what a partner does on average (pairs, inside fold, cohort, point and method): what is left is
    who clashes with whom. Inside a fold, because with two families left out even the training
    mean knows something of them. For folds by cohort; NaN without pairs, or with smaller folds."""
    pairs = tested.pick(tested.rows.size == 2)
    if not len(pairs.rows):
        return np.nan
    table = pairs.rows.table
    columns = [table[c].to_list() for c in ("cohort", "base", "point", "method")]
    keys = list(zip(pairs.fold.tolist(), *columns, strict=True))
    partner = [others[0] for others in table["others"].to_list()]
    own = table["i"].to_list()
    left = []
    for values in (pairs.guess.retention, pairs.rows.target):
        residual = np.zeros(len(values))
        for key in set(keys):
            mask = np.array([k == key for k in keys])
            residual[mask] = _without_main_effects(
                values[mask], np.array(own)[mask], np.array(partner)[mask]
            )
        left.append(residual)
    return spearman(*left)


def _without_main_effects(values: np.ndarray, own: np.ndarray, partner: np.ndarray) -> np.ndarray:
    """Residuals of a two-way additive least-squares fit."""
    design = np.concatenate(
        [own[:, None] == np.unique(own), partner[:, None] == np.unique(partner)], 1
    ).astype(float)
    left = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    return np.where(np.abs(left) < 1e-9, 0.0, left)
