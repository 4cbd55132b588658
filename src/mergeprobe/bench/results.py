"""A run's results as a page: everything that was forecast beside everything that was measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from mergeprobe.adapters.checkpoint import CARD
from mergeprobe.artefact import read_json
from mergeprobe.bench.folder import RunFolder
from mergeprobe.bench.measure import DEPLOYED, Measurement
from mergeprobe.bench.outcomes import PLAN, Outcomes, regret
from mergeprobe.capture.probe import read_probe
from mergeprobe.errors import AdapterError
from mergeprobe.report.data import (
    AdapterRow,
    CurvePoint,
    LayerRow,
    PairValues,
    PartitionRow,
    ReportData,
    RoutedRow,
    StrategyRow,
)
from mergeprobe.report.page import write_report
from mergeprobe.signals import SIGNALS

# the signals that the page offers in its matrices, in this order
SHOWN = (
    "frobenius_cosine",
    "gradient_cosine_base",
    "gradient_cosine",
    "output_overlap",
    "interference",
    "drift_cosine",
)
EARLY = {
    "disturbance_late": "disturbance of the other's states",
    "kl_merge_mean": "divergence of the early merge by mean",
    "early_retention_mean": "early merge by mean, extrapolated",
    "early_retention_sum": "early merge by sum, extrapolated",
}


def write_page(folder: RunFolder, out: Path | None = None) -> Path:
    """Writes the run's report.html (or `out`) from the files in its folder."""
    target = out or folder.report
    write_report(report_data(folder), target)
    return target


UNCALIBRATED = (
    "Forecasts are uncalibrated: where the learned predictor does not speak, the intervals come "
    "from the residuals of a small pilot."
)


def report_data(folder: RunFolder) -> ReportData:
    outcomes = Outcomes(folder)
    config, plan = outcomes.config, outcomes.plan
    lost = regret(outcomes)
    return ReportData(
        title="Will these adapters merge?",
        subtitle=f"{len(config.tasks)} LoRA adapters on {config.base}, forecast at "
        f"step {_probe_step(folder)} of {config.steps}",
        base=config.base,
        provenance={
            "base model": config.base,
            "base fingerprint": plan.base_fingerprint or "unverified",
            "made by": config.made_by,
            "seed": str(config.seed),
            "control": config.control,
            "training": f"{config.steps} steps of {config.batch_size} items, LoRA rank "
            f"{config.rank} on all linear layers, learning rate {config.learning_rate:g}",
            "forecast tier": f"{plan.tier}, {'' if plan.calibrated else 'un'}calibrated",
            "test items per task": str(config.test_items),
        },
        notes=(
            *(() if plan.calibrated else (UNCALIBRATED,)),
            f"Against the best partition of at most the plan's parameters, chosen on one half of "
            f"the test items and scored on the other ({lost.best}): the plan's regret is "
            f"{lost.worst:+.3f} in worst-case and {lost.mean:+.3f} in mean retention "
            "(below 0 the plan is better).",
        ),
        adapters=tuple(_adapters(outcomes)),
        strategies=tuple(_strategies(outcomes)),
        strategies_caption=f"Gain retention on {config.test_items} test items a task, one run, "
        f"seed {config.seed}; ± is the standard error over items.",
        pair_values=tuple(_pair_values(outcomes)),
        layers=tuple(_layers(folder)),
        layers_label="interference (K-FAC, nats per token)",
        curves=tuple(_curves(folder)),
        probe_steps={name: _probe_step(folder, name) for name in config.tasks},
        plan=plan,
        partitions=tuple(_partitions(outcomes)),
        routed=tuple(_routed(outcomes)),
    )


def _adapters(outcomes: Outcomes) -> Iterator[AdapterRow]:
    names, folder = outcomes.config.tasks, outcomes.folder
    deployed = Measurement(DEPLOYED, names)
    for name in names:
        task = folder.task(name, outcomes.config)
        example = task.generate("test", 1, outcomes.config.seed)[0]
        group = outcomes.plan.group_of(name)
        forecast = group.forecast.get(name)
        kept = outcomes.retention(name, deployed)
        yield AdapterRow(
            name=name,
            domain=task.domain,
            prompt_example=example.prompt,
            completion_example=example.completion.strip(),
            group=group.name,
            gain=kept.own_gain,
            forecast=forecast.retention if forecast else None,
            low=forecast.low if forecast else None,
            high=forecast.high if forecast else None,
            measured=kept.gain,
            measured_se=kept.gain_se,
            ratio_retention=kept.ratio,
            accuracy_base=outcomes.base(name).accuracy(name),
            accuracy_single=outcomes.single(name).accuracy(name),
            accuracy_deployed=outcomes.measured(deployed).accuracy(name),
        )


def _strategies(outcomes: Outcomes) -> Iterator[StrategyRow]:
    for found in outcomes.strategies():
        yield StrategyRow(
            name=found.name,
            mean_retention=found.total.mean,
            mean_se=found.total.mean_se,
            worst_retention=found.total.worst,
            worst_se=found.total.worst_se,
            resident_parameters=found.resident_parameters,
            passes=found.passes,
            chosen=found.name == PLAN,
        )


def _routed(outcomes: Outcomes) -> Iterator[RoutedRow]:
    found = outcomes.routed()
    for task, chosen in found.chosen.items() if found else ():
        sent = {name: chosen.count(name) for name in outcomes.config.tasks if name in chosen}
        rivals = tuple(found.rivals.get(task, ())) if found else ()
        yield RoutedRow(task=task, sent=sent, base=chosen.count(None), rivals=rivals)


def _pair_values(outcomes: Outcomes) -> Iterator[PairValues]:
    names, folder = outcomes.config.tasks, outcomes.folder
    forecasts, signals = pl.read_parquet(folder.forecasts), pl.read_parquet(folder.signals)
    for method in ("mean", "sum"):
        rows = forecasts.filter(pl.col("method") == method)
        yield PairValues(
            name=f"forecast_{method}",
            label=f"forecast retention, merged in pairs by {method}",
            unit="retention",
            summary="what the column's adapter keeps when merged with the row's",
            values={
                f"{row['others']}|{row['adapter']}": row["retention"]
                for row in rows.iter_rows(named=True)
                if row["others"] in names
            },
        )
        yield PairValues(
            name=f"measured_{method}",
            label=f"measured retention, merged in pairs by {method}",
            unit="retention",
            summary="what the column's adapter kept when merged with the row's",
            values={
                f"{a}|{b}": outcomes.retention(b, _pair(names, a, b, method, outcomes)).gain
                for a in names
                for b in names
                if a != b
            },
        )
    for column in (*SHOWN, *EARLY):
        if column in signals.columns:
            known = SIGNALS.get(column)
            yield PairValues(
                name=column,
                label=EARLY.get(column) or column.replace("_", " "),
                unit="retention" if column.startswith("early_retention") else "",
                summary=known.summary if known else "",
                symmetric=known.symmetric if known else False,
                values={
                    f"{a}|{b}": value for a, b, value in signals.select("a", "b", column).rows()
                },
            )


def _pair(names: tuple[str, ...], a: str, b: str, method: str, outcomes: Outcomes) -> Measurement:
    pair = tuple(name for name in names if name in (a, b))
    return Measurement(method, pair, outcomes.config.rank)


def _layers(folder: RunFolder) -> Iterator[LayerRow]:
    frame = pl.read_parquet(folder.layers)
    for row in frame.iter_rows(named=True):
        if row["layer"] is not None and row["interference"] is not None:
            yield LayerRow(
                a=row["a"],
                b=row["b"],
                layer=row["layer"],
                kind=row["kind"],
                value=row["interference"],
            )


def _curves(folder: RunFolder) -> Iterator[CurvePoint]:
    for name in folder.config().tasks:
        card: dict[str, Any] = read_json(folder.adapters / name / CARD, AdapterError)
        for step, loss in card.get("losses", []):
            yield CurvePoint(adapter=name, step=step, loss=loss)


def _probe_step(folder: RunFolder, name: str | None = None) -> int:
    return read_probe(folder.probe(name or folder.config().tasks[0])).meta["step"]


def _partitions(outcomes: Outcomes) -> Iterator[PartitionRow]:
    """Every partition under mean and sum; the plan's own as it was really deployed."""
    chosen = {frozenset(group.adapters) for group in outcomes.plan.groups}
    deployed = {strategy.name: strategy for strategy in outcomes.strategies()}[PLAN]
    for found in outcomes.partitions():
        ours = {frozenset(group) for group in found.groups} == chosen
        yield PartitionRow(
            label=found.label,
            mean=deployed.total.mean if ours else found.mean,
            worst=deployed.total.worst if ours else found.worst,
            # at the ranks that the plan cuts to; the others are measured uncut
            resident_parameters=(deployed if ours else found).resident_parameters,
            chosen=ours,
        )
