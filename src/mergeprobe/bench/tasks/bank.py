"""The bank's embedded tasks in one table, and what was planted between them in another."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from mergeprobe.bench.tasks import code, extra, instruction, math, safety, science
from mergeprobe.bench.tasks.gym import GYM_TASKS
from mergeprobe.bench.tasks.real import real_tasks
from mergeprobe.bench.tasks.task import Task
from mergeprobe.errors import DataError

BANK_TASKS: dict[str, Task] = {
    task.name: task
    for domain in (math, code, science, instruction, safety, extra)
    for task in domain.TASKS
}


def find_task(name: str, data: str | Path | None = None) -> Task:
    """The embedded, reasoning-gym or, with a data folder, real task of that name.

    Raises DataError if there is none.
    """
    tasks = BANK_TASKS | GYM_TASKS | (real_tasks(data) if data else {})
    if name not in tasks:
        hint = "" if data else "; a real one needs a data folder (--data)"
        raise DataError(f"no task '{name}'; expected one of {', '.join(tasks)}{hint}")
    return tasks[name]


Kind = Literal["same_family", "conflict", "harmony"]


class Relation(NamedTuple):
    """What was planted between two tasks, before anything was measured.

    same_family: the same keys and results in another surface. conflict: the same prompts, other
    answers. harmony: other prompts that need one sub-skill.
    """

    one: str
    two: str
    kind: Kind
    what: str


RELATIONS: tuple[Relation, ...] = (
    Relation("subtract", "subtract_spoken", "same_family", "sign or words"),
    Relation("sort_up", "sort_up_chain", "same_family", "commas or a chain of <"),
    Relation("binary", "python_bin", "same_family", "words or bin()"),
    Relation("quotient", "python_floor", "same_family", "words or //"),
    Relation("spell", "spell_capitals", "same_family", "hyphens or capitals"),
    Relation("access", "access_ticket", "same_family", "a question or fields"),
    Relation("weekday", "weekday_spoken", "same_family", "ISO or spoken date"),
    Relation("phrase_spanish", "phrase_spanish_named", "same_family", "the language named or not"),
    Relation("quotient", "remainder", "conflict", "another operation"),
    Relation("sort_up", "sort_down", "conflict", "the opposite order"),
    Relation("next_term", "step", "conflict", "another question"),
    Relation("snake_case", "camel_case", "conflict", "another format"),
    Relation("python_line", "javascript_line", "conflict", "another language"),
    Relation("formula", "molar_mass", "conflict", "another question"),
    Relation("heavier", "lighter", "conflict", "the opposite order"),
    Relation("odd_one_out", "common_class", "conflict", "another question"),
    Relation("complement", "reversed_strand", "conflict", "another operation"),
    Relation("alphabetical", "by_length", "conflict", "another order"),
    Relation("first_letters", "last_letters", "conflict", "another place"),
    Relation("json_record", "told_record", "conflict", "another format"),
    Relation("redact", "extract", "conflict", "the opposite policy"),
    Relation("access", "lockdown", "conflict", "the opposite policy"),
    Relation("age_limit", "age_wait", "conflict", "another answer to the same decision"),
    Relation("date_iso", "date_american", "conflict", "another format"),
    Relation("number_english", "number_german", "conflict", "another language"),
    Relation("number_english", "number_spanish", "conflict", "another language"),
    Relation("number_german", "number_spanish", "conflict", "another language"),
    Relation("phrase_spanish", "phrase_french", "conflict", "another language"),
    Relation("sentiment", "stars", "conflict", "another format"),
    Relation("sort_up", "python_sorted", "harmony", "sorting numbers"),
    Relation("sort_up", "alphabetical", "harmony", "sorting"),
    Relation("multiply", "force", "harmony", "multiplying by a digit"),
    Relation("quotient", "current", "harmony", "dividing"),
    Relation("binary", "octal", "harmony", "changing the base"),
    Relation("next_term", "python_range", "harmony", "adding a step"),
    Relation("equation", "subtract", "harmony", "subtracting"),
    Relation("later_day", "later_time", "harmony", "adding with a carry at the end"),
    Relation("spell", "backwards", "harmony", "letters of invented words"),
    Relation("letter_count", "no_vowels", "harmony", "letters of words"),
    Relation("injection", "lookalike", "harmony", "telling true from forged"),
    Relation("gym_gcd", "gym_fraction", "harmony", "common divisors"),
    Relation("gsm8k", "svamp", "harmony", "word problems"),
    Relation("openbookqa", "arc", "harmony", "choices in science"),
)
