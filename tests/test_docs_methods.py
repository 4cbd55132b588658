"""docs/methods is what the table and the docstrings say."""

from pathlib import Path

import pytest

from mergeprobe.compose.merge import METHODS
from mergeprobe.compose.merge.methods import Method
from mergeprobe.compose.merge.pages import described, pages, write
from mergeprobe.errors import MergeError

DOCS = Path(__file__).parents[1] / "docs" / "methods"


def test_the_pages_are_up_to_date():
    found = {path.name: path.read_text("utf-8") for path in DOCS.glob("*.md")}
    assert found == pages(), "run: python -m mergeprobe.compose.merge.pages docs/methods"


def test_there_is_a_page_for_every_method_with_what_a_reader_needs():
    made = pages()
    assert made.keys() == {"README.md", *(f"{name}.md" for name in METHODS)}
    for name, row in METHODS.items():
        text = made[f"{name}.md"]
        for label in ("**Assumes** ", "**Fails** ", "**Cost** ", "| source | ", f"--method {name}"):
            assert label in text, (name, label)
        for option in row.defaults:
            assert f"`{option}`" in text
        assert f"({name}.md)" in made["README.md"]


def test_a_stale_page_goes(tmp_path):
    (tmp_path / "gone.md").write_text("old")
    write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == pages().keys()


def test_a_docstring_without_its_notes_is_refused():
    def rule(updates, weights):
        """A rule.

        Assumes: nothing.
        Cost: nothing.
        """

    with pytest.raises(MergeError, match="'rule' ends with"):
        described(Method(rule, "lowrank", "a rule", "no paper"))
