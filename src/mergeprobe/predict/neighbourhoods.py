"""Neighbourhoods: of more adapters than MANY, merges are looked for in small sets of them only.

Signals, forecasts and the search grow with the pairs, so a thousand adapters would take a thousand
times as long as thirty. Cut into neighbourhoods of SIZE they take as long as their number says.
Which adapters meet is decided by ‖ΔW‖: a rule that weighs updates lets the larger of two drown the
smaller, so those of a like size are neighbours. No cheap signal orders pairs by how well they merge
(in the bank's cohorts rank correlations of a pair's best worst case with cosines, drifts and norm
ratios change their sign), so a better cut is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import polars as pl

from mergeprobe.capture.probe import Probe
from mergeprobe.errors import NotForecastable
from mergeprobe.lowrank import norm
from mergeprobe.plan import Forecast
from mergeprobe.predict.blend import Tier
from mergeprobe.predict.early import ModelTier
from mergeprobe.predict.forecaster import Forecaster
from mergeprobe.predict.learned import Learned
from mergeprobe.predict.planner import AdapterInfo
from mergeprobe.predict.planning import Forecasts, Key
from mergeprobe.threads import one_thread

MANY = 32  # up to here every pair is measured
SIZE = 8  # where the exact search over all of a neighbourhood's sets takes no time yet


def neighbourhoods(
    sizes: Mapping[str, float], together: Sequence[Sequence[str]] = (), size: int = SIZE
) -> list[tuple[str, ...]]:
    """Names by neighbourhood, each of about `size` adapters of a like size; those that must stay
    together are in one. sizes: ‖ΔW‖ by name."""
    units = [{name} for name in sizes]
    for wanted in together:
        met = [unit for unit in units if unit & set(wanted)]
        units = [unit for unit in units if not unit & set(wanted)] + [set().union(*met)]
    order = sorted(units, key=lambda unit: (max(sizes[name] for name in unit), min(unit)))
    count = -(-len(sizes) // size)
    found: list[list[str]] = [[]]
    done = 0
    for unit in order:
        # the next one begins where its even share of the adapters does
        if found[-1] and done >= len(sizes) * len(found) / count:
            found.append([])
        found[-1] += sorted(unit)
        done += len(unit)
    return [tuple(names) for names in found]


def update_norms(probes: Sequence[Probe], modules: int | None = 32) -> dict[str, float]:
    """‖ΔW‖ of each, by name; of so many of its modules, spread evenly over all (None: of all)."""
    found = {}
    with one_thread():
        for probe in probes:
            names = list(probe.updates)
            chosen = names[:: max(1, len(names) // modules)] if modules else names
            found[probe.name] = sum(norm(probe.updates[name]) ** 2 for name in chosen) ** 0.5
    return found


@dataclass(eq=False)
class Neighbourhoods(Forecasts):
    """A Forecaster for each neighbourhood, read as one: what reaches across two is not forecast."""

    parts: tuple[Forecaster, ...]
    probes: tuple[Probe, ...]
    progress: Callable[[str], None] = lambda message: None

    @property
    def each(self) -> tuple[Forecaster, ...]:
        return self.parts

    @cached_property
    def _of(self) -> dict[str, Forecaster]:
        return {probe.name: one for one in self.each for probe in one.probes}

    @property
    def tier(self) -> Tier:
        return self.each[0].tier

    @property
    def fingerprint(self) -> str | None:
        return self.each[0].fingerprint

    @property
    def model(self) -> ModelTier | None:
        return self.each[0].model

    @property
    def learned(self) -> Learned | None:
        return self.each[0].learned

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(line for one in self.each for line in one.missing))

    @property
    def evidence(self) -> dict[Key, dict[str, float]]:
        return {key: parts for one in self.each for key, parts in one.evidence.items()}

    def of(self, name: str) -> Forecaster:
        if name not in self._of:
            raise NotForecastable(f"no adapter '{name}' here; there are {', '.join(self._of)}")
        return self._of[name]

    def forecast(self, name: str, group: Sequence[str], method: str) -> Forecast:
        """As of Forecaster; NotForecastable where the group is not in one neighbourhood."""
        if strangers := [other for other in group if self.of(other) is not self.of(name)]:
            raise NotForecastable(
                f"'{strangers[0]}' and '{name}' are in different neighbourhoods of "
                f"{len(self.probes)} adapters, whose pairs are not measured; forecast them alone"
            )
        return self._of[name].forecast(name, group, method)

    def source(self, name: str, others: tuple[str, ...], method: str) -> str:
        return self._of[name].source(name, others, method)

    def pairs(self) -> Iterator[tuple[str, str]]:
        for one in self.each:
            yield from one.pairs()

    def ask_pairs(self, methods: Sequence[str] = ()) -> None:
        for one in self.each:
            one.ask_pairs(methods)

    def infos(self) -> list[AdapterInfo]:
        found = {info.name: info for one in self.each for info in one.infos()}
        return [found[probe.name] for probe in self.probes]

    def ready(self, min_retention: float, together: Sequence[Sequence[str]], by_rank: bool) -> None:
        for number, one in enumerate(self.each):
            self.progress(f"neighbourhood {number + 1} of {len(self.each)}")
            names = {probe.name for probe in one.probes}
            inside = [wanted for wanted in together if names.issuperset(wanted)]
            one.ready(min_retention, inside, by_rank)

    def signal_rows(self) -> pl.DataFrame:
        return pl.concat([one.signal_rows() for one in self.each], how="diagonal")

    def forecast_rows(self) -> pl.DataFrame:
        return pl.concat([one.forecast_rows() for one in self.each])
