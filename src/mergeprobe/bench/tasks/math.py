"""The bank's mathematics: operations on numbers that a small model does not finish learning."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import islice

from mergeprobe.bench.tasks.items import POOL, Keyed, comma, counted, distinct, draws, said
from mergeprobe.bench.tasks.task import Task


def _borrowing() -> Iterator[tuple[int, int]]:
    """Three-digit pairs a > b whose units need a borrow."""
    pairs = ((100 + x, 100 + y) for x, y in draws("subtract", 900, 900))
    return islice(((a, b) for a, b in pairs if a > b and a % 10 < b % 10), POOL)


def differences() -> Keyed:
    for a, b in _borrowing():
        yield f"{a}-{b}", counted(f"{a} - {b} =", a - b)


def spoken_differences() -> Keyed:
    for a, b in _borrowing():
        yield f"{a}-{b}", counted(f"Take {b} away from {a}.", a - b)


def products() -> Keyed:
    for a, b in islice(draws("multiply", 900, 8), POOL):
        yield f"{a + 100}*{b + 2}", counted(f"{a + 100} * {b + 2} =", (a + 100) * (b + 2))


def divisions() -> Iterator[tuple[int, int]]:
    """Three digits by one, never even, quotient and remainder told apart by their length."""
    pairs = ((100 + x, 3 + y) for x, y in draws("divide", 900, 7))
    return islice(((a, b) for a, b in pairs if a % b and a // b > 9), POOL)


def quotients() -> Keyed:
    for a, b in divisions():
        yield f"{a}/{b}", counted(f"Divide {a} by {b}.", a // b)


def remainders() -> Keyed:
    for a, b in divisions():
        yield f"{a}/{b}", counted(f"Divide {a} by {b}.", a % b)


def larger_fractions() -> Keyed:
    """Both below 1, numerator and denominator from 1 to 15; both orders of a pair share a key."""
    stream = (tuple(1 + k for k in chosen) for chosen in draws("fractions", 15, 15, 15, 15))
    kept = (c for c in stream if c[0] < c[1] and c[2] < c[3] and c[0] * c[3] != c[2] * c[1])
    for a, b, c, d in islice(kept, POOL):
        larger = f"{a}/{b}" if Fraction(a, b) > Fraction(c, d) else f"{c}/{d}"
        key = " ".join(sorted((f"{a}/{b}", f"{c}/{d}")))
        yield key, said(f"Larger, {a}/{b} or {c}/{d}?", larger)


def unsorted() -> Iterator[tuple[int, ...]]:
    """Four different two-digit numbers in no order: neither up nor down already."""
    stream = (tuple(10 + k for k in chosen) for chosen in draws("sort", 90, 90, 90, 90))
    kept = (c for c in stream if distinct(c) and list(c) not in (sorted(c), sorted(c)[::-1]))
    return islice(kept, POOL)


def rising() -> Keyed:
    for four in unsorted():
        yield comma(four), said(f"Sort {comma(four)}.", comma(sorted(four)))


def falling() -> Keyed:
    for four in unsorted():
        yield comma(four), said(f"Sort {comma(four)}.", comma(sorted(four, reverse=True)))


def rising_words() -> Keyed:
    for four in unsorted():
        answer = " < ".join(str(value) for value in sorted(four))
        yield comma(four), said(f"From smallest to largest: {comma(four)}", answer)


def binary() -> Keyed:
    for value in range(64, 64 + POOL):
        yield f"{value}", said(f"Binary of {value}:", f"{value:b}")


def octal() -> Keyed:
    for value in range(64, 64 + POOL):
        yield f"{value}", said(f"In base eight, {value} is", f"{value:o}")


def digit_sums() -> Keyed:
    for (value,) in islice(draws("digits", 90000), POOL):
        number = value + 10000
        yield f"{number}", counted(f"Digit sum of {number}:", sum(map(int, str(number))))


def progressions() -> Iterator[tuple[int, int]]:
    """(first term, step), the step neither a term shown nor the next one."""
    pairs = ((1 + x, 3 + y) for x, y in draws("progression", 200, 40))
    return islice(((a, d) for a, d in pairs if a % d), POOL)


def next_terms() -> Keyed:
    for a, d in progressions():
        shown = comma(a + k * d for k in range(4))
        yield f"{a} {d}", counted(f"Sequence {shown}:", a + 4 * d)


def steps() -> Keyed:
    for a, d in progressions():
        shown = comma(a + k * d for k in range(4))
        yield f"{a} {d}", counted(f"Sequence {shown}:", d)


def percentages() -> Keyed:
    """Whole answers: a multiple of 5 % of a multiple of 20."""
    for part in range(5, 100, 5):
        for whole in range(40, 4040, 20):
            yield f"{part}% {whole}", counted(f"{part}% of {whole} is", part * whole // 100)


def equations() -> Keyed:
    for a, x, b in islice(draws("equation", 8, 39, 99), POOL):
        a, x, b = a + 2, x + 2, b + 1
        yield f"{a}x+{b}={a * x + b}", said(f"Solve {a}x + {b} = {a * x + b}.", f"x = {x}")


TASKS = (
    Task("subtract", "math", "three digits minus three digits, with a borrow", differences),
    Task(
        "subtract_spoken", "math", "the same differences in words", spoken_differences, "subtract"
    ),
    Task("multiply", "math", "three digits times one digit", products),
    Task("quotient", "math", "three digits by one digit: the quotient", quotients),
    Task("remainder", "math", "three digits by one digit: the remainder", remainders),
    Task("larger_fraction", "math", "the larger of two fractions below 1", larger_fractions),
    Task("sort_up", "math", "four numbers in rising order", rising),
    Task("sort_up_chain", "math", "the same numbers as a chain of <", rising_words, "sort_up"),
    Task("sort_down", "math", "four numbers in falling order", falling),
    Task("binary", "math", "a number up to 4,063 in base two", binary),
    Task("octal", "math", "a number up to 4,063 in base eight", octal),
    Task("digit_sum", "math", "the sum of five digits", digit_sums),
    Task("next_term", "math", "an arithmetic sequence: the next term", next_terms),
    Task("step", "math", "an arithmetic sequence: its step", steps),
    Task("percent", "math", "a percentage with a whole answer", percentages),
    Task("equation", "math", "a linear equation in one unknown", equations),
)
