"""Predictive distributions from residuals on unseen families, and what intervals may claim.

A forecast's score ŝ comes with a spread σ(x); z = (s − ŝ)/σ of rows whose families the model had
not seen says how far off forecasts are. Every family counts the same, however many rows it has.
The interval is ŝ + σ (low, high), the 5 % and 95 % quantiles of z: about 90 % of the rows of new
families, as far as families are exchangeable, with no promise for a finite number of them.

`correction` widens it to the conformal interval for hierarchical data (Lee, Barber & Willett,
arXiv:2306.06342): with K exchangeable families a row of a new one is covered with probability of
at least 90 %, marginally over families, no more. With many rows a family that is cautious (96 %
measured on made-up banks of 18 families, the plain interval 90 %), so it is there for who asks.
With K < 9 no finite interval can promise 90 %: then there is no correction. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from mergeprobe.predict.features import COLUMNS, SETTING

Vector = Float[np.ndarray, " rows"]
LEVEL = 0.9
GRID = np.linspace(0.005, 0.995, 100)
SPREAD_COLUMNS = ("exponent", "log_size", "log_progress")


def family_weights(groups: Sequence[Any] | np.ndarray) -> Vector:
    """Weights that sum to 1, every group with the same share, its rows alike."""
    names, place, count = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    return 1.0 / (len(names) * count[place])


def weighted_quantile(values: Vector, level: float, weights: Vector) -> float:
    """The smallest value at which the cumulative weight reaches `level` of the total."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order]) / weights.sum()
    place = int(np.searchsorted(reached, level - 1e-12))
    return float(values[order][min(place, len(values) - 1)])


def family_quantile(values: Vector, groups: Sequence[Any] | np.ndarray, level: float) -> float:
    """The conformal quantile at the level of families: each of K has weight 1/(K + 1), and the
    rest sits at +∞. Infinite where level > K/(K + 1)."""
    families = len(set(np.asarray(groups).tolist()))
    needed = level * (families + 1) / families
    if needed > 1.0 + 1e-12:
        return math.inf
    return weighted_quantile(values, min(needed, 1.0), family_weights(groups))


@dataclass(frozen=True, eq=False)
class Spread:
    """Typical |s − ŝ|: exp(intercept + slopes · (ŝ, exponent, log n, log progress)), between
    `least` and `most`."""

    intercept: float
    slopes: tuple[float, ...]
    least: float
    most: float

    def at(self, forecast: Vector, values: Float[np.ndarray, "rows columns"]) -> Vector:
        logs = self.intercept + _spread_design(forecast, values) @ np.array(self.slopes)
        return np.clip(np.exp(logs), self.least, self.most)


def fit_spread(
    forecast: Vector, residual: Vector, values: Float[np.ndarray, "rows columns"], weight: Vector
) -> Spread:
    """Least squares of log(|residual| + a tenth of its mean), shrunk towards one spread for all."""
    size = np.abs(residual)
    mean = float(np.average(size, weights=weight)) + 1e-6
    goal = np.log(size + 0.1 * mean)
    design = _spread_design(forecast, values)
    share = weight / weight.sum()
    centre, level = share @ design, float(share @ goal)
    moved = design - centre
    spread = share @ moved**2
    gram = moved.T @ (moved * share[:, None]) + np.diag(0.05 * spread + 1e-9)
    slopes = np.linalg.solve(gram, moved.T @ (share * (goal - level)))
    low, high = np.quantile(size, [0.1, 0.99])
    return Spread(
        float(level - centre @ slopes),
        tuple(float(s) for s in slopes),
        float(max(low, 0.05 * mean)),
        float(max(high, mean)),
    )


def _spread_design(
    forecast: Vector, values: Float[np.ndarray, "rows columns"]
) -> Float[np.ndarray, "rows four"]:
    assert set(SPREAD_COLUMNS) <= set(SETTING)
    known = values[:, [COLUMNS.index(name) for name in SPREAD_COLUMNS]]
    return np.concatenate([forecast[:, None], np.nan_to_num(known)], 1)


@dataclass(frozen=True, eq=False)
class Predictive:
    """The distribution of the true score around a forecast.

    quantiles: of z at GRID. low, high: the interval's ends in z. correction: what the guaranteed
    interval adds on both sides; None where no finite one is possible. families: how many the
    residuals come from.
    """

    spread: Spread
    quantiles: Float[np.ndarray, " grid"]
    low: float
    high: float
    correction: float | None
    families: int

    def ends(
        self,
        forecast: Vector,
        values: Float[np.ndarray, "rows columns"],
        *,
        guaranteed: bool = False,
    ) -> tuple[Vector, Vector]:
        """The interval in scores; infinite if a guarantee is asked for that nobody can give."""
        wider = 0.0
        if guaranteed:
            wider = math.inf if self.correction is None else self.correction
        spread = self.spread.at(forecast, values)
        return forecast + spread * (self.low - wider), forecast + spread * (self.high + wider)

    def draws(
        self, forecast: Vector, values: Float[np.ndarray, "rows columns"]
    ) -> Float[np.ndarray, "rows grid"]:
        """Equally likely scores."""
        return forecast[:, None] + self.spread.at(forecast, values)[:, None] * self.quantiles

    def above(
        self, threshold: float, forecast: Vector, values: Float[np.ndarray, "rows columns"]
    ) -> Vector:
        """Probability of a score of at least `threshold`, in [0.005, 0.995]."""
        needed = (threshold - forecast) / self.spread.at(forecast, values)
        return 1.0 - np.interp(needed, self.quantiles + 1e-9 * np.arange(len(GRID)), GRID)

    def to_json(self) -> dict[str, Any]:
        spread = self.spread
        return {
            "spread": {
                "intercept": spread.intercept,
                "slopes": list(spread.slopes),
                "least": spread.least,
                "most": spread.most,
            },
            "quantiles": self.quantiles.tolist(),
            "low": self.low,
            "high": self.high,
            "correction": self.correction,
            "families": self.families,
        }


def fit_predictive(
    forecast: Vector,
    true: Vector,
    values: Float[np.ndarray, "rows columns"],
    weight: Vector,
    groups: Sequence[Any] | np.ndarray,
    level: float = LEVEL,
) -> Predictive:
    """From forecasts of rows whose families the model had not seen. groups: a family per row."""
    residual = true - forecast
    spread = fit_spread(forecast, residual, values, weight)
    z = residual / spread.at(forecast, values)
    even = family_weights(groups)
    tail = (1.0 - level) / 2.0
    low, high = weighted_quantile(z, tail, even), weighted_quantile(z, 1.0 - tail, even)
    correction = family_quantile(np.maximum(low - z, z - high), groups, level)
    return Predictive(
        spread=spread,
        quantiles=np.array([weighted_quantile(z, at, even) for at in GRID]),
        low=low,
        high=high,
        correction=max(correction, 0.0) if math.isfinite(correction) else None,
        families=len(set(np.asarray(groups).tolist())),
    )


def predictive_from_json(value: Mapping[str, Any]) -> Predictive:
    spread = dict(value["spread"])
    spread["slopes"] = tuple(spread["slopes"])
    return Predictive(
        spread=Spread(**spread),
        quantiles=np.array(value["quantiles"], dtype=float),
        **{k: value[k] for k in ("low", "high", "correction", "families")},
    )
