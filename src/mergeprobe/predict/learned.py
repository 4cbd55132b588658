"""The learned predictor on today's probes: signals to rows, rows to forecasts, or why not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from mergeprobe.plan import Forecast
from mergeprobe.predict.feature_rows import feature_matrix
from mergeprobe.predict.predictor import Predictor
from mergeprobe.predict.signal_rows import SignalRows
from mergeprobe.predict.weighing import WEIGHTED

Asked = tuple[str, tuple[str, ...], str]
"""(adapter, the others that it is merged with, method)."""
Early = Callable[[str, str, str], Mapping[str, float]]
"""early(i, j, method): the model tier's signals of i beside j; those that all methods share, and of
one that merges by more than weights its own. {} where it cannot run."""
SHOWN = ("frobenius_cosine", "norm_ratio", "gradient_cosine_base", "own_gain", "disturbance_late")


@dataclass(eq=False)
class Learned:
    """Asks the predictor about (adapter, set, method)s, each once; rows of pairs are kept, and
    those of sets are made of them.

    rows: the file tier's tables. early: the model tier's part of a row. base: what the predictor's
    rows call the base model. far: what the predictor would not speak of, with its novelty (above 1:
    farther from the bank's rows than they are from each other; NaN: a signal that it needs is
    missing).
    """

    predictor: Predictor
    rows: SignalRows
    early: Early = lambda i, j, method: {}
    base: str | None = None
    far: dict[Asked, float] = field(default_factory=dict)
    _said: dict[Asked, Forecast | None] = field(default_factory=dict)
    _pairs: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    _measured: set[tuple[str, str, str]] = field(default_factory=set)

    def forecast(self, name: str, others: tuple[str, ...], method: str) -> Forecast | None:
        """Retention of `name` merged with `others`; None where the predictor should not be asked:
        it has seen no merge by this method, or the row lies far from the bank, or lacks what even
        the lowest tier needs."""
        key = (name, others, method)
        if key not in self._said:
            self.ask([key])
        return self._said[key]

    def ask(self, wanted: Iterable[Asked]) -> None:
        """Forecasts many at once, for `forecast` to hand out."""
        new = [key for key in dict.fromkeys(wanted) if key not in self._said]
        fresh = [key for key in new if self.predictor.knows_method(key[2])]
        self._said |= dict.fromkeys(set(new) - set(fresh))
        if not fresh:
            return
        names, others, methods = (list(column) for column in zip(*fresh, strict=True))
        requests = pl.DataFrame(
            {"i": names, "others": [list(those) for those in others], "method": methods},
            schema={"i": pl.String, "others": pl.List(pl.String), "method": pl.String},
        )
        each = dict.fromkeys((name, one, how) for name, those, how in fresh for one in those)
        pairs = {(i, j): self._pair(i, j, method) for i, j, method in each}
        table = pl.DataFrame(list(pairs.values()), infer_schema_length=None)
        guess = self.predictor.predict(feature_matrix(requests, table), base=self.base)
        numbers = zip(guess.retention, guess.low, guess.high, guess.novelty, strict=True)
        for key, (kept, low, high, novelty) in zip(fresh, numbers, strict=True):
            if novelty <= 1.0:  # not where it is NaN: no tier supports the row
                said = Forecast(retention=float(kept), low=float(low), high=float(high))
                self._said[key] = said
            else:
                self._said[key], self.far[key] = None, float(novelty)

    def evidence(self, name: str, other: str, method: str) -> dict[str, float]:
        """Single signals of a pair, to be shown beside its forecast; those that were measured."""
        row = self._pair(name, other, method)
        wanted = {
            **{column: column for column in SHOWN},
            "surrogate": f"surrogate_{method}",
            f"early_retention_{method}": f"early_retention_{method}",
            "extrapolated_merge": f"extrapolated_{method}",
        }
        found = {shown: row.get(column) for shown, column in wanted.items()}
        return {shown: value for shown, value in found.items() if value is not None}

    def _pair(self, i: str, j: str, method: str) -> dict[str, Any]:
        """The row of a pair; it grows by what a method adds."""
        if (i, j) not in self._pairs:
            self._pairs[i, j] = self.rows.pair(i, j, {})
        key = (i, j, method if method not in WEIGHTED else "")
        if key not in self._measured:
            self._measured.add(key)
            self._pairs[i, j] |= self.early(i, j, method)
        return self._pairs[i, j]
