"""Tables of forecasters at the points and methods that are shown, for any rows."""

from __future__ import annotations

from collections.abc import Mapping

from mergeprobe.bench.tables.bank import near
from mergeprobe.bench.tables.forecasters import part_of
from mergeprobe.bench.tables.page import percent
from mergeprobe.bench.tables.resample import Resampled, resampled
from mergeprobe.bench.tables.skill import METHODS, POINTS, UNCONDITIONAL, Options, cells
from mergeprobe.predict.scores import Tested

SIMPLE = (UNCONDITIONAL, "early merge alone", "extrapolated merge alone", "surrogate alone")


def caption(what: str, options: Options) -> str:
    return (
        f"`{options.command}`, seed {options.seed}. {what} In brackets: 90 % intervals of "
        f"{options.runs} bootstrap samples over families; no SD or SE; one run an adapter."
    )


def scored(tested: Mapping[str, Tested], options: Options) -> dict[str, Resampled]:
    return resampled(tested, runs=options.runs, seed=options.seed)


def score_rows(label: str, tested: Mapping[str, Tested], options: Options) -> list[list[str]]:
    found = scored(tested, options)
    plain_one = found.get(UNCONDITIONAL)
    return [[f"{label}, {name}", *cells(each, plain_one)] for name, each in found.items()]


def by_setting(tested: Mapping[str, Tested], options: Options) -> list[list[str]]:
    """Rows of a table: every forecaster at POINTS under METHODS."""
    rows, out = next(iter(tested.values())).rows, []
    for point in POINTS:
        for method in METHODS:
            mask = near(rows, point) & (rows.method == method)
            if mask.sum() > 2:
                label = f"{percent(point)}, {method}"
                out += score_rows(label, part_of(tested, mask), options)
    return out
