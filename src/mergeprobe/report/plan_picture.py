"""The plan as a picture: who picks, which adapters go into which group, what stays in memory."""

from __future__ import annotations

from mergeprobe.plan import Action, Group, Plan
from mergeprobe.report.data import ReportData, adapter_names, forecasts
from mergeprobe.report.headline import outcome
from mergeprobe.report.marks import Axis, adapter_label, interval_line, retention_axis
from mergeprobe.report.wording import counted, interval, number, parameters, percent, text

ACTIONS = {
    Action.merge: "merged into one adapter",
    Action.reweight: "merged into one adapter, weighted",
    Action.prune: "pruned, then merged into one adapter",
    Action.isolate: "kept apart in its own subspace",
    Action.logits: "combined at decoding, on the logits",
    Action.route: "kept as it is",
}


def plan_picture(data: ReportData) -> str:
    if data.plan is None:
        return ""
    plan, axis, names = data.plan, retention_axis(data), adapter_names(data)
    groups = "".join(_group(group, data, axis, names) for group in plan.groups)
    return (
        f'{_router(plan)}<div class="groups">{groups}</div>{_total(data)}'
        f"{_reasons('Why this plan', plan.reasons)}"
        f"{_reasons('What would make the forecast better', plan.missing)}"
    )


def _router(plan: Plan) -> str:
    if len(plan.groups) == 1 and plan.groups[0].action is not Action.route:
        words = "every request goes to the one merged adapter"
    elif plan.route.by == "name":
        words = "the caller names the adapter; that picks the group"
    else:
        words = "a router reads the prompt and picks the group"
    return f'<p class="router"><b>request</b><span class="to">→</span>{words}</p>'


def _group(group: Group, data: ReportData, axis: Axis, names: list[str]) -> str:
    known, measured = forecasts(data), {row.name: row.measured for row in data.adapters}
    members = "".join(
        f'<li><span class="who">{adapter_label(name, names.index(name))}'
        f'<span class="parts">{_part(group, name)}</span></span>'
        f"{_line(axis, names.index(name), known.get(name), measured.get(name))}</li>"
        for name in group.adapters
    )
    several = group.action is Action.route and len(group.adapters) > 1
    words = "each kept as it is" if several else ACTIONS[group.action]
    return (
        f'<article class="group {group.action}"><h3>{text(group.name)}'
        f'<span class="pill">{text(group.action)}</span></h3>'
        f'<ul class="members">{members}</ul>'
        f'<p class="becomes"><span class="to">↓</span>{words}</p>'
        f'<div class="deployed">{_deployed(group)}</div>'
        f"{_list(group.reasons)}</article>"
    )


def _part(group: Group, name: str) -> str:
    parts = []
    if group.weights is not None:
        parts.append(f"weight {number(group.weights[name])}")
    if dropped := group.pruned.get(name):
        modules, components = len(dropped.modules), sum(map(len, dropped.components.values()))
        parts += [f"without {counted(modules, 'module')}"] if modules else []
        parts += [f"without {counted(components, 'component')}"] if components else []
    return ", ".join(parts)


def _line(
    axis: Axis,
    index: int,
    forecast: tuple[float, float | None, float | None] | None,
    measured: float | None,
) -> str:
    if forecast is None and measured is None:
        return ""
    words = []
    if forecast is not None:
        span = interval(*forecast[1:])
        words.append(f"forecast {number(forecast[0])}" + (f" ({span})" if span else ""))
    words += [f"measured {number(measured)}"] if measured is not None else []
    return (
        f'{interval_line(axis, index, forecast, measured)}<span class="note">'
        f"{', '.join(words)}</span>"
    )


def _deployed(group: Group) -> str:
    options = ", ".join(f"{key} {value:g}" for key, value in group.options.items())
    facts = [("method", group.method or ""), ("options", options)]
    if group.action is not Action.route:
        facts.append(("rank", "exact (sum of ranks)" if group.rank is None else str(group.rank)))
    else:
        facts.append(("rank", "as trained" if group.rank is None else str(group.rank)))
    if group.resident_parameters is not None:
        facts.append(("resident", parameters(group.resident_parameters)))
    return "".join(f"<span><i>{label}</i> {text(value)}</span>" for label, value in facts if value)


def _total(data: ReportData) -> str:
    found = outcome(data)
    if found.resident is None:
        return ""
    words = f"<b>{parameters(found.resident)}</b> adapter parameters stay in memory"
    if found.share is not None and found.full_routing is not None:
        words += f", {percent(found.share)} of the {parameters(found.full_routing)} of full routing"
    return f'<p class="total">{words}.</p>'


def _reasons(title: str, reasons: tuple[str, ...]) -> str:
    return f"<h3>{title}</h3>{_list(reasons)}" if reasons else ""


def _list(reasons: tuple[str, ...]) -> str:
    items = "".join(f"<li>{text(reason)}</li>" for reason in reasons)
    return f'<ul class="reasons">{items}</ul>' if items else ""
