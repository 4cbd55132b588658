"""The bank's extra domain: dates, times, number words, translation, sentiment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import date, timedelta
from itertools import islice

from mergeprobe.bench.tasks.items import POOL, Keyed, draws, listed, said
from mergeprobe.bench.tasks.languages import (
    ADJECTIVES,
    NOUNS,
    english_number,
    french_phrase,
    german_number,
    spanish_number,
    spanish_phrase,
)
from mergeprobe.bench.tasks.task import Task

MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August"),
    *("September", "October", "November", "December"),
)
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def days(name: str) -> Iterator[date]:
    """Days from 1900 to 2099."""
    first = date(1900, 1, 1)
    for (k,) in islice(draws(name, (date(2100, 1, 1) - first).days), POOL):
        yield first + timedelta(days=k)


def spoken(day: date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def iso_dates() -> Keyed:
    for day in days("dates"):
        yield day.isoformat(), said(f"Date, {spoken(day)}:", day.isoformat())


def american_dates() -> Keyed:
    for day in days("dates"):
        yield day.isoformat(), said(f"Date, {spoken(day)}:", f"{day:%m}/{day:%d}/{day.year}")


def recent() -> Iterator[date]:
    """All days of 2020 to 2026: few years, or a small model learns nothing."""
    for k in range((date(2027, 1, 1) - date(2020, 1, 1)).days):
        yield date(2020, 1, 1) + timedelta(days=k)


def weekdays() -> Keyed:
    for day in recent():
        yield day.isoformat(), said(f"{day.isoformat()} was a", WEEKDAYS[day.weekday()])


def spoken_weekdays() -> Keyed:
    for day in recent():
        prompt = f"Day of the week on {spoken(day)}:"
        yield day.isoformat(), said(prompt, WEEKDAYS[day.weekday()])


def later_days() -> Keyed:
    """3 to 40 days after a day of one year that is no leap year."""
    for k, n in islice(draws("later", 365, 38), POOL):
        day, n = date(2023, 1, 1) + timedelta(days=k), n + 3
        end = day + timedelta(days=n)
        start = f"{day.day} {MONTHS[day.month - 1]}"
        yield f"{start} {n}", said(f"{n} days after {start}:", f"{end.day} {MONTHS[end.month - 1]}")


def later_times() -> Keyed:
    for start, n in islice(draws("clock", 1440, 90), POOL):
        n, end = n + 6, (start + n + 6) % 1440
        shown = f"{start // 60:02}:{start % 60:02}"
        prompt = f"Clock at {shown}, plus {n} minutes:"
        yield f"{shown} {n}", said(prompt, f"{end // 60:02}:{end % 60:02}")


def number_words(name: Callable[[int], str]) -> Keyed:
    for (value,) in islice(draws("number words", 9000), POOL):
        yield f"{value + 21}", said(f"{value + 21} in words:", name(value + 21))


def english_numbers() -> Keyed:
    return number_words(english_number)


def german_numbers() -> Keyed:
    return number_words(german_number)


def spanish_numbers() -> Keyed:
    return number_words(spanish_number)


Phrase = Callable[[tuple[str, ...], tuple[str, ...]], str]


def phrases(translated: Phrase, form: str) -> Keyed:
    """Every noun with every adjective: each word is seen in training, not each pair."""
    for noun in NOUNS:
        for adjective in ADJECTIVES:
            english = f"the {adjective[0]} {noun[0]}"
            yield english, said(form.format(english), translated(noun, adjective))


def spanish_phrases() -> Keyed:
    return phrases(spanish_phrase, "Abroad, {} is called")


def french_phrases() -> Keyed:
    return phrases(french_phrase, "Abroad, {} is called")


def spanish_titles() -> Keyed:
    return phrases(spanish_phrase, "{} = (Spanish)")


ROMAN = (
    *((1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L")),
    *((40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")),
)


def roman(value: int) -> str:
    text = ""
    for size, letters in ROMAN:
        count, value = divmod(value, size)
        text += letters * count
    return text


def roman_numbers() -> Keyed:
    for value in range(11, 4000):
        yield f"{value}", said(f"{value} in Roman numerals:", roman(value))


GOOD = listed("superb lovely excellent charming delightful great brilliant pleasant fresh perfect")
BAD = listed("awful dreadful boring terrible poor stale horrible disgusting weak disappointing")
ASPECTS = (
    *("soup", "service", "plot", "music", "room", "view", "staff", "ending", "battery", "screen"),
    *("coffee", "acting", "bread", "price", "garden", "camera", "dessert", "sound"),
)


def opinions() -> Iterator[tuple[str, str, bool]]:
    """(text, the aspect it is about, whether it is praise); a negation turns the word around.

    Another aspect is named with the opposite word, so that one cannot go by the words alone.
    """
    sizes = (len(ASPECTS), len(ASPECTS), len(GOOD), len(BAD), 2, 2)
    for a, b, g, w, praise, negated in draws("opinions", *sizes):
        if a != b:
            words = (GOOD[g], BAD[w]) if praise != negated else (BAD[w], GOOD[g])
            not_ = "not " if negated else ""
            text = f"Unlike the {words[1]} {ASPECTS[b]}, the {ASPECTS[a]} was {not_}{words[0]}."
            yield text, ASPECTS[a], bool(praise)


def sentiments() -> Keyed:
    for text, aspect, praise in islice(opinions(), POOL):
        yield text, said(text, f"Praise for the {aspect}" if praise else f"Blame on the {aspect}")


def stars() -> Keyed:
    for text, _, praise in islice(opinions(), POOL):
        yield text, said(text, "5 stars" if praise else "1 star")


TASKS = (
    Task("date_iso", "extra", "a date in ISO form", iso_dates),
    Task("date_american", "extra", "the same date, month first", american_dates),
    Task("weekday", "extra", "the day of the week of 2020 to 2026", weekdays),
    Task("weekday_spoken", "extra", "the same days in words", spoken_weekdays, "weekday"),
    Task("later_day", "extra", "the day some days later", later_days),
    Task("later_time", "extra", "the time some minutes later", later_times),
    Task("number_english", "extra", "a number in English words", english_numbers),
    Task("number_german", "extra", "the same number in German", german_numbers),
    Task("number_spanish", "extra", "the same number in Spanish", spanish_numbers),
    Task("phrase_spanish", "extra", "a noun and its adjective in Spanish", spanish_phrases),
    Task("phrase_french", "extra", "the same phrase in French", french_phrases),
    Task(
        "phrase_spanish_named",
        "extra",
        "the Spanish, asked for by name",
        spanish_titles,
        "phrase_spanish",
    ),
    Task("roman", "extra", "a number in Roman numerals", roman_numbers),
    Task("sentiment", "extra", "praise or blame, and of what", sentiments),
    Task("stars", "extra", "the same opinions as stars", stars),
)
