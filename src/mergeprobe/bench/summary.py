"""A run's results in numbers: strategies, adapters, regret. What `evaluate --json` prints."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mergeprobe.bench.folder import RunFolder
from mergeprobe.bench.measure import DEPLOYED, Measurement
from mergeprobe.bench.outcomes import PLAN, Outcomes, Strategy, regret
from mergeprobe.errors import DataError


def summary(folder: RunFolder) -> dict[str, Any]:
    """run, plan, strategies, adapters and regret of a measured run; JSON-ready but for infinities.

    Retentions are gain retentions on all test items; the standard errors are over items. A value
    that is undefined (an adapter that gained nothing) is None, with the reason in `note`.
    Raises DataError if the folder holds no run, or one that is not measured yet.
    """
    config = folder.config()
    if not folder.outcomes.exists():
        raise DataError(
            f"'{folder.path}' is not measured yet; run `mergeprobe demo --out '{folder.path}'` "
            "with its settings: it goes on where it was"
        )
    outcomes = Outcomes(folder)
    plan = outcomes.plan
    return {
        "run": {"path": str(folder.path), **config.model_dump()},
        "plan": {
            "groups": [
                {
                    "name": group.name,
                    "adapters": list(group.adapters),
                    "action": group.action.value,
                    "method": group.method,
                    "resident_parameters": group.resident_parameters,
                }
                for group in plan.groups
            ],
            "tier": plan.tier,
            "calibrated": plan.calibrated,
            "min_retention": plan.min_retention,
            "resident_parameters": plan.resident_parameters,
            "full_routing_parameters": plan.full_routing_parameters,
            "reasons": list(plan.reasons),
            "missing": list(plan.missing),
        },
        "strategies": [_strategy(found) for found in outcomes.strategies()],
        "adapters": [_adapter(outcomes, name) for name in config.tasks],
        "regret": asdict(regret(outcomes)),
    }


def _strategy(found: Strategy) -> dict[str, Any]:
    return {
        "name": found.name,
        "mean_retention": found.total.mean,
        "mean_se": found.total.mean_se,
        "worst_retention": found.total.worst,
        "worst_se": found.total.worst_se,
        "worst_adapter": found.total.worst_adapter,
        "left_out": list(found.total.left_out),
        "resident_parameters": found.resident_parameters,
        "chosen": found.name == PLAN,
    }


def _adapter(outcomes: Outcomes, name: str) -> dict[str, Any]:
    deployed = Measurement(DEPLOYED, outcomes.config.tasks)
    group = outcomes.plan.group_of(name)
    forecast = group.forecast.get(name)
    kept = outcomes.retention(name, deployed)
    inside = None
    if forecast is not None and kept.gain is not None:
        inside = forecast.low <= kept.gain <= forecast.high
    return {
        "name": name,
        "group": group.name,
        "forecast": forecast.retention if forecast else None,
        "low": forecast.low if forecast else None,
        "high": forecast.high if forecast else None,
        "measured": kept.gain,
        "measured_se": kept.gain_se,
        "inside": inside,
        "ratio_retention": kept.ratio,
        "ratio_retention_se": kept.ratio_se,
        "own_gain": kept.own_gain,
        "own_gain_se": kept.own_gain_se,
        "accuracy_base": outcomes.base(name).accuracy(name),
        "accuracy_single": outcomes.single(name).accuracy(name),
        "accuracy_deployed": outcomes.measured(deployed).accuracy(name),
        "items": kept.items,
        "note": kept.note,
    }
