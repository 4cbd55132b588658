"""A predictor fitted on the user's own rows, with ours or without. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mergeprobe.errors import DataError
from mergeprobe.predict.features import COLUMNS, TIERS, Tier
from mergeprobe.predict.learning import HIGHEST, LOWEST, Rows, learning_rows, read_tables
from mergeprobe.predict.menus import CANDIDATES, Candidate
from mergeprobe.predict.models import fit_model
from mergeprobe.predict.predictor import NEEDED, Predictor, describe
from mergeprobe.predict.ridge import FLOOR, score
from mergeprobe.predict.scores import Tested, scores_of
from mergeprobe.predict.splits import unseen_all
from mergeprobe.predict.tier import FEWEST_ROWS, Guess, TierModel, fit_tier
from mergeprobe.predict.validate import out_of_fold

OURS = Path(__file__).parents[1] / "bank"
"""The rows that travel with the package: a folder of cohorts."""
HELD_OUT = ("h1", "h2", "h3")
"""Of ours: fitted on by the predictor that is shipped, but its models are those that were chosen
without them, as in the tables that they judge."""
YOURS = " (yours)"
SCORED = ("Spearman", "within partners", "R2", "MAE", "AUC")
Say = Callable[[str], None]


def refit(
    folders: Path | Sequence[Path],
    *,
    ours: Path | None = OURS,
    frozen: Sequence[str] = (),
    candidates: Mapping[str, Candidate] = CANDIDATES,
    seed: int = 0,
    say: Say = lambda message: None,
) -> Predictor:
    """A predictor fitted on the cohorts in `folders` (learning.read_rows says which layout) and,
    unless `ours` is None, on ours. Its card holds scores on families that were left out: of all
    rows, and of the user's own. frozen: cohorts that choose no model; HELD_OUT of ours too.

    Only tiers that enough rows have signals for are fitted. Raises DataError for rows that cannot
    be read or a frozen cohort that is not there, NotForecastable where rows are too few or of too
    few families.
    """
    rows, mine = gathered(folders, ours)
    there = set(rows.cohort.tolist())
    if unknown := sorted(set(frozen) - there):
        raise DataError(f"no cohort '{unknown[0]}' to freeze; there are {', '.join(sorted(there))}")
    if ours is not None:
        frozen = sorted({*frozen, *HELD_OUT} & there)
    fitted: dict[Tier, TierModel] = {}
    scores: list[dict[str, Any]] = []
    for tier in supported(rows):
        say(f"{tier} tier: {len(candidates)} candidates on families left out")
        fitted[tier] = fit_tier(rows, tier, candidates=candidates, frozen=frozen, seed=seed)
        say(f"{tier} tier: scores of '{fitted[tier].chosen}'")
        tested = unseen_scores(rows, tier, fitted[tier].chosen, candidates, seed)
        scores += score_rows(tested, tier, mine if ours is not None else ())
    card = describe(rows, fitted)
    card |= {"frozen": list(frozen), "yours": list(mine), "scores": scores}
    return Predictor(fitted, card)


def gathered(folders: Path | Sequence[Path], ours: Path | None) -> tuple[Rows, tuple[str, ...]]:
    """All learning rows, and the names of the user's cohorts among them. One that has the name of
    one of ours is renamed."""
    tables = read_tables(folders)
    mine = set(tables["adapters"]["cohort"].unique().to_list())
    if ours is not None:
        if not any(ours.glob("*/outcomes.parquet")):
            raise DataError(f"'{ours}' holds no rows of ours; fit on yours alone with --only-mine")
        theirs = read_tables(ours)
        twice = mine & set(theirs["adapters"]["cohort"].unique().to_list())
        tables = {name: _renamed(table, twice) for name, table in tables.items()}
        mine = {name + YOURS if name in twice else name for name in mine}
        tables = {
            name: pl.concat(
                [t[name] for t in (theirs, tables) if name in t], how="diagonal_relaxed"
            )
            for name in theirs.keys() | tables.keys()
        }
    return learning_rows(**tables), tuple(sorted(mine))


def _renamed(table: pl.DataFrame, names: set[str]) -> pl.DataFrame:
    new = pl.when(pl.col("cohort").is_in(sorted(names))).then(pl.col("cohort") + YOURS)
    return table.with_columns(new.otherwise(pl.col("cohort")).alias("cohort"))


def supported(rows: Rows) -> list[Tier]:
    """The tiers whose needed signals FEWEST_ROWS rows have; at least the lowest."""
    able, found = np.ones(len(rows), bool), []
    for tier in TIERS:
        picked = rows.values[:, [COLUMNS.index(name) for name in NEEDED[tier]]]
        able &= np.isfinite(picked).all(1)
        if able.sum() >= FEWEST_ROWS or not found:
            found.append(tier)
        else:
            break
    return found


def unseen_scores(
    rows: Rows, tier: Tier, chosen: str, candidates: Mapping[str, Candidate], seed: int
) -> Tested:
    """Forecasts of the chosen candidate for rows whose families it had not seen. It was chosen on
    the same folds, so they flatter it a little; intervals are not judged here."""

    def fit(train: Rows) -> Callable[[Rows], Guess]:
        goal = np.asarray(score(train.target))
        given = (train.values, goal, train.weight)
        model = fit_model(chosen, tier, *given, candidates=candidates, seed=seed)

        def guess(test: Rows) -> Guess:
            kept = 1.0 + FLOOR - np.exp(-model.scores(test.values))
            nothing = np.full(len(test), np.nan)
            return Guess(np.clip(kept, LOWEST, HIGHEST), nothing, nothing, nothing, nothing)

        return guess

    return out_of_fold(rows, unseen_all(rows, seed=seed), fit)


def score_rows(tested: Tested, tier: Tier, mine: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Scores of pairs and of larger sets, under each method; of all cohorts and of `mine`."""
    found = []
    whose = {"all": np.ones(len(tested.rows), bool)}
    if mine:
        whose["yours"] = np.isin(tested.rows.cohort, list(mine))
    for name, inside in whose.items():
        for label, sized in (("pairs", tested.rows.size == 2), ("sets", tested.rows.size > 2)):
            for method in sorted(set(tested.rows.method.tolist())):
                mask = inside & sized & (tested.rows.method == method)
                if mask.sum() > 2:
                    scores = scores_of(tested.pick(mask))
                    values = {key: _rounded(scores[key]) for key in SCORED}
                    head = {"tier": tier, "cohorts": name, "of": label, "method": method}
                    found.append({**head, "rows": int(mask.sum()), **values})
    return found


def _rounded(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None
