"""Planning: from forecasts, of all adapters or of neighbourhoods of them, to a plan in words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from mergeprobe.capture.probe import Probe
from mergeprobe.plan import Forecast, Plan
from mergeprobe.predict.blend import Tier
from mergeprobe.predict.candidates import candidates
from mergeprobe.predict.options import Cost
from mergeprobe.predict.planner import EXACT_UP_TO, AdapterInfo, make_plan
from mergeprobe.predict.trimming import trimmed

if TYPE_CHECKING:
    from mergeprobe.predict.early import ModelTier
    from mergeprobe.predict.forecaster import Forecaster
    from mergeprobe.predict.learned import Learned

LEARNED = "the learned predictor"
CLOSED_FORM = "the surrogate and the early merge"
BOTH = "the learned predictor and the set's own early merge"
Key = tuple[str, tuple[str, ...], str]
"""(adapter, the others that it is merged with, method)."""


class Forecasts(ABC):
    """What can be asked of forecasts, and the plan made from them.

    probes, in the order given. tier, fingerprint (of the base), model and learned: as of
    Forecaster. missing: what would make the forecasts better, in words. evidence: what each
    forecast was made from, by part. each: the forecasters behind it, no pair between two of them.
    """

    probes: tuple[Probe, ...]
    progress: Callable[[str], None]
    if TYPE_CHECKING:

        @property
        def tier(self) -> Tier: ...
        @property
        def fingerprint(self) -> str | None: ...
        @property
        def model(self) -> ModelTier | None: ...
        @property
        def learned(self) -> Learned | None: ...
        @property
        def missing(self) -> tuple[str, ...]: ...
        @property
        def evidence(self) -> dict[Key, dict[str, float]]: ...

    @property
    @abstractmethod
    def each(self) -> tuple[Forecaster, ...]: ...

    @abstractmethod
    def of(self, name: str) -> Forecaster:
        """The forecaster that knows this adapter."""

    @abstractmethod
    def forecast(self, name: str, group: Sequence[str], method: str) -> Forecast:
        """Retention of `name` when `group` (itself included) is merged by `method`."""

    @abstractmethod
    def source(self, name: str, others: tuple[str, ...], method: str) -> str:
        """What a forecast was made by."""

    @abstractmethod
    def pairs(self) -> Iterator[tuple[str, str]]:
        """Every ordered pair that can be forecast."""

    @abstractmethod
    def ask_pairs(self, methods: Sequence[str] = ()) -> None:
        """Forecasts every ordered pair under these rules (all that are worth asking)."""

    def methods(self, group: Sequence[str]) -> tuple[str, ...]:
        """The merge rules that are worth a forecast for this group."""
        return self.of(group[0]).methods(group)

    @abstractmethod
    def infos(self) -> list[AdapterInfo]: ...

    @abstractmethod
    def ready(self, min_retention: float, together: Sequence[Sequence[str]], by_rank: bool) -> None:
        """Forecasts what a plan will ask for. by_rank: single adapters are offered cut, too."""

    @abstractmethod
    def signal_rows(self) -> pl.DataFrame: ...

    @abstractmethod
    def forecast_rows(self) -> pl.DataFrame: ...

    @property
    def calibrated(self) -> bool:
        """Whether every forecast so far came from the learned predictor."""
        return all(
            one.known and all(one.source(*key) == LEARNED for key in one.known) for one in self.each
        )

    def plan(
        self,
        *,
        min_retention: float = 0.9,
        keep_ranks: bool = False,
        cost: Cost = "adapters",
        together: Sequence[Sequence[str]] = (),
        **options: Any,
    ) -> Plan:
        """The cheapest partition above the floor; see planner.make_plan. Its groups are cut to the
        ranks that do (trimming.trimmed), unless keep_ranks."""
        by_rank = cost == "parameters" and self.model is not None and not keep_ranks
        self.ready(min_retention, together, by_rank)
        plan = make_plan(
            self.infos(),
            lambda names: candidates(self.of(names[0]), names),
            min_retention=min_retention,
            cost=cost,
            together=together,
            within=[tuple(probe.name for probe in one.probes) for one in self.each],
            tier=self.tier,
            base=self.probes[0].meta.get("base") or "",
            base_fingerprint=self.fingerprint,
            calibrated=lambda group: self.of(group.adapters[0]).is_calibrated(group),
            missing=self.missing,
            **options,
        )
        if not keep_ranks:
            self.progress("which ranks do")
            plan = trimmed(self, plan)
        said = self.warnings()
        if self.learned is not None:
            said = (self.learned.predictor.in_words(), *said)
        return plan.model_copy(update={"reasons": (*plan.reasons, *said)})

    def warnings(self) -> tuple[str, ...]:
        """What was not measured, and what the learned predictor did not speak of, in words."""
        said = []
        if len(self.each) > 1:
            largest = max(len(one.probes) for one in self.each)
            said.append(
                f"{len(self.probes)} adapters: merges were looked for within {len(self.each)} sets "
                f"of up to {largest} adapters of a like size; other pairs were not measured"
            )
        if self.learned is None:
            return (*said, *dict.fromkeys(one.passed for one in self.each if one.passed))
        known = [key for one in self.each for key in one.known]
        far = [
            key for one in self.each if one.learned for key in one.learned.far if key in one.known
        ]
        if far:
            names = sorted({name for name, _, _ in far})
            said.append(
                f"{len(far)} of {len(known)} forecasts (of {', '.join(names)}) lie outside "
                f"of what the learned predictor has seen: these come from {CLOSED_FORM}, "
                "uncalibrated"
            )
        if any(one.source(*key) == BOTH for one in self.each for key in one.known):
            said.append(
                "forecasts of sets of three or more are averaged with the set's own early merge: "
                "safer, and their intervals are rough"
            )
        if any(not one.few and any(len(k[1]) > 1 for k in one.known) for one in self.each):
            said.append(
                f"with more than {EXACT_UP_TO} adapters only pairs are asked of the learned "
                "predictor; sets are combined from them, uncalibrated"
            )
        return tuple(said)
