"""Predictive distributions from residuals on unseen families, and what intervals may claim.

A forecast's score ŝ comes with a spread σ(x); z = (s − ŝ)/σ of rows whose families the model had
not seen says how far off forecasts are. Every family counts the same, however many rows it has.
The interval is ŝ + σ (low, high), two quantiles of z 90 % apart: about 90 % of the rows of new
families, as far as families are exchangeable, with no promise for a finite number of them. Which
two is what makes the shortest intervals in retention: it ends at about 1, so what the upper end
costs in width is little, and most of the 10 % are left below the lower one. Whether σ depends on
the forecast itself, besides SETTING, is tried on families left out.

`correction` widens it to the conformal interval for hierarchical data (Lee, Barber & Willett,
arXiv:2306.06342): with K exchangeable families a row of a new one is covered with probability of
at least 90 %, marginally over families, no more. With many rows a family that is cautious (96 %
measured on made-up banks of 18 families, the plain interval 90 %), so it is there for who asks.
With K < 9 no finite interval can promise 90 %: then there is no correction. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from mergeprobe.predict.features import COLUMNS
from mergeprobe.predict.ridge import FLOOR, score

Vector = Float[np.ndarray, " rows"]
LEVEL = 0.9
GRID = np.linspace(0.005, 0.995, 100)
SHRINK = 0.1
FORECAST = "forecast"
SPREADS: dict[str, tuple[str, ...]] = {
    "setting": ("exponent", "log_size", "log_progress"),
    "setting and forecast": ("exponent", "log_size", "log_progress", FORECAST),
}
"""What an interval's width may depend on: wider under the sum, in larger sets, early on; and
where much is lost. Which one is taken by the interval score on families left out."""


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


def shortest(
    values: Vector, weights: Vector, level: float, width: Callable[[float, float], float]
) -> tuple[float, float]:
    """The two quantiles, `level` of the weight apart, of the least width."""
    order = np.argsort(values, kind="stable")
    ordered, reached = values[order], np.cumsum(weights[order]) / weights.sum()

    def at(share: float) -> float:
        place = int(np.searchsorted(reached, share - 1e-12))
        return float(ordered[min(place, len(ordered) - 1)])

    tails = np.linspace(0.0, 1.0 - level, 21)[1:-1]
    return min(((at(tail), at(tail + level)) for tail in tails), key=lambda pair: width(*pair))


def _retention(scores: Vector) -> Vector:
    """As far as scores tell retentions apart: at most 1."""
    best = float(score(1.0))
    return np.clip(1.0 + FLOOR - np.exp(-np.minimum(scores, best)), -1.0, 1.0)


def _width(forecast: Vector, scale: Vector, low: float, high: float) -> float:
    """Mean width in retention."""
    ends = _retention(forecast + scale * high) - _retention(forecast + scale * low)
    return float(ends.mean())


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
    """Typical |s − ŝ|: exp(intercept + slopes · columns), between `least` and `most`. columns:
    some of features.SETTING, or FORECAST for ŝ."""

    columns: tuple[str, ...]
    intercept: float
    slopes: tuple[float, ...]
    least: float
    most: float

    def at(self, forecast: Vector, values: Float[np.ndarray, "rows columns"]) -> Vector:
        design = _spread_design(self.columns, forecast, values)
        return np.clip(
            np.exp(self.intercept + design @ np.array(self.slopes)), self.least, self.most
        )


def fit_spread(
    columns: Sequence[str],
    forecast: Vector,
    residual: Vector,
    values: Float[np.ndarray, "rows columns"],
    weight: Vector,
) -> Spread:
    """The mean of |residual| as a log-linear function, by Gamma quasi-likelihood (reweighted least
    squares), shrunk towards one spread for all: one tiny residual says nothing of the spread."""
    size = np.abs(residual)
    mean = float(np.average(size, weights=weight)) + 1e-6
    design = _spread_design(columns, forecast, values)
    share = weight / weight.sum()
    centre = share @ design
    moved = design - centre
    gram = moved.T @ (moved * share[:, None]) + np.diag(SHRINK * (share @ moved**2) + 1e-9)
    level, slopes = math.log(mean), np.zeros(design.shape[1])
    for _ in range(30):
        fitted = np.exp(np.clip(level + moved @ slopes, -8.0, 4.0))
        working = moved @ slopes + np.clip(size / fitted - 1.0, -1.0, 5.0)
        slopes = np.linalg.solve(gram, moved.T @ (share * (working - share @ working)))
        level = math.log(max(float(share @ (size / np.exp(moved @ slopes))), 1e-9))
    low, high = np.quantile(np.exp(level + moved @ slopes), [0.01, 0.99])
    return Spread(
        tuple(columns),
        float(level - centre @ slopes),
        tuple(float(s) for s in slopes),
        float(max(low, 0.1 * mean)),
        float(max(high, 0.2 * mean)),
    )


def _spread_design(
    columns: Sequence[str], forecast: Vector, values: Float[np.ndarray, "rows columns"]
) -> Float[np.ndarray, "rows picked"]:
    picked = [forecast if name == FORECAST else values[:, COLUMNS.index(name)] for name in columns]
    return np.nan_to_num(np.stack(picked, 1))


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
                "columns": list(spread.columns),
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
    rows = _Residuals(forecast, true, values, weight, np.asarray(groups))
    columns = min(SPREADS.values(), key=lambda each: _unseen_interval_score(rows, each, level))
    spread, z, low, high = _interval(rows, columns, level)
    correction = family_quantile(np.maximum(low - z, z - high), groups, level)
    even = family_weights(groups)
    return Predictive(
        spread=spread,
        quantiles=np.array([weighted_quantile(z, at, even) for at in GRID]),
        low=low,
        high=high,
        correction=max(correction, 0.0) if math.isfinite(correction) else None,
        families=len(set(rows.groups.tolist())),
    )


@dataclass(frozen=True, eq=False)
class _Residuals:
    forecast: Vector
    true: Vector
    values: Float[np.ndarray, "rows columns"]
    weight: Vector
    groups: np.ndarray

    def pick(self, mask: np.ndarray) -> _Residuals:
        parts = (self.forecast, self.true, self.values, self.weight, self.groups)
        return _Residuals(*(part[mask] for part in parts))


def _interval(
    rows: _Residuals, columns: Sequence[str], level: float
) -> tuple[Spread, Vector, float, float]:
    """(spread, z, low, high)."""
    residual = rows.true - rows.forecast
    spread = fit_spread(columns, rows.forecast, residual, rows.values, rows.weight)
    scale = spread.at(rows.forecast, rows.values)
    z = residual / scale
    even = family_weights(rows.groups)
    low, high = shortest(z, even, level, lambda a, b: _width(rows.forecast, scale, a, b))
    return spread, z, low, high


def _unseen_interval_score(rows: _Residuals, columns: Sequence[str], level: float) -> float:
    """Mean interval score in retention (width + 2/(1 − level) times what a miss misses by;
    Gneiting & Raftery 2007), every tenth of the families judged by the others."""
    names = np.unique(rows.groups)
    if len(names) < 3:
        return float(len(columns))  # nothing to compare with: the smaller one
    total = 0.0
    for part in range(min(10, len(names))):
        out = np.isin(rows.groups, names[part::10])
        spread, _, low, high = _interval(rows.pick(~out), columns, level)
        test = rows.pick(out)
        scale = spread.at(test.forecast, test.values)
        below, above = (_retention(test.forecast + scale * end) for end in (low, high))
        true = _retention(test.true)
        missed = np.maximum(below - true, 0.0) + np.maximum(true - above, 0.0)
        scores = above - below + 2.0 / (1.0 - level) * missed
        total += float(family_weights(test.groups) @ scores) * len(np.unique(test.groups))
    return total / len(names)


def predictive_from_json(value: Mapping[str, Any]) -> Predictive:
    spread = dict(value["spread"])
    spread |= {name: tuple(spread[name]) for name in ("columns", "slopes")}
    return Predictive(
        spread=Spread(**spread),
        quantiles=np.array(value["quantiles"], dtype=float),
        **{k: value[k] for k in ("low", "high", "correction", "families")},
    )
