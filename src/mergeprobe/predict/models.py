"""The candidate models of the learned predictor: a ridge and boosted trees on retention's score.

Both forecast ridge.score(ρ) = −log(max(0, 1 − ρ) + 0.05), on which the long tail of failures does
not drown the rest; a "mix" is the mean of several, which err apart. Signs of FEATURES hold in all
of them. A fitted model is plain numbers and goes to JSON. Needs no torch; xgboost and scipy only
where they are used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from mergeprobe.errors import NotForecastable
from mergeprobe.predict.features import COLUMNS, SETTING, SIGNS, TIERS, Tier, columns_of
from mergeprobe.predict.ridge import score

Matrix = Float[np.ndarray, "rows columns"]
Vector = Float[np.ndarray, " rows"]
TAIL = 0.8


class Model(Protocol):
    """Fitted. columns: the features it reads. scores: of rows with all of COLUMNS."""

    @property
    def columns(self) -> tuple[str, ...]: ...
    def scores(self, values: Matrix) -> Vector: ...
    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Candidate:
    """kind: "ridge", "trees" or "mix". menu: a row of MENUS, absent for a mix. parts: of a mix.
    options: penalty of a ridge; rounds, depth, rate, leaf (least weight in one), shrink of trees;
    of both tail (default 0: how much more a failure, ρ < TAIL, weighs than another row) and
    signed (default 1; 0 lets go of the signs of FEATURES).
    """

    kind: str
    menu: str = ""
    options: Mapping[str, float] = field(default_factory=dict)
    parts: tuple[str, ...] = ()


_DISTURBED = (
    *("own_gain", "disturbance_late", "disturbance_final", "early_retention"),
    *("extrapolated_merge", "gradient_cosine_base"),
)
_PROBED = (
    *("own_gain_early", "gradient_cosine_base", "interference_ratio", "drift_ratio", "js_to_kl"),
    "surrogate",
)
_WEIGHED = ("frobenius_cosine", "frobenius_size", "norm_ratio", "output_overlap", "union_rank")
MENUS: dict[str, Mapping[Tier, tuple[str, ...] | None]] = {
    "own": dict.fromkeys(TIERS, ("own_gain", "own_gain_early", "own_loss_slope")),
    "few": {"weights": _WEIGHED, "file": _PROBED, "model": _DISTURBED},
    "core": dict.fromkeys(TIERS, (*_DISTURBED, *_PROBED, *_WEIGHED)),
    "wide": dict.fromkeys(
        TIERS,
        (
            *_DISTURBED,
            *_PROBED,
            *_WEIGHED,
            *("log_length", "log_length_ratio", "nonadditivity_late", "kl_merge"),
            *("kl_own_other", "js_own_other", "early_transfer", "joint_gradient_cosine"),
            *("set_early_retention", "set_extrapolated_merge", "set_surrogate"),
            *("own_loss_slope", "own_kl_to_base", "gradient_cosine", "data_weighted"),
            *("first_order_transfer_snapshot", "drift_cosine", "js_divergence"),
            *("own_stable_rank", "own_effective_rank", "amplification", "shared_init"),
        ),
    ),
    "all": dict.fromkeys(TIERS, None),
}
"""Features to choose from, small to large, for each tier; those of a higher tier than asked are
left out, and SETTING is always there. "few" are the signals that the pilot's choice took."""

_SHALLOW = {"rounds": 150, "depth": 3, "rate": 0.05, "leaf": 8, "shrink": 5.0}
_DEEP = {"rounds": 200, "depth": 5, "rate": 0.04, "leaf": 12, "shrink": 5.0}
CANDIDATES: dict[str, Candidate] = {
    "ridge, own": Candidate("ridge", "own", {"penalty": 0.05}),
    "ridge, few": Candidate("ridge", "few", {"penalty": 0.05}),
    "ridge, core": Candidate("ridge", "core", {"penalty": 0.2}),
    "ridge, wide": Candidate("ridge", "wide", {"penalty": 0.3}),
    "trees, few": Candidate("trees", "few", _SHALLOW),
    "trees, wide": Candidate("trees", "wide", _SHALLOW),
    "trees, all": Candidate("trees", "all", _DEEP),
    "mix, few": Candidate("mix", parts=("ridge, few", "trees, few")),
    "mix, wide": Candidate("mix", parts=("ridge, wide", "trees, wide")),
    "mix of four": Candidate(
        "mix", parts=("ridge, few", "ridge, core", "trees, few", "trees, wide")
    ),
}


def fit_model(
    name: str,
    tier: Tier,
    values: Matrix,
    goal: Vector,
    weight: Vector,
    *,
    candidates: Mapping[str, Candidate] = CANDIDATES,
    without: Sequence[str] = (),
    seed: int = 0,
) -> Model:
    """A candidate fitted to scores. values: COLUMNS. without: features that are withheld.
    Columns that say nothing in these rows (constant, or never measured) are left out."""
    candidate = candidates[name]
    if candidate.kind == "mix":
        given = {"candidates": candidates, "without": without, "seed": seed}
        parts = [fit_model(p, tier, values, goal, weight, **given) for p in candidate.parts]
        return Mix(tuple(parts))
    menu, options = MENUS[candidate.menu][tier], candidate.options
    allowed = [c for c in columns_of(tier) if menu is None or c in menu or c in SETTING]
    columns = _telling([c for c in allowed if c not in set(without)], values)
    signs = SIGNS if options.get("signed", 1) else {}
    weight = weight * (1.0 + options.get("tail", 0.0) * (goal < score(TAIL)))
    if candidate.kind == "ridge":
        return fit_ridge(columns, values, goal, weight, options["penalty"], signs)
    return fit_trees(columns, values, goal, weight, options, signs, seed)


def _telling(columns: Sequence[str], values: Matrix) -> tuple[str, ...]:
    kept = []
    for name in columns:
        seen = values[:, COLUMNS.index(name)]
        seen = seen[np.isfinite(seen)]
        if len(seen) and np.ptp(seen) > 1e-9:
            kept.append(name)
    return tuple(kept)


# ------------------------------------------------------------------------------------------ ridge
@dataclass(frozen=True, eq=False)
class Linear:
    """score = intercept + Σ coefficient · (x − mean)/scale + Σ absent · [x missing].

    x is cut to [low, high], the fitted rows' 1 % and 99 %, and is `median` where missing.
    """

    columns: tuple[str, ...]
    intercept: float
    low: Vector
    high: Vector
    median: Vector
    mean: Vector
    scale: Vector
    coefficient: Vector
    absent: Vector

    def scores(self, values: Matrix) -> Vector:
        picked = values[:, [COLUMNS.index(name) for name in self.columns]]
        missing = np.isnan(picked)
        seen = np.clip(np.where(missing, self.median, picked), self.low, self.high)
        return (
            self.intercept
            + (seen - self.mean) / self.scale @ self.coefficient
            + missing @ self.absent
        )

    def to_json(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name).tolist() for name in _LINEAR}
        return {
            "kind": "ridge",
            "columns": list(self.columns),
            "intercept": self.intercept,
            **numbers,
        }


_LINEAR = ("low", "high", "median", "mean", "scale", "coefficient", "absent")


def fit_ridge(
    columns: Sequence[str],
    values: Matrix,
    goal: Vector,
    weight: Vector,
    penalty: float,
    signs: Mapping[str, int] = SIGNS,
) -> Linear:
    """Weighted ridge on standardised columns, signs kept by bounded least squares. penalty: per
    row and standard deviation."""
    from scipy.optimize import lsq_linear

    picked = values[:, [COLUMNS.index(name) for name in columns]]
    missing = np.isnan(picked)
    low, median, high = np.nanquantile(picked, [0.01, 0.5, 0.99], axis=0)
    seen = np.clip(np.where(missing, median, picked), low, high)
    share = weight / weight.sum()
    mean = share @ seen
    scale = np.sqrt(share @ (seen - mean) ** 2) + 1e-9
    some = missing.any(0) & ~missing.all(0)
    absent = missing[:, some].astype(float)
    centre = share @ absent
    design = np.concatenate([(seen - mean) / scale, absent - centre], 1)
    intercept = float(share @ goal)
    gram = design.T @ (design * share[:, None]) + penalty * np.eye(design.shape[1])
    root = np.linalg.cholesky(gram)
    aim = np.linalg.solve(root, design.T @ (share * (goal - intercept)))
    side = np.array([signs.get(name, 0) for name in columns] + [0] * int(some.sum()))
    bounds = np.where(side > 0, 0.0, -np.inf), np.where(side < 0, 0.0, np.inf)
    found = np.asarray(lsq_linear(root.T, aim, bounds=bounds).x)
    jumps = np.zeros(len(columns))
    jumps[some] = found[len(columns) :]
    return Linear(
        columns=tuple(columns),
        intercept=intercept - float(centre @ jumps[some]),
        low=low,
        high=high,
        median=median,
        mean=mean,
        scale=scale,
        coefficient=found[: len(columns)],
        absent=jumps,
    )


# ------------------------------------------------------------------------------------------ trees
@dataclass(frozen=True, eq=False)
class Trees:
    """Boosted trees. booster: xgboost's own JSON."""

    columns: tuple[str, ...]
    booster: dict[str, Any]
    _loaded: list = field(default_factory=list, repr=False)

    def scores(self, values: Matrix) -> Vector:
        xgboost = _xgboost()
        if not self._loaded:
            booster = xgboost.Booster({"nthread": 1})
            booster.load_model(bytearray(json.dumps(self.booster).encode()))
            self._loaded.append(booster)
        picked = values[:, [COLUMNS.index(name) for name in self.columns]]
        found = self._loaded[0].inplace_predict(picked.astype(np.float32))
        return np.asarray(found, dtype=float)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "trees", "columns": list(self.columns), "booster": self.booster}


def fit_trees(
    columns: Sequence[str],
    values: Matrix,
    goal: Vector,
    weight: Vector,
    options: Mapping[str, float],
    signs: Mapping[str, int] = SIGNS,
    seed: int = 0,
) -> Trees:
    """Histogram trees on squared error, one thread (so that a seed gives the same trees)."""
    xgboost = _xgboost()
    settings = {
        "objective": "reg:squarederror",
        "tree_method": "hist",
        "max_depth": int(options["depth"]),
        "eta": options["rate"],
        "min_child_weight": options["leaf"],
        "reg_lambda": options["shrink"],
        "subsample": 0.8,
        "colsample_bynode": 0.5,
        "monotone_constraints": tuple(signs.get(name, 0) for name in columns),
        "base_score": float(np.average(goal, weights=weight)),
        "nthread": 1,
        "seed": seed,
    }
    picked = values[:, [COLUMNS.index(name) for name in columns]].astype(np.float32)
    # the least weight of a leaf counts rows of full weight
    booster = xgboost.train(
        settings, xgboost.DMatrix(picked, goal, weight=weight), int(options["rounds"])
    )
    return Trees(tuple(columns), json.loads(bytes(booster.save_raw("json"))))


def _xgboost() -> Any:
    try:
        import xgboost
    except ImportError:
        raise NotForecastable(
            "the learned predictor needs xgboost, which is not installed: "
            "pip install xgboost-cpu (or xgboost)"
        ) from None
    return xgboost


# -------------------------------------------------------------------------------------------- mix
@dataclass(frozen=True, eq=False)
class Mix:
    """The mean of several models' scores."""

    parts: tuple[Model, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        used = {name for part in self.parts for name in part.columns}
        return tuple(name for name in COLUMNS if name in used)

    def scores(self, values: Matrix) -> Vector:
        return sum((p.scores(values) for p in self.parts), np.zeros(len(values))) / len(self.parts)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "mix", "parts": [part.to_json() for part in self.parts]}


def model_from_json(value: Mapping[str, Any]) -> Model:
    """Reads what to_json wrote; NotForecastable for features that this version does not know."""
    kind = value.get("kind")
    if kind == "mix":
        return Mix(tuple(model_from_json(part) for part in value["parts"]))
    columns = tuple(value["columns"])
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise NotForecastable(
            f"the predictor wants the features {', '.join(unknown[:3])}, which this mergeprobe "
            "does not measure: fit it again"
        )
    if kind == "trees":
        return Trees(columns, value["booster"])
    if kind != "ridge":
        raise NotForecastable(f"a predictor of kind '{kind}' is unknown; expected ridge or trees")
    numbers = {name: np.array(value[name], dtype=float) for name in _LINEAR}
    if not math.isfinite(value["intercept"]):
        raise NotForecastable("the predictor's intercept is no number")
    return Linear(columns, float(value["intercept"]), **numbers)
