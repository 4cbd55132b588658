"""Tables that people read: a plan, results, retention under a deployment, a doctor's findings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from mergeprobe.cli.show import (
    DASH,
    bullets,
    console,
    count,
    heading,
    number,
    print_table,
    table,
    with_error,
    with_interval,
)

if TYPE_CHECKING:
    from mergeprobe.adapters.doctor import Examination, Finding
    from mergeprobe.plan import Plan


def show_plan(plan: Plan) -> None:
    """Groups with their action and forecasts, cost, reasons, and what is missing."""
    made = table("group", "adapter", "action", "retention (90 % interval)", "parameters", left=3)
    for group in plan.groups:
        action = group.action.value + (f" by {group.method}" if group.method else "")
        for index, name in enumerate(group.adapters):
            found = group.forecast.get(name)
            spread = with_interval(found.retention, found.low, found.high) if found else DASH
            first = (spaced(group.name), name, action), (spread, count(group.resident_parameters))
            made.add_row(*(first[0] + first[1] if index == 0 else ("", name, "", spread, "")))
    print_table("Plan", made)
    cost = f"{count(plan.resident_parameters)} resident parameters"
    if plan.full_routing_parameters and plan.resident_parameters is not None:
        share = plan.resident_parameters / plan.full_routing_parameters
        cost += f", {share:.0%} of full routing's {count(plan.full_routing_parameters)}"
    sure = "calibrated" if plan.calibrated else "uncalibrated"
    console().print(f"{cost}. Tier: {plan.tier}, {sure}.")
    console().print(heading("Why"))
    # two groups that stay apart both say so
    said = [*plan.reasons, *(reason for group in plan.groups for reason in group.reasons)]
    bullets(list(dict.fromkeys(said)))
    show_missing(plan.missing)


def spaced(group: str) -> str:
    """A group's name with room to break: "math + code"."""
    return group.replace("+", " + ")


def show_missing(missing: Sequence[str]) -> None:
    if missing:
        console().print(heading("What would make this better"))
        bullets(missing)


def show_results(found: dict[str, Any]) -> None:
    """A measured run (bench.summary.summary): per adapter, per strategy, regret."""
    made = table(
        *("group", "adapter", "forecast (90 % interval)", "measured", "inside", "own gain"),
        left=2,
    )
    rows = {row["name"]: row for row in found["adapters"]}
    for group in found["plan"]["groups"]:
        for index, name in enumerate(group["adapters"]):
            row = rows[name]
            inside = DASH if row["inside"] is None else ("yes" if row["inside"] else "no")
            forecast = with_interval(row["forecast"], row["low"], row["high"])
            measured = with_error(row["measured"], row["measured_se"])
            label = spaced(group["name"]) if index == 0 else ""
            made.add_row(label, name, forecast, measured, inside, number(row["own_gain"]))
    print_table("Adapters: forecast against measured retention", made)
    made = table(
        *("strategy", "worst adapter", "mean", "worst", "resident parameters"),
        left=2,
    )
    for row in found["strategies"]:
        made.add_row(
            ("→ " if row["chosen"] else "  ") + row["name"],
            row["worst_adapter"],
            with_error(row["mean_retention"], row["mean_se"]),
            with_error(row["worst_retention"], row["worst_se"]),
            count(row["resident_parameters"]),
            style="bold" if row["chosen"] else None,
        )
    print_table("Strategies: measured retention", made)
    _show_regret(found["regret"])
    bullets([f"'{row['name']}': {row['note']}" for row in found["adapters"] if row["note"]], "!")


def _show_regret(regret: dict[str, Any]) -> None:
    console().print(
        "Against the best partition of at most the plan's parameters (all measured under "
        f"mean and sum, chosen on one half of the test items, scored on the other: "
        f"{regret['best']}), the plan's regret is {regret['worst']:+.3f} in worst-case and "
        f"{regret['mean']:+.3f} in mean retention; below 0 the plan is better."
    )


def show_deployed(found: dict[str, Any]) -> None:
    """Measured retention under a deployment, both definitions."""
    made = table(
        *("adapter", "served by", "gain retention", "ratio retention", "own gain (nats)", "items"),
        left=2,
    )
    for row in found["adapters"]:
        made.add_row(
            row["name"],
            row["served_by"],
            with_error(row["measured"], row["measured_se"]),
            with_error(row["ratio_retention"], row["ratio_retention_se"]),
            with_error(row["own_gain"], row["own_gain_se"]),
            count(row["items"]),
        )
    print_table("Retention under the deployment", made)
    if found["worst_adapter"] is not None:
        console().print(
            f"Mean {with_error(found['mean_retention'], found['mean_se'])}, worst "
            f"{with_error(found['worst_retention'], found['worst_se'])} "
            f"('{found['worst_adapter']}'), {found['resident_parameters']:,} resident parameters."
        )
    bullets([f"'{row['name']}': {row['note']}" for row in found["adapters"] if row["note"]], "!")


def show_examination(found: Examination) -> None:
    """The doctor's table and verdicts."""
    made = table(*("adapter", "state", "variant", "base", "modules", "rank", "norm"), left=4)
    for finding in found.findings:
        made.add_row(finding.name, _state(finding), *_cells(finding))
    print_table("Adapters", made)
    bullets(found.verdicts)


def _cells(finding: Finding) -> tuple[str, ...]:
    if not finding.readable:
        return finding.variant, DASH, DASH, DASH, DASH
    base = (finding.base or "unnamed") + ("" if finding.verified else " (unverified)")
    ranks = ", ".join(map(str, finding.ranks))
    norm = number(finding.norm, 3)
    return finding.variant, base, count(finding.modules), ranks, norm


def _state(finding: Finding) -> Text:
    if not finding.readable:
        return Text("unreadable", style="red")
    if finding.mergeable:
        return Text("sound", style="green")
    kinds = sorted({fault.kind for fault in finding.faults})
    return Text(", ".join(kinds) or "unsound", style="red")
