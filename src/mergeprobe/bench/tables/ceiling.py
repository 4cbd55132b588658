"""The ceiling: another seed's retention as the forecast. No forecast of one seed can do better
than the outcome itself repeats."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl

from mergeprobe.predict.learning import HIGHEST, LOWEST, Rows
from mergeprobe.predict.scores import Tested
from mergeprobe.predict.tier import Guess

CEILING = "ceiling: another seed's retention"


def repeated(rows: Rows, measured: pl.DataFrame) -> Tested | None:
    """Rows measured in another cohort too (same base and method; same tasks with the same learning
    rates, ranks and steps), "forecast" by the mean of what the others measured; None where nothing
    is repeated. Each role of a repeated pair is a row. measured: learning.measured_rows of every
    cohort, also of those that were not probed."""
    twins: dict[tuple, list[tuple[str, float]]] = {}
    kept = measured["gain_retention"].cast(pl.Float64).clip(LOWEST, HIGHEST).to_list()
    for key, cohort, value in zip(_keys(measured), measured["cohort"], kept, strict=True):
        twins.setdefault(key, []).append((cohort, value))
    said = np.full(len(rows), np.nan)
    for place, (key, cohort) in enumerate(zip(_keys(rows.table), rows.cohort, strict=True)):
        others = [value for theirs, value in twins.get(key, ()) if theirs != cohort]
        if others:
            said[place] = np.mean(others)
    known = np.isfinite(said)
    if known.sum() < 3:
        return None
    nothing = np.full(int(known.sum()), np.nan)
    guess = Guess(said[known], nothing, nothing, nothing, nothing)
    return Tested(rows.pick(known), guess, rows.cohort[known].astype(str))


def _keys(table: pl.DataFrame) -> Iterator[tuple]:
    """What makes two rows repeats of each other: i first, the others in any order."""
    members = ("tasks", "learning_rates", "ranks", "steps")
    for row in table.select("base", "method", *members).iter_rows(named=True):
        own, *others = zip(*(row[column] for column in members), strict=True)
        yield (row["base"], row["method"], own, *sorted(others))
