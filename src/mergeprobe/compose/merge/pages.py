"""docs/methods: one page a method, from the table and the docstrings.

python -m mergeprobe.compose.merge.pages docs/methods
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from mergeprobe.artefact import atomic_file
from mergeprobe.compose.merge.methods import COPIES, GAUGE, IDENTITY, METHODS, PERMUTATION, Method
from mergeprobe.errors import MergeError

# what the last paragraph of a rule's docstring says, line by line
NOTES = ("Assumes", "Fails", "Cost")
KEPT = {
    PERMUTATION: "The order of the adapters does not matter.",
    GAUGE: "Only ΔW matters, not how it is factored: (B Q⁻¹, Q A) merges as (B, A).",
    COPIES: "Copies of one adapter merge to that adapter.",
    IDENTITY: "One adapter of weight 1 merges to itself.",
}
LOST = {
    PERMUTATION: "Another order of the adapters gives another merge.",
    GAUGE: "Another factorisation of the same ΔW gives another merge.",
    COPIES: "Copies of one adapter do not merge to it.",
    IDENTITY: "One adapter alone does not merge to itself.",
}
WEIGHTS = {
    "fixed": "takes none",
    "as given": "taken as they are: their size matters",
    "ratios": "only their ratios matter",
}
KINDS = {
    "lowrank": "low-rank: exact in factors",
    "entrywise": "entry-wise: forms one module's ΔW at a time; the result is truncated to a rank",
    "search": "a search for weights, then a linear merge",
}


def pages() -> dict[str, str]:
    """File name -> text: README.md and a page for each row of METHODS."""
    found = {f"{name}.md": page(name, row) for name, row in METHODS.items()}
    return {"README.md": index()} | found


def page(name: str, row: Method) -> str:
    text, notes = described(row)
    lines = [f"# {name}", "", f"{row.summary[0].upper()}{row.summary[1:]}.", "", text, ""]
    for label, note in notes.items():
        lines += [f"**{label}** {note}", ""]
    lines += ["| | |", "|---|---|", f"| kind | {KINDS[row.kind]} |", f"| source | {_source(row)} |"]
    options = ", ".join(f"`{key}` {value}" for key, value in row.defaults.items())
    lines += [f"| options and defaults | {options or 'none'} |"]
    if row.kind != "search":
        uniform = "" if row.weights == "fixed" else f"; where none are given: {row.uniform} each"
        lines += [f"| weights | {WEIGHTS[row.weights]}{uniform} |"]
    lines += [f"| data | {_needs(row)} |"]
    if row.seeded:
        lines += ["| random | draws from a generator of each module's own, set by `--seed` |"]
    if row.kind != "search":
        lines += ["", "With its defaults:", ""]
        lines += [f"- {(KEPT if kept in row.keeps else LOST)[kept]}" for kept in KEPT]
    lines += ["", "```bash", _command(name, row), "```", ""]
    return "\n".join(lines)


def described(row: Method) -> tuple[str, dict[str, str]]:
    """(the docstring without its notes, the notes); MergeError where one is missing."""
    paragraphs = (inspect.getdoc(row.function) or "").split("\n\n")
    said = re.split(rf"^({'|'.join(NOTES)}): ", paragraphs[-1], flags=re.MULTILINE)
    notes = {said[k]: " ".join(said[k + 1].split()) for k in range(1, len(said), 2)}
    if tuple(notes) != NOTES:
        raise MergeError(
            f"the docstring of '{row.function.__name__}' ends with {list(notes)}; expected a last "
            f"paragraph with {', '.join(NOTES)}, each at the start of a line"
        )
    body = (" ".join(part.split()) for part in paragraphs[:-1])
    return "\n\n".join(body), notes


def index() -> str:
    lines = [_INTRODUCTION, "| method | what | kind | data | source |", "|---|---|---|---|---|"]
    for name, row in METHODS.items():
        summary = row.summary.replace("|", "\\|")
        data = ", ".join(row.needs) or "–"
        lines += [f"| [`{name}`]({name}.md) | {summary} | {row.kind} | {data} | {_source(row)} |"]
    return "\n".join([*lines, ""])


def _source(row: Method) -> str:
    for pattern, address in (
        (r"arXiv:(\S+)", "https://arxiv.org/abs/"),
        (r"doi:(\S+)", "https://doi.org/"),
    ):
        if found := re.search(pattern, row.source):
            link = f"[{found[0]}]({address}{found[1]})"
            return row.source.replace(found[0], link)
    return row.source


def _needs(row: Method) -> str:
    if "batches" in row.needs:
        return "the base model, and the calibration batch of each adapter's probe"
    if row.needs:
        return f"the {' and '.join(row.needs)} moments of each adapter's probe"
    return "none"


def _command(name: str, row: Method) -> str:
    words = [f"mergeprobe merge adapters/ --method {name}"]
    if row.defaults:
        key, value = next(iter(row.defaults.items()))
        words += [f"--option {key}={value}"]
    words += ["--probes probes/"] * bool(row.needs)
    words += ["--base BASE"] * ("batches" in row.needs)
    words += ["--rank 32"] * (row.kind == "entrywise")
    return " ".join([*words, "--out merged/"])


_INTRODUCTION = """# Merge rules

One page each, made from the table and the docstrings by
`python -m mergeprobe.compose.merge.pages docs/methods`; a test keeps them in step.

Every rule acts on true updates, ΔW = scaling · B A with all that a variant changes in it, never on
A's and B's apart, and writes one plain LoRA with the relative error of what was written against the
exact rule. Rules without data also run in the small spaces of the updates (`--space knots`,
`--space core`). On the command line every option is `--option name=value`; from Python,
`mergeprobe.compose.merge_folders(folders, method, out=..., **options)`.
"""


def write(folder: Path) -> None:
    for name, text in pages().items():
        with atomic_file(folder / name) as temporary:
            temporary.write_text(text, "utf-8")
    for stale in set(folder.glob("*.md")) - {folder / name for name in pages()}:
        stale.unlink()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
