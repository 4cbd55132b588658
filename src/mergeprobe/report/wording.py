"""Numbers and words as the page writes them; every string from outside passes `text`."""

from __future__ import annotations

from html import escape

DASH = "–"


def text(value: object) -> str:
    """Escaped for HTML, in text and in quoted attributes."""
    return escape(str(value), quote=True)


def number(value: float | None, digits: int = 2) -> str:
    """Two decimals with a true minus sign; a dash where it is not known."""
    if value is None:
        return DASH
    rounded = round(value, digits) + 0.0  # no "-0.00"
    return f"{rounded:,.{digits}f}".replace("-", "−")


def with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return DASH
    plus = f' <span class="se">± {number(error)}</span>' if error is not None else ""
    return f"{number(value)}{plus}"


def plain_error(value: float | None, error: float | None) -> str:
    plus = f" ± {number(error)}" if error is not None and value is not None else ""
    return number(value) + plus


def interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{number(low)} to {number(high)}"


def parameters(count: int | None) -> str:
    """412 | 8,300 | 920 k | 4.88 M | 1.20 B."""
    if count is None:
        return DASH
    if count < 10_000:
        return f"{count:,}"
    if count < 999_500:
        return f"{count / 1e3:.0f} k"
    if count < 999_500_000:
        return f"{count / 1e6:.2f} M"
    return f"{count / 1e9:.2f} B"


def percent(fraction: float | None) -> str:
    return DASH if fraction is None else f"{100 * fraction:.0f} %"


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(items: list[str]) -> str:
    """a | a and b | a, b and c."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
