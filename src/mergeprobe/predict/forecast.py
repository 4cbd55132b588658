"""Forecasts at three tiers.

weights: finished adapters and nothing else. file: probes. model: probes, the base model and the
probes' calibration items. Each tier yields a `Forecaster`, which the planner asks for candidates.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import polars as pl

from mergeprobe.capture.probe import Probe
from mergeprobe.errors import NotForecastable
from mergeprobe.predict import surrogate
from mergeprobe.predict.blend import Tier
from mergeprobe.predict.early import ModelTier
from mergeprobe.predict.features import FEATURES
from mergeprobe.predict.forecaster import Forecaster
from mergeprobe.predict.learned import SHOWN, Learned
from mergeprobe.predict.neighbourhoods import (
    MANY,
    SIZE,
    Neighbourhoods,
    neighbourhoods,
    update_norms,
)
from mergeprobe.predict.planning import CLOSED_FORM, Forecasts
from mergeprobe.predict.predictor import Predictor, opened
from mergeprobe.predict.signal_rows import final_norms, signal_rows
from mergeprobe.signals import in_memory, tables
from mergeprobe.signals.checks import check_probes
from mergeprobe.threads import in_order

HELD = 512 * 2**20  # bytes of a neighbourhood's probes that are read at once
AT_ONCE = 2  # neighbourhoods that are measured at a time, each by one thread: more take more memory


def forecast_probes(
    probes: Sequence[Probe],
    *,
    model: ModelTier | None = None,
    predictor: Predictor | str | Path | None = None,
    floor: float = 0.9,
    signals: Mapping[str, pl.DataFrame] | None = None,
    all_pairs: bool = False,
    together: Sequence[Sequence[str]] = (),
    max_adapters: int | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Forecasts:
    """The best forecaster that the probes allow: model tier if given, else file, else weights.

    predictor: by default the one that comes with mergeprobe; one from `mergeprobe fit`, or its
    folder; "none" for no predictor. It is asked first, about every pair and, of up to ten adapters,
    every set. Where its answer would be far from the rows that it was fitted on, the surrogate and
    the early merge answer as they do without it, and the forecaster's `warnings` say so.
    signals: `mergeprobe.signals.tables` of these probes, where they have been made already; by
    default only the columns that a forecast reads are.
    all_pairs: measure every pair, of however many probes. By default more than MANY are cut into
    neighbourhoods, whose pairs alone are measured; together, max_adapters: what the plan will be
    asked for, so that it can be had within them.

    Raises AdapterMismatch if the probes are of different bases or share no module,
    NotForecastable if there are fewer than two.
    """
    if len(probes) < 2:
        raise NotForecastable(
            f"a forecast needs at least two adapters, got {len(probes)}: "
            "one alone is simply deployed"
        )
    asked = opened(predictor)
    if len(probes) <= MANY or signals is not None or all_pairs:
        return _forecaster(probes, model, asked, floor, signals, progress)
    check_probes(probes)
    by_name = {probe.name: probe for probe in probes}
    size = max(SIZE, -(-len(probes) // (max_adapters or len(probes))))
    sets = neighbourhoods(update_norms(probes), together, size)

    def measured(number: int) -> Forecaster:
        def said(message: str) -> None:
            progress(f"neighbourhood {number + 1} of {len(sets)}: {message}")

        own = tuple(by_name[n] for n in sets[number])
        inside = in_memory(own, HELD)
        found = _forecaster(inside, model, asked, floor, None, said)
        # measured: from here on few tensors are read again, or none, and the memory is let go
        found.probes = own
        return found

    # one after the other where they share a model, whose passes are counted
    at_once = 1 if model is not None else min(AT_ONCE, os.cpu_count() or 1)
    each = tuple(in_order(measured, range(len(sets)), at_once))
    return Neighbourhoods(each, tuple(probes), progress)


def _forecaster(
    probes: Sequence[Probe],
    model: ModelTier | None,
    asked: Predictor | None,
    floor: float,
    signals: Mapping[str, pl.DataFrame] | None,
    progress: Callable[[str], None],
) -> Forecaster:
    fingerprint = check_probes(probes)
    progress("signals of all pairs")
    # sets are asked of the surrogate only to find weights, which the model tier then tries
    found = dict(signals or tables(probes, only=_read(asked), triples=model is not None))
    missing = _missing(probes, model)
    quadratic = lengths = None
    facts = surrogate.adapter_table(probes, found["adapters"])
    tier: Tier = "weights"
    if all(probe.gradient and probe.inputs and probe.calibration for probe in probes):
        quadratic = surrogate.from_tables(found["quadratic"], found["linear"], facts)
        try:
            lengths = surrogate.lengths(quadratic, facts)
        except NotForecastable as problem:
            missing = (*missing, f"the surrogate takes updates as they are: {problem}")
        tier = "file"
    if model is not None:
        tier = "model"
    norms = final_norms(found["adapters"], facts, lengths)
    if model is not None:
        norms |= model.final_norms(list(norms))
    forecaster = Forecaster(
        tier=tier,
        probes=tuple(probes),
        fingerprint=fingerprint,
        tables=found,
        missing=missing,
        norms=norms,
        floor=floor,
        quadratic=quadratic,
        lengths=lengths,
        model=model,
        progress=progress,
    )
    meta = probes[0].meta
    base = asked.base_like(meta.get("base"), fingerprint) if asked is not None else None
    if asked is not None and base is None:
        theirs, known = meta.get("base") or "unknown", ", ".join(asked.card["bases"])
        forecaster.passed = (
            f"the learned predictor knows no adapters of base '{theirs}': forecasts come from "
            f"{CLOSED_FORM}, uncalibrated"
        )
        more = f"measured merges on base '{theirs}' for `mergeprobe fit` (fitted so far: {known})"
        forecaster.missing = (*missing, more)
    elif asked is not None:
        rows = signal_rows(found, facts, quadratic, lengths)
        forecaster.learned = Learned(asked, rows, forecaster.early, base)
    return forecaster


def _read(asked: Predictor | None) -> frozenset[str]:
    """The columns of pairs that the predictor reads or that are shown beside its forecasts; names
    that are no signal of pairs come from elsewhere."""
    pairs = {name: feature for name, feature in FEATURES.items() if feature.about == "pair"}
    read = {f.column for name, f in pairs.items() if asked is not None and asked.reads(name)}
    return frozenset(read | set(SHOWN))


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
