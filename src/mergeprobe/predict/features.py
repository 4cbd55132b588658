"""FEATURES: what the learned predictor sees of (adapter i, set S, method m), once.

A feature is a signal of the pair rows (what j does to i), of i or of j alone, or of the set row,
brought to one number a row: over the other members of S by `over`, then by `kind` to a scale on
which a step means about the same everywhere. For a pair "over the others" is the pair's own
value, so one model serves pairs and sets. What was not measured is NaN, never a guess; a sum over
the others is NaN as soon as one of them is. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from jaxtyping import Float, Int

from mergeprobe.errors import NotForecastable
from mergeprobe.predict.ridge import METHODS, score

Tier = Literal["weights", "file", "model"]
TIERS: tuple[Tier, ...] = ("weights", "file", "model")
"""Each holds the ones before it: finished adapters; probes; probes and the base model."""


Kind = Literal["linear", "log", "damage", "magnitude"]


@dataclass(frozen=True)
class Feature:
    """One column that the predictor may use.

    column: in the pair row (own: it starts with i_ or is the same for every j). For about="set"
    the pair row's column serves sets of two, `set_column` (default: the same) larger ones.
    about: "own" (i alone, no cross term), "other" (the others alone), "pair", "set".
    family: of signals, for ablations. over: how the values of several others become one; "harm"
    adds what is missing to a retention of 1. kind: as ridge.TRANSFORMS, without its clipping.
    sign: +1 or −1 where more of the feature surely means more or less retention, else 0.
    method: "shared" by all, "between" (columns for mean and sum, taken between them by the
    method's exponent, `{}` in the name), or "own" (a column for each method, else between).
    """

    column: str
    about: Literal["own", "other", "pair", "set"]
    tier: Tier
    family: str
    over: Literal["first", "sum", "mean", "max", "harm"] = "sum"
    kind: Kind = "linear"
    sign: int = 0
    method: Literal["shared", "between", "own"] = "shared"
    set_column: str | None = None


def _own(column: str, tier: Tier, family: str, kind: Kind = "linear", sign: int = 0) -> Feature:
    return Feature(column, "own", tier, family, "first", kind, sign)


def _other(column: str, tier: Tier, family: str, kind: Kind = "linear", sign: int = 0) -> Feature:
    return Feature(column, "other", tier, family, "mean", kind, sign)


# fmt: off
FEATURES: dict[str, Feature] = {
    # --- finished adapters
    "own_relative_norm": _own("i_relative_norm", "weights", "update", "log"),
    "own_stable_rank": _own("i_stable_rank", "weights", "update", "log"),
    "own_effective_rank": _own("i_effective_rank", "weights", "subspace", "log"),
    "other_stable_rank": _other("j_stable_rank", "weights", "update", "log"),
    "frobenius_cosine": Feature("frobenius_cosine", "pair", "weights", "update"),
    "frobenius_size": Feature(
        "frobenius_cosine", "pair", "weights", "update", "max", "magnitude"),
    "frobenius_cosine_late": Feature("frobenius_cosine_late", "pair", "weights", "update"),
    "norm_ratio": Feature("norm_ratio", "pair", "weights", "update", "sum", "log"),
    "spectral_amplification": Feature(
        "spectral_amplification", "pair", "weights", "update", "max"),
    "sign_conflict": Feature("sign_conflict", "pair", "weights", "update", "max"),
    "output_overlap": Feature("output_overlap", "pair", "weights", "subspace", "sum", "log"),
    "output_overlap_late": Feature(
        "output_overlap_late", "pair", "weights", "subspace", "sum", "log"),
    "principal_cosine": Feature("principal_cosine", "pair", "weights", "subspace", "max"),
    "union_rank": Feature("union_rank", "pair", "weights", "subspace", "mean"),
    "shared_init": Feature("shared_init", "pair", "weights", "init", "mean"),
    "amplification": Feature(
        "amplification", "set", "weights", "update", set_column="set_amplification"),
    # --- probes
    "own_gain_early": _own("i_own_gain_relative", "file", "guards", sign=1),
    "own_loss_slope": _own("i_loss_slope", "file", "guards"),
    "own_norm_growth": _own("i_norm_growth", "file", "guards"),
    "own_entropy_change": _own("i_entropy_change", "file", "guards"),
    "own_kl_to_base": _own("i_kl_to_base", "file", "guards", "log"),
    "own_drift_norm": _own("i_drift_norm", "file", "guards", "log"),
    "own_selectivity": _own("i_selectivity", "file", "guards", "log"),
    "own_curvature": _own("i_own_curvature", "file", "guards", "log"),
    "other_gain_early": _other("j_own_gain_relative", "file", "others"),
    "other_kl_to_base": _other("j_kl_to_base", "file", "others", "log"),
    "gradient_cosine_base": Feature("gradient_cosine_base", "pair", "file", "gradient"),
    "gradient_cosine_base_late": Feature("gradient_cosine_base_late", "pair", "file", "gradient"),
    "gradient_cosine": Feature("gradient_cosine", "pair", "file", "gradient"),
    "velocity_cosine": Feature("velocity_cosine", "pair", "file", "gradient"),
    "first_order_transfer": Feature("first_order_transfer", "pair", "file", "gradient"),
    "first_order_transfer_snapshot": Feature(
        "first_order_transfer_snapshot", "pair", "file", "gradient"),
    "interference": Feature("interference", "pair", "file", "curvature", "sum", "log"),
    "interference_ratio": Feature(
        "interference_ratio", "set", "file", "curvature", "sum", "log",
        set_column="joint_interference_ratio"),
    "fisher_cosine": Feature("fisher_cosine", "pair", "file", "curvature"),
    "data_weighted": Feature("data_weighted", "pair", "file", "curvature", "sum", "log"),
    "drift_ratio": Feature("drift_ratio", "pair", "file", "representation", "sum", "log"),
    "drift_cosine": Feature("drift_cosine", "pair", "file", "representation"),
    "drift_cosine_late": Feature("drift_cosine_late", "pair", "file", "representation"),
    "drift_cka": Feature("drift_cka", "pair", "file", "representation", "mean"),
    "js_divergence": Feature("js_divergence", "pair", "file", "representation", "sum", "log"),
    "js_to_kl": Feature("js_to_kl", "pair", "file", "representation", "sum", "log"),
    "surrogate": Feature(
        "surrogate_{}", "pair", "file", "surrogate", "harm", "damage", 1, "between"),
    "set_surrogate": Feature(
        "surrogate_{}", "set", "file", "surrogate", "harm", "damage", 1, "between"),
    # --- a few forward passes
    "own_gain": _own("own_gain", "model", "own gain", sign=1),
    "log_length": _own("log_c", "model", "own gain"),
    "log_length_ratio": Feature("log_c_ratio", "pair", "model", "own gain", "mean"),
    "disturbance_late": Feature(
        "disturbance_late", "pair", "model", "disturbance", "sum", "log", -1),
    "disturbance_final": Feature(
        "disturbance_final", "pair", "model", "disturbance", "sum", "log", -1),
    "nonadditivity_late": Feature(
        "nonadditivity_{}_late", "pair", "model", "disturbance", "sum", "log", -1, "between"),
    "nonadditivity_final": Feature(
        "nonadditivity_{}_final", "pair", "model", "disturbance", "sum", "log", -1, "between"),
    "kl_base_other": Feature("kl_base_other", "pair", "model", "divergence", "sum", "log", -1),
    "kl_own_other": Feature("kl_own_other", "pair", "model", "divergence", "sum", "log", -1),
    "js_own_other": Feature("js_own_other", "pair", "model", "divergence", "sum", "log", -1),
    "top1_disagreement": Feature("top1_disagreement", "pair", "model", "divergence", "sum",
        "linear", -1),
    "kl_merge": Feature(
        "kl_merge_{}", "pair", "model", "divergence", "sum", "log", -1, "between"),
    "early_transfer": Feature("early_transfer", "pair", "model", "early merge", "sum"),
    "early_retention": Feature(
        "early_retention_{}", "pair", "model", "early merge", "harm", "damage", 1, "own"),
    "extrapolated_merge": Feature(
        "extrapolated_{}", "pair", "model", "early merge", "harm", "damage", 1, "between"),
    "joint_gradient_cosine": Feature(
        "joint_gradient_cosine", "pair", "model", "joint point", "sum"),
    "set_disturbance": Feature(
        "disturbance_late", "set", "model", "disturbance", "sum", "log", -1),
    "set_nonadditivity": Feature(
        "nonadditivity_{}_late", "set", "model", "disturbance", "sum", "log", -1, "between"),
    "set_kl_merge": Feature(
        "kl_merge_{}", "set", "model", "divergence", "sum", "log", -1, "between"),
    "set_early_retention": Feature(
        "early_retention_{}", "set", "model", "early merge", "harm", "damage", 1, "own"),
    "set_extrapolated_merge": Feature(
        "extrapolated_{}", "set", "model", "early merge", "harm", "damage", 1, "between"),
}
# fmt: on
SETTING = (
    "exponent",
    "log_size",
    "log_progress",
    *(f"method_{m}" for m in METHODS if m != "linear"),
)
"""The weight's exponent (1 for the mean, 0 for the sum), log n, log of the share of training done
(of the pair rows' step and planned_steps, i's own run), the method."""
COLUMNS = (*SETTING, *FEATURES)
SIGNS: dict[str, int] = {name: feature.sign for name, feature in FEATURES.items() if feature.sign}


def columns_of(
    tier: Tier,
    *,
    about: Iterable[str] = ("own", "other", "pair", "set"),
    families: Iterable[str] | None = None,
    without: Iterable[str] = (),
) -> tuple[str, ...]:
    """SETTING and the features up to a tier, of these kinds and families, in the table's order."""
    known = TIERS[: TIERS.index(tier) + 1]
    about, without = set(about), set(without)
    kept = None if families is None else set(families)
    picked = [
        name
        for name, feature in FEATURES.items()
        if feature.tier in known
        and feature.about in about
        and (kept is None or feature.family in kept)
        and feature.family not in without
    ]
    return (*SETTING, *picked)


def feature_matrix(
    requests: pl.DataFrame, pairs: pl.DataFrame, sets: pl.DataFrame | None = None
) -> Float[np.ndarray, "requests columns"]:
    """One row of COLUMNS per request, NaN where a signal is missing.

    requests: i, others (a list of names), method. pairs: i, j and signals, one row per ordered
    pair; sets: adapter, set (names sorted, joined by "+") and signals. Whatever else `requests`
    shares with `pairs` (cohort, point) must agree too. A column that a table lacks counts as
    missing. Raises NotForecastable for an unknown method or a row without others.
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
    whole = None
    if sets is not None and sets.height and (count > 1).any():
        keys = requests.select(
            *shared,
            pl.col("i").alias("adapter"),
            pl.concat_list("others", "i").list.sort().list.join("+").alias("set"),
        )
        whole = _Source(_joined(keys, sets, [*shared, "adapter", "set"]), np.arange(len(count)))
    methods = requests["method"].to_numpy()
    exponent = np.array([METHODS[m].exponent for m in methods])
    filled = [_setting(name, beside, methods, exponent, count) for name in SETTING]
    filled += [_value(f, beside, whole, methods, exponent, count) for f in FEATURES.values()]
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


def _value(
    feature: Feature,
    beside: _Source,
    whole: _Source | None,
    methods: np.ndarray,
    exponent: np.ndarray,
    count: np.ndarray,
) -> Float[np.ndarray, " requests"]:
    found = _of_methods(feature, feature.column, beside, methods, exponent)
    if feature.about != "set":
        return found
    larger = np.full(len(count), math.nan)
    if whole is not None:
        column = feature.set_column or feature.column
        larger = _of_methods(feature, column, whole, methods, exponent)
    return np.where(count == 1, found, larger)


def _of_methods(
    feature: Feature, column: str, source: _Source, methods: np.ndarray, exponent: np.ndarray
) -> Float[np.ndarray, " requests"]:
    """The feature at every row's own method; NaN where its columns are missing."""
    nothing = np.full(len(methods), math.nan)
    if feature.method == "shared":
        found = source.over(column, feature)
        return nothing if found is None else found
    ends = [source.over(column.format(end), feature) for end in ("mean", "sum")]
    mean, total = (nothing if end is None else end for end in ends)
    between = exponent * mean + (1.0 - exponent) * total
    between = np.where(exponent == 1.0, mean, np.where(exponent == 0.0, total, between))
    if feature.method == "between":
        return between
    for method in set(methods.tolist()) - {"mean", "sum", "linear"}:
        exact = source.over(column.format(method), feature)
        if exact is not None:
            between = np.where((methods == method) & np.isfinite(exact), exact, between)
    return between


def _transformed(values: np.ndarray, kind: Kind) -> np.ndarray:
    if kind == "log":
        return np.log(np.maximum(values, 1e-6))
    if kind == "damage":
        return score(values)
    return np.abs(values) if kind == "magnitude" else values


_SOURCES = {
    column.format(method)
    for feature in FEATURES.values()
    for column in (feature.column, feature.set_column or feature.column)
    for method in METHODS
} | {"step", "planned_steps"}
