"""Forecaster: what is forecast of a list of adapters, once each, and the plan made from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, permutations, product
from typing import Any

import numpy as np
import polars as pl

from mergeprobe.capture.probe import Probe
from mergeprobe.errors import NotForecastable
from mergeprobe.plan import Action, Forecast, Group
from mergeprobe.predict import ridge, surrogate
from mergeprobe.predict.blend import Tier, around, blend, clip
from mergeprobe.predict.candidates import KEPT
from mergeprobe.predict.costs import resident_parameters
from mergeprobe.predict.early import ModelTier
from mergeprobe.predict.learned import Learned
from mergeprobe.predict.planner import EXACT_UP_TO, AdapterInfo
from mergeprobe.predict.planning import BOTH, CLOSED_FORM, LEARNED, Forecasts, Key
from mergeprobe.predict.signal_rows import early_row, merged_retentions
from mergeprobe.predict.weighing import WEIGHTED, weights_of, worth_asking
from mergeprobe.signals.files import rank_of, shape_of

PASSES_A_PAIR = 10  # below this a pair is left to the file tier
SET_MARGIN = 0.05  # sets that hold a pair this far below the floor are not measured


@dataclass(eq=False)
class Forecaster(Forecasts):
    """One tier's forecasts of a list of adapters.

    evidence: (adapter, others, method) -> what the forecast was made from, by part. sources: by
    whom it was made, LEARNED where the predictor spoke.
    missing: what would make the forecasts better, in words. norms: ‖ΔW‖ at the end of training.
    passed: why the learned predictor is not asked, where one was given.
    floor, together, by_rank (whether single adapters are offered at smaller ranks): of the plan.
    known: the forecasts that were asked for.
    """

    tier: Tier
    probes: tuple[Probe, ...]
    fingerprint: str | None
    tables: dict[str, pl.DataFrame]
    missing: tuple[str, ...]
    norms: dict[str, float]
    floor: float = 0.9
    together: tuple[tuple[str, ...], ...] = ()
    by_rank: bool = False
    quadratic: surrogate.QuadraticModel | None = None
    lengths: np.ndarray | None = None
    model: ModelTier | None = None
    learned: Learned | None = None
    passed: str = ""
    progress: Callable[[str], None] = lambda message: None
    evidence: dict[Key, dict[str, float]] = field(default_factory=dict)
    sources: dict[Key, str] = field(default_factory=dict)
    known: dict[Key, Forecast] = field(default_factory=dict)

    def forecast(self, name: str, group: Sequence[str], method: str) -> Forecast:
        others = tuple(other for other in sorted(group) if other != name)
        if not others:
            return KEPT
        key = (name, others, method)
        if key not in self.known:
            found = None
            if self.learned is not None and (len(others) == 1 or self.few):
                found = self.learned.forecast(name, others, method)
            if found is None and method not in WEIGHTED:
                raise NotForecastable(
                    f"no forecast for the merge method '{method}' without a learned predictor that "
                    f"knows it and adapters like its own; known here are {', '.join(WEIGHTED)}"
                )
            if found is not None:
                assert self.learned is not None
                self.known[key] = found
                self.sources[key] = LEARNED
                if len(others) == 1:
                    self.evidence[key] = self.learned.evidence(name, others[0], method)
                elif (both := self._with_own_merge(found, name, others, method)) != found:
                    self.known[key] = both
                    self.sources[key] = BOTH
            elif len(others) == 1:
                self.known[key] = self._pair(name, others[0], method)
            else:
                self.known[key] = self._set(name, others, method)
        return self.known[key]

    def source(self, name: str, others: tuple[str, ...], method: str) -> str:
        return self.sources.get((name, others, method), CLOSED_FORM)

    @property
    def few(self) -> bool:
        """Whether sets are asked about one by one; in a search among many, pairs are combined."""
        return len(self.probes) <= EXACT_UP_TO

    def early(self, i: str, j: str, method: str) -> dict[str, float]:
        """The model tier's part of a pair's row, as far as the predictor reads it; {} without a
        model, or where its budget is spent."""
        if self.model is None or self.model.left() < PASSES_A_PAIR:
            return {}
        assert self.learned is not None
        self.progress(f"what {j} can do to {i}")
        try:
            found = early_row(self.model, i, (i, j), self.methods((i, j)))
            if self.learned.predictor.reads("joint_gradient_cosine"):
                found["joint_gradient_cosine"] = self.model.joint_gradient_cosine(i, j)
            if method not in WEIGHTED and self.learned.predictor.reads("early_retention"):
                kept = merged_retentions(self.model, (i, j), method, self.rank((i, j)))
                found[f"early_retention_{method}"] = kept[i]
        except NotForecastable:
            return {}
        return found

    def _pair(self, name: str, other: str, method: str) -> Forecast:
        parts = self._parts(name, (other,), method)
        self.evidence[name, (other,), method] = parts
        return blend(parts, method, self.tier)

    def _set(self, name: str, others: tuple[str, ...], method: str) -> Forecast:
        pairs = [self.forecast(name, (name, other), method) for other in others]
        combined = ridge.combine(pairs, len(others) + 1, method)
        return self._with_own_merge(combined, name, others, method)

    def _with_own_merge(
        self, forecast: Forecast, name: str, others: tuple[str, ...], method: str
    ) -> Forecast:
        """A set's forecast from its pairs, averaged with its own extrapolated early merge: pairs
        see what builds up, the set's merge what cancels, or clashes only together. As it is
        without the model, and where a pair inside falls well below the floor already."""
        if self.model is None or method not in WEIGHTED:
            return forecast
        if self._hopeless((name, *others), method):
            return forecast
        self.progress(f"what {' + '.join(others)} do to {name}, merged by {method}")
        weights = self.weights((name, *others), method)
        try:
            early = clip(self.model.extrapolated_merge(name, weights))
        except NotForecastable:  # the budget is spent: the pairs have to do
            return forecast
        self.evidence[name, others, method] = {"extrapolated_merge": early}
        middle = (forecast.retention + early) / 2
        return around(middle, forecast, abs(forecast.retention - early) / 2)

    def _hopeless(self, group: Sequence[str], method: str) -> bool:
        """Whether some pair inside the group falls so far below the floor that the group will."""
        return any(
            self.forecast(one, (one, other), method).retention < self.floor - SET_MARGIN
            for one, other in permutations(group, 2)
        )

    def _parts(self, name: str, others: tuple[str, ...], method: str) -> dict[str, float]:
        parts = {}
        group = (name, *others)
        pairs = self.tables["pairs"]
        rows = pairs.filter((pl.col("b") == name) & pl.col("a").is_in(others))
        for column in ("frobenius_cosine", "norm_ratio", "gradient_cosine_base"):
            if column in rows.columns and rows[column].null_count() == 0:
                parts[column] = float(rows[column].max())  # type: ignore[arg-type]
        if self.quadratic is not None:
            weights = self.weights(group, method)
            found = surrogate.set_retentions(self.quadratic, group, weights, self.lengths)
            parts["surrogate"] = found[name]
        if self.model is not None and self.model.left() >= PASSES_A_PAIR:
            self.progress(f"what {' + '.join(others)} does to {name}, merged by {method}")
            parts |= self.model.set_features(name, group, method)
            weights = self.weights(group, method)
            parts["extrapolated_merge"] = self.model.extrapolated_merge(name, weights)
        return parts

    def weights(self, group: Sequence[str], method: str) -> dict[str, float]:
        """What `method` multiplies each finished update of the group by, as far as is known now."""
        return weights_of(method, {name: self.norms[name] for name in group})

    def methods(self, group: Sequence[str]) -> tuple[str, ...]:
        return worth_asking({name: self.norms[name] for name in group})

    def infos(self) -> list[AdapterInfo]:
        return [
            AdapterInfo(
                probe.name,
                self._ranks[probe.name],
                self.parameters([probe.name]),
                path=str(probe.path) if probe.path and self.tier == "weights" else None,
            )
            for probe in self.probes
        ]

    def parameters(self, names: Sequence[str], rank: int | None = None) -> int:
        """Resident parameters of one adapter at a rank, by default the largest of `names`."""
        shapes: dict[str, tuple[int, int]] = {}
        for each in {id(self._shapes[name]): self._shapes[name] for name in names}.values():
            shapes |= each
        return resident_parameters(shapes, rank or self.rank(names))

    def rank(self, names: Sequence[str]) -> int:
        """The largest rank among `names`."""
        return max(self._ranks[name] for name in names)

    @cached_property
    def _ranks(self) -> dict[str, int]:
        return {
            p.name: max(rank_of(p.updates, module) for module in p.updates) for p in self.probes
        }

    @cached_property
    def _shapes(self) -> dict[str, dict[str, tuple[int, int]]]:
        """By adapter, the shapes of its modules; adapters of the same modules share one."""
        known: dict[tuple, dict[str, tuple[int, int]]] = {}
        found = {}
        for probe in self.probes:
            each = {module: shape_of(probe.updates, module) for module in probe.updates}
            shapes = {module: (out, into) for module, (out, into) in each.items()}
            found[probe.name] = known.setdefault(tuple(sorted(shapes.items())), shapes)
        return found

    def ready(self, min_retention: float, together: Sequence[Sequence[str]], by_rank: bool) -> None:
        self.floor, self.together = min_retention, tuple(map(tuple, together))
        self.by_rank = by_rank
        # pairs first: sets may use the budget up; a search among many combines all rules of them
        self.ask_pairs(() if self.few or self.model is not None else WEIGHTED)
        if self.learned is not None and self.few:
            # where the predictor does not speak of a set, its pairs are asked under the set's rules
            pairs = () if self.model is not None else product(self.pairs(), WEIGHTED)
            single = ((one, (other,), method) for (one, other), method in pairs)
            self.learned.ask([*self._all_sets(), *single])

    def is_calibrated(self, group: Group) -> bool:
        """Whether what is forecast of a group of the plan came from the learned predictor."""
        if len(group.adapters) == 1:
            return self.learned is not None
        if group.action is not Action.merge or group.method is None:
            return False
        return all(
            self.source(n, tuple(sorted(set(group.adapters) - {n})), group.method) == LEARNED
            for n in group.adapters
        )

    @property
    def each(self) -> tuple[Forecaster, ...]:
        return (self,)

    def of(self, name: str) -> Forecaster:
        return self

    def pairs(self) -> Iterator[tuple[str, str]]:
        return permutations([probe.name for probe in self.probes], 2)

    def ask_pairs(self, methods: Sequence[str] = ()) -> None:
        wanted = [
            (one, other, method)
            for one, other in self.pairs()
            for method in methods or self.methods((one, other))
        ]
        if self.learned is not None:
            self.learned.ask((one, (other,), method) for one, other, method in wanted)
        for one, other, method in wanted:
            self.forecast(one, (one, other), method)

    def _all_sets(self) -> Iterator[tuple[str, tuple[str, ...], str]]:
        """(adapter, others, method) of every set of three or more."""
        names = sorted(probe.name for probe in self.probes)
        for size in range(3, len(names) + 1):
            for group in combinations(names, size):
                for method, name in product(self.methods(group), group):
                    yield name, tuple(other for other in group if other != name), method

    def signal_rows(self) -> pl.DataFrame:
        """Pair rows of the file tier (the columns that a forecast reads, or all that it was given),
        with the model tier's columns where it ran (prefix early_
        where a name would clash). One row per ordered pair: what a does to b."""
        if self.model is None:
            return self.tables["pairs"]
        rows = []
        for a, b in self.pairs():
            row: dict[str, Any] = {"a": a, "b": b}
            for method in self.methods((a, b)):
                row |= self.model.set_features(b, (a, b), method)
            rows.append(row)
        early = pl.DataFrame(rows, infer_schema_length=None)
        return self.tables["pairs"].join(early, on=["a", "b"], how="left")

    def forecast_rows(self) -> pl.DataFrame:
        """Every forecast that was asked for: adapter, others, method, retention, low, high, and
        the parts it was made from."""
        rows = []
        for (name, others, method), forecast in sorted(self.known.items()):
            parts = self.evidence.get((name, others, method), {})
            rows.append(
                {
                    "adapter": name,
                    "others": "+".join(others),
                    "method": method,
                    "tier": self.tier,
                    "source": self.source(name, tuple(others), method),
                    "retention": forecast.retention,
                    "low": forecast.low,
                    "high": forecast.high,
                    "surrogate": parts.get("surrogate"),
                    "early_merge": parts.get(f"early_retention_{method}"),
                    "extrapolated_merge": parts.get("extrapolated_merge"),
                }
            )
        return pl.DataFrame(rows, schema=FORECAST_COLUMNS)


FORECAST_COLUMNS: dict[str, Any] = {
    **dict.fromkeys(("adapter", "others", "method", "tier", "source"), pl.String),
    **dict.fromkeys(
        ("retention", "low", "high", "surrogate", "early_merge", "extrapolated_merge"), pl.Float64
    ),
}
