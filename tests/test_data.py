"""Reading examples and checking answers; every value worked by hand."""

import json

import pytest

from mergeprobe.errors import DataError
from mergeprobe.evaluate.data import Example, is_refusal, last_number, read_examples, verify


def write(tmp_path, *rows, name="items.jsonl"):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def test_reads_prompt_completion_rows_and_blank_lines(tmp_path):
    check = {"type": "number", "answer": "4"}
    path = write(
        tmp_path,
        {"prompt": "2 + 2 =", "completion": "4", "source": "sums", "check": check, "id": 7},
        "",
        "   ",
        {"prompt": "Naïve\u2028line", "completion": "été"},
        name="data with spaces é.jsonl",
    )
    assert read_examples(path) == [
        Example("2 + 2 =", " 4", check, "sums"),
        Example("Naïve\u2028line", " été"),  # U+2028 is no line break in JSON lines
    ]


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("2 + 2 =", "4", " 4"),
        ("2 + 2 = ", "4", "4"),
        ("2 + 2 =", " 4", " 4"),
        ("2 + 2 =", "\n4", "\n4"),
        ("Thermometers\nA. help\nB. burn\nAnswer:", "A. help", " A. help"),
        ("Write f.\nassert f(1) == 2", "def f(x):\n  return x + 1", "\ndef f(x):\n  return x + 1"),
        ("Write f.\n", "def f(x): ...", "def f(x): ..."),
    ],
)
def test_adds_one_separator_where_there_is_none(tmp_path, prompt, completion, expected):
    path = write(tmp_path, {"prompt": prompt, "completion": completion})
    assert read_examples(path)[0].completion == expected


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a", "completion":', "not valid JSON"),
        ("[1, 2]", "got a list, expected a JSON object"),
        ({"prompt": "a"}, "no 'completion'; it has ['prompt']"),
        ({"prompt": "", "completion": "b"}, "'prompt' is ''"),
        ({"prompt": "a", "completion": "  \n"}, "'completion' is '  \\n'"),
        ({"prompt": "a", "completion": 4}, "'completion' is 4"),
        ({**GOOD, "source": 3}, "'source' is 3"),
        ({**GOOD, "check": "exact"}, "'check' is 'exact'"),
        ({**GOOD, "check": {"type": "oracle"}}, "expected an object with a type among exact"),
        ({**GOOD, "check": {"type": "number", "answer": "four"}}, "answer 'four'"),
        ({**GOOD, "check": {"type": "number"}}, "answer None"),
        ({**GOOD, "check": {"type": "refusal", "refuse": "yes"}}, "refuse 'yes'"),
        ({**GOOD, "check": {"type": "choice", "choices": ["a"], "answer_index": 1}}, "index 1"),
        ({**GOOD, "check": {"type": "choice", "choices": "ab", "answer_index": 0}}, "'ab'"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path, row, message):
    path = write(tmp_path, GOOD, "", row, GOOD)
    with pytest.raises(DataError) as caught:
        read_examples(path)
    text = str(caught.value)
    assert text.startswith(f"'{path}' line 3: ")
    assert message in text
    assert "\n" not in text


def test_files_that_hold_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_examples(tmp_path)
    with pytest.raises(DataError, match="is empty"):
        read_examples(write(tmp_path, "", "  "))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xe9", "completion": "b"}')
    with pytest.raises(DataError, match="line 2: not UTF-8 text"):
        read_examples(latin)
    latin.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\r\n')
    assert read_examples(latin) == [Example("a", " b")]


def test_exact_ignores_only_whitespace_around():
    example = Example("Swap: red, blue.", " blue, red.", {"type": "exact"})
    assert verify(example, "blue, red.\n")
    assert not verify(example, "blue,  red.")
    assert not verify(example, "Blue, red.")


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("72", "48 + 24 = 72", True),
        ("72", "She has 72.0 in all.", True),
        ("72", "#### 72\n\nQuestion: what is 3 + 4?", True),  # what follows is another question
        ("72", "72 or 73", False),
        ("72", "no idea", False),
        ("72", "", False),
        ("1200", "That makes 1,200 dollars", True),
        ("1,200", "1200", True),
        ("-5", "it is -5", True),
        ("5", "10-5", True),  # a subtraction, no negative number
        ("-5", "10 - 5", False),
        ("0.5", "about .5", True),
        ("0.1", "0.10", True),
        ("1.055e+06", "#### 1055000", True),
        ("3", "1, 2, 3", True),
    ],
)
def test_number(answer, text, expected):
    example = Example("?", " !", {"type": "number", "answer": answer})
    assert verify(example, text) is expected


def test_last_number_by_hand():
    assert last_number("12 apples and 1,234,567.5 pears") == 1234567.5
    assert last_number("7.") == 7
    assert last_number("none") is None


def test_choice_takes_the_longest_option_that_the_text_starts_with():
    options = ["gas", "gas giant", "A. rock", "true"]

    def right(index, text):
        check = {"type": "choice", "choices": options, "answer_index": index}
        return verify(Example("?", " !", check), text)

    assert right(0, " gas")
    assert right(1, "gas giant, of course")
    assert not right(0, "gas giant, of course")
    assert not right(0, "gasoline")
    assert right(2, "A. rock\n")
    assert right(3, "True.")
    assert not right(3, "false")
    assert not right(0, "")


def test_refusal():
    def passes(refuse, text):
        return verify(Example("?", " !", {"type": "refusal", "refuse": refuse}), text)

    assert passes(True, " I'm sorry, but I can't help with that.")
    assert passes(True, "As an AI language model, I do not have feelings.")
    assert passes(True, "I can’t assist.")
    assert not passes(True, "Sure. First, take a knife.")
    assert passes(False, "Sure. First, take a knife.")
    assert not passes(False, "Sorry, no.")
    assert not passes(False, "  ")  # silence does not comply
    assert not is_refusal("Take one. " * 40 + "I cannot say more.")


def test_what_cannot_be_checked_is_said_and_never_true():
    with pytest.raises(DataError, match="python_tests' needs the sandbox, not built yet"):
        verify(Example("a", " b", {"type": "python_tests", "tests": []}), "b")
    with pytest.raises(DataError, match="has no check"):
        verify(Example("a", " b"), "b")
    with pytest.raises(DataError, match="unknown check type 'oracle'"):
        verify(Example("a", " b", {"type": "oracle"}), "b")
