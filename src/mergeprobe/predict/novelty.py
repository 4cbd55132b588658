"""How far a row lies from everything that a predictor was fitted on.

Three measures, each in units of what training rows of *other* families score, so that 1 is the
edge: the share of features outside the training range, how far norms and ranks lie outside of
theirs, and the distance to the nearest training rows in robustly scaled features (median and
interquartile range). A missing feature counts as the median. Kept for each base model by itself:
what is usual on one is far on another. Needs no torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from mergeprobe.predict.features import COLUMNS, SETTING

REFERENCES = 400
NEAREST = 3
EDGE = 0.99
LEAST = 0.05
"""Rows closer than this (in standard deviations) are the same, whatever training rows do."""
LEAST_BEYOND = 1.0
"""One feature outside of the range by less than this (in standard deviations) is no reason."""
REGIME = ("own_relative_norm", "norm_ratio", "own_stable_rank", "own_effective_rank")
"""What tells learning rates, ranks and horizons, whether or not the forecast reads it."""
CUT = 8.0
"""Scaled features are cut here, so that one wild signal alone does not decide the distance."""


@dataclass(frozen=True, eq=False)
class Novelty:
    """low, high: training range of each column (0.5 % and 99.5 %). references: scaled rows.
    edge_outside, edge_beyond, edge_distance: the EDGE quantiles over training rows, judged by rows
    of other families only."""

    columns: tuple[str, ...]
    low: Float[np.ndarray, " columns"]
    high: Float[np.ndarray, " columns"]
    median: Float[np.ndarray, " columns"]
    scale: Float[np.ndarray, " columns"]
    references: Float[np.ndarray, "references columns"]
    edge_outside: float
    edge_beyond: float
    edge_distance: float

    def score(self, values: Float[np.ndarray, "rows all"]) -> Float[np.ndarray, " rows"]:
        """The largest of the measures; above 1 a row is far from all training rows."""
        picked = values[:, [COLUMNS.index(name) for name in self.columns]]
        distance = _nearest(self._scaled(picked), self.references)
        measures = (
            _outside(picked, self.low, self.high) / self.edge_outside,
            _beyond(self.columns, picked, self.low, self.high, self.scale) / self.edge_beyond,
            distance / self.edge_distance,
        )
        return np.max(measures, axis=0)

    def _scaled(self, picked: Float[np.ndarray, "rows columns"]) -> np.ndarray:
        return scaled(picked, self.median, self.scale)

    def to_json(self) -> dict[str, Any]:
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        return {
            "columns": list(self.columns),
            "edge_outside": self.edge_outside,
            "edge_beyond": self.edge_beyond,
            "edge_distance": self.edge_distance,
            **{name: array.tolist() for name, array in arrays.items()},
        }


_ARRAYS = ("low", "high", "median", "scale", "references")


def fit_novelty(
    columns: Sequence[str],
    values: Float[np.ndarray, "rows all"],
    groups: Sequence[Any] | np.ndarray,
    seed: int = 0,
) -> Novelty:
    """groups: the family of every row's i. Columns of the setting (method, size) are left out:
    they are known to be covered, or the method is refused by name. REGIME is always looked at, as
    far as it was measured."""
    kept = [name for name in columns if name not in SETTING or name == "log_progress"]
    kept += [n for n in REGIME if np.isfinite(values[:, COLUMNS.index(n)]).any()]
    columns = tuple(dict.fromkeys(kept))
    picked = values[:, [COLUMNS.index(name) for name in columns]]
    low, first, median, third, high = quantiles(picked, 0.005, 0.25, 0.5, 0.75, 0.995)
    # a column with one common value has no interquartile range
    scale = np.maximum((third - first) / 1.349, (high - low) / 6.0) + 1e-9
    rows = scaled(picked, median, scale)
    groups = np.asarray(groups)
    chosen = _spread_out(len(rows), seed)
    outside, beyond, distance = np.zeros((3, len(rows)))
    for group in sorted(set(groups.tolist())):
        mine, theirs = groups == group, groups != group
        if not theirs.any():
            theirs = ~theirs
        ends = quantiles(picked[theirs], 0.005, 0.995)
        outside[mine] = _outside(picked[mine], *ends)
        beyond[mine] = _beyond(columns, picked[mine], ends[0], ends[1], scale)
        others = chosen[theirs[chosen]]
        distance[mine] = _nearest(rows[mine], rows[others if len(others) else chosen])
    return Novelty(
        columns=columns,
        low=low,
        high=high,
        median=median,
        scale=scale,
        references=np.round(rows[chosen], 3),
        edge_outside=max(float(np.quantile(outside, EDGE)), 1.0 / max(len(columns), 1)),
        edge_beyond=max(float(np.quantile(beyond, EDGE)), LEAST_BEYOND),
        edge_distance=max(float(np.quantile(distance, EDGE)), LEAST),
    )


def fit_novelties(
    columns: Sequence[str],
    values: Float[np.ndarray, "rows all"],
    groups: Sequence[Any] | np.ndarray,
    bases: Sequence[str] | np.ndarray,
    seed: int = 0,
) -> dict[str, Novelty]:
    """Base model -> fit_novelty of its rows."""
    groups, bases = np.asarray(groups), np.asarray(bases)
    return {
        base: fit_novelty(columns, values[bases == base], groups[bases == base], seed)
        for base in sorted(set(bases.tolist()))
    }


def novelty_of(
    novelties: Mapping[str, Novelty], values: Float[np.ndarray, "rows all"], base: str | None = None
) -> Float[np.ndarray, " rows"]:
    """Scores of rows on `base`; on a base that is not told, or not known, how far they are from
    the rows of whichever known one they are nearest to."""
    known = novelties.get(base or "")
    asked = list(novelties.values()) if known is None else [known]
    return np.min([each.score(values) for each in asked], axis=0)


def quantiles(
    picked: Float[np.ndarray, "rows columns"], *levels: float
) -> Float[np.ndarray, "levels columns"]:
    """Of each column's known values; also where there is no column at all."""
    if not picked.shape[1]:
        return np.zeros((len(levels), 0))
    with warnings.catch_warnings():  # a column that is missing in all of these rows stays NaN
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanquantile(picked, levels, axis=0)


def novelty_from_json(value: Mapping[str, Any]) -> Novelty:
    return Novelty(
        columns=tuple(value["columns"]),
        edge_outside=value["edge_outside"],
        edge_beyond=value["edge_beyond"],
        edge_distance=value["edge_distance"],
        **{name: np.array(value[name], dtype=float) for name in _ARRAYS},
    )


def scaled(
    picked: Float[np.ndarray, "rows columns"],
    median: Float[np.ndarray, " columns"],
    scale: Float[np.ndarray, " columns"],
) -> Float[np.ndarray, "rows columns"]:
    return np.clip(np.nan_to_num((picked - median) / scale), -CUT, CUT)


def _outside(picked: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Share of a row's known columns that lie outside the range."""
    known = np.isfinite(picked)
    beyond = known & ((picked < low) | (picked > high))
    return beyond.sum(1) / np.maximum(known.sum(1), 1)


def _beyond(
    columns: Sequence[str], picked: np.ndarray, low: np.ndarray, high: np.ndarray, scale: np.ndarray
) -> np.ndarray:
    """How far the one of REGIME that lies farthest outside of its range does, in scales."""
    mine = [place for place, name in enumerate(columns) if name in REGIME]
    far = (np.maximum(low - picked, picked - high) / scale)[:, mine]
    return np.nan_to_num(far, nan=0.0).max(1, initial=0.0)


def _nearest(
    rows: Float[np.ndarray, "rows columns"], references: Float[np.ndarray, "references columns"]
) -> Float[np.ndarray, " rows"]:
    """Mean distance (root mean square over columns) to the NEAREST references."""
    squares = (rows**2).sum(1)[:, None] - 2.0 * rows @ references.T + (references**2).sum(1)
    count = min(NEAREST, len(references))
    closest = np.partition(squares, count - 1, axis=1)[:, :count]
    return np.sqrt(np.maximum(closest, 0.0) / max(rows.shape[1], 1)).mean(1)


def _spread_out(count: int, seed: int) -> np.ndarray:
    if count <= REFERENCES:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, REFERENCES, replace=False))
