"""The learned predictor on pilot rows: both families of tasks unseen, beside simple baselines.

    python benchmarks/pilot_predictor.py --data PILOT              scores of every forecaster
    python benchmarks/pilot_predictor.py --data PILOT --attempts   what raises R² and what does not

PILOT holds rows_S1.csv and rows_S2.csv (188 ordered pairs, 20 tasks of 8 families, one seed,
probes at 5 % and 10 % of 60 steps). They are put into the bank's layout first. One thread: about
fifteen minutes for the first, one for the second.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import polars as pl

from mergeprobe.predict.baselines import BASELINES, Fitter, classifier, learned, own_only
from mergeprobe.predict.learning import LOWEST, Rows, learning_rows
from mergeprobe.predict.menus import CANDIDATES, Candidate
from mergeprobe.predict.models import fit_model
from mergeprobe.predict.ridge import score
from mergeprobe.predict.scores import Tested
from mergeprobe.predict.splits import unseen_families
from mergeprobe.predict.tier import Guess
from mergeprobe.predict.validate import difference_table, out_of_fold, score_table

# the bank's column -> the pilot's; {k} is the step of the snapshot
PAIR_COLUMNS = {
    "frobenius_cosine": "w{k}_cos",
    "norm_ratio": "w{k}_lnr",  # a logarithm there
    "output_overlap": "w{k}_Bov",
    "amplification": "w{k}_amp",
    "gradient_cosine_base": "g_base_None_cos",
    "gradient_cosine": "g_own1_{k}_cos",
    "first_order_transfer": "s{k}_base_linn",
    "first_order_transfer_snapshot": "s{k}_own1_linn",
    "interference_ratio": "s{k}_own1_fish",
    "fisher_cosine": "s{k}_own1_Ecos",
    "data_weighted": "s{k}_own1_E",
    "i_own_gain_relative": "t{k}_i_gain1",
    "j_own_gain_relative": "t{k}_j_gain1",
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
    "joint_gradient_cosine": "s{k}_jgstar_gcos",
}
FAMILIES = {
    **dict.fromkeys(("add", "addw", "sub"), "arithmetic"),
    **dict.fromkeys(("date", "iso"), "dates"),
    **dict.fromkeys(("comply", "refuse"), "requests"),
}
COHORTS, STEPS, PLANNED = ("S1", "S2"), (3, 6), 60


def load(folder: Path) -> Rows:
    """Learning rows; the pilot kept no noise of the own gains, so all rows weigh the same."""
    raw = {c: pl.read_csv(folder / f"rows_{c}.csv", infer_schema_length=None) for c in COHORTS}
    pairs = [_pairs(raw[cohort], cohort, step) for cohort in COHORTS for step in STEPS]
    measured = [row for cohort in COHORTS for row in _measured(raw[cohort], cohort)]
    adapters = [
        {"cohort": c, "base": "SmolLM2-135M", "adapter": t, "task": t, "family": FAMILIES.get(t, t)}
        for c in COHORTS
        for t in sorted(set(raw[c]["i"]))
    ]
    together = pl.concat(pairs, how="diagonal").with_columns(pl.col("norm_ratio").exp())
    return learning_rows(pl.DataFrame(adapters), together, pl.DataFrame(measured))


def _pairs(raw: pl.DataFrame, cohort: str, step: int) -> pl.DataFrame:
    named = [
        pl.col(source.format(k=step)).cast(pl.Float64).alias(column)
        for column, source in PAIR_COLUMNS.items()
        if source.format(k=step) in raw.columns
    ]
    setting = {"cohort": cohort, "point": step / PLANNED, "step": step, "planned_steps": PLANNED}
    return raw.select(*(pl.lit(v).alias(k) for k, v in setting.items()), "i", "j", *named)


def _measured(raw: pl.DataFrame, cohort: str) -> Iterator[dict]:
    for row in raw.iter_rows(named=True):
        for method in ("mean", "sum"):
            yield {
                "cohort": cohort,
                "adapter": row["i"],
                "set": "+".join(sorted((row["i"], row["j"]))),
                "method": method,
                "gain_retention": row[f"rho_{method}"],
                "own_gain": 1.0,
                "own_gain_se": 0.0,
                "loss": 1.0,
                "loss_single": 1.0,
            }


def forecasters() -> dict[str, Fitter]:
    ridges = {name: c for name, c in CANDIDATES.items() if c.kind == "ridge"}
    trees = {name: c for name, c in CANDIDATES.items() if c.kind == "trees"}
    kept = ("method mean", "early merge alone", "Frobenius cosine alone", "task-additive")
    return {
        **{name: BASELINES[name] for name in kept},
        "own features only": own_only("model"),
        "classifier (AUC only)": classifier("model"),
        "weights only": learned("weights", candidates=ridges),
        "file tier": learned("file"),
        "ridge": learned("model", candidates=ridges),
        "xgboost": learned("model", candidates=trees),
        "predictor": learned("model"),
        "predictor, mean of its distribution": learned("model", centre="mean"),
        "predictor, chosen by retention": learned("model", aim="retention"),
    }


SHALLOW = CANDIDATES["trees, few"].options
LINKS: dict[str, tuple[Callable, Callable]] = {
    "score": (score, lambda y: 1.05 - np.exp(-y)),
    "asinh of damage over 0.05": (
        lambda r: -np.arcsinh((1 - r) / 0.05),
        lambda y: 1 - 0.05 * np.sinh(-y),
    ),
    "asinh of damage over 0.2": (
        lambda r: -np.arcsinh((1 - r) / 0.2),
        lambda y: 1 - 0.2 * np.sinh(-y),
    ),
    "retention itself": (lambda r: r, lambda y: y),
}


def attempts(rows: Rows) -> dict[str, Tested]:
    """Fixed candidates, one change at a time: target, signs, weights, mixing."""
    models = {
        "ridge": Candidate("ridge", "few", {"penalty": 0.05}),
        "xgboost": Candidate("trees", "few", SHALLOW),
        "xgboost, wide": Candidate("trees", "wide", SHALLOW),
    }
    unsigned = {k: Candidate(c.kind, c.menu, {**c.options, "signed": 0}) for k, c in models.items()}
    tail = {k: Candidate(c.kind, c.menu, {**c.options, "tail": 2}) for k, c in models.items()}
    even = rows.weight / np.array([np.sum(rows.family == f) for f in rows.family])
    even = even / even.mean()
    found = {}
    for link in LINKS:
        for name, candidate in models.items():
            found[f"{name}; {link}"] = _fixed(rows, candidate, link)
        mixed = [f"{name}; {link}" for name in models]
        found[f"mix of the three; {link}"] = _mixed([found[name] for name in mixed], link)
    for label, changed in (("without signs", unsigned), ("failures weigh threefold", tail)):
        for name, candidate in changed.items():
            found[f"{name}; {label}"] = _fixed(rows, candidate, "score")
        parts = [found[f"{name}; {label}"] for name in changed]
        found[f"mix of the three; {label}"] = _mixed(parts, "score")
    for name, candidate in models.items():
        found[f"{name}; families weigh alike"] = _fixed(rows, candidate, "score", even)
    return found


def _fixed(rows: Rows, candidate: Candidate, link: str, weight: np.ndarray | None = None) -> Tested:
    """Out-of-fold forecasts of one candidate without any choice."""
    forward, back = LINKS[link]
    goal, weight = forward(rows.target), rows.weight if weight is None else weight
    total, count = np.zeros(len(rows)), np.zeros(len(rows))
    for fold in unseen_families(rows):
        train = fold.train
        given = (rows.values[train], goal[train], weight[train])
        model = fit_model("it", "model", *given, candidates={"it": candidate})
        total[fold.test] += model.scores(rows.values[fold.test])
        count[fold.test] += 1
    return _tested(rows, back(total / count))


def _mixed(parts: list[Tested], link: str) -> Tested:
    forward, back = LINKS[link]
    return _tested(parts[0].rows, back(np.mean([forward(p.guess.retention) for p in parts], 0)))


def _tested(rows: Rows, retention: np.ndarray) -> Tested:
    nothing = np.full(len(rows), np.nan)
    guess = Guess(np.clip(retention, LOWEST, 1.2), nothing, nothing, nothing, nothing)
    return Tested(rows, guess, np.full(len(rows), ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of rows_*.csv")
    parser.add_argument("--attempts", action="store_true", help="one change at a time")
    options = parser.parse_args()
    pl.Config(tbl_rows=200, tbl_cols=30, tbl_width_chars=220, fmt_str_lengths=60)
    pl.Config.set_float_precision(3)
    rows = load(options.data)
    if options.attempts:
        print(score_table(attempts(rows), by=("method",), reference=None))
        return
    tested, folds = {}, unseen_families(rows)
    for name, fitter in forecasters().items():
        started = time.monotonic()
        tested[name] = out_of_fold(rows, folds, fitter)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    print(score_table(tested))
    print(difference_table(tested, "predictor", by=("method",), runs=200))


if __name__ == "__main__":
    main()
