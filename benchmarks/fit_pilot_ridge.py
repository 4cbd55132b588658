"""Fits the ridge of `mergeprobe.predict.ridge` on pilot rows and says how good it is.

    python benchmarks/fit_pilot_ridge.py --data PILOT          the tables and the coefficients
    python benchmarks/fit_pilot_ridge.py --data PILOT --check  status 1 if the code holds others

PILOT holds rows_S1.csv and rows_S2.csv. Every score is out of fold with *both* families of tasks
unseen (near-duplicates share a family; a family is left out of both sets at once). Needs scipy.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from scipy.optimize import nnls
from scipy.stats import spearmanr

from mergeprobe.predict.ridge import (
    HIGHEST,
    LOWEST,
    MODELS,
    TRANSFORMS,
    WEIGHT_MODELS,
    Ridge,
    Term,
    score,
    transform,
)

# our signal -> the pilot's column; {k} is the step of the snapshot (3 or 6 of 60)
COLUMNS = {
    "own_gain": "t{k}_i_gainstar",
    "log_c": "t{k}_i_lc",
    "log_c_ratio": "t{k}_lcr",
    "disturbance_late": "s{k}_cstar_x_dist_h28",
    "disturbance_final": "s{k}_cstar_x_dist_hF",
    "nonadditivity_sum_late": "s{k}_cstar_nadd_sum_h28",
    "nonadditivity_sum_final": "s{k}_cstar_nadd_sum_hF",
    "nonadditivity_mean_late": "s{k}_cstar_nadd_mean_h28",
    "nonadditivity_mean_final": "s{k}_cstar_nadd_mean_hF",
    "kl_merge_sum": "s{k}_cstar_klm_sum",
    "kl_merge_mean": "s{k}_cstar_klm_mean",
    "kl_base_other": "s{k}_cstar_kl_0j",
    "kl_own_other": "s{k}_cstar_kl_ij",
    "top1_disagreement": "s{k}_cstar_dis1",
    "early_retention_mean": "s{k}_cstar_ret_mean",
    "early_retention_sum": "s{k}_cstar_ret_sum",
    "early_transfer": "s{k}_cstar_xlossn",
    "gradient_cosine_base": "g_base_None_cos",
    "frobenius_cosine": "w60_cos",
    "norm_ratio": "w60_lnr",  # a logarithm there
}
FAMILIES = {
    **dict.fromkeys(("add", "addw", "sub"), "arithmetic"),
    **dict.fromkeys(("date", "iso"), "dates"),
    **dict.fromkeys(("comply", "refuse"), "requests"),
}
PENALTIES = (0.05, 0.1, 0.2, 0.5)
PENALTY = 0.1
WEIGHTS_ONLY = ("frobenius_cosine", "norm_ratio")
# quantiles of 5 % and 95 % cover 0.81 (mean) and 0.87 (sum) of pairs of unseen families; these 0.9
TAIL = 0.02
SETS_STEPS = tuple(itertools.product(("S1", "S2"), (3, 6)))


def menu(target: str) -> dict[str, tuple[str, ...]]:
    """The sets of signals that the nested choice picks from, small to large."""
    disturbed = ("own_gain", "disturbance_late", "disturbance_final")
    merged = (*disturbed, f"early_retention_{target}")
    graded = (*merged, "gradient_cosine_base")
    wide = (*graded, f"kl_merge_{target}", f"nonadditivity_{target}_late")
    return {
        "own gain only": ("own_gain",),
        "gain, final disturbance": ("own_gain", "disturbance_final"),
        "gain, disturbances": disturbed,
        "… and early merge": merged,
        "… and base gradients": graded,
        "… and KL, non-additivity": wide,
        "… and lengths": (*wide, "log_c", "log_c_ratio"),
        "all signals of snapshots": tuple(s for s in COLUMNS if s not in WEIGHTS_ONLY),
        "weights only": WEIGHTS_ONLY,
    }


# what the nested choice takes in most folds for the mean; for the sum it adds two more signals,
# which is no better outside. The base gradients joined the menu after the pilot had been looked at
COMMITTED = {
    "MODELS": ("… and base gradients", "… and early merge", "gain, disturbances"),
    "WEIGHTS": ("weights only",),
}


@dataclass(frozen=True)
class Rows:
    """One row per ordered pair and snapshot. seen: transformed signals; others: per row."""

    seen: dict[str, np.ndarray]
    retention: dict[str, np.ndarray]
    group: np.ndarray
    step: np.ndarray
    task: np.ndarray
    own: np.ndarray
    other: np.ndarray

    def matrix(self, signals: tuple[str, ...]) -> np.ndarray:
        return np.stack([self.seen[signal] for signal in signals], 1)

    def folds(self, among: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(train, test) masks: test pairs lie within two families, train pairs touch neither."""
        among = np.ones(len(self.own), bool) if among is None else among
        for two in itertools.combinations(sorted(set(self.own[among])), 2):
            own, other = np.isin(self.own, two), np.isin(self.other, two)
            yield among & ~own & ~other, among & own & other


def load(folder: Path) -> Rows:
    frames = []
    for group, step in SETS_STEPS:
        raw = pl.read_csv(folder / f"rows_{group}.csv", infer_schema_length=None)
        named = [
            pl.col(column.format(k=step)).cast(pl.Float64).alias(signal)
            for signal, column in COLUMNS.items()
        ]
        frames.append(
            raw.select("set", "i", "j", "rho_mean", "rho_sum", pl.lit(step).alias("step"), *named)
        )
    rows = pl.concat(frames).with_columns(pl.col("norm_ratio").exp())
    family = {task: FAMILIES.get(task, task) for task in rows["i"].unique()}
    return Rows(
        seen={signal: transform(signal, rows[signal].to_numpy()) for signal in COLUMNS},
        retention={t: rows[f"rho_{t}"].to_numpy().clip(-1.0, 1.2) for t in ("mean", "sum")},
        group=rows["set"].to_numpy(),
        step=rows["step"].to_numpy(),
        task=rows["i"].to_numpy(),
        own=np.array([family[task] for task in rows["i"]]),
        other=np.array([family[task] for task in rows["j"]]),
    )


def fit(
    rows: Rows, target: str, signals: tuple[str, ...], penalty: float, train: np.ndarray
) -> Ridge:
    """Ridge with signs fixed by TRANSFORMS: a non-negative least-squares problem."""
    seen, goal = rows.matrix(signals)[train], score(rows.retention[target][train])
    signs = np.array([TRANSFORMS[signal].sign for signal in signals])
    mean, scale = seen.mean(0), seen.std(0)
    design = (seen - mean) / scale * signs
    root = np.linalg.cholesky(design.T @ design / len(goal) + penalty * np.eye(len(signals)))
    aim = np.linalg.solve(root, design.T @ (goal - goal.mean()) / len(goal))
    coefficients = nnls(root.T, aim)[0] * signs
    columns = zip(signals, mean, scale, coefficients, strict=True)
    return Ridge(float(goal.mean()), tuple(Term(s, *map(float, c)) for s, *c in columns), ())


def predict(model: Ridge, rows: Rows) -> np.ndarray:
    value = np.full(len(rows.own), model.intercept)
    for term in model.terms:
        value += term.coefficient * (rows.seen[term.signal] - term.mean) / term.scale
    return np.clip(value, score(LOWEST), score(1.0))


def out_of_fold(rows: Rows, target: str, signals: tuple[str, ...], penalty: float) -> np.ndarray:
    """Scores forecast for every row; a pair within one family is in several folds: their mean."""
    total, count = np.zeros(len(rows.own)), np.zeros(len(rows.own))
    for train, test in rows.folds():
        total[test] += predict(fit(rows, target, signals, penalty, train), rows)[test]
        count[test] += 1
    return total / count


def choose(rows: Rows, target: str, among: np.ndarray) -> tuple[str, float]:
    """The menu entry and penalty of the least squared score error over inner folds."""
    goal = score(rows.retention[target])
    names = [name for name in menu(target) if name != "weights only"]
    errors = dict.fromkeys(itertools.product(names, PENALTIES), 0.0)
    for train, test in rows.folds(among):
        for name, penalty in errors:
            guess = predict(fit(rows, target, menu(target)[name], penalty, train), rows)
            errors[name, penalty] += float(((guess - goal)[test] ** 2).sum())
    return min(errors, key=lambda key: errors[key])


def nested(rows: Rows, target: str) -> tuple[np.ndarray, Counter[str]]:
    total, count, chosen = np.zeros(len(rows.own)), np.zeros(len(rows.own)), Counter[str]()
    for train, test in rows.folds():
        name, penalty = choose(rows, target, train)
        chosen[name] += 1
        total[test] += predict(fit(rows, target, menu(target)[name], penalty, train), rows)[test]
        count[test] += 1
    return total / count, chosen


def spread(
    rows: Rows, target: str, guess: np.ndarray, use: np.ndarray
) -> tuple[tuple[float, float, float], ...]:
    """The residuals' TAIL and 1 − TAIL quantiles in the lower and upper half of the forecasts."""
    residual = score(rows.retention[target]) - guess
    middle = float(np.median(guess[use]))
    halves = (use & (guess <= middle), use & (guess > middle))
    knots = []
    for half in halves:
        low, high = np.quantile(residual[half], (TAIL, 1 - TAIL))
        knots.append((float(guess[half].mean()), float(low), float(high)))
    return tuple(knots)


def bounds(guess: np.ndarray, knots: tuple[tuple[float, float, float], ...]) -> np.ndarray:
    at, low, high = zip(*knots, strict=True)
    ends = [guess + np.interp(guess, at, side) for side in (low, high)]
    return np.clip(1.0 + np.exp(-score(1.0)) - np.exp(-np.stack(ends)), LOWEST, HIGHEST)


def coverage(rows: Rows, target: str, guess: np.ndarray) -> tuple[float, float]:
    """Share inside, and mean width, of intervals whose residuals saw neither family."""
    count, inside, width = np.zeros((3, len(guess)))
    for train, test in rows.folds():
        low, high = bounds(guess[test], spread(rows, target, guess, train))
        true = rows.retention[target][test]
        count[test] += 1
        inside[test] += (low <= true) & (true <= high)
        width[test] += high - low
    return float((inside / count).mean()), float((width / count).mean())


def scores(rows: Rows, target: str, guess: np.ndarray, use: np.ndarray) -> str:
    """Spearman pooled and within an adapter's partners, MAE, R²."""
    true = rows.retention[target]
    value = np.minimum(1.0, 1.0 + np.exp(-score(1.0)) - np.exp(-guess))
    pooled, within = [], []
    for group, step in SETS_STEPS:
        here = use & (rows.group == group) & (rows.step == step)
        if not here.any():
            continue
        pooled.append(spearmanr(value[here], true[here])[0])
        for task in sorted(set(rows.task[here])):
            each = here & (rows.task == task)
            if np.ptp(value[each]) > 0:
                within.append(spearmanr(value[each], true[each])[0])
    error = (value - true)[use]
    r2 = 1 - (error**2).sum() / ((true[use] - true[use].mean()) ** 2).sum()
    middle = float(np.mean(within)) if within else float("nan")
    return f"{np.mean(pooled):7.2f} {middle:7.2f} {abs(error).mean():7.3f} {r2:7.2f}"


def report(rows: Rows, target: str) -> None:
    everywhere = np.ones(len(rows.own), bool)
    print(f"\n{target}: both families unseen      Spearman  within     MAE      R²  cover   width")
    tested = {name: out_of_fold(rows, target, s, PENALTY) for name, s in menu(target).items()}
    tested["NESTED CHOICE"], chosen = nested(rows, target)
    for name, guess in tested.items():
        inside, width = coverage(rows, target, guess)
        print(f"  {name:30s} {scores(rows, target, guess, everywhere)} {inside:6.2f} {width:7.2f}")
    for step in (3, 6):
        guess = tested[COMMITTED["MODELS"][0]]
        line = scores(rows, target, guess, rows.step == step)
        print(f"  committed, step {step} of 60         {line}")
    signals = menu(target)[COMMITTED["MODELS"][0]]
    moved = predict(fit(rows, target, signals, PENALTY, rows.group == "S1"), rows)
    print(f"  committed, S1 -> S2 (same tasks){scores(rows, target, moved, rows.group == 'S2')}")
    print("  chosen in the folds:", ", ".join(f"{n} × {name}" for name, n in chosen.most_common()))


def final(rows: Rows, name: str, target: str) -> Ridge:
    """The model that the code holds: fitted on all rows, spread from out-of-fold residuals."""
    everywhere = np.ones(len(rows.own), bool)
    signals = menu(target)[name]
    model = fit(rows, target, signals, PENALTY, everywhere)
    knots = spread(rows, target, out_of_fold(rows, target, signals, PENALTY), everywhere)
    terms = tuple(
        Term(t.signal, round(t.mean, 4), round(t.scale, 4), round(t.coefficient, 4))
        for t in model.terms
    )
    rounded = tuple((round(a, 3), round(b, 3), round(c, 3)) for a, b, c in knots)
    return Ridge(round(model.intercept, 4), terms, rounded)


def agree(ours: Ridge, code: Ridge) -> bool:
    def numbers(model: Ridge) -> list[float]:
        terms = [x for t in model.terms for x in (t.mean, t.scale, t.coefficient)]
        return [model.intercept, *terms, *itertools.chain(*model.spread)]

    return ours.signals == code.signals and np.allclose(numbers(ours), numbers(code), atol=2e-3)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of rows_*.csv")
    parser.add_argument("--check", action="store_true", help="compare with the code")
    options = parser.parse_args()
    rows = load(options.data)
    same = True
    for table, code in (("MODELS", MODELS), ("WEIGHTS", WEIGHT_MODELS)):
        for target in ("mean", "sum"):
            fitted = tuple(final(rows, name, target) for name in COMMITTED[table])
            held = code.get(target, ())
            matches = len(fitted) == len(held) and all(map(agree, fitted, held))
            same &= matches
            print(f"{table}[{target!r}]: {'as in the code' if matches else 'NOT as in the code'}")
            for model in () if options.check else fitted:
                print(f"  {model}")
    if not options.check:
        for target in ("mean", "sum"):
            report(rows, target)
    return 0 if same or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
