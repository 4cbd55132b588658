"""What was tried to make the learned predictor better, on cohorts to learn from only.

    python benchmarks/predictor_attempts.py

Each cohort is forecast by the others, which share no family with it (one run an adapter; no SD or
SE). Tables: candidates, intervals of the mix on few signals (share inside, mean width), what these
gain by those about the partner and by how long the merge rule makes each (under the equal-norm mean
and SVC), what deeper trees and the two dearest signals bring at the file
tier, the points of training whose rows are learned from, the median or the mean of the predictive
distribution, a set's forecast averaged with the set's own extrapolated merge; a second base's rows
(--second) among those learned from, for our base and for pairs of its own families that are left
out; then the share of rows that novelty calls far, of the cohort left out and of the same rows with
longer updates. Pairs unless it says sets; Spearman, the same within an adapter's partners, R², MAE,
AUC for ρ ≥ 0.8 (of sets Spearman, R², MAE, AUC and the mean of forecast − measured), under the mean
/ the sum. A minute or two on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from mergeprobe.predict.blend import clip
from mergeprobe.predict.features import COLUMNS, TIERS, Tier, columns_of
from mergeprobe.predict.learning import HIGHEST, LOWEST, Rows, read_rows
from mergeprobe.predict.menus import CANDIDATES, DEAR, MENUS, Candidate
from mergeprobe.predict.models import fit_model
from mergeprobe.predict.novelty import fit_novelty
from mergeprobe.predict.refit import OURS
from mergeprobe.predict.ridge import FLOOR, score
from mergeprobe.predict.scores import METRICS, Tested
from mergeprobe.predict.splits import Fold, unseen_cohorts, unseen_families
from mergeprobe.predict.tier import Guess, fit_tier

SHOWN = ("Spearman", "within partners", "R2", "MAE", "AUC")
METHODS = ("mean", "sum")
RULES = ("mean", "sum", "equal_norm_mean", "svc")
RULE = ("own_weight", "others_length")
PARTNER = ("norm_ratio", "other_gain_early")
POINTS = (0.05, 0.1)
Forecast = Callable[[Rows], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, default=OURS)
    parser.add_argument("--cohorts", nargs="+", default=["t1", "t2", "t3"])
    parser.add_argument("--second", type=Path, default=Path(__file__).parent / "rows")
    asked = parser.parse_args()
    rows = read_rows(asked.rows, cohorts=asked.cohorts)
    candidates(rows)
    intervals(rows)
    partner(rows)
    rule(rows)
    file_tier(rows)
    points(rows)
    centres(rows)
    sets(rows, own_merges(asked.rows, asked.cohorts))
    both = read_rows([asked.rows, asked.second])
    known = {*asked.cohorts, *read_rows(asked.second).cohort}
    second_base(both.pick(np.isin(both.cohort, list(known))))
    novelty(rows)


def candidates(rows: Rows) -> None:
    print("\n## candidates, model tier")
    single = [name for name, candidate in CANDIDATES.items() if candidate.kind != "mix"]
    for name in (*single, "mix, few", "mix, wide", "mix of four"):
        show(rows, name, left_out(rows, plain(name, "model")))


def intervals(rows: Rows) -> None:
    print("\n## 90 % intervals of the mix on few signals, model tier: inside, width")
    few = {n: CANDIDATES[n] for n in ("ridge, few", "trees, few", "mix, few")}
    low, high = np.full((2, len(rows)), np.nan)
    for fold in unseen_cohorts(rows):
        model = fit_tier(rows.pick(fold.train), "model", candidates=few)
        found = model.predict(rows.values[fold.test])
        low[fold.test], high[fold.test] = found.low, found.high
    inside = (low <= rows.target) & (rows.target <= high)
    for point in POINTS:
        cells = [
            f"{inside[m].mean():.2f} {(high - low)[m].mean():.2f}" for m in slices(rows, point)
        ]
        print(f"{point:4.0%}  {' / '.join(cells)}")


def partner(rows: Rows) -> None:
    print("\n## the few signals without those about the partner")
    for tier in ("model", "file"):
        for gone in ((), ("norm_ratio",), ("other_gain_early",), PARTNER):
            if tier == "model" or "norm_ratio" not in gone:
                found = left_out(rows, plain("mix, few", tier, gone))
                show(rows, f"{tier}, without {' and '.join(gone) or 'none'}", found)


def rule(rows: Rows) -> None:
    print(f"\n## with and without how long the rule makes each: {' / '.join(RULES)}")
    for tier in TIERS:
        for name in ("ridge, few", "trees, few", "mix, few"):
            for label, gone in (("with", ()), ("without", RULE)):
                found = left_out(rows, plain(name, tier, gone))
                show(rows, f"{tier}, {name}, {label}", found, RULES)


def file_tier(rows: Rows) -> None:
    print(f"\n## deeper trees, and {' and '.join(DEAR)}, file tier")
    MENUS["every"] = {tier: columns_of(tier) for tier in TIERS}
    deep = CANDIDATES["trees, all"].options
    tried = {
        "trees, few": CANDIDATES["trees, few"],
        "trees, few, deep": Candidate("trees", "few", deep),
        "trees, all": CANDIDATES["trees, all"],
        "trees, every": Candidate("trees", "every", deep),
    }
    for name in tried:
        show(rows, name, left_out(rows, plain(name, "file", candidates=tried)))


def points(rows: Rows) -> None:
    print("\n## learned from rows of these points, model tier")
    for name in ("ridge, few", "ridge, core", "trees, few"):
        for label, most in (("all", 1.0), ("up to 25 %", 0.3), ("up to 10 %", 0.15)):
            found = left_out(rows, plain(name, "model"), rows.point <= most)
            show(rows, f"{name}, {label}", found)


def centres(rows: Rows) -> None:
    print("\n## centre of the predictive distribution, learned from 5 and 10 %, model tier")
    for name in ("ridge, few", "trees, few"):
        for centre in ("median", "mean"):

            def fit(train: Rows, name=name, centre=centre) -> Forecast:
                model = fit_tier(train, "model", candidates={name: CANDIDATES[name]})
                return lambda test: model.predict(test.values, centre).retention

            early = rows.pick(rows.point < 0.15)
            show(early, f"{name}, {centre}", left_out(early, fit))


def second_base(rows: Rows) -> None:
    """Ours: by cohort, as above. The second base's: by two of its families."""
    bases = rows.table["base"].to_numpy()
    ours = bases == max(set(bases), key=bases.tolist().count)
    pairs = [fold for fold in unseen_families(rows) if (fold.test & ~ours).any()]
    for title, shown, folds in (
        ("our base", ours, unseen_cohorts(rows)),
        ("the second base", ~ours, pairs),
    ):
        print(f"\n## {title}: learned with and without the second base's rows, model tier")
        for name in ("ridge, few", "ridge, wide", "trees, few", "mix of four"):
            for label, among in (("with", None), ("without", ours)):
                found = left_out(rows, plain(name, "model"), among, folds, shown)
                kept = shown & np.isfinite(found)
                show(rows.pick(kept), f"{name}, {label}", found[kept])


def sets(rows: Rows, own: dict[tuple, float]) -> None:
    print("\n## sets of three and five at 5 %, model tier")
    keys = zip(*(rows.table[c] for c in ("cohort", "i", "set", "method")), strict=True)
    merged = np.array([clip(own.get(key, np.nan)) if key in own else np.nan for key in keys])
    for name in ("ridge, few", "trees, all", "mix of four"):
        found = left_out(rows, plain(name, "model"))
        for label, kept in (("alone", found), ("averaged", (found + merged) / 2)):
            cells = []
            for method in METHODS:
                mask = (rows.size > 2) & (rows.method == method) & np.isfinite(merged)
                mask &= np.abs(rows.point - 0.05) < 1e-9
                cells.append(f"{scored(rows, kept, mask, ('Spearman', 'R2', 'MAE', 'AUC'))}")
                cells[-1] += f" {np.mean(kept[mask] - rows.target[mask]):+.2f}"
            print(f"{name + ', ' + label:28s} " + " / ".join(cells))


def novelty(rows: Rows) -> None:
    print("\n## share called far of cohorts left out; with updates 10, 30, 100 times as long")
    place = COLUMNS.index("own_relative_norm")
    for tier in ("weights", "file", "model"):
        goal = np.asarray(score(rows.target))
        columns = fit_model("ridge, few", tier, rows.values, goal, rows.weight).columns
        for fold in unseen_cohorts(rows):
            known = fit_novelty(columns, rows.values[fold.train], rows.family[fold.train])
            shares = []
            for factor in (1, 10, 30, 100):
                longer = rows.values[fold.test].copy()
                longer[:, place] += np.log(factor)
                shares.append(f"{(known.score(longer) > 1).mean():.2f}")
            print(f"{tier:8s} {fold.name:4s} {' '.join(shares)}")


def own_merges(folder: Path, cohorts: list[str]) -> dict[tuple, float]:
    """(cohort, adapter, set, method) -> the set's own extrapolated merge at 5 % of training."""
    found = {}
    for cohort in cohorts:
        table = pl.read_parquet(folder / cohort / "sets.parquet")
        for row in table.filter((pl.col("point") - 0.05).abs() < 1e-9).to_dicts():
            for method in METHODS:
                kept = row.get(f"extrapolated_{method}")
                if kept is not None:
                    found[cohort, row["adapter"], row["set"], method] = kept
    return found


def plain(
    name: str,
    tier: Tier,
    without: Sequence[str] = (),
    candidates: Mapping[str, Candidate] = CANDIDATES,
) -> Callable[[Rows], Forecast]:
    def fit(train: Rows) -> Forecast:
        goal = np.asarray(score(train.target))
        given = {"candidates": candidates, "without": without}
        model = fit_model(name, tier, train.values, goal, train.weight, **given)
        return lambda test: np.clip(1 + FLOOR - np.exp(-model.scores(test.values)), LOWEST, HIGHEST)

    return fit


def left_out(
    rows: Rows,
    fit: Callable[[Rows], Forecast],
    among: np.ndarray | None = None,
    folds: Sequence[Fold] | None = None,
    tested: np.ndarray | None = None,
) -> np.ndarray:
    """Mean forecast over the folds that test a row, NaN for rows that none tests."""
    total, count = np.zeros((2, len(rows)))
    for fold in unseen_cohorts(rows) if folds is None else folds:
        train = fold.train if among is None else fold.train & among
        test = fold.test if tested is None else fold.test & tested
        total[test] += fit(rows.pick(train))(rows.pick(test))
        count[test] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def show(rows: Rows, label: str, found: np.ndarray, methods: Sequence[str] = METHODS) -> None:
    for point in POINTS:
        cells = " / ".join(scored(rows, found, m, SHOWN) for m in slices(rows, point, methods))
        print(f"{label:45s} {point:4.0%}  {cells}")


def slices(rows: Rows, point: float, methods: Sequence[str] = METHODS) -> Iterator[np.ndarray]:
    for method in methods:
        yield (rows.size == 2) & (rows.method == method) & (np.abs(rows.point - point) < 1e-9)


def scored(rows: Rows, found: np.ndarray, mask: np.ndarray, names: tuple[str, ...]) -> str:
    picked, nothing = rows.pick(mask), np.full(int(mask.sum()), np.nan)
    guess = Guess(found[mask], nothing, nothing, found[mask], nothing)
    tested = Tested(picked, guess, picked.cohort.astype(str))
    return " ".join(f"{METRICS[n](tested, np.ones(len(picked))):5.2f}" for n in names)


if __name__ == "__main__":
    main()
