"""The sections made of tables: strategies, forecasts, tasks, provenance."""

from __future__ import annotations

from mergeprobe.report.data import (
    AdapterRow,
    ReportData,
    RoutedRow,
    StrategyRow,
    adapter_names,
    forecasts,
    uncalibrated,
)
from mergeprobe.report.headline import inside, outcome
from mergeprobe.report.marks import adapter_label, bar, interval_line, retention_axis
from mergeprobe.report.wording import (
    DASH,
    interval,
    number,
    parameters,
    percent,
    text,
    with_error,
)

BEST = '<span class="best" title="best in this column">best</span>'
WON = "won"


def strategies(data: ReportData) -> str:
    """One row a strategy; the best of each column marked, ties at two decimals together."""
    if not data.strategies:
        return ""
    full = outcome(data).full_routing
    best = {
        "mean": _best([row.mean_retention for row in data.strategies]),
        "worst": _best([row.worst_retention for row in data.strategies]),
        "cost": min(
            (row.resident_parameters for row in data.strategies if row.resident_parameters),
            default=None,
        ),
    }
    rows = "".join(_strategy(row, best, full) for row in data.strategies)
    said = data.strategies_caption
    caption = f'<p class="caption">{text(said)}</p>' if said else ""
    return (
        '<div class="scroll"><table class="strategies stacked"><thead><tr>'
        '<th scope="col">Strategy</th>'
        '<th scope="col" class="n">Mean retention</th>'
        '<th scope="col" class="n">Worst-case retention</th>'
        '<th scope="col" class="n">Resident parameters</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{caption}"
    )


def routed(data: ReportData) -> str:
    """One row a task: where the router sends its held-out prompts."""
    if not data.routed:
        return ""
    names = [name for name in adapter_names(data) if any(name in r.sent for r in data.routed)]
    names = list(dict.fromkeys([*names, *(row.task for row in data.routed)]))
    known = adapter_names(data)
    head = "".join(f'<th scope="col" class="n">{text(name)}</th>' for name in names)
    body = "".join(_routed(row, names, known) for row in data.routed)
    total = sum(sum(row.sent.values()) + row.base for row in data.routed)
    right = sum(row.sent.get(row.task, 0) for row in data.routed)
    return (
        '<div class="scroll"><table class="routed"><thead><tr><th scope="col">Prompts of</th>'
        f'{head}<th scope="col" class="n">base model</th></tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="caption">{right} of {total} held-out '
        f"prompts go to their own task's adapter.{_unpromised(data)}</p>"
    )


def _unpromised(data: ReportData) -> str:
    said = [
        f" Prompts of {text(row.task)} look like those of {text(' and '.join(row.rivals))}."
        for row in data.routed
        if row.rivals
    ]
    return "".join(said) + (" There a router promises nothing: name the adapter." if said else "")


def _routed(row: RoutedRow, names: list[str], known: list[str]) -> str:
    total = max(1, sum(row.sent.values()) + row.base)
    index = known.index(row.task) if row.task in known else 0

    def cell(count: int, own: bool) -> str:
        shade = f"--share:{count / total:.3f}"
        kind = "own" if own else "other"
        return f'<td class="n share {kind}" style="{shade}">{count or DASH}</td>'

    cells = "".join(cell(row.sent.get(name, 0), name == row.task) for name in names)
    label = adapter_label(row.task, index)
    return f'<tr><th scope="row">{label}</th>{cells}{cell(row.base, False)}</tr>'


def _best(values: list[float | None]) -> float | None:
    known = [round(value, 2) for value in values if value is not None]
    return max(known) if len(known) > 1 else None


def _strategy(row: StrategyRow, best: dict[str, float | int | None], full: int | None) -> str:
    def retention(value: float | None, error: float | None, top: float | int | None) -> str:
        won = value is not None and round(value, 2) == top
        return (
            f'<td class="n {WON if won else ""}">{BEST if won else ""}'
            f"{with_error(value, error)}{bar(value)}</td>"
        )

    share = row.resident_parameters / full if row.resident_parameters and full else None
    cheap = row.resident_parameters is not None and row.resident_parameters == best["cost"]
    chosen = ' <span class="pill">chosen</span>' if row.chosen else ""
    mine = "chosen" if row.chosen else ""
    note = f'<span class="note">{text(row.note)}</span>' if row.note else ""
    of_full = f'<span class="note">{percent(share)} of full routing</span>' if share else ""
    if row.passes is not None and row.passes > 1:
        of_full += f'<span class="note">{row.passes} rows a token</span>'
    return (
        f'<tr class="{mine}">'
        f'<th scope="row"><span class="strategy">{text(row.name)}{chosen}</span>{note}</th>'
        f"{retention(row.mean_retention, row.mean_se, best['mean'])}"
        f"{retention(row.worst_retention, row.worst_se, best['worst'])}"
        f'<td class="n {WON if cheap else ""}">{BEST if cheap else ""}'
        f"{parameters(row.resident_parameters)}{of_full}</td></tr>"
    )


def forecast_table(data: ReportData) -> str:
    """Per adapter: the interval as a line, and the numbers; measured ones if there are any."""
    known, axis = forecasts(data), retention_axis(data)
    rows = {row.name: row for row in data.adapters}
    names = [n for n in adapter_names(data) if n in known or _measured(rows.get(n))]
    if not names:
        return ""
    body = "".join(_forecast(rows.get(name, AdapterRow(name=name)), data) for name in names)
    last = '<th scope="col" class="n">Measured</th>' if _anything(data) else ""
    return (
        '<div class="scroll"><table class="forecasts stacked"><thead><tr><th scope="col">Adapter'
        '</th><th scope="col" class="linecell"><span class="ends">'
        f"<span>{number(axis.low)}</span><span>retention</span><span>{number(axis.high)}</span>"
        f'</span></th><th scope="col" class="n">Forecast</th>{last}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{_key(data)}"
    )


def _forecast(row: AdapterRow, data: ReportData) -> str:
    value, index = forecasts(data).get(row.name), adapter_names(data).index(row.name)
    out = '<span class="pill warn">outside</span>' if row.name in inside(data)[1] else ""
    gain = f"gain {number(row.gain)} nats" if row.gain is not None else ""
    ratio = f"ratio {number(row.ratio_retention)}" if row.ratio_retention is not None else ""
    cells = (
        f'<th scope="row">{adapter_label(row.name, index)}<span class="note">{gain}</span></th>'
        f'<td class="linecell">'
        f"{interval_line(retention_axis(data), index, value, row.measured)}</td>"
        f'<td class="n" data-label="forecast">{number(value[0]) if value else DASH}'
        f'<span class="note">{interval(*value[1:]) if value else ""}</span></td>'
    )
    if _anything(data):
        cells += (
            f'<td class="n" data-label="measured">{with_error(row.measured, row.measured_se)}'
            f'<span class="note">{ratio}</span>{out}</td>'
        )
    return f"<tr>{cells}</tr>"


def _anything(data: ReportData) -> bool:
    return any(_measured(row) for row in data.adapters)


def _measured(row: AdapterRow | None) -> bool:
    return row is not None and row.measured is not None


def _key(data: ReportData) -> str:
    words = "Band: 90 % forecast interval. Tick: forecast. Thin line: 1."
    if _anything(data):
        words = words.replace("forecast. Thin", "forecast. Diamond: measured. Thin")
        if any(row.ratio_retention is not None for row in data.adapters):
            words += " Ratio: merged over single utility, the other definition of retention."
        if not all(_measured(row) for row in data.adapters):
            words += " A dash: not measured, or undefined because the gain is within its own noise."
    return f'<p class="caption">{words}</p>'


def calibration_warning(data: ReportData) -> str:
    if not uncalibrated(data):
        return ""
    return (
        '<p class="callout"><strong>Uncalibrated forecast.</strong> Nobody has checked on unseen '
        "tasks whether the 90 % intervals hold nine times in ten.</p>"
    )


def tasks(data: ReportData) -> str:
    """Per adapter: what it learns, one example, and the accuracies."""
    names = adapter_names(data)
    cards = "".join(_task(row, names.index(row.name)) for row in data.adapters if _has_task(row))
    return f'<div class="cards">{cards}</div>' if cards else ""


def _has_task(row: AdapterRow) -> bool:
    said = row.domain or row.prompt_example or row.completion_example
    return bool(said) or any(value is not None for _, value in _accuracies(row))


def _accuracies(row: AdapterRow) -> list[tuple[str, float | None]]:
    return [
        ("base", row.accuracy_base),
        ("alone", row.accuracy_single),
        ("deployed", row.accuracy_deployed),
    ]


def _task(row: AdapterRow, index: int) -> str:
    domain = f'<span class="domain">{text(row.domain)}</span>' if row.domain else ""
    group = f'<span class="domain">in {text(row.group)}</span>' if row.group else ""
    parts = [f'<h3>{adapter_label(row.name, index)}<span class="tags">{domain}{group}</span></h3>']
    if row.prompt_example or row.completion_example:
        parts.append(
            f'<dl class="example"><dt>prompt</dt><dd>{text(row.prompt_example.strip())}</dd>'
            f"<dt>answer</dt><dd>{text(row.completion_example.strip())}</dd></dl>"
        )
    known = [(label, value) for label, value in _accuracies(row) if value is not None]
    if known:
        bars = "".join(
            f"<dt>{label}</dt><dd>{bar(value, f'c{index % 8}')}"
            f'<span class="n">{percent(value)}</span></dd>'
            for label, value in known
        )
        parts.append(f'<p class="small">accuracy</p><dl class="accuracy">{bars}</dl>')
    return f'<article class="card">{"".join(parts)}</article>'


def provenance(data: ReportData, absent: list[str]) -> str:
    """Notes, what made the page, and which sections had no data."""
    rows = {"base model": data.base} if data.base else {}
    if data.plan is not None:
        rows |= {"plan made by": data.plan.made_by, "forecast tier": data.plan.tier}
        if data.plan.base_fingerprint:
            rows["base fingerprint"] = data.plan.base_fingerprint
    rows |= data.provenance
    if absent:
        rows["not available"] = ", ".join(absent)
    notes = "".join(f"<li>{text(note)}</li>" for note in data.notes)
    listing = "".join(f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in rows.items())
    return (f'<ul class="notes">{notes}</ul>' if notes else "") + (
        f'<dl class="provenance">{listing}</dl>' if listing else ""
    )
