"""What the verbs print: tables for people, JSON for programs, progress on stderr."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

DASH = "–"
QUIET_SECONDS = 5.0  # in a log, one line of progress at most this often
WIDE = 200  # columns where the output is no terminal: a file has no edge


def console(*, err: bool = False) -> Console:
    """On stdout, or on stderr for progress. Names are shown as they are: no markup in them."""
    found = Console(stderr=err, markup=False, emoji=False, highlight=False)
    if not found.is_terminal:
        found = Console(stderr=err, markup=False, emoji=False, highlight=False, width=WIDE)
    return found


def emit(value: Any) -> None:
    """JSON on stdout; a number that is not finite becomes null."""
    print(json.dumps(finite(value), indent=2, ensure_ascii=False))


def finite(value: Any) -> Any:
    """The same with plain lists, dicts and strings, and null for NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def table(*columns: str, left: int = 1) -> Table:
    """A table whose first `left` columns are words and whose others are numbers.

    On a narrow screen words are broken, never numbers, and long headings of numbers take two lines.
    """
    made = Table(box=box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        if index < left:
            made.add_column(name, overflow="fold")
        else:
            short = name if len(name) < 9 else name.replace(" ", "\n", 1)
            made.add_column(short, justify="right", no_wrap=True)
    return made


def print_table(title: str, made: Table) -> None:
    console().print(heading(title))
    console().print(made)


def heading(words: str) -> Text:
    return Text(words, style="bold")


def bullets(lines: Sequence[str], sign: str = "•") -> None:
    for line in lines:
        console().print(Text(f"  {sign} {line}"))


def number(value: float | None, digits: int = 2) -> str:
    """Two decimals; a dash where it is not known."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{round(value, digits) + 0.0:.{digits}f}"


def with_error(value: float | None, error: float | None) -> str:
    """Such as "0.94 ± 0.02"."""
    known = value is not None and error is not None and math.isfinite(error)
    return number(value) + (f" ± {number(error)}" if known else "")


def with_interval(value: float | None, low: float | None, high: float | None) -> str:
    """Such as "0.94 (0.81 to 1.00)"."""
    if value is None:
        return DASH
    return f"{number(value)} ({number(low)} to {number(high)})"


def count(value: int | None) -> str:
    return DASH if value is None else f"{value:,}"


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Progress of one long step: a spinner on a terminal, else a line every few seconds."""
    screen = console(err=True)
    if screen.is_terminal:
        with screen.status(Text(what)) as status:
            yield lambda message: status.update(Text(f"{what}: {message}"))
        return
    yield every_few_seconds(lambda message: screen.print(f"{what}: {message}"))


def every_few_seconds(say: Callable[[str], None]) -> Callable[[str], None]:
    """The same, but it keeps quiet for a few seconds at first and after every line."""
    last = time.monotonic()

    def spaced(message: str) -> None:
        nonlocal last
        if time.monotonic() - last >= QUIET_SECONDS:
            last = time.monotonic()
            say(message)

    return spaced
