"""Small figures as SVG, written by hand: a plot's marks and axes, nothing interactive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

INK, FAINT, GRID = "#1f2933", "#66727f", "#dfe4ea"
COLOURS = ("#2563a8", "#c2571a", "#2e7d4f", "#8a4fa3", "#8c6d1f", "#4a6572")
"""Told apart by people who do not see red and green as well; series also differ by label."""
FONT = "font-family=\"-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\""


@dataclass(frozen=True)
class Mark:
    """A point, with whiskers from low to high along y (None: without)."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""


@dataclass(frozen=True)
class Series:
    label: str
    marks: Sequence[Mark]
    line: bool = False


@dataclass(frozen=True)
class Panel:
    """One plot. x_ticks, y_ticks: (place, words). diagonal: where x = y."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    diagonal: bool = False
    small: bool = False
    notes: Sequence[str] = field(default_factory=tuple)


WIDTH, HEIGHT = 420, 320
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 34, 46


def drawn(panels: Sequence[Panel], columns: int = 2) -> str:
    """The panels side by side, with one legend below where there is more than one series."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    names = list(dict.fromkeys(s.label for panel in panels for s in panel.series if s.label))
    per_line = 2 * columns
    legend = 22 * math.ceil(len(names) / per_line) + 8 if len(names) > 1 else 0
    width, height = columns * WIDTH, rows * HEIGHT + legend
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" {FONT} font-size="12" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for place, panel in enumerate(panels):
        x, y = place % columns * WIDTH, place // columns * HEIGHT
        parts.append(f'<g transform="translate({x} {y})">{_panel(panel, names)}</g>')
    if legend:
        step = width / per_line
        for place, name in enumerate(names):
            x, y = 20 + place % per_line * step, rows * HEIGHT + 14 + 22 * (place // per_line)
            parts.append(f'<circle cx="{x:.1f}" cy="{y - 4}" r="4.5" fill="{_colour(place)}"/>')
            parts.append(_text(x + 10, y, name, "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, names: Sequence[str]) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(value: float) -> float:
        low, high = panel.x_range
        return LEFT + (_within(value, low, high) - low) / (high - low) * (right - LEFT)

    def up(value: float) -> float:
        low, high = panel.y_range
        return bottom - (_within(value, low, high) - low) / (high - low) * (bottom - TOP)

    parts = [_text(LEFT, 20, panel.title, "start", weight="600")]
    for value, words in panel.y_ticks:
        parts.append(_line(LEFT, up(value), right, up(value), GRID))
        parts.append(_text(LEFT - 6, up(value) + 4, words, "end", FAINT))
    for value, words in panel.x_ticks:
        parts.append(_line(across(value), bottom, across(value), bottom + 4, FAINT))
        parts.append(_text(across(value), bottom + 17, words, "middle", FAINT))
    parts.append(_line(LEFT, bottom, right, bottom, FAINT))
    if panel.diagonal:
        low = max(panel.x_range[0], panel.y_range[0])
        high = min(panel.x_range[1], panel.y_range[1])
        parts.append(_line(across(low), up(low), across(high), up(high), FAINT, "4 3"))
    for series in panel.series:
        parts.append(_series(series, _colour(names.index(series.label)), across, up, panel.small))
    parts.append(_text((LEFT + right) / 2, HEIGHT - 8, panel.x_label, "middle"))
    middle = (TOP + bottom) / 2
    turned = f'transform="rotate(-90 14 {middle:.1f})"'
    parts.append(_text(14, middle, panel.y_label, "middle", extra=turned))
    for place, note in enumerate(panel.notes):
        parts.append(_text(LEFT + 8, TOP + 14 + 15 * place, note, "start", FAINT))
    return "".join(parts)


def _series(series: Series, colour: str, across, up, small: bool) -> str:
    parts = []
    places = [(across(m.x), up(m.y), m) for m in series.marks if math.isfinite(m.y)]
    if series.line and len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for x, y, mark in places:
        if mark.low is not None and mark.high is not None and math.isfinite(mark.low):
            ends = up(mark.low), up(mark.high)
            parts.append(_line(x, ends[0], x, ends[1], colour, opacity=0.25 if small else 0.8))
        radius, fill = (2.4, 0.7) if small else (4.5, 1.0)
        said = f"<title>{escape(mark.label)}</title>" if mark.label else ""
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" '
            f'fill-opacity="{fill}">{said}</circle>'
        )
    return "".join(parts)


def bars(
    title: str, rows: Sequence[tuple[str, float, float, float]], ceiling: float | None = None
) -> str:
    """One line a forecaster: its score as a point with its interval, from 0 to 1 (or as far below
    as there are values); ceiling: a dashed line."""
    known = [value for row in rows for value in row[1:] if math.isfinite(value)]
    low, high = min([0.0, *known]), max([1.0, *known])
    left, width, line = 250, 760, 22
    height = 70 + line * len(rows)

    def across(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - 24)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" {FONT} font-size="12" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(16, 22, title, "start", weight="600"),
    ]
    for tick in [t / 4 for t in range(math.floor(4 * low), math.ceil(4 * high) + 1)]:
        if low <= tick <= high:
            parts.append(_line(across(tick), 36, across(tick), height - 30, GRID))
            parts.append(_text(across(tick), height - 12, f"{tick:g}", "middle", FAINT))
    if ceiling is not None and math.isfinite(ceiling):
        x = across(ceiling)
        parts.append(_line(x, 36, x, height - 30, FAINT, "4 3"))
    for place, (name, value, from_, to) in enumerate(rows):
        y = 50 + line * place
        colour = COLOURS[0] if name.startswith("predictor") else FAINT
        parts.append(_text(left - 12, y + 4, name, "end"))
        if math.isfinite(from_):
            parts.append(_line(across(from_), y, across(to), y, colour))
        if math.isfinite(value):
            parts.append(f'<circle cx="{across(value):.1f}" cy="{y}" r="4.5" fill="{colour}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _line(
    x: float, y: float, x2: float, y2: float, colour: str, dash: str = "", opacity: float = 1.0
) -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    faint = f' stroke-opacity="{opacity}"' if opacity < 1 else ""
    return (
        f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"'
        f"{dashed}{faint}/>"
    )


def _text(
    x: float,
    y: float,
    words: str,
    anchor: str,
    colour: str = INK,
    weight: str = "",
    extra: str = "",
) -> str:
    heavy = f' font-weight="{weight}"' if weight else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{heavy} {extra}>'
        f"{escape(words)}</text>"
    )
