"""Signal tables -> rows of features.COLUMNS, for any (adapter, set, method). Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Float, Int

from mergeprobe.errors import NotForecastable
from mergeprobe.predict.features import COLUMNS, FEATURES, SETTING, Feature, Kind
from mergeprobe.predict.ridge import METHODS, score


def feature_matrix(
    requests: pl.DataFrame, pairs: pl.DataFrame
) -> Float[np.ndarray, "requests columns"]:
    """One row of COLUMNS per request, NaN where a signal is missing.

    requests: i, others (a list of names), method. pairs: i, j and signals, one row per ordered
    pair. Whatever else `requests` shares with `pairs` (cohort, point) must agree too. A column that
    the table lacks counts as missing. Raises NotForecastable for an unknown method or a row without
    others.
    """
    known = set(METHODS)
    if unknown := sorted(set(requests["method"].unique()) - known):
        raise NotForecastable(
            f"no forecast for the merge method '{unknown[0]}'; expected one of {', '.join(METHODS)}"
        )
    count = requests["others"].list.len().cast(pl.Int64).to_numpy()
    if (count == 0).any():
        raise NotForecastable("a forecast needs at least one other adapter in every set")
    shared = [c for c in ("cohort", "point") if c in requests.columns and c in pairs.columns]
    exploded = requests.select(*shared, "i", pl.col("others").alias("j")).explode("j")
    starts = np.cumsum(count) - count
    beside = _Source(_joined(exploded, pairs, [*shared, "i", "j"]), starts)
    methods = requests["method"].to_numpy()
    exponent = np.array([METHODS[m].exponent for m in methods])
    filled = [_setting(name, beside, methods, exponent, count) for name in SETTING]
    for feature in FEATURES.values():
        if feature.method in ("weight", "length"):
            filled.append(_weighed(feature, beside, methods, exponent, count))
        else:
            filled.append(_of_methods(feature, beside, methods, exponent))
    return np.stack(filled, 1) if len(count) else np.zeros((0, len(COLUMNS)))


@dataclass(frozen=True, eq=False)
class _Source:
    """A table joined to the requests; starts: where each request's run of rows begins."""

    table: pl.DataFrame
    starts: Int[np.ndarray, " requests"]

    def column(self, name: str) -> Float[np.ndarray, " rows"] | None:
        if name not in self.table.columns:
            return None
        return self.table[name].cast(pl.Float64).to_numpy()

    def over(self, name: str, feature: Feature) -> Float[np.ndarray, " requests"] | None:
        """The column over each request's rows, transformed; None if the table lacks it."""
        values = self.column(name)
        if values is None:
            return None
        count = np.diff(np.append(self.starts, len(values)))
        if feature.over == "first":
            found = values[self.starts]
        elif feature.over == "max":
            found = np.maximum.reduceat(
                np.abs(values) if feature.kind == "magnitude" else values, self.starts
            )
        else:
            parts = 1.0 - values if feature.over == "harm" else values
            found = np.add.reduceat(parts, self.starts)
            found = 1.0 - found if feature.over == "harm" else found
            found = found / count if feature.over == "mean" else found
        return _transformed(found, feature.kind)


def _joined(left: pl.DataFrame, right: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    """`left` in its order with the columns that a feature may ask for; a key twice is refused."""
    wanted = [c for c in right.columns if c in keys or c in _SOURCES]
    right = right.select(wanted)
    if right.select(keys).is_duplicated().any():
        raise NotForecastable(f"the signal rows hold a row of ({', '.join(keys)}) twice")
    return left.join(right, on=list(keys), how="left", maintain_order="left")


def _setting(
    name: str, beside: _Source, methods: np.ndarray, exponent: np.ndarray, count: np.ndarray
) -> Float[np.ndarray, " requests"]:
    if name == "exponent":
        return exponent
    if name == "log_size":
        return np.log(count + 1.0)
    if name == "log_progress":
        step, planned = beside.column("step"), beside.column("planned_steps")
        if step is None or planned is None:
            return np.full(len(count), math.nan)
        return np.log(np.clip(step / planned, 1e-3, 1.0))[beside.starts]
    return (methods == name.removeprefix("method_")).astype(float)


def _of_methods(
    feature: Feature, source: _Source, methods: np.ndarray, exponent: np.ndarray
) -> Float[np.ndarray, " requests"]:
    """The feature at every row's own method; NaN where its columns are missing."""
    nothing, column = np.full(len(methods), math.nan), feature.column
    if feature.method == "shared":
        found = source.over(column, feature)
        return nothing if found is None else found
    ends = [source.over(column.format(end), feature) for end in ("mean", "sum")]
    mean, total = (nothing if end is None else end for end in ends)
    between = exponent * mean + (1.0 - exponent) * total
    between = np.where(exponent == 1.0, mean, np.where(exponent == 0.0, total, between))
    for method in set(methods.tolist()) - {"mean", "sum", "linear"}:
        exact = source.over(column.format(method), feature)
        if exact is not None:
            between = np.where((methods == method) & np.isfinite(exact), exact, between)
    return between


def _weighed(
    feature: Feature,
    source: _Source,
    methods: np.ndarray,
    exponent: np.ndarray,
    count: np.ndarray,
) -> Float[np.ndarray, " requests"]:
    """weighing.weights_of for whole arrays; a rule that it does not know has the weight T^−e."""
    ratios = source.over(feature.column, feature)  # Σ ‖ΔW_j‖ / ‖ΔW_i‖ over the others
    if ratios is None:
        return np.full(len(methods), math.nan)
    even, size = methods == "equal_norm_mean", count + 1.0
    if feature.method == "weight":
        equal = np.log1p(ratios) - 2.0 * np.log(size)  # w_i = n̄ / (T n_i), T n̄ = Σ n
        return np.where(even, equal, -exponent * np.log(size))
    alike = np.where(np.isnan(ratios), math.nan, np.log(count))
    return np.where(even, alike, np.log(np.maximum(ratios, 1e-6)))


def _transformed(values: np.ndarray, kind: Kind) -> np.ndarray:
    if kind == "log":
        return np.log(np.maximum(values, 1e-6))
    if kind == "damage":
        return score(values)
    return np.abs(values) if kind == "magnitude" else values


_SOURCES = {
    feature.column.format(method) for feature in FEATURES.values() for method in METHODS
} | {"step", "planned_steps"}
