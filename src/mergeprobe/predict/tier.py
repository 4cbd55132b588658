"""The model of one tier: candidates compared on unseen families, one fitted, its intervals.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from mergeprobe.errors import NotForecastable
from mergeprobe.plan import Forecast
from mergeprobe.predict.conformal import Predictive, fit_predictive, predictive_from_json
from mergeprobe.predict.features import COLUMNS, FEATURES, Tier
from mergeprobe.predict.learning import LOWEST, Rows
from mergeprobe.predict.menus import CANDIDATES, Candidate
from mergeprobe.predict.models import Model, features_of, fit_model, model_from_json
from mergeprobe.predict.novelty import Novelty, fit_novelties, novelty_from_json, novelty_of
from mergeprobe.predict.ridge import FLOOR, score
from mergeprobe.predict.splits import Fold, unseen_all

MERGEABLE = 0.8
FEWEST_ROWS = 30
Centre = Literal["median", "mean"]
Aim = Literal["score", "retention"]


@dataclass(frozen=True, eq=False)
class Guess:
    """Forecasts of rows, NaN where none can be made. retention, low, high in [−1, 1.2];
    mergeable: probability of a retention of at least MERGEABLE; novelty: above 1 the row lies
    farther from the training rows than they do from each other across families."""

    retention: Float[np.ndarray, " rows"]
    low: Float[np.ndarray, " rows"]
    high: Float[np.ndarray, " rows"]
    mergeable: Float[np.ndarray, " rows"]
    novelty: Float[np.ndarray, " rows"]

    @property
    def far(self) -> Bool[np.ndarray, " rows"]:
        return self.novelty > 1.0

    def forecasts(self) -> list[Forecast]:
        """As plans hold them. NotForecastable if one of the rows has no forecast."""
        if np.isnan(self.retention).any():
            raise NotForecastable("a row lacks the signals that every tier of the predictor needs")
        each = zip(self.retention, self.low, self.high, strict=True)
        return [Forecast(retention=float(r), low=float(a), high=float(b)) for r, a, b in each]


@dataclass(frozen=True, eq=False)
class TierModel:
    """What serves one tier. chosen: its candidate's name (simplest). errors: candidate -> mean
    squared error on unseen families, of what the choice aimed at. top: the retention that a score
    of "nothing lost" may stand for. novelty: by base model."""

    tier: Tier
    chosen: str
    model: Model
    predictive: Predictive
    novelty: Mapping[str, Novelty]
    top: float
    errors: Mapping[str, float]

    def predict(
        self,
        values: Float[np.ndarray, "rows columns"],
        centre: Centre = "median",
        *,
        guaranteed: bool = False,
        base: str | None = None,
    ) -> Guess:
        """centre: of the predictive distribution. guaranteed: conformal.Predictive.ends. base: the
        model that all rows are of, as in Rows.table, for the novelty (novelty_of)."""
        forecast = self.model.scores(values)
        ends = self.predictive.ends(forecast, values, guaranteed=guaranteed)
        low, high = (_unscored(end, self.top) for end in ends)
        # what is lost below the noise of a measurement is not told apart from nothing
        high = np.where(high >= 1.0 - FLOOR / 2, self.top, high)
        if centre == "mean":
            draws = self.predictive.draws(forecast, values)
            retention = _unscored(draws, 1.0).mean(1)
        else:
            retention = _unscored(forecast, 1.0)
        return Guess(
            retention=retention,
            low=np.minimum(low, retention),
            high=np.maximum(high, retention),
            mergeable=self.predictive.above(float(score(MERGEABLE)), forecast, values),
            novelty=novelty_of(self.novelty, values, base),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "tier": self.tier,
            "chosen": self.chosen,
            "top": self.top,
            "errors": dict(self.errors),
            "predictive": self.predictive.to_json(),
            "novelty": {base: each.to_json() for base, each in self.novelty.items()},
            "model": self.model.to_json(),
        }


def tier_from_json(value: Mapping[str, Any]) -> TierModel:
    """What to_json wrote; KeyError, TypeError or ValueError if it is something else."""
    return TierModel(
        tier=value["tier"],
        chosen=value["chosen"],
        model=model_from_json(value["model"]),
        predictive=predictive_from_json(value["predictive"]),
        novelty={base: novelty_from_json(each) for base, each in value["novelty"].items()},
        top=float(value["top"]),
        errors=dict(value["errors"]),
    )


def fit_tier(
    rows: Rows,
    tier: Tier,
    *,
    candidates: Mapping[str, Candidate] = CANDIDATES,
    without: Sequence[str] = (),
    folds: Sequence[Fold] | None = None,
    frozen: Sequence[str] = (),
    aim: Aim = "score",
    seed: int = 0,
) -> TierModel:
    """folds: for choice and calibration; default unseen_all(rows). without: withheld features.
    Learned from all rows, chosen and calibrated by those that the tier will be asked about: where
    any signal of its own was measured (finished adapters, say, often have none of the model tier).
    frozen: cohorts that choose nothing, unless there are no others.
    Other arguments and errors as of predictor.fit_predictor."""
    if len(rows) < FEWEST_ROWS:
        raise NotForecastable(
            f"{len(rows)} learning rows are too few to fit a predictor; {FEWEST_ROWS} is the least"
        )
    goal = np.asarray(score(rows.target))
    folds = unseen_all(rows, seed=seed) if folds is None else folds
    forecasts = {
        name: _unseen_scores(rows, goal, folds, name, tier, candidates, without, seed)
        for name, candidate in candidates.items()
        if candidate.kind != "mix"
    }
    for name, candidate in candidates.items():
        if candidate.kind == "mix":
            forecasts[name] = np.mean([forecasts[part] for part in candidate.parts], axis=0)
    seen = np.isfinite(next(iter(forecasts.values())))
    if (asked := seen & measured_at(rows.values, tier)).any():
        seen = asked
    if not (choosing := seen & ~np.isin(rows.cohort, list(frozen))).any():
        choosing = seen
    share = rows.weight[choosing]
    squared = {name: _error(found, goal, aim)[choosing] ** 2 for name, found in forecasts.items()}
    errors = {name: float(np.average(each, weights=share)) for name, each in squared.items()}
    sizes = {name: len(features_of(name, tier, candidates)) for name in candidates}
    chosen = simplest(squared, sizes, share, rows.family[choosing])
    model = fit_model(
        chosen,
        tier,
        rows.values,
        goal,
        rows.weight,
        candidates=candidates,
        without=without,
        seed=seed,
    )
    above = rows.target[rows.target >= 1.0]
    return TierModel(
        tier=tier,
        chosen=chosen,
        model=model,
        predictive=fit_predictive(
            forecasts[chosen][seen],
            goal[seen],
            rows.values[seen],
            rows.weight[seen],
            rows.family[seen],
        ),
        novelty=fit_novelties(
            model.columns, rows.values, rows.family, rows.table["base"].to_numpy(), seed
        ),
        top=max(1.0 + FLOOR / 2, float(np.quantile(above, 0.99)) if len(above) else 1.0),
        errors={name: round(value, 5) for name, value in errors.items()},
    )


def measured_at(values: Float[np.ndarray, "rows columns"], tier: Tier) -> Bool[np.ndarray, " rows"]:
    """Rows of COLUMNS that hold a signal of this very tier."""
    own = [COLUMNS.index(name) for name, feature in FEATURES.items() if feature.tier == tier]
    return np.asarray(np.isfinite(values[:, own]).any(1))


def simplest(
    squared: Mapping[str, Float[np.ndarray, " rows"]],
    sizes: Mapping[str, int],
    weight: Float[np.ndarray, " rows"],
    groups: Sequence[str] | np.ndarray,
) -> str:
    """Of the candidates that are worse than the best by no more than one standard error of the
    difference (groups, families, taken as drawn), the one that reads the fewest features; of
    equals the one with the least error. So many are compared on so few families that the best by a
    hair is often the luckiest (Breiman et al. 1984, the one-standard-error rule).

    squared: name -> squared error of each row. sizes: name -> number of features.
    """
    names, place = np.unique(np.asarray(groups), return_inverse=True)
    share = weight / weight.sum()
    mean = {name: float(share @ each) for name, each in squared.items()}
    best = min(mean, key=lambda name: mean[name])

    def close(name: str) -> bool:
        worse = squared[name] - squared[best]
        parts = np.bincount(place, share * (worse - share @ worse), minlength=len(names))
        error = np.sqrt((parts**2).sum() * len(names) / max(len(names) - 1, 1))
        return float(share @ worse) <= error

    return min(filter(close, squared), key=lambda name: (sizes[name], mean[name]))


def _error(
    forecast: Float[np.ndarray, " rows"], goal: Float[np.ndarray, " rows"], aim: Aim
) -> Float[np.ndarray, " rows"]:
    return forecast - goal if aim == "score" else _unscored(forecast, 1.0) - _unscored(goal, 1.0)


def _unseen_scores(
    rows: Rows,
    goal: Float[np.ndarray, " rows"],
    folds: Sequence[Fold],
    name: str,
    tier: Tier,
    candidates: Mapping[str, Candidate],
    without: Sequence[str],
    seed: int,
) -> Float[np.ndarray, " rows"]:
    """A candidate's scores of rows it had not seen the families of; NaN for rows in no fold."""
    total, count = np.zeros(len(rows)), np.zeros(len(rows))
    for fold in folds:
        model = fit_model(
            name,
            tier,
            rows.values[fold.train],
            goal[fold.train],
            rows.weight[fold.train],
            candidates=candidates,
            without=without,
            seed=seed,
        )
        total[fold.test] += model.scores(rows.values[fold.test])
        count[fold.test] += 1
    with np.errstate(invalid="ignore"):
        return total / count


def _unscored(scores: Float[np.ndarray, "*rows"], top: float) -> Float[np.ndarray, "*rows"]:
    """Retention of scores; "nothing lost", where the score ends, stands for `top`."""
    best = float(score(1.0))
    found = 1.0 + FLOOR - np.exp(-np.minimum(scores, best))
    found = np.where(scores >= best - 1e-9, top, found)
    return np.clip(found, LOWEST, max(top, 1.0))
