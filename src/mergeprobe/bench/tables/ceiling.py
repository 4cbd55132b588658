"""The ceiling: another seed's retention as the forecast. No forecast of one seed can do better
than the outcome itself repeats."""

from __future__ import annotations

import numpy as np

from mergeprobe.predict.learning import Rows
from mergeprobe.predict.scores import Tested
from mergeprobe.predict.tier import Guess

CEILING = "ceiling: another seed's retention"


def repeated(rows: Rows) -> Tested | None:
    """Rows measured in another cohort too (same base, method and point; same tasks with the same
    learning rates, ranks and steps), "forecast" by the mean of what the others measured; None
    where nothing is repeated. Each role of a repeated pair is a row."""
    members = [rows.table[c].to_list() for c in ("tasks", "learning_rates", "ranks", "steps")]
    setting = [rows.table[c].to_list() for c in ("base", "point", "method")]
    keys = []
    for place in range(len(rows)):
        own, *others = zip(*(column[place] for column in members), strict=True)
        keys.append((*(column[place] for column in setting), own, *sorted(others)))
    places: dict[tuple, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    cohorts = rows.cohort.tolist()
    said = np.full(len(rows), np.nan)
    for place, key in enumerate(keys):
        others = [p for p in places[key] if cohorts[p] != cohorts[place]]
        if others:
            said[place] = rows.target[others].mean()
    known = np.isfinite(said)
    if known.sum() < 3:
        return None
    nothing = np.full(int(known.sum()), np.nan)
    guess = Guess(said[known], nothing, nothing, nothing, nothing)
    return Tested(rows.pick(known), guess, rows.cohort[known].astype(str))
