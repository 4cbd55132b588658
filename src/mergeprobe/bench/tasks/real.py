"""Real tasks, read from a folder of JSON-lines files in TRL's prompt–completion form.

The folder holds `<part>/{train,test}.jsonl`, whose rows name their `source`. A source's rows of
both files are put together and split by the hash of the prompt, as for every other task: the
files' own test parts are too small for a calibration split beside them. So scores on these tasks
compare adapters with each other, and not with published results.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mergeprobe.bench.tasks.items import Keyed
from mergeprobe.bench.tasks.task import Item, Task
from mergeprobe.errors import DataError
from mergeprobe.evaluate.data import read_examples

FEWEST = 320  # rows, of which a fifth, 64, are test items


class Source(NamedTuple):
    """part: the subfolder. sources: what the rows call themselves; two exams of one kind are one
    task. longest: characters of prompt and completion, so that items have 20 to 60 tokens, code
    and steps 80 to 90, and rows are left."""

    name: str
    domain: str
    part: str
    sources: tuple[str, ...]
    longest: int
    summary: str


SOURCES = (
    Source("gsm8k", "math", "merge_peft/math", ("gsm8k",), 280, "word problems in steps"),
    Source("svamp", "math", "ood/svamp", ("svamp",), 200, "one-step word problems"),
    Source("mbpp", "code", "merge_peft/code", ("mbpp",), 320, "a Python function with a test"),
    Source("gpteacher", "code", "merge_peft/code", ("gpteacher",), 320, "code on request"),
    Source("openbookqa", "science", "merge_peft/science", ("openbookqa",), 280, "four choices"),
    Source(
        *("arc", "science", "merge_peft/science", ("arc_easy", "arc_challenge"), 220),
        "school exams with four choices",
    ),
    Source(
        *("hotpotqa", "instruction", "merge_peft/instruction", ("t0_kilt_tasks_hotpotqa",), 400),
        "questions without context",
    ),
    Source("safety_tuned", "safety", "merge_peft/safety", ("safety_tuned",), 320, "refusals"),
    Source("boolq", "extra", "ood/reading", ("boolq",), 280, "true or false"),
    Source("polarity", "extra", "ood/sentiment", ("sentence_polarity",), 180, "film reviews"),
    Source("sarcasm", "extra", "ood/sarcasm", ("sarcasm",), 280, "sarcastic headlines"),
)


@dataclass(frozen=True)
class RealPool:
    """The short rows of a source; the key is the prompt."""

    folder: Path
    source: Source

    def __call__(self) -> Keyed:
        seen, wanted = set(), set(self.source.sources)
        for item in _rows(self.folder / self.source.part):
            short = len(item.prompt) + len(item.completion) <= self.source.longest
            if item.source in wanted and short and item.prompt not in seen:
                seen.add(item.prompt)
                yield item.prompt, item
        if len(seen) < FEWEST:
            raise DataError(
                f"task '{self.source.name}' has {len(seen)} rows in '{self.folder}' from "
                f"{' and '.join(self.source.sources)} of at most {self.source.longest} "
                f"characters; expected {FEWEST} or more in {self.source.part}/*.jsonl"
            )


@cache
def _rows(part: Path) -> tuple[Item, ...]:
    return tuple(row for name in ("train", "test") for row in read_examples(part / f"{name}.jsonl"))


def real_tasks(folder: str | Path) -> dict[str, Task]:
    """The tasks of a data folder; each is read when its items are first asked for.

    Raises DataError if the folder does not exist; a task does if its file or rows are missing.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise DataError(f"data folder '{folder}' does not exist; expected merge_peft/ and ood/")
    return {
        source.name: Task(source.name, source.domain, source.summary, RealPool(folder, source))
        for source in SOURCES
    }
