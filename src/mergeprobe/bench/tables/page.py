"""What a page of results is made of, and its Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from mergeprobe.predict.scores import Estimate

DASH = "–"


@dataclass(frozen=True)
class Table:
    """columns, rows: words, as they are shown. caption: where the numbers are from."""

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """name: of its file, without folder. svg: the picture."""

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Needs:
    """What cannot be computed from the rows there are, and what it would take."""

    title: str
    needs: str


Part = Table | Figure | Needs


@dataclass(frozen=True)
class Page:
    name: str
    title: str
    intro: str
    parts: Sequence[Part] = field(default_factory=tuple)

    def markdown(self) -> str:
        shown = [f"# {self.title}", self.intro, *(_part(part) for part in self.parts)]
        return "\n\n".join(text for text in shown if text) + "\n"


def _part(part: Part) -> str:
    match part:
        case Table():
            return f"## {part.title}\n\n{grid(part.columns, part.rows)}\n\n*{part.caption}*"
        case Figure():
            return f"## {part.title}\n\n![{part.title}]({part.name})\n\n*{part.caption}*"
        case Needs():
            return f"## {part.title}\n\nNot computed: needs {part.needs}."


def grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is words, the others are aligned right."""
    lines = [tuple(columns), ("---", *("---:" for _ in columns[1:])), *rows]
    for row in rows:
        if len(row) != len(columns):
            raise AssertionError(f"{len(row)} cells for {len(columns)} columns: {row}")
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def number(value: float | None, digits: int = 2) -> str:
    """Two decimals with a true minus sign; a dash where it is not known."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def between(low: float, high: float, digits: int = 2) -> str:
    return f"[{number(low, digits)}, {number(high, digits)}]"


def estimate(found: Estimate, digits: int = 2) -> str:
    """Such as "0.81 [0.74, 0.86]"; the value alone where there is no interval."""
    if not math.isfinite(found.value):
        return DASH
    shown = number(found.value, digits)
    if not math.isfinite(found.low):
        return shown
    return f"{shown} {between(found.low, found.high, digits)}"


def with_error(value: float, error: float, digits: int = 2) -> str:
    """Such as "0.94 ± 0.02"."""
    shown = number(value, digits)
    return f"{shown} ± {number(error, digits)}" if math.isfinite(error) else shown


def percent(share: float) -> str:
    """Such as "5 %" or "2.5 %"."""
    return f"{100 * share:.3g} %" if math.isfinite(share) else DASH


def listed(names: Sequence[str], most: int = 16) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown or "none"
