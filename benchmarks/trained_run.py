"""What the benchmarks need of a trained run: a `mergeprobe demo`, or a cohort of a bank."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import polars as pl

from mergeprobe.artefact import read_json
from mergeprobe.bench.bank.folder import CohortFolder, read_spec
from mergeprobe.bench.folder import RunFolder
from mergeprobe.errors import DataError
from mergeprobe.predict.weighing import WEIGHTED


class TrainedRun(NamedTuple):
    """items: (adapter, "calibration" or "test") -> its examples. forecast: () -> the forecasts:
    (a, b) -> retention of the worse adapter under the best of the rules that a plan offers."""

    label: str
    base: str
    names: tuple[str, ...]
    adapters: Path
    items: Callable
    forecast: Callable


def opened(path: Path) -> TrainedRun:
    """From its folder; a cohort's lies in the work folder of `mergeprobe bench run`."""
    return _cohort(path) if (path / "cohort.json").exists() else _demo(path)


def _demo(path):
    run = RunFolder(path)
    config = run.config()

    def items(name, split):
        count = config.test_items if split == "test" else 32
        return run.task(name, config).generate(split, count, config.seed)

    def forecast():
        rows = pl.read_parquet(run.forecasts).filter(pl.col("method").is_in(WEIGHTED))
        table = {(r["adapter"], r["others"], r["method"]): r["retention"] for r in rows.to_dicts()}
        return _best(table, config.tasks)

    label = f"{path.name} ({config.control}, seed {config.seed})"
    return TrainedRun(label, config.base, config.tasks, run.adapters, items, forecast)


def _cohort(path):
    """Forecasts are the extrapolated early merge at 10 %, from what the cohort measured."""
    folder = CohortFolder(path.parent, read_spec(path / "cohort.json")[0])
    spec = folder.spec

    def items(name, split):
        count = spec.test_items if split == "test" else spec.calibration_items
        return folder.examples(name, split, count)

    def forecast():
        table = {}
        for i in spec.names:
            for j, row in read_json(folder.early(i, 0.1), DataError)["pairs"].items():
                for method in WEIGHTED:
                    table[i, j, method] = min(1.2, max(-1.0, row[f"extrapolated_{method}"]))
        return _best(table, spec.names)

    return TrainedRun(spec.name, spec.base, spec.names, folder.adapters, items, forecast)


def _best(table, names):
    """Updates of nearly equal norms have no forecast of their own under the equal-norm mean."""
    return {
        (a, b): max(min(table[a, b, m], table[b, a, m]) for m in WEIGHTED if (a, b, m) in table)
        for a, b in combinations(names, 2)
    }
