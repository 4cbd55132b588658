"""The figures of the skill page and of decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mergeprobe.bench.tables.bank import near, points_of
from mergeprobe.bench.tables.ceiling import CEILING
from mergeprobe.bench.tables.forecasters import CLASSIFIER, MODEL, OWN, PREDICTORS
from mergeprobe.bench.tables.page import Figure, percent
from mergeprobe.bench.tables.picture import Mark, Panel, Series, bars, drawn
from mergeprobe.bench.tables.skill import METHODS, POINTS, Slices

RETENTION = (-1.0, 1.2)
TICKS = [(v, f"{v:g}".replace("-", "−")) for v in (-1.0, -0.5, 0.0, 0.5, 1.0)]
UNIT = [(v, f"{v:g}") for v in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]


def skill_figures(slices: Slices) -> list[Figure]:
    found = [forecast_against_measured(slices), ranking(slices), over_points(slices)]
    return [figure for figure in found if figure is not None]


def forecast_against_measured(slices: Slices) -> Figure | None:
    """Every held-out pair: forecast with its interval across, measured up."""
    panels = []
    ours = slices.tested[MODEL]
    for method in METHODS:
        for point in POINTS:
            mask = near(ours.rows, point) & (ours.rows.method == method)
            if not mask.any():
                continue
            part = ours.pick(mask)
            inside = (part.guess.low <= part.rows.target) & (part.rows.target <= part.guess.high)
            series = [
                Series(
                    label,
                    [
                        Mark(float(x), float(y))
                        for x, y in zip(
                            part.guess.retention[where], part.rows.target[where], strict=True
                        )
                    ],
                )
                for label, where in (
                    ("inside its 90 % interval", inside),
                    ("outside its 90 % interval", ~inside),
                )
            ]
            title = f"{method}, {percent(point)} of training"
            labels = ("forecast retention", "measured retention")
            axes = {"x_range": RETENTION, "y_range": RETENTION, "x_ticks": TICKS, "y_ticks": TICKS}
            panels.append(Panel(title, *labels, series, **axes, diagonal=True, small=True))
    if not panels:
        return None
    return Figure(
        "skill_scatter.svg",
        "Forecast against measured retention",
        f"{slices.caption()} One point an ordered pair; model tier; dashed: forecast = measured.",
        drawn(panels),
    )


def ranking(slices: Slices, point: float = POINTS[0]) -> Figure | None:
    """Every forecaster's pooled rank correlation, best first."""
    found = slices.at(point)
    rows = []
    for name, each in found.items():
        if name not in (CLASSIFIER, CEILING):
            score = each.estimate("Spearman")
            rows.append((name, score.value, score.low, score.high))
    if not rows:
        return None
    rows.sort(key=lambda row: -row[1])
    top = found[CEILING].value["Spearman"] if CEILING in found else None
    dashed = " Dashed: the ceiling." if top is not None else ""
    return Figure(
        "skill_ranking.svg",
        f"Rank correlation at {percent(point)} of training",
        f"{slices.caption(slices.rows_at(point, METHODS))} Mean and sum together.{dashed}",
        bars(f"Spearman, pairs under mean and sum, {percent(point)} of training", rows, top),
    )


def over_points(slices: Slices) -> Figure | None:
    points = points_of(slices.rows)
    if len(points) < 2:
        return None
    panels = []
    places = [(np.log(p), percent(p)) for p in points]
    for method in METHODS:
        series: list[Series] = []
        for name in (*PREDICTORS, OWN):
            marks = _over_points(slices, method, name, points)
            if marks:
                series.append(Series(name, marks, line=True))
        if series:
            ends = (places[0][0] - 0.2, places[-1][0] + 0.2)
            axes = {"x_range": ends, "y_range": (0.0, 1.0), "x_ticks": places, "y_ticks": UNIT}
            panels.append(Panel(method, "share of training", "Spearman", series, **axes))
    if not panels:
        return None
    title = "Rank correlation by probe point"
    return Figure("skill_points.svg", title, slices.caption(), drawn(panels))


def _over_points(slices: Slices, method: str, name: str, points: Sequence[float]) -> list[Mark]:
    marks = []
    shift = 0.03 * [*PREDICTORS, OWN].index(name)
    for point in points:
        found: Mapping = slices.at(point, (method,), (*PREDICTORS, OWN, "method mean"))
        if name in found:
            score = found[name].estimate("Spearman")
            marks.append(Mark(float(np.log(point)) + shift, score.value, score.low, score.high))
    return marks
