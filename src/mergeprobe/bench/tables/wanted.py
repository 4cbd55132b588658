"""What was wanted of the forecast, set before held-out cohorts were looked at, and what came."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from mergeprobe.bench.tables.audit import AUDIT
from mergeprobe.bench.tables.ceiling import CEILING
from mergeprobe.bench.tables.forecasters import MODEL
from mergeprobe.bench.tables.page import (
    DASH,
    Table,
    between,
    estimate,
    listed,
    number,
    percent,
)
from mergeprobe.bench.tables.resample import Resampled
from mergeprobe.predict.baselines import BASELINES

if TYPE_CHECKING:
    from mergeprobe.bench.tables.skill import Slices

RANKS: Mapping[float, Mapping[str, float]] = {
    0.1: {"Spearman": 0.85, "within partners": 0.65},
    0.05: {"Spearman": 0.75, "within partners": 0.55},
}
OF_CEILING = 0.9
LEAST_R2, LEAST_AUC, COVERED, WIDEST = 0.5, 0.90, 0.9, 0.7
MOST_MAE: Mapping[str, float] = {"mean": 0.08, "sum": 0.12}
DIGITS = 3  # two would hide on which side of the wanted number a score lies
COLUMNS = ("score", "point", "method", "wanted", "model tier", "ceiling", "reached")
COMPARED = ("Spearman", "within partners", "R2", "MAE")


def wanted_table(slices: Slices) -> Table:
    rows: list[list[str]] = []
    for point in RANKS:
        for method in MOST_MAE:
            found = slices.at(point, (method,))
            if not found:
                rows.append([f"needs pairs under '{method}'", percent(point), method, *4 * [DASH]])
                continue
            rows += [
                [*row[:1], percent(point), method, *row[1:]] for row in _rows(found, point, method)
            ]
    caption = (
        f"{slices.caption()} Rank correlations count as reached at the number wanted or at "
        f"{percent(OF_CEILING)} of the ceiling; the point estimate decides."
    )
    return Table("What was wanted", caption, COLUMNS, rows)


def _rows(found: Mapping[str, Resampled], point: float, method: str) -> list[list[str]]:
    ours, top = found[MODEL], found.get(CEILING)

    def ceiling(metric: str) -> float:
        return top.value[metric] if top is not None else np.nan

    rows = []
    for metric, least in RANKS[point].items():
        value = ours.value[metric]
        enough = value >= least or value >= OF_CEILING * ceiling(metric)
        name = "Spearman" if metric == "Spearman" else "Spearman within partners"
        rows.append(_row(name, f"≥ {least:.2f}", ours, metric, ceiling(metric), enough))
    r2, mae, auc = (ours.value[m] for m in ("R2", "MAE", "AUC"))
    most = MOST_MAE[method]
    rows.append(_row("R²", f"≥ {LEAST_R2}", ours, "R2", ceiling("R2"), r2 >= LEAST_R2))
    rows.append(_row("MAE", f"≤ {most}", ours, "MAE", ceiling("MAE"), mae <= most))
    rows.append(_row("AUC", f"≥ {LEAST_AUC:.2f}", ours, "AUC", ceiling("AUC"), auc >= LEAST_AUC))
    coverage = ours.estimate("coverage")
    inside = coverage.low <= COVERED <= coverage.high
    rows.append(_row("coverage", "interval holds 90 %", ours, "coverage", np.nan, inside))
    width = ours.ratio("width", found["method mean"])
    narrow = _yes(width.value <= WIDEST)
    rows.append(["width over the method mean's", f"≤ {WIDEST}", estimate(width), DASH, narrow])
    return rows + [_beaten(found, metric) for metric in COMPARED]


def _row(
    name: str, wanted: str, ours: Resampled, metric: str, ceiling: float, reached: bool
) -> list[str]:
    return [
        name,
        wanted,
        estimate(ours.estimate(metric), DIGITS),
        number(ceiling, DIGITS),
        _yes(reached),
    ]


def _beaten(found: Mapping[str, Resampled], metric: str) -> list[str]:
    """Against how many baselines the interval of the difference is on the better side of 0."""
    sign = -1.0 if metric == "MAE" else 1.0
    not_beaten, best = [], None
    names = [name for name in (*BASELINES, AUDIT) if name in found]
    for name in names:
        each = found[MODEL].estimate(metric, against=found[name])
        near = sign * (each.low if sign > 0 else each.high)
        if not near > 0:
            not_beaten.append(name)
        if best is None or near < best[0]:
            best = near, name, each
    assert best is not None
    shown = f"{len(names) - len(not_beaten)} of {len(names)}"
    hardest = f"hardest: {best[1]} {between(best[2].low, best[2].high)}"
    reached = "yes" if not not_beaten else f"no: {listed(not_beaten)}"
    return [f"better than baselines in {metric}", "all", f"{shown}; {hardest}", DASH, reached]


def _yes(reached: bool) -> str:
    return "yes" if reached else "no"
