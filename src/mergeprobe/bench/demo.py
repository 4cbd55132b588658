"""The demo: five adapters start, are probed, forecast, finished, deployed and measured.

Every stage leaves a file and is passed over where the file is there, so a killed run goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from mergeprobe.adapters.checkpoint import read_adapter
from mergeprobe.artefact import write_parquet
from mergeprobe.bench.folder import Config, RunFolder
from mergeprobe.bench.measure import (
    BY_PROMPT,
    DEPLOYED,
    LOGITS,
    Measurement,
    pending,
    singles,
    subsets,
)
from mergeprobe.bench.outcomes import WHOLE_SET_METHODS, outcome_rows, truncated
from mergeprobe.bench.pool import Pool
from mergeprobe.bench.start import alone, unpack
from mergeprobe.compose import apply_plan
from mergeprobe.plan import Plan, read_plan

PARTITION_METHODS = ("mean", "sum")

Notify = Callable[..., None]
"""notify(stage, **data); stages: base, train, step, forecast, note, planned, apply, measure,
measured, done."""


def run_demo(
    out: str | Path,
    config: Config | None = None,
    *,
    force: bool = False,
    workers: int | None = None,
    notify: Notify = lambda stage, **data: None,
) -> RunFolder:
    """Does the whole job in `out`, or what is left of it, and returns the folder."""
    folder, config = RunFolder(out), config or Config()
    if force and folder.config_file.exists():
        shutil.rmtree(folder.path)
    config = folder.claim(config)
    notify("base", name=config.base)
    with alone(folder.path), Pool("demo", folder.path, workers) as pool:
        unpack({config.base}, notify)
        _train(folder, config, pool, "probe", notify)
        if not folder.plan.exists():
            # in a worker: one process fewer that holds the base model
            pool.run([{"job": "forecast"}], lambda event: _step(event, notify))
        plan = read_plan(folder.plan)
        notify("planned", plan=plan, folder=folder)
        _train(folder, config, pool, "finish", notify)
        if not folder.deployment.exists():
            notify("apply", plan=plan)
            adapters = {name: read_adapter(folder.adapters / name) for name in config.tasks}
            apply_plan(plan, adapters, folder.deployment)
        _measure(folder, config, plan, pool, notify)
    write_parquet(pl.DataFrame(outcome_rows(folder)), folder.outcomes)
    notify("measured", folder=folder)
    from mergeprobe.bench.results import write_page

    write_page(folder)
    notify("done", folder=folder)
    return folder


def _train(folder: RunFolder, config: Config, pool: Pool, job: str, notify: Notify) -> None:
    def done(name: str) -> bool:
        target = folder.probe(name) if job == "probe" else folder.adapters / name
        return target.exists()

    left = [name for name in config.tasks if not done(name)]
    if not left:
        return
    notify("train", job=job, names=left, steps=config.steps)
    pool.run([{"job": job, "name": name} for name in left], lambda e: _step(e, notify))


def _step(event: dict[str, Any], notify: Notify) -> None:
    if event["event"] == "step":
        notify("step", name=event["name"], step=event["step"], loss=event["loss"])
    elif event["event"] == "forecast":
        notify("forecast", message=event["message"])


def _measure(folder: RunFolder, config: Config, plan: Plan, pool: Pool, notify: Notify) -> None:
    wanted = [
        *singles(config),
        *(Measurement(method, config.tasks) for method in (LOGITS, BY_PROMPT, DEPLOYED)),
        *(Measurement(method, config.tasks, config.rank) for method in WHOLE_SET_METHODS),
        *truncated(config, plan),
        *subsets(config, PARTITION_METHODS),
    ]
    left = pending(folder.measured, wanted)
    if not left:
        return
    notify("measure", total=len(wanted), left=len(left))

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "done":
            notify("measure", total=len(wanted), left=len(pending(folder.measured, wanted)))

    jobs = [
        {
            "job": "measure",
            "measurement": {"method": m.method, "adapters": list(m.adapters), "rank": m.rank},
        }
        for m in left
    ]
    pool.run(jobs, on_event)
