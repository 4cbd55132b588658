"""The learned predictor on today's probes: signals to rows, rows to forecasts, or why not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from mergeprobe.capture.probe import Probe
from mergeprobe.plan import Forecast
from mergeprobe.predict.feature_rows import feature_matrix
from mergeprobe.predict.predictor import Predictor
from mergeprobe.predict.signal_rows import SignalRows
from mergeprobe.signals.rows import set_rows

Early = Callable[[str, tuple[str, ...]], Mapping[str, float]]
"""early(name, group): the model tier's signals of `name` in `group`, {} where it cannot run."""


@dataclass(eq=False)
class Learned:
    """Asks the predictor about one (adapter, set, method) at a time; rows are kept.

    rows: the file tier's tables. early: the model tier's part of a row. far: what the predictor
    would not speak of, with its novelty (above 1: farther from the bank's rows than they are from
    each other; NaN: a signal that it needs is missing).
    """

    predictor: Predictor
    probes: tuple[Probe, ...]
    rows: SignalRows
    early: Early = lambda name, group: {}
    far: dict[tuple[str, tuple[str, ...], str], float] = field(default_factory=dict)
    _pairs: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    _groups: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = field(default_factory=dict)

    def forecast(self, name: str, others: tuple[str, ...], method: str) -> Forecast | None:
        """Retention of `name` merged with `others`; None where the predictor should not be asked:
        the row lies far from the bank, or lacks what even the lowest tier needs."""
        requests = pl.DataFrame({"i": [name], "others": [list(others)], "method": [method]})
        pairs = _table([self._pair(name, other) for other in others])
        sets = _table([self._group(name, others)]) if len(others) > 1 else None
        guess = self.predictor.predict(feature_matrix(requests, pairs, sets))
        if math.isnan(guess.retention[0]) or guess.far[0]:
            self.far[name, others, method] = float(guess.novelty[0])
            return None
        return guess.forecasts()[0]

    def _pair(self, i: str, j: str) -> dict[str, Any]:
        if (i, j) not in self._pairs:
            self._pairs[i, j] = self.rows.pair(i, j, self.early(i, (i, j)))
        return self._pairs[i, j]

    def _group(self, name: str, others: tuple[str, ...]) -> dict[str, Any]:
        if (name, others) not in self._groups:
            group = tuple(sorted((name, *others)))
            early = self.early(name, group)
            label = "+".join(group)
            if (name, label) not in self.rows.sets:
                members = [probe for probe in self.probes if probe.name in group]
                for row in set_rows(members, [group]).to_dicts():
                    self.rows.sets[row["a"], label] = row
            self._groups[name, others] = self.rows.group(name, group, early)
        return self._groups[name, others]


def _table(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, infer_schema_length=None)
