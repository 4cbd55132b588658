"""The page: one HTML file with its styles, scripts and plotly inside; it asks the network nothing.

Needs no torch. plotly.js (MIT) is taken from the installed plotly package.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from plotly.offline import get_plotlyjs

from mergeprobe.artefact import MADE_BY, atomic_file
from mergeprobe.report.charts import as_script_json, payload
from mergeprobe.report.data import ReportData
from mergeprobe.report.headline import inside, outcome, sentence, verdicts
from mergeprobe.report.plan_picture import plan_picture
from mergeprobe.report.tables import (
    calibration_warning,
    forecast_table,
    provenance,
    routed,
    strategies,
    tasks,
)
from mergeprobe.report.wording import number, parameters, percent, plain_error, text

# the browser itself refuses any request, whatever a script may try
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'"
)
SCRIPTS = ("charts.js", "matrices.js")
TERMS = {
    "Retention": "the share of what an adapter gained by training that is still there once it is "
    "deployed; 1 is all of it, 0 none, below 0 worse than the base model.",
    "Worst case": "the lowest retention among the adapters; the mean can hide one that broke.",
    "Resident parameters": "adapter weights that must stay in memory to serve every task.",
    "Full routing": "every adapter kept as trained and picked by name: nothing lost, most memory.",
    "90 % interval": "where the forecast expects the measurement nine times in ten.",
}


class Section(NamedTuple):
    """body: empty where its data is absent; the section is then left out of the page."""

    key: str
    title: str
    lead: str
    body: str


def render(data: ReportData) -> str:
    """The whole page. DataError if a pair matrix has a key that names no two adapters."""
    charts = payload(data)
    sections = _sections(data, charts)
    absent = [section.title.lower() for section in sections if not section.body]
    shown = [section for section in sections if section.body]
    shown.append(Section("provenance", "Provenance and notes", "", provenance(data, absent)))
    nav = "".join(f'<a href="#{item.key}">{item.title}</a>' for item in shown)
    body = "".join(_section(item) for item in shown if item.body)
    drawn = any(charts[key] for key in ("scatter", "pairs", "layers", "curves")) or any(
        charts["frontier"].values()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><title>{text(data.title)}</title>'
        f"<style>{_piece('page.css')}</style></head><body>"
        f"<main>{_header(data)}<nav>{nav}</nav>{body}"
        f"<footer>{text(MADE_BY)}</footer></main>"
        f"{_scripts(charts) if drawn else ''}</body></html>\n"
    )


def write_report(data: ReportData, path: str | Path, *, force: bool = True) -> None:
    """Writes the page whole or not at all; OutputExists if it is there and not `force`."""
    page = render(data)
    with atomic_file(path, force=force) as temporary:
        temporary.write_text(page, "utf-8")


def _piece(name: str) -> str:
    return files("mergeprobe.report").joinpath(name).read_text("utf-8")


def _scripts(charts: dict[str, object]) -> str:
    ours = "".join(f"<script>{_piece(name)}</script>" for name in SCRIPTS)
    return (
        f"<script>{get_plotlyjs()}</script>"
        f'<script type="application/json" id="data">{as_script_json(charts)}</script>{ours}'
    )


def _header(data: ReportData) -> str:
    subtitle = f'<p class="subtitle">{text(data.subtitle)}</p>' if data.subtitle else ""
    base = f'<p class="base">base model <b>{text(data.base)}</b></p>' if data.base else ""
    signs = {"right": "✓", "wrong": "✗", "even": "≈"}
    checks = "".join(
        f'<li class="{item.outcome}"><b aria-label="{item.outcome}">{signs[item.outcome]}</b>'
        f"<span>{_unbroken(item.words)}</span></li>"
        for item in verdicts(data)
    )
    terms = "".join(f"<dt>{term}</dt><dd>{meaning}</dd>" for term, meaning in TERMS.items())
    return (
        f"<header><p class='kicker'>{text(data.title)}</p><h1>{_unbroken(sentence(data))}</h1>"
        f"{subtitle}{base}{_tiles(data)}"
        + (f'<ul class="verdicts">{checks}</ul>' if checks else "")
        + '<details class="terms" open><summary>What the words mean</summary>'
        f"<dl>{terms}</dl></details></header>"
    )


def _unbroken(words: str) -> str:
    """Escaped, with no line break inside "0.94 ± 0.02", "60 %" or "worst-case"."""
    whole = text(words).replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%")
    return whole.replace("worst-case", '<span class="whole">worst-case</span>')


def _tiles(data: ReportData) -> str:
    found = outcome(data)
    held, missed = inside(data)
    rows: list[tuple[str, str, str]] = []
    for label, value, error, forecast in (
        ("worst-case retention", found.worst, found.worst_se, found.forecast_worst),
        ("mean retention", found.mean, found.mean_se, found.forecast_mean),
    ):
        if value is not None:
            said = "" if forecast is None else f"measured; forecast {number(forecast)}"
            rows.append((label, plain_error(value, error), said or "measured"))
        elif forecast is not None:
            rows.append((label, number(forecast), "forecast, not measured yet"))
    if found.resident is not None:
        share = f"{percent(found.share)} of full routing" if found.share is not None else ""
        rows.append(("resident parameters", parameters(found.resident), share))
    if held or missed:
        total = len(held) + len(missed)
        rows.append(("inside the interval", f"{len(held)} of {total}", "measured against forecast"))
    tiles = "".join(
        f'<div><span class="label">{label}</span><b>{value}</b><span>{said}</span></div>'
        for label, value, said in rows
    )
    return f'<div class="tiles">{tiles}</div>' if tiles else ""


def _section(item: Section) -> str:
    words = item.lead.replace(" %", "\u00a0%")
    lead = f'<p class="lead">{words}</p>' if words else ""
    return f'<section id="{item.key}"><h2>{item.title}</h2>{lead}{item.body}</section>'


def _chart(key: str, present: object, label: str, kind: str = "") -> str:
    if not present:
        return ""
    return f'<div class="chart {kind}" id="chart-{key}" role="img" aria-label="{label}"></div>'


def _switch(key: str, label: str) -> str:
    return (
        f'<p class="switch"><label for="switch-{key}">{label}</label>'
        f'<select id="switch-{key}"></select></p>'
    )


def _sections(data: ReportData, charts: dict) -> list[Section]:
    table = forecast_table(data)
    scatter = _chart("scatter", charts["scatter"], "Forecast against measured retention", "square")
    pairs = "".join(
        f'<div>{_switch(f"pairs-{at}", word)}<div id="pairs-{at}"></div></div>'
        for at, word in zip(range(len(charts["pairs"])), ("Show", "Beside it"), strict=False)
    )
    many = "many" if len(charts["names"]) > 6 else ""
    measured = any(row.measured is not None for row in data.adapters)
    frontier = _chart("frontier", any(charts["frontier"].values()), "Worst case against parameters")
    layers = _chart("layers", charts["layers"], "Interference by layer")
    return [
        Section(
            "strategies",
            "Strategies",
            "Ways to deploy the same adapters, all measured on the same items. Higher retention "
            "and fewer resident parameters are better; differences below about two standard "
            "errors mean little.",
            strategies(data),
        ),
        Section(
            "forecast",
            "Forecast against measured" if measured else "Forecast",
            "What was expected of each adapter in its group"
            + (", and what came out." if measured else "; nothing is measured yet.")
            + (
                " On the diagonal the forecast was exact; bars across are 90 % intervals, bars "
                "upright one standard error."
                if scatter
                else ""
            ),
            calibration_warning(data) + f'<div class="beside">{scatter}<div>{table}</div></div>'
            if table
            else "",
        ),
        Section(
            "plan",
            "The plan",
            "Which adapters share a deployment, and why.",
            plan_picture(data),
        ),
        Section(
            "decode",
            "At decode time",
            "Which adapter a router picks for held-out prompts, from the base model's states "
            "alone; what is far from every task goes to the base model. What that keeps, and what "
            "composed logits keep, stands among the strategies.",
            routed(data),
        ),
        Section(
            "pairs-section",
            "Pairs",
            "Row: the adapter that acts; column: the adapter it acts on.",
            pairs and f'<div class="matrices {many}">{pairs}</div>',
        ),
        Section(
            "frontier",
            "The frontier",
            "Each point is one way to group the adapters: up is a better worst case, left is "
            "cheaper.",
            frontier,
        ),
        Section(
            "layers",
            "Interference by layer",
            "Where in the model one adapter's update disturbs another's; stronger colour is more, "
            "and the strongest twentieth share the last colour.",
            _switch("layers", "Show") + layers if layers else "",
        ),
        Section(
            "curves",
            "Training",
            "Loss of each adapter on its own task (nats per token). The mark is the probe: all "
            "that a forecast saw lies to its left.",
            _chart("curves", charts["curves"], "Training loss by step"),
        ),
        Section("tasks", "Tasks", "What each adapter learns, with one example.", tasks(data)),
    ]
