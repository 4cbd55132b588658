"""The models of the learned predictor: a ridge and boosted trees on retention's score.

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
from mergeprobe.predict.features import COLUMNS, SETTING, SIGNS, Tier, columns_of
from mergeprobe.predict.menus import CANDIDATES, MENUS, TAIL, Candidate
from mergeprobe.predict.novelty import quantiles
from mergeprobe.predict.ridge import score

Matrix = Float[np.ndarray, "rows columns"]
Vector = Float[np.ndarray, " rows"]


class Model(Protocol):
    """Fitted. columns: the features it reads. scores: of rows with all of COLUMNS."""

    @property
    def columns(self) -> tuple[str, ...]: ...
    def scores(self, values: Matrix) -> Vector: ...
    def to_json(self) -> dict[str, Any]: ...


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
    allowed, options = features_of(name, tier, candidates), candidate.options
    columns = telling([c for c in allowed if c not in set(without)], values)
    signs = SIGNS if options.get("signed", 1) else {}
    weight = weight * (1.0 + options.get("tail", 0.0) * (goal < score(TAIL)))
    if candidate.kind == "ridge" or not columns:  # no trees without a column: a constant
        own = bool(options.get("by_method", 0))
        return fit_ridge(
            columns, values, goal, weight, options.get("penalty", 0.1), signs=signs, by_method=own
        )
    return fit_trees(columns, values, goal, weight, options, signs, seed)


def features_of(
    name: str, tier: Tier, candidates: Mapping[str, Candidate] = CANDIDATES
) -> tuple[str, ...]:
    """What a candidate may read at a tier, of all its parts, in the order of COLUMNS."""
    candidate = candidates[name]
    if candidate.kind == "mix":
        used = {c for part in candidate.parts for c in features_of(part, tier, candidates)}
        return tuple(column for column in COLUMNS if column in used)
    menu = MENUS[candidate.menu][tier]
    return tuple(c for c in columns_of(tier) if c in menu or c in SETTING)


def telling(columns: Sequence[str], values: Matrix) -> tuple[str, ...]:
    """Those that differ between rows."""
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
    """score = intercept + Σ (e·under_mean + (1 − e)·under_sum) · (x − mean)/scale
    + Σ absent · [x missing].

    e is the method's exponent: 1 under the mean, 0 under the sum. x is cut to [low, high], the
    fitted rows' 1 % and 99 %, and is `median` where missing.
    """

    columns: tuple[str, ...]
    intercept: float
    low: Vector
    high: Vector
    median: Vector
    mean: Vector
    scale: Vector
    under_mean: Vector
    under_sum: Vector
    absent: Vector

    def scores(self, values: Matrix) -> Vector:
        picked = values[:, [COLUMNS.index(name) for name in self.columns]]
        missing = np.isnan(picked)
        seen = np.clip(np.where(missing, self.median, picked), self.low, self.high)
        seen = (seen - self.mean) / self.scale
        exponent = values[:, COLUMNS.index("exponent")]
        slopes = exponent * (seen @ self.under_mean) + (1.0 - exponent) * (seen @ self.under_sum)
        return self.intercept + slopes + missing @ self.absent

    def to_json(self) -> dict[str, Any]:
        head = {"kind": "ridge", "columns": list(self.columns), "intercept": self.intercept}
        return head | {name: getattr(self, name).tolist() for name in _LINEAR}


_LINEAR = ("low", "high", "median", "mean", "scale", "under_mean", "under_sum", "absent")


def fit_ridge(
    columns: Sequence[str],
    values: Matrix,
    goal: Vector,
    weight: Vector,
    penalty: float,
    *,
    signs: Mapping[str, int] = SIGNS,
    by_method: bool = False,
) -> Linear:
    """Weighted ridge on standardised columns, signs kept by bounded least squares. penalty: per
    row and standard deviation. by_method: slopes under the mean and under the sum of their own,
    other methods between."""
    picked = values[:, [COLUMNS.index(name) for name in columns]]
    missing = np.isnan(picked)
    low, median, high = quantiles(picked, 0.01, 0.5, 0.99)
    seen = np.clip(np.where(missing, median, picked), low, high)
    share = weight / weight.sum()
    mean = share @ seen
    scale = np.sqrt(share @ (seen - mean) ** 2) + 1e-9
    seen = (seen - mean) / scale
    exponent = values[:, [COLUMNS.index("exponent")]]
    own = np.array([by_method and name not in SETTING for name in columns], bool)
    some = missing.any(0) & ~missing.all(0)
    # both ends of a slope, the slopes that all methods share, the jumps where a value is missing
    blocks = [seen[:, own] * exponent, seen[:, own] * (1 - exponent), seen[:, ~own]]
    design = np.concatenate([*blocks, missing[:, some].astype(float)], 1)
    names = [name for name, mine in zip(columns, own, strict=True) if mine] * 2
    names += [name for name, mine in zip(columns, own, strict=True) if not mine]
    side = np.array([signs.get(name, 0) for name in names] + [0] * int(some.sum()))
    found, intercept = _bounded(design, goal, share, penalty, side)
    both, rest = int(own.sum()), int((~own).sum())
    under_mean, under_sum, absent = np.zeros((3, len(columns)))
    under_mean[own], under_sum[own] = found[:both], found[both : 2 * both]
    under_mean[~own] = under_sum[~own] = found[2 * both : 2 * both + rest]
    absent[some] = found[2 * both + rest :]
    return Linear(
        tuple(columns), intercept, low, high, median, mean, scale, under_mean, under_sum, absent
    )


def _bounded(
    design: Matrix, goal: Vector, share: Vector, penalty: float, side: np.ndarray
) -> tuple[Vector, float]:
    """(coefficients, intercept) of the penalised least squares with signs `side`."""
    from scipy.optimize import lsq_linear

    if not design.shape[1]:
        return np.zeros(0), float(share @ goal)
    centre, level = share @ design, float(share @ goal)
    moved = design - centre
    gram = moved.T @ (moved * share[:, None]) + penalty * np.eye(design.shape[1])
    root = np.linalg.cholesky(gram)
    aim = np.linalg.solve(root, moved.T @ (share * (goal - level)))
    bounds = np.where(side > 0, 0.0, -np.inf), np.where(side < 0, 0.0, np.inf)
    found = np.asarray(lsq_linear(root.T, aim, bounds=bounds).x)
    return found, level - float(centre @ found)


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
    options: Mapping[str, Any],
    signs: Mapping[str, int] = SIGNS,
    seed: int = 0,
) -> Trees:
    """Histogram trees on squared error (or options["objective"]), one thread, so that a seed
    gives the same trees."""
    xgboost = _xgboost()
    settings = {
        "objective": options.get("objective", "reg:squarederror"),
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
