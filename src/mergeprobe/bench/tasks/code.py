"""The bank's code: what an expression gives, and how a request is written."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from mergeprobe.bench.tasks.items import POOL, Keyed, comma, counted, distinct, draws, said, written
from mergeprobe.bench.tasks.math import binary, divisions
from mergeprobe.bench.tasks.task import Task
from mergeprobe.bench.tasks.words import WORDS


def slices() -> Keyed:
    """Two to six letters of two words in one."""
    for w, v, start, n in islice(draws("slice", len(WORDS), len(WORDS), 4, 5), POOL):
        word, stop = WORDS[w] + WORDS[v], start + n + 2
        if stop <= len(word):
            shown = f"'{word}'[{start}:{stop}]"
            yield shown, written(f"{shown} is", f"'{word[start:stop]}'")


def list_items() -> Keyed:
    """One item of a list of five; the index may be negative."""
    for *values, at in islice(draws("index", *([99] * 5), 10), POOL):
        shown, index = comma(values), at - 5
        prompt = f"x = [{shown}]; x[{index}] ->"
        yield f"{shown} {index}", written(prompt, f"{values[index]};")


def sorted_lists() -> Keyed:
    """Numbers of one and two digits, four to a list: sorting, in brackets."""
    for four in islice(filter(distinct, draws("python sort", 99, 99, 99, 99)), POOL):
        yield comma(four), written(f"sorted([{comma(four)}])", f"[{comma(sorted(four))}]")


def comparisons() -> Keyed:
    for a, b, c, d, how in islice(draws("bool", 99, 99, 99, 99, 4), POOL):
        word, first, second = ("and", "or")[how % 2], a > b, c < d
        if how >= 2:
            second, shown = not second, f"not {c} < {d}"
        else:
            shown = f"{c} < {d}"
        value = (first and second) if word == "and" else (first or second)
        yield f"{a} {b} {c} {d}", said(f"Evaluate {a} > {b} {word} {shown}:", str(value))


def floor_divisions() -> Keyed:
    for a, b in divisions():
        yield f"{a}/{b}", counted(f">>> {a} // {b}", a // b)


def ranges() -> Keyed:
    """Four or five terms; the stop is not always the term after the last."""
    stream = ((a, a + span, step + 3) for a, span, step in draws("range", 60, 60, 9))
    for start, stop, step in islice((r for r in stream if len(range(*r)) in (4, 5)), POOL):
        shown = f"{start}, {stop}, {step}"
        yield shown, written(f"list(range({shown}))", f"[{comma(range(start, stop, step))}]")


def bitwise() -> Keyed:
    """Both orders of a pair share a key."""
    for a, b in islice(draws("bits", 120, 120), POOL):
        a, b = a + 8, b + 8
        yield f"{min(a, b)} {max(a, b)}", counted(f"Bitwise {a} & {b} =", a & b)


def prefixed_binary() -> Keyed:
    for key, item in binary():
        yield key, written(f"bin({key})", f"'0b{item.completion.strip(' .')}'")


def identifiers() -> Iterator[tuple[str, str, str]]:
    for chosen in islice(filter(distinct, draws("names", *([len(WORDS)] * 3))), POOL):
        one, two, three = (WORDS[k] for k in chosen)
        yield one, two, three


def snake_case() -> Keyed:
    for words in identifiers():
        phrase = " ".join(words)
        yield phrase, written(f"Variable for the {phrase}:", f"{'_'.join(words)};")


def camel_case() -> Keyed:
    for one, two, three in identifiers():
        phrase = f"{one} {two} {three}"
        answer = f"{one}{two.title()}{three.title()};"
        yield phrase, written(f"Variable for the {phrase}:", answer)


# request, Python, JavaScript; {x} is a name, {n} a number
STATEMENTS = (
    ("append {n} to {x}", "{x}.append({n})", "{x}.push({n});"),
    ("remove {n} from {x}", "{x}.remove({n})", "{x}.splice({x}.indexOf({n}), 1);"),
    ("count {n} in {x}", "{x}.count({n})", "{x}.filter(v => v === {n}).length;"),
    ("print {x} and {n}", "print({x}, {n})", "console.log({x}, {n});"),
    ("index of {n} in {x}", "{x}.index({n})", "{x}.indexOf({n});"),
    ("insert {n} first in {x}", "{x}.insert(0, {n})", "{x}.unshift({n});"),
    ("first {n} of {x}", "{x}[:{n}]", "{x}.slice(0, {n});"),
    ("last {n} of {x}", "{x}[-{n}:]", "{x}.slice(-{n});"),
    ("join {x} with {n}", "'{n}'.join({x})", "{x}.join('{n}');"),
    ("round {x} to {n} digits", "round({x}, {n})", "{x}.toFixed({n});"),
    ("larger of {x} and {n}", "max({x}, {n})", "Math.max({x}, {n});"),
    ("multiply each {x} by {n}", "[v * {n} for v in {x}]", "{x}.map(v => v * {n});"),
    ("each {x} above {n}", "[v for v in {x} if v > {n}]", "{x}.filter(v => v > {n});"),
    ("fill a list with {n} times {x}", "list(repeat({x}, {n}))", "Array({n}).fill({x});"),
    ("{x} as an integer in base {n}", "int({x}, {n})", "parseInt({x}, {n});"),
    ("{x} to the power {n}", "pow({x}, {n})", "Math.pow({x}, {n});"),
)


def statements(language: int) -> Keyed:
    """language: the column of STATEMENTS, 1 for Python, 2 for JavaScript."""
    for s, w, n in islice(draws("statements", len(STATEMENTS), len(WORDS), 90), POOL):
        request, *answers = (text.format(x=WORDS[w], n=n + 2) for text in STATEMENTS[s])
        yield request, written(f"Code to do this: {request}", answers[language - 1])


def python_statements() -> Keyed:
    return statements(1)


def javascript_statements() -> Keyed:
    return statements(2)


# in words, in SQL
CONDITIONS = (("above", ">"), ("below", "<"), ("at least", ">="), ("at most", "<="), ("not", "!="))
COLUMNS = ("age", "price", "weight", "score", "year", "size", "rank", "cost")


def queries() -> Keyed:
    sizes = (len(WORDS), len(COLUMNS), len(CONDITIONS), 400)
    for w, c, how, n in islice(draws("sql", *sizes), POOL):
        words, sign = CONDITIONS[how]
        request = f"all {WORDS[w]} with {COLUMNS[c]} {words} {n}"
        answer = f"SELECT * FROM {WORDS[w]} WHERE {COLUMNS[c]} {sign} {n};"
        yield request, written(f"SQL, {request}:", answer)


TASKS = (
    Task("python_slice", "code", "a slice of a text", slices),
    Task("python_index", "code", "one item of a list, from either end", list_items),
    Task("python_sorted", "code", "a sorted list", sorted_lists),
    Task("python_bool", "code", "two comparisons, joined by and, or, not", comparisons),
    Task("python_floor", "code", "floor division", floor_divisions, "quotient"),
    Task("python_range", "code", "the numbers of a range", ranges),
    Task("bitwise_and", "code", "bitwise and of two numbers below 128", bitwise),
    Task("python_bin", "code", "what bin() gives", prefixed_binary, "binary"),
    Task("snake_case", "code", "a phrase as a name in snake_case", snake_case),
    Task("camel_case", "code", "the same phrase in camelCase", camel_case),
    Task("python_line", "code", "a request as a line of Python", python_statements),
    Task("javascript_line", "code", "the same request in JavaScript", javascript_statements),
    Task("sql", "code", "a request as an SQL query", queries),
)
