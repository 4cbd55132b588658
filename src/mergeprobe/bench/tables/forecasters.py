"""What is compared: the predictor in each tier, its parts, and every baseline, as Fitters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mergeprobe.predict.baselines import BASELINES, Fitted, Fitter, classifier, learned
from mergeprobe.predict.features import FEATURES, Tier, columns_of
from mergeprobe.predict.learning import HIGHEST, LOWEST, Rows
from mergeprobe.predict.menus import CANDIDATES, Candidate
from mergeprobe.predict.models import fit_model
from mergeprobe.predict.ridge import FLOOR, score
from mergeprobe.predict.scores import Tested
from mergeprobe.predict.splits import Fold, unseen_all
from mergeprobe.predict.tier import Guess, fit_tier
from mergeprobe.predict.validate import QUICK

MODEL, FILE, WEIGHTS = (
    "predictor, model tier",
    "predictor, file tier",
    "predictor, weights tier",
)
PREDICTORS: dict[str, Tier] = {MODEL: "model", FILE: "file", WEIGHTS: "weights"}
IDENTITIES = ("task-additive", "partner only", "own identity only")
"""Baselines that know families by name only: the leak test."""
OWN = "own features only (model tier)"
CLASSIFIER = "classifier for ρ ≥ 0.8 (AUC only)"
INNER_FOLDS = 4
FIXED: dict[str, Candidate] = {
    "ridge, all": Candidate("ridge", "all", {"penalty": 0.3}),
    "trees, all": Candidate("trees", "all", CANDIDATES["trees, wide"].options),
    "mix, all": Candidate("mix", parts=("ridge, all", "trees, all")),
}
"""One fixed mix that sees every signal: for comparisons of many fits, without nested choice."""


def held_out_forecasters(seed: int = 0) -> dict[str, Fitter]:
    """Everything for the frozen cohorts: fitted once, so the whole nested choice is affordable."""
    predictors = {name: learned(tier, seed=seed) for name, tier in PREDICTORS.items()}
    single = {
        "ridge alone": {"ridge, wide": CANDIDATES["ridge, wide"]},
        "xgboost alone": {"trees, wide": CANDIDATES["trees, wide"]},
    }
    parts = {name: learned("model", candidates=c, seed=seed) for name, c in single.items()}
    return predictors | parts | {CLASSIFIER: classifier("model", seed=seed)} | BASELINES


def capped(tier: Tier, *, without: Sequence[str] = (), seed: int = 0) -> Fitter:
    """The predictor with fewer candidates and INNER_FOLDS inner folds, for outer folds by the
    dozen; intervals and all."""

    def fit(train: Rows) -> Fitted:
        folds = unseen_all(train, seed=seed)
        step = max(1, len(folds) // INNER_FOLDS)
        chosen = folds[::step][:INNER_FOLDS]
        model = fit_tier(train, tier, candidates=QUICK, without=without, folds=chosen, seed=seed)
        return lambda rows: model.predict(rows.values)

    return fit


def plain(tier: Tier, *, without: Sequence[str] = (), seed: int = 0) -> Fitter:
    """The fixed mix of ridge and trees: forecasts without intervals, one fit a fold."""

    def fit(train: Rows) -> Fitted:
        model = fit_model(
            "mix, all",
            tier,
            train.values,
            np.asarray(score(train.target)),
            train.weight,
            candidates=FIXED,
            without=without,
            seed=seed,
        )

        def guess(rows: Rows) -> Guess:
            damage = np.exp(-model.scores(rows.values)) - FLOOR
            nothing = np.full(len(rows), np.nan)
            kept = np.clip(1.0 - damage, LOWEST, HIGHEST)
            return Guess(kept, nothing, nothing, nothing, nothing)

        return guess

    return fit


def not_own() -> tuple[str, ...]:
    """Every feature but the adapter's own: withheld for "own features only"."""
    own = set(columns_of("model", about=("own",)))
    return tuple(name for name in FEATURES if name not in own)


def fitted(rows: Rows, fold: Fold, fitters: Mapping[str, Fitter]) -> dict[str, Fitted]:
    train = rows.pick(fold.train)
    return {name: fitter(train) for name, fitter in fitters.items()}


def forecast_by(rows: Rows, mask: np.ndarray, found: Mapping[str, Fitted]) -> dict[str, Tested]:
    """Forecasts of the masked rows."""
    picked = rows.pick(mask)
    label = np.full(len(picked), "held out")
    return {name: Tested(picked, guess(picked), label) for name, guess in found.items()}


def part_of(all_tested: Mapping[str, Tested], mask: np.ndarray) -> dict[str, Tested]:
    return {name: found.pick(mask) for name, found in all_tested.items()}
