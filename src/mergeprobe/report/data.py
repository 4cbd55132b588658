"""What the page shows: one frozen record, filled by whoever has measured something.

Everything but the title may be absent; a section without data is left out of the page and named
in its provenance. NaN and infinities are read as "not known" and shown as a dash.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mergeprobe.plan import Plan


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_known)]
Count = Annotated[int | None, Field(ge=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AdapterRow(_Frozen):
    """One adapter: its task, what was forecast for it in its group, and what was measured.

    gain: nats by which the adapter lowered its own loss. forecast, low, high, measured: gain
    retention (1 = keeps everything it gained), with a 90 % interval. ratio_retention: merged
    utility over single utility. Accuracies are fractions in [0, 1].
    """

    name: str
    domain: str = ""
    prompt_example: str = ""
    completion_example: str = ""
    group: str = ""
    gain: Number = None
    forecast: Number = None
    low: Number = None
    high: Number = None
    measured: Number = None
    measured_se: Number = None
    ratio_retention: Number = None
    accuracy_base: Number = None
    accuracy_single: Number = None
    accuracy_deployed: Number = None


class StrategyRow(_Frozen):
    """One way to deploy all adapters: gain retention, mean and minimum over adapters. passes: rows
    of a forward pass for one token, where logits are composed more than one."""

    name: str
    mean_retention: Number = None
    mean_se: Number = None
    worst_retention: Number = None
    worst_se: Number = None
    resident_parameters: Count = None
    chosen: bool = False
    note: str = ""
    passes: Count = None


class PairValues(_Frozen):
    """One pair matrix. values: "a|b" -> what a does to b (either order if symmetric).

    center: the value that is neutral, drawn without colour; None takes 1 for the unit
    "retention", 0 where signs are mixed, and otherwise colours from the smallest value up.
    """

    name: str
    label: str = ""
    unit: str = ""
    summary: str = ""
    symmetric: bool = False
    center: float | None = None
    values: dict[str, Number] = Field(default_factory=dict)


class LayerRow(_Frozen):
    """Interference of a with b at one layer; kind: "attention", "mlp", or a module's name."""

    a: str
    b: str
    layer: int
    kind: str = ""
    value: Number = None


class CurvePoint(_Frozen):
    """Training loss of one adapter, nats per completion token."""

    adapter: str
    step: int
    loss: Number = None


class PartitionRow(_Frozen):
    """One way to group the adapters, measured: gain retention, mean and minimum."""

    label: str
    mean: Number = None
    worst: Number = None
    resident_parameters: Count = None
    chosen: bool = False


class RoutedRow(_Frozen):
    """Where a router sends the held-out prompts of one adapter's task: adapter -> how many; base:
    those left to the base model; rivals: whose prompts look like this task's own."""

    task: str
    sent: dict[str, int] = Field(default_factory=dict)
    base: int = 0
    rivals: tuple[str, ...] = ()


class ReportData(_Frozen):
    """The page's content. strategies_caption says how many examples, seeds and which error."""

    title: str
    subtitle: str = ""
    base: str = ""
    provenance: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    adapters: tuple[AdapterRow, ...] = ()
    strategies: tuple[StrategyRow, ...] = ()
    strategies_caption: str = ""
    pair_values: tuple[PairValues, ...] = ()
    layers: tuple[LayerRow, ...] = ()
    layers_label: str = "interference"
    curves: tuple[CurvePoint, ...] = ()
    probe_steps: dict[str, int] = Field(default_factory=dict)
    plan: Plan | None = None
    partitions: tuple[PartitionRow, ...] = ()
    routed: tuple[RoutedRow, ...] = ()


def adapter_names(data: ReportData) -> list[str]:
    """Every adapter that the page speaks of, in order of first mention."""
    names = [row.name for row in data.adapters]
    names += [ref.name for ref in data.plan.adapters] if data.plan else []
    names += [point.adapter for point in data.curves]
    names += [name for row in data.layers for name in (row.a, row.b)]
    return list(dict.fromkeys(names))


def forecasts(data: ReportData) -> dict[str, tuple[float, float | None, float | None]]:
    """Adapter -> (forecast, low, high): its own row first, else its group's in the plan."""
    found: dict[str, tuple[float, float | None, float | None]] = {}
    for group in data.plan.groups if data.plan else ():
        for name, value in group.forecast.items():
            found[name] = (value.retention, value.low, value.high)
    for row in data.adapters:
        if row.forecast is not None:
            found[row.name] = (row.forecast, row.low, row.high)
    return found


def uncalibrated(data: ReportData) -> bool:
    """True if there are forecasts whose intervals nobody has checked on unseen tasks."""
    if not forecasts(data):
        return False
    said = any("uncalibrated" in note.lower() for note in data.notes)
    return said or (data.plan is not None and not data.plan.calibrated)
