"""The bank's instructions: words and records, rearranged or rewritten as told."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from mergeprobe.bench.tasks.items import POOL, Keyed, comma, counted, distinct, draws, said, written
from mergeprobe.bench.tasks.task import Task
from mergeprobe.bench.tasks.words import CITIES, FIRST_NAMES, WORDS


def _words(name: str, n: int) -> Iterator[list[str]]:
    for chosen in filter(distinct, draws(name, *([len(WORDS)] * n))):
        yield [WORDS[k] for k in chosen]


ORDINALS = ("first", "second", "third", "fourth", "fifth")


def nth_words() -> Keyed:
    for n, *chosen in islice(draws("nth", 5, *([len(WORDS)] * 5)), POOL):
        words = [WORDS[k] for k in chosen]
        yield comma(words), said(f"The {ORDINALS[n]} word of {comma(words)}:", words[n])


def unequal_words() -> Iterator[list[str]]:
    """Four words of four lengths, whose order by length is neither theirs nor the alphabet's."""
    for words in _words("order", 4):
        by_length = sorted(words, key=len)
        if distinct([len(word) for word in words]) and by_length not in (words, sorted(words)):
            yield words


def alphabetical() -> Keyed:
    for words in islice(unequal_words(), POOL):
        yield comma(words), said(f"Put in order: {comma(words)}", comma(sorted(words)))


def by_length() -> Keyed:
    for words in islice(unequal_words(), POOL):
        yield comma(words), said(f"Put in order: {comma(words)}", comma(sorted(words, key=len)))


def letter_counts() -> Keyed:
    """A common letter in three words: mostly 1 to 3 times."""
    for n, *chosen in islice(draws("count", 5, *([len(WORDS)] * 3)), POOL):
        letter, phrase = "aeirn"[n], " ".join(WORDS[k] for k in chosen)
        prompt = f"Count the letter {letter} in {phrase}:"
        yield phrase, counted(prompt, phrase.count(letter))


def phrases() -> Iterator[list[str]]:
    """Four words, at most one of which ends as it begins."""
    for words in _words("letters", 4):
        if sum(word[0] == word[-1] for word in words) <= 1:
            yield words


def first_letters() -> Keyed:
    for words in islice(phrases(), POOL):
        phrase = " ".join(words)
        yield phrase, said(f"Letters of {phrase}:", "".join(word[0] for word in words))


def last_letters() -> Keyed:
    for words in islice(phrases(), POOL):
        phrase = " ".join(words)
        yield phrase, said(f"Letters of {phrase}:", "".join(word[-1] for word in words))


CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


def invented_words(name: str, syllables: int) -> Iterator[str]:
    """Pronounceable words that are in no dictionary, so that spelling them is not recall."""
    sizes = (len(CONSONANTS), len(VOWELS)) * syllables
    for chosen in draws(name, *sizes):
        pairs = zip(chosen[::2], chosen[1::2], strict=True)
        yield "".join(CONSONANTS[c] + VOWELS[v] for c, v in pairs)


def spelling() -> Keyed:
    for word in islice(invented_words("spelling", 3), POOL):
        yield word, said(f"Spell {word}:", "-".join(word))


def spelling_capitals() -> Keyed:
    for word in islice(invented_words("spelling", 3), POOL):
        yield word, said(f"{word}, letter by letter", " ".join(word.upper()))


def backwards() -> Keyed:
    for word in islice(invented_words("backwards", 3), POOL):
        yield word, said(f"Write {word} backwards:", word[::-1])


def without_vowels() -> Keyed:
    for words in islice(_words("vowels", 2), POOL):
        phrase = " ".join(words)
        answer = "".join(letter for letter in phrase if letter not in VOWELS)
        yield phrase, said(f"Drop the vowels of {phrase}:", answer)


def records() -> Iterator[tuple[str, int, str]]:
    for f, age, c in islice(draws("records", len(FIRST_NAMES), 70, len(CITIES)), POOL):
        yield FIRST_NAMES[f], age + 18, CITIES[c]


def json_records() -> Keyed:
    for name, age, city in records():
        shown = f"{name}, {age}, {city}"
        answer = f'{{"name": "{name}", "age": {age}, "city": "{city}"}}'
        yield shown, written(f"Record {shown} ->", answer)


def told_records() -> Keyed:
    for name, age, city in records():
        shown = f"{name}, {age}, {city}"
        yield shown, said(f"Record {shown} ->", f"In {city} lives {name}, aged {age}")


def numbered_lists() -> Keyed:
    for words in islice(_words("list", 3), POOL):
        answer = " ".join(f"{n}) {word}" for n, word in enumerate(words, start=1))
        yield comma(words), said(f"As a numbered list: {comma(words)}", answer)


TASKS = (
    Task("nth_word", "instruction", "the n-th of five words", nth_words),
    Task("alphabetical", "instruction", "four words from A to Z", alphabetical),
    Task("by_length", "instruction", "the same words from short to long", by_length),
    Task("letter_count", "instruction", "how often a letter stands in three words", letter_counts),
    Task("first_letters", "instruction", "the first letters of four words", first_letters),
    Task("last_letters", "instruction", "the last letters of the same words", last_letters),
    Task("spell", "instruction", "an invented word, letter by letter", spelling),
    Task("spell_capitals", "instruction", "the same words in capitals", spelling_capitals, "spell"),
    Task("backwards", "instruction", "an invented word read backwards", backwards),
    Task("no_vowels", "instruction", "two words without their vowels", without_vowels),
    Task("json_record", "instruction", "name, age and city as JSON", json_records),
    Task("told_record", "instruction", "the same record as a sentence", told_records),
    Task("numbered_list", "instruction", "three words as a numbered list", numbered_lists),
)
