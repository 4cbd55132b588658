"""Small drawings inside tables and cards: an adapter's mark, an interval on a line, a bar."""

from __future__ import annotations

from typing import NamedTuple

from mergeprobe.report.data import ReportData, forecasts
from mergeprobe.report.wording import number, text

PALETTE = 8
# the same order as SYMBOLS in charts.js: colour alone does not tell adapters apart
SHAPES = (
    '<circle cx="7" cy="7" r="5"/>',
    '<rect x="2.4" y="2.4" width="9.2" height="9.2"/>',
    '<path d="M7 .8 13.2 7 7 13.2 .8 7z"/>',
    '<path d="M7 1.2 13 12H1z"/>',
    '<path d="M7 12.8 1 2h12z"/>',
    '<path d="M5 1.2h4V5h3.8v4H9v3.8H5V9H1.2V5H5z"/>',
    '<path d="m7 1 6 4.5-2.3 7.1H3.3L1 5.5z"/>',
    '<path d="m7 .6 1.9 4.3 4.7.5-3.5 3.1 1 4.6L7 10.7l-4.1 2.4 1-4.6L.4 5.4l4.7-.5z"/>',
)


class Axis(NamedTuple):
    """A horizontal retention axis shared by all the small lines of the page."""

    low: float
    high: float

    def place(self, value: float) -> float:
        """Percent of the width; values beyond the ends sit on them."""
        return 100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


def retention_axis(data: ReportData) -> Axis:
    """Wide enough for every interval and measurement down to -0.5; lower ones sit on the end."""
    values = [row.measured for row in data.adapters]
    values += [value for triple in forecasts(data).values() for value in triple]
    known = [value for value in values if value is not None]
    return Axis(max(-0.5, min([0.75, *known]) - 0.05), min(2.0, max([1.0, *known]) + 0.05))


def mark(index: int) -> str:
    """The adapter's shape and colour, as in the charts."""
    shape = SHAPES[index % len(SHAPES)]
    return (
        f'<svg class="mark c{index % PALETTE}" viewBox="0 0 14 14" width="12" height="12" '
        f'aria-hidden="true">{shape}</svg>'
    )


def adapter_label(name: str, index: int) -> str:
    return f'<span class="adapter">{mark(index)}<span class="name">{text(name)}</span></span>'


def interval_line(
    axis: Axis,
    index: int,
    forecast: tuple[float, float | None, float | None] | None,
    measured: float | None,
) -> str:
    """Band = 90 % forecast interval, tick = forecast, diamond = measured, thin line = 1."""
    parts = [f'<line class="one" x1="{axis.place(1.0):.1f}%" x2="{axis.place(1.0):.1f}%" y2="20"/>']
    words = []
    if forecast is not None:
        value, low, high = forecast
        words.append(f"forecast {number(value)}")
        if low is not None and high is not None:
            left, right = axis.place(low), axis.place(high)
            parts.append(
                f'<rect class="band" x="{left:.1f}%" width="{right - left:.1f}%" y="5" '
                'height="10" rx="3"/>'
            )
            words.append(f"90 % interval {number(low)} to {number(high)}")
        at = axis.place(value)
        parts.append(f'<line class="tick" x1="{at:.1f}%" x2="{at:.1f}%" y1="3" y2="17"/>')
    if measured is not None:
        parts.append(
            f'<svg x="{axis.place(measured):.1f}%" y="10" overflow="visible">'
            '<path class="dot" d="M0-6 6 0 0 6-6 0z"/></svg>'
        )
        words.append(f"measured {number(measured)}")
    label = text("; ".join(words) or "nothing known")
    return (
        f'<svg class="line c{index % PALETTE}" role="img" aria-label="{label}" height="20">'
        f"<title>{label}</title>{''.join(parts)}</svg>"
    )


def bar(fraction: float | None, kind: str = "") -> str:
    """A quiet horizontal bar for a value in [0, 1]; nothing where it is not known."""
    if fraction is None:
        return ""
    width = 100 * min(1.0, max(0.0, fraction))
    return f'<span class="bar {kind}"><i style="width:{width:.1f}%"></i></span>'
