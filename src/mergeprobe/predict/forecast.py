"""Forecasts at three tiers, and what could be done with each group of adapters.

weights: finished adapters and nothing else. file: probes. model: probes, the base model and the
probes' calibration items. Each tier yields a `Forecaster`, which the planner asks for candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any, Literal

import numpy as np
import polars as pl

from mergeprobe.adapters.checkpoint import check_same_base
from mergeprobe.capture.probe import Probe
from mergeprobe.errors import NotForecastable
from mergeprobe.plan import Action, Forecast, Group, Plan
from mergeprobe.predict import ridge, surrogate
from mergeprobe.predict.costs import resident_parameters
from mergeprobe.predict.early import ModelTier
from mergeprobe.predict.planner import AdapterInfo, make_plan
from mergeprobe.signals import tables

Tier = Literal["weights", "file", "model"]
METHODS = ("mean", "sum")
KEPT = Forecast(retention=1.0, low=1.0, high=1.0)
SET_MARGIN = 0.25  # sets whose pair forecasts fall this far below the floor are not measured


@dataclass
class Forecaster:
    """One tier's forecasts of a list of adapters.

    evidence: (adapter, others, method) -> what the forecast was made from, by part.
    missing: what would make the forecasts better, in words.
    """

    tier: Tier
    probes: tuple[Probe, ...]
    fingerprint: str | None
    tables: dict[str, pl.DataFrame]
    missing: tuple[str, ...]
    floor: float = 0.9
    quadratic: surrogate.QuadraticModel | None = None
    lengths: np.ndarray | None = None
    model: ModelTier | None = None
    progress: Callable[[str], None] = lambda message: None
    evidence: dict[tuple[str, tuple[str, ...], str], dict[str, float]] = field(default_factory=dict)
    _known: dict[tuple[str, tuple[str, ...], str], Forecast] = field(default_factory=dict)

    def forecast(self, name: str, group: Sequence[str], method: str) -> Forecast:
        """Retention of `name` when `group` (itself included) is merged by `method`."""
        others = tuple(other for other in sorted(group) if other != name)
        if not others:
            return KEPT
        key = (name, others, method)
        if key not in self._known:
            if len(others) == 1:
                self._known[key] = self._pair(name, others[0], method)
            else:
                self._known[key] = self._set(name, others, method)
        return self._known[key]

    def _pair(self, name: str, other: str, method: str) -> Forecast:
        parts = self._parts(name, (other,), method)
        self.evidence[name, (other,), method] = parts
        if self.tier == "weights":
            return ridge.forecast_pair_weights(parts, method)
        return blend(parts, method, self.tier)

    def _set(self, name: str, others: tuple[str, ...], method: str) -> Forecast:
        pairs = [self.forecast(name, (name, other), method) for other in others]
        combined = ridge.combine(pairs, len(others) + 1, method)
        if self.tier != "model" or combined.retention < self.floor - SET_MARGIN:
            return combined
        try:
            parts = self._parts(name, others, method)
        except NotForecastable:  # the budget is spent: the pairs have to do
            return combined
        self.evidence[name, others, method] = parts
        measured = blend(parts, method, self.tier)
        # the two see different things: pairs what builds up, the set's own merge what cancels
        return Forecast(
            retention=(measured.retention + combined.retention) / 2,
            low=min(measured.low, combined.low),
            high=max(measured.high, combined.high),
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
            weight = 1.0 if method == "sum" else 1.0 / len(group)
            found = surrogate.set_retentions(self.quadratic, group, weight, self.lengths)
            parts["surrogate"] = found[name]
        if self.model is not None:
            self.progress(f"{' + '.join(group)} by {method}")
            parts |= self.model.set_features(name, group, method)
        return parts

    def infos(self) -> list[AdapterInfo]:
        return [
            AdapterInfo(
                probe.name,
                max(update.r for update in probe.updates.values()),
                self._parameters([probe.name]),
                path=str(probe.path) if probe.path and self.tier == "weights" else None,
            )
            for probe in self.probes
        ]

    def _parameters(self, names: Sequence[str]) -> int:
        """Resident parameters of one adapter at the largest rank of `names`."""
        mine = [probe for probe in self.probes if probe.name in names]
        shapes = {m: u.shape for probe in mine for m, u in probe.updates.items()}
        return resident_parameters(shapes, self._rank(names))

    def _rank(self, names: Sequence[str]) -> int:
        mine = [probe for probe in self.probes if probe.name in names]
        return max(update.r for probe in mine for update in probe.updates.values())

    def candidates(self, names: tuple[str, ...]) -> list[Group]:
        """What could be done with a group: kept as it is (one adapter), merged, reweighted."""
        common = {
            "name": names[0],
            "adapters": names,
            "resident_parameters": self._parameters(names),
        }
        if len(names) == 1:
            return [Group(action=Action.route, forecast={names[0]: KEPT}, **common)]
        found = []
        for method in METHODS:
            forecast = {name: self.forecast(name, names, method) for name in names}
            found.append(
                Group(
                    action=Action.merge,
                    method=method,
                    rank=self._rank(names),
                    forecast=forecast,
                    **common,
                )
            )
        return found

    def plan(self, *, min_retention: float = 0.9, **options: Any) -> Plan:
        """The cheapest partition above the floor; see planner.make_plan."""
        self.floor = min_retention
        first = self.probes[0].meta
        return make_plan(
            self.infos(),
            self.candidates,
            min_retention=min_retention,
            tier=self.tier,
            base=first.get("base") or "",
            base_fingerprint=self.fingerprint,
            missing=self.missing,
            **options,
        )

    def signal_rows(self) -> pl.DataFrame:
        """Pair rows of the file tier, with the model tier's columns where it ran (prefix early_
        where a name would clash). One row per ordered pair: what a does to b."""
        if self.model is None:
            return self.tables["pairs"]
        rows = []
        names = [probe.name for probe in self.probes]
        for a, b in permutations(names, 2):
            row: dict[str, Any] = {"a": a, "b": b}
            for method in METHODS:
                row |= self.model.set_features(b, (a, b), method)
            rows.append(row)
        return self.tables["pairs"].join(pl.DataFrame(rows), on=["a", "b"], how="left")

    def forecast_rows(self) -> pl.DataFrame:
        """Every forecast that was asked for: adapter, others, method, retention, low, high, and
        the parts it was made from."""
        rows = []
        for (name, others, method), forecast in sorted(self._known.items()):
            parts = self.evidence.get((name, others, method), {})
            rows.append(
                {
                    "adapter": name,
                    "others": "+".join(others),
                    "method": method,
                    "tier": self.tier,
                    "retention": forecast.retention,
                    "low": forecast.low,
                    "high": forecast.high,
                    "surrogate": parts.get("surrogate"),
                    "early_merge": parts.get(f"early_retention_{method}"),
                }
            )
        return pl.DataFrame(rows, schema=FORECAST_COLUMNS)


FORECAST_COLUMNS: dict[str, Any] = {
    **dict.fromkeys(("adapter", "others", "method", "tier"), pl.String),
    **dict.fromkeys(("retention", "low", "high", "surrogate", "early_merge"), pl.Float64),
}


def blend(parts: Mapping[str, float], method: str, tier: Tier) -> Forecast:
    """One forecast from its parts. Probes without a model have no ridge of their own fitted yet:
    their forecast is that of the weights, and its wide interval says so."""
    if tier != "model":
        return ridge.forecast_pair_weights(parts, method)
    return ridge.forecast_pair(parts, method)


def forecast_probes(
    probes: Sequence[Probe],
    *,
    model: ModelTier | None = None,
    floor: float = 0.9,
    progress: Callable[[str], None] = lambda message: None,
) -> Forecaster:
    """The best forecaster that the probes allow: model tier if given, else file, else weights.

    Raises AdapterMismatch if the probes are of different bases or share no module,
    NotForecastable if there are fewer than two.
    """
    if len(probes) < 2:
        raise NotForecastable(
            f"a forecast needs at least two adapters, got {len(probes)}: "
            "one alone is simply deployed"
        )
    fingerprint = check_same_base([probe.to_adapter() for probe in probes])
    progress("signals of all pairs")
    found = tables(probes)
    missing = _missing(probes, model)
    quadratic = lengths = None
    tier: Tier = "weights"
    if all(probe.gradient and probe.inputs and probe.calibration for probe in probes):
        facts = surrogate.adapter_table(probes, found["adapters"])
        quadratic = surrogate.from_tables(found["quadratic"], found["linear"], facts)
        try:
            lengths = surrogate.lengths(quadratic, facts)
        except NotForecastable as problem:
            missing = (*missing, f"the surrogate takes updates as they are: {problem}")
        tier = "file"
    if model is not None:
        tier = "model"
    return Forecaster(
        tier=tier,
        probes=tuple(probes),
        fingerprint=fingerprint,
        tables=found,
        missing=missing,
        floor=floor,
        quadratic=quadratic,
        lengths=lengths,
        model=model,
        progress=progress,
    )


def _missing(probes: Sequence[Probe], model: ModelTier | None) -> tuple[str, ...]:
    said = []
    bare = [probe.name for probe in probes if not probe.gradient or not probe.calibration]
    if bare:
        said.append(
            f"no gradients, moments or calibration items for {', '.join(bare)}: train with "
            "MergeProbeCallback to get a probe"
        )
    unverified = [p.name for p in probes if not p.meta.get("base_fingerprint")]
    if unverified:
        said.append(f"base unverified for {', '.join(unverified)}: no fingerprint was recorded")
    if model is None and not bare:
        said.append("the base model was not run: pass --base for the model tier")
    return tuple(said)
