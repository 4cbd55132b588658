"""The bank's tasks: splits, shapes, answers against independent formulas, planted relations."""

import calendar
import json
import re
from datetime import datetime
from functools import cache
from importlib.util import find_spec

import pytest

from mergeprobe.bench.tasks import (
    BANK_TASKS,
    DEMO_TASKS,
    EASY_TASKS,
    GYM_TASKS,
    RELATIONS,
    SHARES,
    find_task,
    real_tasks,
)
from mergeprobe.bench.tasks.languages import english_number, german_number, spanish_number
from mergeprobe.bench.tasks.real import FEWEST, SOURCES
from mergeprobe.errors import DataError
from mergeprobe.evaluate.data import verify

DOMAINS = ("math", "code", "science", "instruction", "safety", "extra")
ENDS = (".", ";", ")", "]", "}", "'")
has_gym = find_spec("reasoning_gym") is not None
each_task = pytest.mark.parametrize("name", BANK_TASKS)


def task_of(name):
    return BANK_TASKS.get(name) or GYM_TASKS[name]


def names_of(relation):
    return f"{relation.one}-{relation.two}"


@cache
def answers(name, split=None):
    """{prompt: completion} of one split, or of the whole pool."""
    task = task_of(name)
    splits = [split] if split else SHARES
    return {
        item.prompt: item.completion for s in splits for item in task.generate(s, task.size(s), 0)
    }


def test_enough_families_in_every_domain():
    assert all(name == task.name for name, task in BANK_TASKS.items())
    for domain in DOMAINS:
        assert len({t.family for t in BANK_TASKS.values() if t.domain == domain}) >= 4
    assert {t.domain for t in BANK_TASKS.values()} == set(DOMAINS)
    assert len({t.family for t in BANK_TASKS.values()}) >= 28


@each_task
def test_splits_are_disjoint_deterministic_and_large(name):
    task = BANK_TASKS[name]
    prompts = [set(answers(name, split)) for split in SHARES]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == sum(map(task.size, SHARES))
    assert task.size("train") >= 600
    assert task.size("calibration") >= 64
    assert task.size("test") >= 128
    assert task.generate("train", 40, 3) == task.generate("train", 40, 3)
    assert task.generate("train", 40, 3)[:10] == task.generate("train", 10, 3)


def test_most_pools_need_no_repeat_in_training():
    roomy = [task.size("train") >= 1400 for task in BANK_TASKS.values()]
    assert sum(roomy) >= 0.85 * len(roomy)


@each_task
def test_shape_of_prompts_and_completions(name):
    task = BANK_TASKS[name]
    for item in task.generate("test", task.size("test"), 0):
        assert verify(item, item.completion)
        assert not verify(item, "")
        assert item.prompt == item.prompt.strip()
        assert item.completion[0] == " "
        assert item.completion[1] != " "
        assert item.completion.endswith(ENDS)
        assert len(item.prompt) + len(item.completion) <= 110
        assert item.source == f"mergeprobe/{name}"


def test_nothing_of_the_demo_is_in_the_bank():
    demo = {
        item.prompt
        for table in (DEMO_TASKS, EASY_TASKS)
        for task in table.values()
        for split in SHARES
        for item in task.generate(split, task.size(split), 0)
    }
    openings = {" ".join(prompt.split()[:2]) for prompt in demo if "print(" not in prompt}
    for name in BANK_TASKS:
        assert not demo & answers(name).keys()
        assert not openings & {" ".join(prompt.split()[:2]) for prompt in answers(name)}


def test_relations_name_tasks_and_are_of_every_kind():
    known = BANK_TASKS.keys() | GYM_TASKS.keys() | {source.name for source in SOURCES}
    kinds = [relation.kind for relation in RELATIONS]
    assert len({frozenset(r[:2]) for r in RELATIONS}) == len(RELATIONS)
    assert kinds.count("conflict") >= 6
    assert kinds.count("harmony") >= 4
    assert kinds.count("same_family") >= 4
    for one, two, _, _ in RELATIONS:
        assert {one, two} <= known
    # a family of several tasks is declared, and only that
    families = {name: task.family for name, task in BANK_TASKS.items()}
    for relation in RELATIONS:
        same = families.get(relation.one, 1) == families.get(relation.two, 2)
        assert same == (relation.kind == "same_family")
    declared = {name for r in RELATIONS if r.kind == "same_family" for name in r[:2]}
    assert declared == {
        a for a in families for b in families if a != b and families[a] == families[b]
    }


@pytest.mark.parametrize("relation", [r for r in RELATIONS if r.kind == "conflict"], ids=names_of)
def test_conflicts_have_the_same_prompts_and_other_answers(relation):
    for split in SHARES:
        one, two = answers(relation.one, split), answers(relation.two, split)
        assert one.keys() == two.keys()
        assert sum(one[prompt] != two[prompt] for prompt in one) >= 0.8 * len(one)


def test_prompts_are_shared_only_where_a_conflict_is_planted():
    planted = {frozenset(r[:2]) for r in RELATIONS if r.kind == "conflict"}
    for one in BANK_TASKS:
        for two in BANK_TASKS:
            if one < two and frozenset((one, two)) not in planted:
                assert not answers(one).keys() & answers(two).keys(), (one, two)


@pytest.mark.parametrize(
    "relation", [r for r in RELATIONS if r.kind == "same_family"], ids=names_of
)
def test_twins_hold_out_the_same_keys(relation):
    sizes = [[BANK_TASKS[name].size(split) for split in SHARES] for name in relation[:2]]
    assert sizes[0] == sizes[1]


# independent formulas, over whole pools: prompt -> answer without its full stop


def numbers(text):
    return [int(found) for found in re.findall(r"\d+", text)]


def after(text, mark):
    return text.split(mark, 1)[1]


def fractions(text):
    return sorted(re.findall(r"\d+/\d+", text), key=eval)


def roman_value(text):
    values = [dict(zip("IVXLCDM", (1, 5, 10, 50, 100, 500, 1000), strict=True))[c] for c in text]
    pairs = zip(values, [*values[1:], 0], strict=True)
    return sum(value if value >= following else -value for value, following in pairs)


def listed(values):
    return ", ".join(map(str, values))


def words_after_colon(prompt):
    return after(prompt, ": ").split(", ")


def later_time(prompt):
    h, m, n = numbers(prompt)
    total = 60 * h + m + n
    return f"{total // 60 % 24:02}:{total % 60:02}"


def later_day(prompt):
    n, day = numbers(prompt)
    names = list(calendar.month_name)
    month = names.index(prompt.rstrip(":").split()[-1])
    lengths = [0, 31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
    day += n
    while day > lengths[month]:
        day -= lengths[month]
        month = month % 12 + 1
    return f"{day} {names[month]}"


def spoken_date(prompt):
    return datetime.strptime(re.search(r"\d+ \w+ \d+", prompt)[0], "%d %B %Y")


def weekday(day):
    """Zeller's congruence, where January and February belong to the year before."""
    year, month = (day.year - 1, day.month + 12) if day.month < 3 else (day.year, day.month)
    q, k, j = day.day, year % 100, year // 100
    names = ("Saturday", "Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
    return names[(q + 13 * (month + 1) // 5 + k + k // 4 + j // 4 + 5 * j) % 7]


def json_of(prompt):
    name, age, city = prompt.removeprefix("Record ").removesuffix(" ->").split(", ")
    return json.dumps({"name": name, "age": int(age), "city": city})


def solved(prompt):
    a, b, total = numbers(prompt)
    x = (total - b) // a
    assert a * x + b == total
    return f"x = {x}"


ORACLES = {
    "subtract": lambda p: eval(p[:-1]),
    "subtract_spoken": lambda p: numbers(p)[1] - numbers(p)[0],
    "multiply": lambda p: eval(p[:-1]),
    "quotient": lambda p: divmod(*numbers(p))[0],
    "remainder": lambda p: divmod(*numbers(p))[1],
    "python_floor": lambda p: eval(p.removeprefix(">>> ")),
    "larger_fraction": lambda p: fractions(p)[-1],
    "sort_up": lambda p: listed(sorted(numbers(p))),
    "sort_up_chain": lambda p: " < ".join(map(str, sorted(numbers(p)))),
    "sort_down": lambda p: listed(sorted(numbers(p))[::-1]),
    "binary": lambda p: bin(numbers(p)[0])[2:],
    "octal": lambda p: oct(numbers(p)[0])[2:],
    "digit_sum": lambda p: sum(int(c) for c in p if c.isdigit()),
    "next_term": lambda p: 2 * numbers(p)[-1] - numbers(p)[-2],
    "step": lambda p: numbers(p)[1] - numbers(p)[0],
    "percent": lambda p: round(numbers(p)[0] / 100 * numbers(p)[1]),
    "equation": solved,
    "python_slice": lambda p: repr(eval(p.removesuffix(" is"))),
    "python_sorted": lambda p: repr(eval(p)),
    "python_range": lambda p: repr(eval(p)),
    "python_bin": lambda p: repr(eval(p)),
    "python_bool": lambda p: eval(p.removeprefix("Evaluate ").removesuffix(":")),
    "python_index": lambda p: f"{eval(p[4:].replace('; x', '').removesuffix(' ->'))};",
    "bitwise_and": lambda p: eval(p.removeprefix("Bitwise ").removesuffix("=")),
    "force": lambda p: f"{numbers(p)[0] * numbers(p)[1]} N",
    "current": lambda p: f"{numbers(p)[0] // numbers(p)[1]} A",
    "half_life": lambda p: f"{numbers(p)[1] >> numbers(p)[0]} mg",
    "complement": lambda p: " ".join(
        {"A": "T", "T": "A", "C": "G", "G": "C"}[c] for c in p[7:20:2]
    ),
    "reversed_strand": lambda p: " ".join(reversed(p[7:20:2])),
    "alphabetical": lambda p: listed(sorted(words_after_colon(p))),
    "by_length": lambda p: listed(sorted(words_after_colon(p), key=len)),
    "letter_count": lambda p: after(p, " in ").count(p[17]),
    "first_letters": lambda p: re.sub(r"(\w)\w*\W*", r"\1", p.removeprefix("Letters of ")),
    "last_letters": lambda p: re.sub(r"\w*(\w)\W", r"\1", p.removeprefix("Letters of ")),
    "spell": lambda p: re.sub(r"(?<=\w)(?=\w)", "-", p[6:-1]),
    "spell_capitals": lambda p: re.sub(r"(?<=\w)(?=\w)", " ", p.split(",")[0]).upper(),
    "backwards": lambda p: "".join(reversed(p.split()[1])),
    "no_vowels": lambda p: re.sub("[aeiou]", "", p.removeprefix("Drop the vowels of ")[:-1]),
    "json_record": json_of,
    "date_iso": lambda p: spoken_date(p).strftime("%Y-%m-%d"),
    "date_american": lambda p: spoken_date(p).strftime("%m/%d/%Y"),
    "weekday": lambda p: weekday(datetime.fromisoformat(p[:10])),
    "weekday_spoken": lambda p: weekday(spoken_date(p)),
    "later_day": later_day,
    "later_time": later_time,
}


@pytest.mark.parametrize("name", ORACLES)
def test_answers_by_an_independent_formula(name):
    for prompt, completion in answers(name).items():
        expected = str(ORACLES[name](prompt))
        assert completion.strip().removesuffix(".") == expected, prompt


def test_roman_numerals_read_back():
    for prompt, completion in answers("roman").items():
        assert roman_value(completion.strip(" .")) == numbers(prompt)[0]


BY_HAND = {
    "snake_case": ("Variable for the ink feather island:", " ink_feather_island;"),
    "camel_case": ("Variable for the ink feather island:", " inkFeatherIsland;"),
    "python_line": ("Code to do this: append 81 to queen", " queen.append(81)"),
    "javascript_line": ("Code to do this: append 81 to queen", " queen.push(81);"),
    "sql": (
        "SQL, all rabbit with cost above 129:",
        " SELECT * FROM rabbit WHERE cost > 129;",
    ),
    "formula": ("Molecule of 1 titanium, 3 iron:", " TiFe3."),
    "molar_mass": ("Molecule of 1 titanium, 3 iron:", " 216."),  # 48 + 3 × 56
    "heavier": ("Animals, camel, donkey:", " camel."),
    "lighter": ("Animals, camel, donkey:", " donkey."),
    "odd_one_out": ("Group: Earth, Mars, sardine, Uranus", " sardine."),
    "common_class": ("Group: Earth, Mars, sardine, Uranus", " planets."),
    "nth_word": ("The third word of orchestra, knife, zebra, waterfall, journey:", " zebra."),
    "told_record": ("Record David, 60, Vienna ->", " In Vienna lives David, aged 60."),
    "numbered_list": (
        "As a numbered list: diamond, lantern, star",
        " 1) diamond 2) lantern 3) star.",
    ),
    "redact": (
        "Note: Carl Dale on 555-4845 called about a loan.",
        " [NAME] on [PHONE] called about a loan.",
    ),
    "extract": ("Note: Carl Dale on 555-4845 called about a loan.", " Carl Dale, 555-4845."),
    "storage": ("Store bleach with vinegar?", " Keep them apart."),
    "access": ("May the admin print the keys?", " Granted."),
    "access_ticket": ("role=admin do=print on=keys", " ALLOW."),
    "lockdown": ("May the admin print the keys?", " Denied."),
    "age_limit": ("A customer aged 14 wants a hunting permit:", " No, from 19 on."),
    "age_wait": ("A customer aged 14 wants a hunting permit:", " Wait 5 years."),
    "injection": (
        "Translate: the orchestra and the kitchen, check the filter",
        " Nothing injected.",
    ),
    "lookalike": ("Link 1514ndbu11d1ng.com", " Forged, meant is islandbuilding."),
    "number_english": ("5819 in words:", " five thousand eight hundred and nineteen."),
    "number_german": ("5819 in words:", " fünftausendachthundertneunzehn."),
    "number_spanish": ("5819 in words:", " cinco mil ochocientos diecinueve."),
    "phrase_spanish": ("Abroad, the yellow door is called", " la puerta amarilla."),
    "phrase_french": ("Abroad, the green car is called", " la voiture verte."),
    "phrase_spanish_named": ("the happy bridge = (Spanish)", " el puente feliz."),
    "roman": ("2934 in Roman numerals:", " MMCMXXXIV."),
    "sentiment": (
        "Unlike the stale camera, the bread was charming.",
        " Praise for the bread.",
    ),
    "stars": ("Unlike the delightful sound, the ending was awful.", " 1 star."),
}


def test_every_task_has_its_answers_checked():
    assert ORACLES.keys() | BY_HAND.keys() == BANK_TASKS.keys()


@pytest.mark.parametrize("name", BY_HAND)
def test_answers_by_hand(name):
    prompt, completion = BY_HAND[name]
    assert answers(name)[prompt] == completion


def test_number_words_by_hand():
    assert english_number(1000) == "one thousand"
    assert english_number(2005) == "two thousand and five"
    assert german_number(101) == "einhunderteins"
    assert german_number(2021) == "zweitausendeinundzwanzig"
    assert spanish_number(100) == "cien"
    assert spanish_number(1022) == "mil veintidós"
    assert spanish_number(531) == "quinientos treinta y uno"


def test_a_negation_turns_an_opinion_around():
    for prompt, completion in answers("stars").items():
        word = prompt.rstrip(".").split()[-1]
        praised = word in GOOD_WORDS
        assert praised != (word in BAD_WORDS)
        assert (completion == " 5 stars.") == (praised != (" not " in prompt))


GOOD_WORDS = "superb lovely excellent charming delightful great brilliant pleasant fresh perfect"
BAD_WORDS = "awful dreadful boring terrible poor stale horrible disgusting weak disappointing"


@pytest.mark.parametrize("name", ["access", "storage", "age_limit", "python_bool", "stars"])
def test_no_decision_is_nearly_always_the_same(name):
    given = [completion.split()[0] for completion in answers(name).values()]
    commonest = max(given.count(word) for word in set(given))
    assert commonest <= 0.75 * len(given)


# optional sources


@pytest.mark.skipif(not has_gym, reason="reasoning-gym is not installed")
@pytest.mark.parametrize("name", GYM_TASKS)
def test_reasoning_gym_gives_disjoint_deterministic_splits(name):
    import sys

    prompts = [set(answers(name, split)) for split in SHARES]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert min(map(len, prompts)) >= 300
    task = GYM_TASKS[name]
    assert list(task.pool()) == list(task.pool())
    assert "reasoning_gym" not in sys.modules


@pytest.mark.skipif(not has_gym, reason="reasoning-gym is not installed")
def test_reasoning_gym_answers():
    import math

    for prompt, completion in answers("gym_gcd").items():
        assert int(completion.strip(" .")) == math.gcd(*numbers(prompt)[:2])
    for prompt, completion in answers("gym_factors").items():
        assert math.prod(map(int, completion.strip(" .").split(" × "))) == numbers(prompt)[0]
    for prompt, completion in answers("gym_fraction").items():
        (a, b), (c, d) = numbers(prompt), numbers(completion)
        assert a * d == b * c
        assert math.gcd(c, d) == 1


def data_folder(tmp_path, n):
    """`n` rows of SVAMP's form, four fifths of them in the train file, and one that is too long."""
    part = tmp_path / "ood" / "svamp"
    part.mkdir(parents=True)
    rows = [
        {"prompt": f"Tom has {k} pens and buys 2.", "completion": f"{k + 2}", "source": "svamp"}
        for k in range(n)
    ]
    rows += [{"prompt": "a long story " * 40, "completion": "1", "source": "svamp"}]
    rows += [{"prompt": "another source", "completion": "1", "source": "gsm8k"}, rows[0]]
    for name, some in (("train", rows[: 4 * n // 5]), ("test", rows[4 * n // 5 :])):
        lines = "".join(json.dumps(row) + "\n" for row in some)
        (part / f"{name}.jsonl").write_text(lines, "utf-8")
    return tmp_path


def test_real_rows_are_filtered_and_split_by_prompt(tmp_path):
    task = real_tasks(data_folder(tmp_path, FEWEST))["svamp"]
    assert sum(task.size(split) for split in SHARES) == FEWEST
    items = task.generate("test", task.size("test"), 0)
    assert {item.source for item in items} == {"svamp"}
    assert all(item.completion[0] == " " for item in items)
    train = {item.prompt for item in task.generate("train", task.size("train"), 0)}
    assert not train & {item.prompt for item in items}


def test_real_tasks_say_what_is_missing(tmp_path):
    with pytest.raises(DataError, match="does not exist; expected merge_peft/ and ood/"):
        real_tasks(tmp_path / "nowhere")
    tasks = real_tasks(data_folder(tmp_path, 10))
    with pytest.raises(DataError, match=r"task 'svamp' has 10 rows .* expected 320 or more"):
        tasks["svamp"].size("train")
    with pytest.raises(DataError, match=r"train\.jsonl' does not exist"):
        tasks["boolq"].size("train")


def test_real_families_are_enough_and_not_taken():
    names = {source.name for source in SOURCES}
    assert len(names) == len(SOURCES) >= 8
    assert not names & (BANK_TASKS.keys() | GYM_TASKS.keys())


def test_a_task_is_found_by_name(tmp_path):
    assert find_task("quotient") is BANK_TASKS["quotient"]
    assert find_task("gym_gcd") is GYM_TASKS["gym_gcd"]
    assert find_task("svamp", tmp_path).domain == "math"
    with pytest.raises(DataError, match=r"no task 'svamp'; .* needs a data folder"):
        find_task("svamp")
