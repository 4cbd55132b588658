"""Skill on the frozen held-out cohorts: pairs whose tasks were both never seen, at every probe
point, beside every baseline and the ceiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mergeprobe.bench.tables.audit import AUDIT
from mergeprobe.bench.tables.bank import Bank, near, points_of
from mergeprobe.bench.tables.ceiling import CEILING, repeated
from mergeprobe.bench.tables.forecasters import (
    CLASSIFIER,
    FILE,
    MODEL,
    OWN,
    PREDICTORS,
    part_of,
)
from mergeprobe.bench.tables.page import (
    DASH,
    Needs,
    Page,
    Part,
    Table,
    estimate,
    listed,
    percent,
)
from mergeprobe.bench.tables.resample import Resampled, resampled
from mergeprobe.bench.tables.wanted import wanted_table
from mergeprobe.predict.baselines import BASELINES
from mergeprobe.predict.scores import Tested

POINTS = (0.05, 0.1)
METHODS = ("mean", "sum")
UNCONDITIONAL = "method mean"
DIFFERENCES = ("Spearman", "within partners", "R2", "AUC", "MAE")
FROM_THE_MODEL = ("early merge", "extrapolated merge", OWN)
"""Baselines that need the base model: the file tier is not compared with them."""
NOT_RUN = "not run: needs audits.parquet (benchmarks/gradience_audit.py, from finished adapters)"
SCORED = (
    *("Spearman", "Spearman within an adapter's partners", "R²", "MAE", "AUC for ρ ≥ 0.8"),
    *("coverage of 90 % intervals", "width over the method mean's"),
)
METRICS = ("Spearman", "within partners", "R2", "MAE", "AUC", "coverage")


@dataclass(frozen=True)
class Options:
    """runs: bootstrap samples. command: as captions name it."""

    command: str
    runs: int = 500
    seed: int = 0


def skill_page(slices: Slices | None) -> Page:
    """slices: of the held-out pairs; None without any."""
    title = "Skill on held-out cohorts"
    if slices is None:
        needs = "cohorts to train on (t…) and frozen ones (h…) that share no family with them"
        return Page("skill.md", title, "", [Needs("Pairs, both tasks unseen", needs)])
    parts: list[Part] = [wanted_table(slices)]
    for point in POINTS:
        for method in METHODS:
            parts.append(scores_table(slices, point, method))
    for ours in (MODEL, FILE):
        parts += [difference_table(slices, ours, point) for point in POINTS]
    parts += [by_point(slices), by_method(slices)]
    return Page("skill.md", title, INTRO, parts)


INTRO = (
    "Retention ρ of adapter i in a merge with j, forecast from the first part of training. Nothing "
    "was chosen or fitted on the tested cohorts or their families. Spearman is pooled over all "
    "ordered pairs; *within an adapter's partners* it is the mean over adapters of the "
    "correlation across their partners, which knowing the task alone cannot raise. In brackets: "
    "90 % intervals of a cluster bootstrap over families. A forecast that tells nothing apart has "
    "rank correlation 0 by convention."
)


class Slices:
    """The held-out pairs at one point under some methods, bootstrapped once each. tested: every
    forecaster on the held-out rows, all sizes and points."""

    def __init__(self, bank: Bank, tested: Mapping[str, Tested], options: Options) -> None:
        self.bank, self.options = bank, options
        self.tested = part_of(tested, tested[MODEL].rows.size == 2)
        self.rows = self.tested[MODEL].rows
        twins = repeated(bank.rows, bank.measured)
        self.twins = twins.pick(twins.rows.size == 2) if twins is not None else None
        self._found: dict[tuple, dict[str, Resampled]] = {}

    def at(
        self, point: float, methods: Sequence[str] = METHODS, names: Sequence[str] | None = None
    ) -> dict[str, Resampled]:
        """By forecaster, and by CEILING where runs are repeated; empty without such rows."""
        key = (point, *methods, names is None or tuple(names))
        if key not in self._found:
            mask = near(self.rows, point) & np.isin(self.rows.method, methods)
            chosen = {n: t for n, t in self.tested.items() if names is None or n in names}
            found = {}
            if mask.sum() > 2:
                found = resampled(part_of(chosen, mask), **self._how)
            if found and (ceiling := self.ceiling(point, methods)) is not None:
                found[CEILING] = ceiling
            self._found[key] = found
        return self._found[key]

    def ceiling(self, point: float, methods: Sequence[str]) -> Resampled | None:
        if self.twins is None:
            return None
        # the outcome does not depend on the point: any that the repeated cohorts have will do
        known = points_of(self.twins.rows)
        point = point if point in known else known[0]
        mask = near(self.twins.rows, point) & np.isin(self.twins.rows.method, methods)
        if mask.sum() < 3:
            return None
        return resampled({CEILING: self.twins.pick(mask)}, **self._how)[CEILING]

    @property
    def _how(self) -> dict[str, int]:
        return {"runs": self.options.runs, "seed": self.options.seed}

    def rows_at(self, point: float, methods: Sequence[str]) -> int:
        return int((near(self.rows, point) & np.isin(self.rows.method, methods)).sum())

    def caption(self, rows: int | None = None) -> str:
        count = f"; {rows} rows" if rows is not None else ""
        repeats = "" if self.twins is None else f" {self._repeats()}"
        return (
            f"`{self.options.command}`, seed {self.options.seed}. "
            f"{self.bank.said('Both tasks unseen')}{count}. Intervals: "
            f"{self.options.runs} bootstrap samples over families; no SD or SE.{repeats}"
        )

    def _repeats(self) -> str:
        assert self.twins is not None
        names = sorted(set(self.twins.rows.cohort.tolist()))
        return f"The ceiling is from the repeated cohorts ({', '.join(names)})."


def cells(found: Resampled, plain: Resampled | None) -> list[str]:
    shown = [estimate(found.estimate(metric)) for metric in METRICS]
    return [*shown, estimate(found.ratio("width", plain))]


def scores_table(slices: Slices, point: float, method: str) -> Table | Needs:
    title = f"Pairs at {percent(point)} of training, {method}"
    found = slices.at(point, (method,))
    if not found:
        return Needs(title, f"held-out pairs at that point under '{method}'")
    plain = found.get(UNCONDITIONAL)
    rows = [[name, *cells(each, plain)] for name, each in found.items() if name != CLASSIFIER]
    if CLASSIFIER in found:
        auc = estimate(found[CLASSIFIER].estimate("AUC"))
        rows.append([CLASSIFIER, *(auc if m == "AUC" else DASH for m in METRICS), DASH])
    if CEILING not in found:
        rows.append([CEILING, "needs a repeated cohort", *(DASH for _ in SCORED[1:])])
    if AUDIT not in found:
        rows.append([AUDIT, NOT_RUN, *(DASH for _ in SCORED[1:])])
    caption = slices.caption(slices.rows_at(point, (method,)))
    if slices.bank.audits is not None:
        known = listed(sorted(slices.bank.audits["cohort"].unique().to_list()))
        caption += f" The audit is known of {known}; elsewhere it counts as the method mean."
    return Table(title, caption, ("forecast", *SCORED), rows)


def difference_table(slices: Slices, ours: str, point: float) -> Table | Needs:
    """`ours` minus every baseline, paired."""
    title = f"Difference to every baseline at {percent(point)} of training: {ours}"
    rows = []
    for method in METHODS:
        found = slices.at(point, (method,))
        for name in (*BASELINES, AUDIT):
            if name not in found or (ours == FILE and name.startswith(FROM_THE_MODEL)):
                continue
            differences = [found[ours].estimate(m, against=found[name]) for m in DIFFERENCES]
            rows.append([f"{name}, {method}", *map(estimate, differences)])
    if not rows:
        return Needs(title, "held-out pairs at that point")
    columns = (
        *("against", "Spearman", "within partners", "R²", "AUC"),
        "MAE (below 0 is better)",
    )
    caption = f"{slices.caption()} Paired: both forecasts in the same bootstrap samples."
    return Table(title, caption, columns, rows)


def by_point(slices: Slices) -> Table | Needs:
    rows = []
    for point in points_of(slices.rows):
        for method in METHODS:
            found = slices.at(point, (method,), (*PREDICTORS, OWN, UNCONDITIONAL))
            plain = found.get(UNCONDITIONAL)
            for name in (*PREDICTORS, OWN, CEILING):
                if name in found:
                    label = f"{percent(point)}, {method}, {name}"
                    rows.append([label, *cells(found[name], plain)])
    title = "By probe point and tier"
    if not rows:
        return Needs(title, "held-out pairs under the mean or the sum")
    lacking = [percent(p) for p in (0.025, 0.25, 1.0) if not near(slices.rows, p).any()]
    said = f" No rows at {', '.join(lacking)}." if lacking else ""
    caption = f"{slices.caption()} 2.5 % is probed in few cohorts only.{said}"
    return Table(title, caption, ("point, method, forecast", *SCORED), rows)


def by_method(slices: Slices) -> Table | Needs:
    rows = []
    for point in POINTS:
        for method in sorted(set(slices.rows.method.tolist())):
            found = slices.at(point, (method,), (MODEL, FILE, UNCONDITIONAL))
            plain = found.get(UNCONDITIONAL)
            for name in (MODEL, FILE, CEILING):
                if name in found:
                    label = f"{percent(point)}, {method}, {name}"
                    rows.append([label, *cells(found[name], plain)])
    if not rows:
        return Needs("By merge method", "held-out pairs")
    return Table("By merge method", slices.caption(), ("point, method, forecast", *SCORED), rows)
