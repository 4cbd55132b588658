"""Scores of forecasts against measured retention, each with weights, and the bootstrap on top.

A weight says how often a row counts; the bootstrap over families draws families with replacement
and weighs a row by how often its own family and the others' were drawn, so rows of one family,
in either role, come and go together. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped

from mergeprobe.predict.conformal import LEVEL
from mergeprobe.predict.learning import Rows
from mergeprobe.predict.tier import MERGEABLE, Guess

Vector = Float[np.ndarray, " rows"]
FEWEST_PARTNERS = 3
FEWEST_IN_FOLD = 5


@dataclass(frozen=True, eq=False)
class Tested:
    """Rows with a forecast each, and the fold (by name) that each was tested in."""

    __test__ = False  # not a test class, whatever its name begins with

    rows: Rows
    guess: Guess
    fold: Shaped[np.ndarray, " rows"]

    def pick(self, mask: np.ndarray) -> Tested:
        parts = {n: getattr(self.guess, n)[mask] for n in Guess.__dataclass_fields__}
        return Tested(self.rows.pick(mask), Guess(**parts), self.fold[mask])


def ranks(values: Vector, weight: Vector | None = None) -> Vector:
    """Midranks: the weight below plus half of the weight at the same value (its own included)."""
    weight = np.ones(len(values)) if weight is None else weight
    _, place = np.unique(values, return_inverse=True)
    at = np.bincount(place, weights=weight)
    return (np.cumsum(at) - at / 2.0)[place]


def spearman(a: Vector, b: Vector, weight: Vector | None = None) -> float:
    """Weighted rank correlation in [−1, 1]; 0 where a is constant (a forecast that tells nothing
    apart has no skill), NaN where b is."""
    weight = np.ones(len(a)) if weight is None else weight
    counts = weight > 0
    a, b, weight = a[counts], b[counts], weight[counts]
    if len(b) < 2 or np.ptp(b) == 0:
        return np.nan
    if np.ptp(a) == 0:
        return 0.0
    return _pearson(ranks(a, weight), ranks(b, weight), weight)


def auc(value: Vector, positive: np.ndarray, weight: Vector | None = None) -> float:
    """Probability that a positive row is ranked above a negative one, ties half; NaN if there is
    only one kind."""
    weight = np.ones(len(value)) if weight is None else weight
    up, down = weight[positive].sum(), weight[~positive].sum()
    if up == 0 or down == 0:
        return np.nan
    below = ranks(value, np.where(positive, 0.0, weight))
    return float((weight * below)[positive].sum() / (up * down))


def mae(tested: Tested, weight: Vector) -> float:
    return float(np.average(np.abs(tested.guess.retention - tested.rows.target), weights=weight))


def r2(tested: Tested, weight: Vector) -> float:
    """1 − squared error over the variance of these rows; below 0 worse than their own mean."""
    true = tested.rows.target
    middle = np.average(true, weights=weight)
    spread = np.average((true - middle) ** 2, weights=weight)
    if spread == 0:
        return np.nan
    return float(1 - np.average((true - tested.guess.retention) ** 2, weights=weight) / spread)


def pooled(tested: Tested, weight: Vector) -> float:
    return spearman(tested.guess.retention, tested.rows.target, weight)


def within_fold(tested: Tested, weight: Vector) -> float:
    """Mean rank correlation inside (fold, point, method): rewards no fold for its level."""
    return _by_group(tested, weight, _fold_groups(tested), FEWEST_IN_FOLD)


def within_partners(tested: Tested, weight: Vector) -> float:
    """Mean over (adapter i, point, method) of the rank correlation across i's partners, in pairs:
    whether a forecast tells i's partners apart. Knowing which task is easy scores 0."""
    return _by_group(tested, weight, _partner_groups(tested.rows), FEWEST_PARTNERS)


def mergeable_auc(tested: Tested, weight: Vector) -> float:
    """For ρ ≥ MERGEABLE; ranked by the forecast probability, else by the forecast."""
    known = np.isfinite(tested.guess.mergeable).all()
    value = tested.guess.mergeable if known else tested.guess.retention
    return auc(value, tested.rows.target >= MERGEABLE, weight)


def coverage(tested: Tested, weight: Vector) -> float:
    guess, true = tested.guess, tested.rows.target
    inside = (guess.low <= true + 1e-9) & (true <= guess.high + 1e-9)
    known = np.isfinite(guess.low)
    return float(np.average(inside, weights=weight)) if known.all() else np.nan


def width(tested: Tested, weight: Vector) -> float:
    return float(np.average(tested.guess.high - tested.guess.low, weights=weight))


def interval_score(tested: Tested, weight: Vector) -> float:
    """Width + 2/(1 − level) times what misses miss by, in retention: the smaller the better; it
    weighs width against coverage (Gneiting & Raftery 2007)."""
    guess, true = tested.guess, tested.rows.target
    missed = np.maximum(guess.low - true, 0.0) + np.maximum(true - guess.high, 0.0)
    scores = guess.high - guess.low + 2.0 / (1.0 - LEVEL) * missed
    return float(np.average(scores, weights=weight))


Metric = Callable[[Tested, Vector], float]
METRICS: dict[str, Metric] = {
    "MAE": mae,
    "R2": r2,
    "Spearman": pooled,
    "within fold": within_fold,
    "within partners": within_partners,
    "AUC": mergeable_auc,
    "coverage": coverage,
    "width": width,
    "interval score": interval_score,
}


def scores_of(tested: Tested, weight: Vector | None = None) -> dict[str, float]:
    """Every metric; NaN where it is not defined on these rows."""
    weight = np.ones(len(tested.rows)) if weight is None else weight
    return {name: metric(tested, weight) for name, metric in METRICS.items()}


def family_draws(rows: Rows, runs: int, seed: int = 0) -> Iterator[Vector]:
    """Weights of the rows in `runs` bootstrap samples of the families.

    A row weighs m_i times the mean of m_j over the others of another family, m how often a family
    was drawn: for a pair the product (both roles resampled, Owen 2007, arXiv:0712.1111).
    """
    names, _ = rows.holds()
    place = {name: k for k, name in enumerate(names)}
    members = [[place[f] for f in row] for row in rows.table["families"].to_list()]
    own = np.array([row[0] for row in members])
    most = max(len(row) for row in members) - 1
    others = np.array([row[1:] + [-1] * (most - len(row) + 1) for row in members])
    there, same = others >= 0, others == own[:, None]
    generator = np.random.default_rng(seed)
    for _ in range(runs):
        drawn = np.bincount(generator.integers(len(names), size=len(names)), minlength=len(names))
        theirs = np.where(same, 1.0, drawn[others])
        yield drawn[own] * np.where(there, theirs, 0.0).sum(1) / there.sum(1)


@dataclass(frozen=True)
class Estimate:
    """A score with its 90 % bootstrap interval over families."""

    value: float
    low: float
    high: float


def bootstrap(
    tested: Tested, metric: str, *, against: Tested | None = None, runs: int = 500, seed: int = 0
) -> Estimate:
    """A metric, or with `against` (the same rows, other forecasts) its difference, paired."""
    measure = METRICS[metric]

    def value(weight: Vector) -> float:
        found = measure(tested, weight)
        return found if against is None else found - measure(against, weight)

    drawn = [value(w) for w in family_draws(tested.rows, runs, seed) if (w > 0).sum() > 1]
    known = np.array(drawn)[np.isfinite(drawn)]
    low, high = np.quantile(known, [0.05, 0.95]) if len(known) else (np.nan, np.nan)
    return Estimate(value(np.ones(len(tested.rows))), float(low), float(high))


def _by_group(tested: Tested, weight: Vector, groups: np.ndarray, fewest: int) -> float:
    """Mean of the rank correlation over groups of enough rows, a group weighing as its rows do."""
    total = count = 0.0
    order = np.argsort(groups, kind="stable")
    ends = np.flatnonzero(np.diff(groups[order])) + 1
    for rows in np.split(order, ends):
        if groups[rows[0]] < 0 or (weight[rows] > 0).sum() < fewest:
            continue
        found = spearman(tested.guess.retention[rows], tested.rows.target[rows], weight[rows])
        if np.isfinite(found):
            share = weight[rows].mean()
            total, count = total + share * found, count + share
    return total / count if count else np.nan


def _fold_groups(tested: Tested) -> np.ndarray:
    table = tested.rows.table
    keys = list(
        zip(tested.fold.tolist(), table["point"].to_list(), table["method"].to_list(), strict=True)
    )
    place = {key: k for k, key in enumerate(dict.fromkeys(keys))}
    return np.array([place[key] for key in keys])


def _partner_groups(rows: Rows) -> np.ndarray:
    """A number for each (cohort, base, point, i, method), −1 for larger sets than pairs."""
    columns = [rows.table[c].to_list() for c in ("cohort", "base", "point", "i", "method")]
    keys = list(zip(*columns, strict=True))
    place = {key: k for k, key in enumerate(dict.fromkeys(keys))}
    return np.where(rows.size == 2, np.array([place[key] for key in keys]), -1)


def _pearson(a: Vector, b: Vector, weight: Vector) -> float:
    a, b = a - np.average(a, weights=weight), b - np.average(b, weights=weight)
    return float((weight * a * b).sum() / np.sqrt((weight * a * a).sum() * (weight * b * b).sum()))
