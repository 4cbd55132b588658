"""The post-hoc audit of `gradience` (PyPI) on finished adapters, as a baseline.

It needs adapters, which rows do not hold: benchmarks/gradience_audit.py writes its
compatibility score of every pair beside a cohort's rows, as audits.parquet.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from mergeprobe.predict.baselines import Fitted, Fitter, method_mean
from mergeprobe.predict.learning import HIGHEST, LOWEST, Rows
from mergeprobe.predict.ridge import FLOOR, score
from mergeprobe.predict.tier import Guess

AUDIT = "gradience, post-hoc audit"


def audit_alone(audits: pl.DataFrame) -> Fitter:
    """A straight line in the compatibility score per method (on retention's score), as
    baselines.one_feature: the best that this number alone can do. In a larger set the mean over
    the others; the method's mean where it is missing."""
    columns = ("cohort", "i", "j", "compatibility")
    known = {(c, i, j): value for c, i, j, value in audits.select(columns).iter_rows()}

    def seen(rows: Rows) -> np.ndarray:
        keys = zip(*(rows.table[c].to_list() for c in ("cohort", "i", "others")), strict=True)
        each = [[known.get((c, i, j), np.nan) for j in others] for c, i, others in keys]
        return np.array([np.mean(values) for values in each])

    def fit(train: Rows) -> Fitted:
        mean, lines, found = method_mean(train), {}, seen(train)
        for method in sorted(set(train.method.tolist())):
            mine = (train.method == method) & np.isfinite(found)
            if mine.sum() > 2 and np.ptp(found[mine]) > 0:
                goal = np.asarray(score(train.target[mine]))
                weight = np.sqrt(train.weight[mine])
                lines[method] = np.polyfit(found[mine], goal, 1, w=weight)

        def guess(rows: Rows) -> Guess:
            kept, value = mean(rows).retention.copy(), seen(rows)
            for method, line in lines.items():
                mine = (rows.method == method) & np.isfinite(value)
                damage = np.exp(-np.polyval(line, value[mine])) - FLOOR
                kept[mine] = np.clip(1.0 - damage, LOWEST, HIGHEST)
            nothing = np.full(len(rows), np.nan)
            return Guess(kept, nothing, nothing, nothing, nothing)

        return guess

    return fit
