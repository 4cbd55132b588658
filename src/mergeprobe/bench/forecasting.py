"""The forecast stage of a run: signals of both tiers, forecasts and the plan, from its probes."""

from __future__ import annotations

from collections.abc import Callable

from mergeprobe.adapters.base import Base
from mergeprobe.artefact import write_parquet
from mergeprobe.bench.folder import RunFolder
from mergeprobe.capture.probe import read_probe
from mergeprobe.plan import Plan, write_plan
from mergeprobe.predict.early import open_tier
from mergeprobe.predict.forecast import forecast_probes
from mergeprobe.signals import tables


def forecast_and_plan(folder: RunFolder, base: Base, progress: Callable[[str], None]) -> Plan:
    """Writes signals.parquet, layers.parquet, forecasts.parquet and, last, plan.json."""
    config = folder.config()
    probes = [read_probe(folder.probe(name)) for name in config.tasks]
    tier = open_tier(
        base, probes, items=config.forecast_items, budget=config.budget, progress=progress
    )
    progress("signals of all pairs")
    signals = tables(probes)
    forecaster = forecast_probes(
        probes, model=tier, floor=config.min_retention, signals=signals, progress=progress
    )
    plan = forecaster.plan(min_retention=config.min_retention)
    write_parquet(forecaster.signal_rows(), folder.signals)
    write_parquet(signals["layers"], folder.layers)
    write_parquet(forecaster.forecast_rows(), folder.forecasts)
    write_plan(plan, folder.plan)
    return plan
