"""Scores in many bootstrap samples at once: what predict.scores says, for all weightings in one go.

A sample is a row of weights (scores.family_draws). Paired differences come for free: two
forecasters' scores in the same samples are subtracted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mergeprobe.predict.learning import Rows
from mergeprobe.predict.scores import (
    FEWEST_PARTNERS,
    Estimate,
    Tested,
    family_draws,
    scores_of,
)
from mergeprobe.predict.tier import MERGEABLE

Weights = Float[np.ndarray, "samples rows"]
Values = Float[np.ndarray, " rows"]
Samples = Float[np.ndarray, " samples"]
SCORES = ("MAE", "R2", "Spearman", "within partners", "AUC", "coverage", "width")
NOTHING = 1e-12


@dataclass(frozen=True, eq=False)
class Resampled:
    """value: scores on the rows as they are (all of scores.METRICS). samples: SCORES in every
    bootstrap sample."""

    value: Mapping[str, float]
    samples: Mapping[str, Samples]

    def estimate(self, metric: str, *, against: Resampled | None = None) -> Estimate:
        """A score, or its paired difference to another forecaster, with its 90 % interval."""
        value, found = self.value[metric], self.samples[metric]
        if against is not None:
            value, found = value - against.value[metric], found - against.samples[metric]
        return _estimate(value, found)

    def ratio(self, metric: str, to: Resampled | None) -> Estimate:
        """A score over another forecaster's of the same rows; NaN where one has none (as the
        ceiling, whose rows are others and which has no intervals)."""
        if to is None or not to.value[metric] > 0 or not np.isfinite(self.value[metric]):
            return Estimate(np.nan, np.nan, np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            found = self.samples[metric] / to.samples[metric]
        return _estimate(self.value[metric] / to.value[metric], found)


def _estimate(value: float, samples: Samples) -> Estimate:
    known = samples[np.isfinite(samples)]
    low, high = np.quantile(known, [0.05, 0.95]) if len(known) else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high))


def draws(rows: Rows, runs: int, seed: int = 0) -> Weights:
    """Weights of `runs` bootstrap samples over families; samples that hold less than two rows are
    left out."""
    found = np.stack(list(family_draws(rows, runs, seed)))
    return found[(found > 0).sum(1) > 1]


def resampled(
    tested: Mapping[str, Tested], *, runs: int = 500, seed: int = 0
) -> dict[str, Resampled]:
    """Every forecaster of the same rows, in the same samples."""
    if not tested:
        return {}
    weights = draws(next(iter(tested.values())).rows, runs, seed)
    return {name: Resampled(scores_of(t), samples_of(t, weights)) for name, t in tested.items()}


def samples_of(tested: Tested, weights: Weights) -> dict[str, Samples]:
    guess, true = tested.guess, tested.rows.target
    total = weights.sum(1)
    error = guess.retention - true
    middle = weights @ true / total
    spread = weights @ true**2 / total - middle**2
    with np.errstate(invalid="ignore", divide="ignore"):
        explained = 1.0 - (weights @ error**2 / total) / np.where(spread > NOTHING, spread, np.nan)
    chance = guess.mergeable if np.isfinite(guess.mergeable).all() else guess.retention
    inside = (guess.low <= true + 1e-9) & (true <= guess.high + 1e-9)
    known = bool(np.isfinite(guess.low).all())
    return {
        "MAE": weights @ np.abs(error) / total,
        "R2": explained,
        "Spearman": spearmans(guess.retention, true, weights),
        "within partners": within_partners(tested, weights),
        "AUC": aucs(chance, true >= MERGEABLE, weights),
        "coverage": weights @ inside / total if known else np.full(len(total), np.nan),
        "width": weights @ (guess.high - guess.low) / total,
    }


def _below(values: Values, others: Values | None = None) -> np.ndarray:
    """[a, b]: 1 where others[b] lies below values[a], ½ where they are equal."""
    others = values if others is None else others
    return (others[None] < values[:, None]) + 0.5 * (others[None] == values[:, None])


def spearmans(a: Values, b: Values, weights: Weights) -> Samples:
    """scores.spearman in every sample: 0 where a is constant, NaN where b is."""
    one, two = weights @ _below(a).T, weights @ _below(b).T
    total = weights.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        one -= (weights * one).sum(1, keepdims=True) / total
        two -= (weights * two).sum(1, keepdims=True) / total
        cross = (weights * one * two).sum(1)
        spread = [(weights * ranks**2).sum(1) / total[:, 0] ** 3 for ranks in (one, two)]
        found = cross / total[:, 0] ** 3 / np.sqrt(spread[0] * spread[1])
    found = np.where(spread[0] > NOTHING, found, 0.0)
    enough = (weights > 0).sum(1) > 1
    return np.where((spread[1] > NOTHING) & enough, found, np.nan)


def aucs(value: Values, positive: np.ndarray, weights: Weights) -> Samples:
    up, down = weights[:, positive], weights[:, ~positive]
    beaten = down @ _below(value[positive], value[~positive]).T
    with np.errstate(invalid="ignore", divide="ignore"):
        return (up * beaten).sum(1) / (up.sum(1) * down.sum(1))


def within_partners(tested: Tested, weights: Weights) -> Samples:
    """scores.within_partners in every sample."""
    total, count = np.zeros((2, len(weights)))
    for rows in partner_groups(tested.rows):
        mine = weights[:, rows]
        found = spearmans(tested.guess.retention[rows], tested.rows.target[rows], mine)
        counts = ((mine > 0).sum(1) >= FEWEST_PARTNERS) & np.isfinite(found)
        share = np.where(counts, mine.mean(1), 0.0)
        total += share * np.where(counts, found, 0.0)
        count += share
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, total / count, np.nan)


def partner_groups(rows: Rows) -> Sequence[np.ndarray]:
    """Places of the pairs of each (cohort, base, point, i, method)."""
    columns = [rows.table[c].to_list() for c in ("cohort", "base", "point", "i", "method")]
    found: dict[tuple, list[int]] = {}
    for place, (size, *key) in enumerate(zip(rows.size.tolist(), *columns, strict=True)):
        if size == 2:
            found.setdefault(tuple(key), []).append(place)
    return [np.array(places) for places in found.values()]


def cluster_interval(
    values: Sequence[float], *, runs: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """90 % interval of a mean, from samples of the values with replacement; NaN with fewer than
    two."""
    known = np.array([value for value in values if np.isfinite(value)])
    if len(known) < 2:
        return np.nan, np.nan
    places = np.random.default_rng(seed).integers(len(known), size=(runs, len(known)))
    low, high = np.quantile(known[places].mean(1), [0.05, 0.95])
    return float(low), float(high)
