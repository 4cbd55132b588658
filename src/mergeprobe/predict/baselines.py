"""What a forecast has to beat. Every one is a Fitter: training rows -> a function of test rows.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from jaxtyping import Float

from mergeprobe.predict.conformal import LEVEL, family_weights, shortest
from mergeprobe.predict.features import COLUMNS, FEATURES, SETTING, Tier, columns_of
from mergeprobe.predict.learning import HIGHEST, LOWEST, Rows
from mergeprobe.predict.menus import CANDIDATES, Candidate
from mergeprobe.predict.models import fit_ridge, fit_trees, telling
from mergeprobe.predict.ridge import FLOOR, score
from mergeprobe.predict.tier import MERGEABLE, Aim, Centre, Guess, fit_tier

Fitted = Callable[[Rows], Guess]
Fitter = Callable[[Rows], Fitted]
IDENTITY_PENALTY = 0.02


def learned(
    tier: Tier,
    *,
    candidates: Mapping[str, Candidate] = CANDIDATES,
    without: Sequence[str] = (),
    centre: Centre = "median",
    guaranteed: bool = False,
    aim: Aim = "score",
    seed: int = 0,
) -> Fitter:
    """The predictor itself: nested choice, intervals and all, inside the training rows."""

    def fit(train: Rows) -> Fitted:
        model = fit_tier(train, tier, candidates=candidates, without=without, aim=aim, seed=seed)
        return lambda rows: model.predict(rows.values, centre, guaranteed=guaranteed)

    return fit


def classifier(tier: Tier, *, seed: int = 0) -> Fitter:
    """Trees trained on whether ρ ≥ MERGEABLE and on nothing else, beside the probability that the
    predictive distribution gives. Its "retention" is that probability: look at the AUC only."""

    def fit(train: Rows) -> Fitted:
        columns = telling(columns_of(tier), train.values)
        options = {**CANDIDATES["trees, wide"].options, "leaf": 2, "objective": "binary:logistic"}
        merges = (train.target >= MERGEABLE).astype(float)
        if np.ptp(merges) == 0 or not columns:
            return training_mean(train)
        trees = fit_trees(columns, train.values, merges, train.weight, options, seed=seed)

        def guess(rows: Rows) -> Guess:
            nothing, chance = np.full(len(rows), np.nan), trees.scores(rows.values)
            return Guess(chance, nothing, nothing, chance, nothing)

        return guess

    return fit


def own_only(tier: Tier, *, seed: int = 0) -> Fitter:
    """The same with nothing but the adapter's own features (no cross term) and the setting."""
    cross = set(columns_of("model")) - set(columns_of("model", about=("own",)))
    own = {
        "ridge, own": CANDIDATES["ridge, own"],
        "ridge": Candidate("ridge", "all", {"penalty": 0.1}),
        "trees": Candidate("trees", "all", CANDIDATES["trees, wide"].options),
    }
    return learned(tier, candidates=own, without=sorted(cross), seed=seed)


def training_mean(train: Rows) -> Fitted:
    """The same for everyone, with the unconditional interval."""
    return _constant(train, lambda rows: np.zeros(len(rows), int))


def method_mean(train: Rows) -> Fitted:
    """The mean of each (method, set size), with its unconditional interval (the shortest)."""
    keys = sorted(set(zip(train.method.tolist(), train.size.tolist(), strict=True)))
    place = {key: k for k, key in enumerate(keys)}

    def group(rows: Rows) -> np.ndarray:
        pairs = zip(rows.method.tolist(), rows.size.tolist(), strict=True)
        return np.array([place.get(key, -1) for key in pairs])

    return _constant(train, group)


def _constant(train: Rows, group: Callable[[Rows], np.ndarray]) -> Fitted:
    known = group(train)
    ends: dict[int, tuple[float, float, float]] = {}
    for key in {*known.tolist(), -1}:
        mine = train.pick(known == key) if key >= 0 else train
        even = family_weights(mine.family)
        low, high = shortest(mine.target, even, LEVEL, lambda a, b: b - a)
        ends[key] = float(np.average(mine.target, weights=mine.weight)), low, high

    def guess(rows: Rows) -> Guess:
        found = np.array([ends[key] for key in group(rows).tolist()])
        nothing = np.full(len(rows), np.nan)
        return Guess(found[:, 0], found[:, 1], found[:, 2], nothing, nothing)

    return guess


def one_feature(name: str) -> Fitter:
    """A straight line in one feature per method (on retention's score), the method's mean where
    it is missing: the best that this signal alone can do."""

    def fit(train: Rows) -> Fitted:
        mean, lines = method_mean(train), {}
        for method in sorted(set(train.method.tolist())):
            mine = train.pick((train.method == method) & np.isfinite(train.select([name])[:, 0]))
            if len(mine) > 2 and np.ptp(mine.select([name])) > 0:
                goal = np.asarray(score(mine.target))
                lines[method] = fit_ridge([name], mine.values, goal, mine.weight, 1e-6)

        def guess(rows: Rows) -> Guess:
            value = mean(rows).retention
            for method, line in lines.items():
                mine = (rows.method == method) & np.isfinite(rows.select([name])[:, 0])
                value[mine] = _retention(line.scores(rows.values[mine]))
            return _only(value)

        return guess

    return fit


def as_measured(name: str, train: Rows) -> Fitted:
    """A feature that is a retention itself (kind "damage"), taken at its word."""
    assert FEATURES[name].kind == "damage"
    mean = method_mean(train)

    def guess(rows: Rows) -> Guess:
        said = _retention(rows.select([name])[:, 0])
        return _only(np.where(np.isfinite(said), said, mean(rows).retention))

    return guess


def identity(roles: Sequence[str], train: Rows) -> Fitted:
    """Effects of families, of i ("own") and of the others ("partner"), on top of the method's:
    a_i + Σ a_j. A family that training has not seen counts as the average one, so where all are
    unseen this must show no skill within a fold: the test for leaks."""
    names = train.holds()[0]
    methods = sorted(set(train.method.tolist()))
    design = _identity_design(train, names, methods, roles)
    goal = np.asarray(score(train.target))
    share = train.weight / train.weight.sum()
    free = np.arange(design.shape[1]) <= len(methods)
    gram = design.T @ (design * share[:, None])
    gram += np.diag(np.where(free, 1e-6, IDENTITY_PENALTY))
    effects = np.linalg.solve(gram, design.T @ (share * goal))
    return lambda rows: _only(_retention(_identity_design(rows, names, methods, roles) @ effects))


def _identity_design(
    rows: Rows, names: Sequence[str], methods: Sequence[str], roles: Sequence[str]
) -> Float[np.ndarray, "rows effects"]:
    place = {name: k for k, name in enumerate(names)}
    method = (rows.method[:, None] == np.array(methods)).astype(float)
    # beside it, how many partners there are: what an average one does
    blocks = [method, (rows.size - 2.0)[:, None]]
    for role in roles:
        block = np.zeros((len(rows), len(names)))
        for row, members in enumerate(rows.table["families"].to_list()):
            for family in members[:1] if role == "own" else members[1:]:
                if family in place:
                    block[row, place[family]] += 1.0
        blocks.append(block)
    return np.concatenate(blocks, 1)


BASELINES: dict[str, Fitter] = {
    "training mean": training_mean,
    "method mean": method_mean,
    "own features only (model tier)": own_only("model"),
    "own features only (file tier)": own_only("file"),
    "Frobenius cosine alone": one_feature("frobenius_cosine"),
    "gradient cosine alone": one_feature("gradient_cosine_base"),
    "early merge alone": one_feature("early_retention"),
    "early merge, as measured": partial(as_measured, "early_retention"),
    "extrapolated merge alone": one_feature("extrapolated_merge"),
    "extrapolated merge, as measured": partial(as_measured, "extrapolated_merge"),
    "surrogate alone": one_feature("surrogate"),
    "surrogate, as measured": partial(as_measured, "surrogate"),
    "task-additive": partial(identity, ("own", "partner")),
    "partner only": partial(identity, ("partner",)),
    "own identity only": partial(identity, ("own",)),
}
"""In "all unseen" the last three are the leak test: families they have not seen have no effect."""


def _retention(scores: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    return np.clip(1.0 + FLOOR - np.exp(-scores), LOWEST, HIGHEST)


def _only(retention: Float[np.ndarray, " rows"]) -> Guess:
    nothing = np.full(len(retention), np.nan)
    return Guess(retention, nothing, nothing, nothing, nothing)


assert set(SETTING) <= set(COLUMNS)
