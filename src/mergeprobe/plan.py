"""Plan: which adapters go together, what is done with each group, and why.

A plan is data: the planner writes it, or a person does, and `compose` carries it out. It names
every number that the deployment depends on (weights, ranks, pruned components), so carrying it
out needs no forecast. Needs no torch.
"""

from __future__ import annotations

import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mergeprobe.artefact import MADE_BY, check_schema, read_json, write_json
from mergeprobe.errors import PlanError

PLAN_SCHEMA = 1


class Action(StrEnum):
    """What is done with a group of adapters."""

    merge = "merge"
    reweight = "reweight"
    prune = "prune"
    isolate = "isolate"
    logits = "logits"
    route = "route"


# the actions that need a method, each with one that would do
EXAMPLES = {
    Action.merge: "mean",
    Action.reweight: "linear",
    Action.prune: "mean",
    Action.isolate: "core_isolation",
    Action.logits: "mixture",
}
SEPARABLE = 0.95  # AUC between two tasks' prompts below which a router promises nothing


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AdapterRef(_Frozen):
    """An adapter the plan speaks of. `weights_sha256`, where known, ties the plan to the file."""

    name: str
    path: str | None = None
    weights_sha256: str | None = None


class Forecast(_Frozen):
    """Forecast gain retention of one adapter in one group, with a 90 % interval."""

    retention: float
    low: float
    high: float


class Pruned(_Frozen):
    """What to drop from one adapter before it is merged.

    modules: module names dropped whole. components: module name -> indices of the singular
    components of ΔW (0 = largest) that are dropped.
    """

    modules: tuple[str, ...] = ()
    components: dict[str, tuple[int, ...]] = Field(default_factory=dict)


class Group(_Frozen):
    """Adapters that are deployed together under one action.

    method, options: a merge rule of `mergeprobe.compose.METHODS` and its parameters (merge,
    reweight, prune; for isolate one of its core isolations); for logits one of
    `mergeprobe.compose.logits.MODES` with the options plausibility and gated. space: in which the
    rule runs, "full" or one of `mergeprobe.compose.merge.spaces`. seed: of what the rule draws.
    weights: one per adapter by name; where absent the method's own uniform weights.
    part_weights: factors on them by part of the model (a depth third: early, middle, late; or a
    kind of module: attention, mlp, other), each with one per adapter by name.
    rank: of what is written; None keeps the exact rank. pruned: by adapter name.
    """

    name: str
    adapters: tuple[str, ...]
    action: Action
    method: str | None = None
    options: dict[str, float | str] = Field(default_factory=dict)
    space: str = "full"
    seed: int = Field(default=0, ge=0)
    weights: dict[str, float] | None = None
    part_weights: dict[str, dict[str, float]] = Field(default_factory=dict)
    rank: int | None = Field(default=None, ge=1)
    pruned: dict[str, Pruned] = Field(default_factory=dict)
    forecast: dict[str, Forecast] = Field(default_factory=dict)
    resident_parameters: int | None = Field(default=None, ge=0)
    reasons: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _coherent(self) -> Group:
        where = f"group '{self.name}'"
        if not self.adapters:
            raise ValueError(f"{where} has no adapters")
        if len(set(self.adapters)) != len(self.adapters):
            raise ValueError(f"{where} names an adapter twice")
        if self.action in EXAMPLES and self.method is None:
            raise ValueError(
                f"{where}: action '{self.action}' needs a method, such as '{EXAMPLES[self.action]}'"
            )
        if self.action is Action.reweight and not self.weights and not self.part_weights:
            raise ValueError(f"{where}: action 'reweight' needs weights, one per adapter")
        by_part = {f"weights for {part}": given for part, given in self.part_weights.items()}
        for what, given in ({"weights": self.weights} | by_part).items():
            if given is not None and given.keys() != set(self.adapters):
                raise ValueError(
                    f"{where}: {what} are for {sorted(given)}, expected {sorted(self.adapters)}"
                )
        if stray := self.pruned.keys() - set(self.adapters):
            raise ValueError(f"{where}: pruned names {sorted(stray)}, which it does not hold")
        return self


class Route(_Frozen):
    """Who picks the group: the caller by adapter name, or a router by the prompt."""

    by: Literal["name", "prompt"] = "name"


class FrontierPoint(_Frozen):
    """One partition that no other beats on both worst-case retention and cost."""

    groups: tuple[tuple[str, ...], ...]
    methods: tuple[str | None, ...]
    mean_retention: float
    worst_retention: float
    resident_parameters: int


class Plan(_Frozen):
    """groups partition `adapters`; the rest says what was forecast, at what cost, and why.

    tier: what the forecasts rest on: "weights" (finished adapters only), "file" (probes),
    "model" (probes, the base model and calibration batches), or "hand" (written by a person).
    confidence: whether the point forecast or the low end of its interval had to keep
    min_retention; the frontier's retentions are in the same measure. cost: what was made small,
    resident adapters and then their parameters, or parameters alone.
    """

    schema_version: int = PLAN_SCHEMA
    made_by: str = MADE_BY
    base: str = ""
    base_fingerprint: str | None = None
    adapters: tuple[AdapterRef, ...]
    groups: tuple[Group, ...]
    route: Route = Route()
    tier: Literal["weights", "file", "model", "hand"] = "hand"
    calibrated: bool = False
    confidence: Literal["point", "lower"] = "point"
    cost: Literal["adapters", "parameters"] = "adapters"
    min_retention: float | None = None
    resident_parameters: int | None = None
    full_routing_parameters: int | None = None
    frontier: tuple[FrontierPoint, ...] = ()
    reasons: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _partition(self) -> Plan:
        names = [ref.name for ref in self.adapters]
        if len(set(names)) != len(names):
            raise ValueError("two adapters of the plan have the same name")
        for name in names:
            check_name(name)
        grouped = [name for group in self.groups for name in group.adapters]
        if twice := sorted({name for name in grouped if grouped.count(name) > 1}):
            raise ValueError(f"{twice} stand in more than one group")
        if lost := sorted(set(names) - set(grouped)):
            raise ValueError(f"{lost} stand in no group; a group with action 'route' keeps them")
        if stray := sorted(set(grouped) - set(names)):
            raise ValueError(f"{stray} stand in a group but not among the plan's adapters")
        labels = [group.name for group in self.groups]
        if len(set(labels)) != len(labels):
            raise ValueError("two groups of the plan have the same name")
        for label in labels:
            check_name(label)
        return self

    def group_of(self, adapter: str) -> Group:
        for group in self.groups:
            if adapter in group.adapters:
                return group
        raise PlanError(f"the plan has no adapter '{adapter}'")


def check_name(name: str) -> str:
    """A name that can be a folder: not empty, no path separators, not '.', '..' or hidden.

    Letters of any script and spaces are fine. The limit is in bytes, as file systems count.
    """
    bad = not name or name.startswith(".") or re.search(r"[/\\\x00-\x1f\x7f\ud800-\udfff]", name)
    if bad or len(name.encode()) > 200:
        raise PlanError(
            f"{name!r} cannot name a group or adapter; use up to 200 bytes without '/', '\\' or "
            "control characters, not starting with '.'"
        )
    return name


def read_plan(path: str | Path) -> Plan:
    """Reads and checks plan.json; PlanError with one line if it is malformed or too new."""
    value = read_json(path, PlanError)
    if not isinstance(value, dict):
        raise PlanError(f"'{path}' holds no JSON object")
    check_schema(value.get("schema_version", PLAN_SCHEMA), PLAN_SCHEMA, f"'{path}'", PlanError)
    try:
        return Plan.model_validate(value)
    except ValidationError as problem:
        raise PlanError(f"'{path}': {_one_line(problem)}") from None
    except PlanError as problem:
        raise PlanError(f"'{path}': {problem}") from None


def _one_line(problem: ValidationError) -> str:
    """The first thing that is wrong, with its place in the file."""
    first = problem.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] in ("extra_forbidden", "missing"):
        what = "unknown field" if first["type"] == "extra_forbidden" else "missing field"
        line = f"{'.'.join(place[:-1]) or 'plan'}: {what} '{place[-1]}'"
    else:
        got = first.get("input")
        shown = f", got {got!r}" if isinstance(got, str | int | float) else ""
        line = f"{'.'.join(place) or 'plan'}: {first['msg'].removeprefix('Value error, ')}{shown}"
    return " ".join(line.split())


def write_plan(plan: Plan, path: str | Path, *, force: bool = True) -> None:
    write_json(path, plan_dict(plan), force=force)


def plan_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON-ready data."""
    return json.loads(plan.model_dump_json())
