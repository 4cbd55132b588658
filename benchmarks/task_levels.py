"""How far the tasks are from floor and ceiling: loss and exact answers of the base, and after LoRA.

    python benchmarks/task_levels.py --data FOLDER --out docs/results/tasks.md

Every embedded task of the bank, and with --data those of the folder: on test items the base's loss
(nats per completion token, ± the standard error over items), the share of the answer's tokens that
are its first choice when it is shown those before (the end token, which a base does not know to
give, is left out), and the share of exact answers, of which every token is and the end token too;
of tasks that a cohort's rows hold (--rows), the adapter's, from those rows, over its cohorts. About
six minutes on one core.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from pathlib import Path

import polars as pl
import torch

from mergeprobe.adapters.base import Base, load_base
from mergeprobe.bench.tables.page import grid, number, percent
from mergeprobe.bench.tasks import BANK_TASKS, real_tasks
from mergeprobe.capture.batch import Batch, completion_logits
from mergeprobe.errors import MergeProbeError
from mergeprobe.evaluate.score import batch_of, score
from mergeprobe.predict.refit import OURS

COLUMNS = (
    "domain",
    "task",
    "family",
    "loss, base",
    "tokens, base",
    "exact, base",
    "loss, adapter",
    "exact, adapter",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m-instruct-q4")
    parser.add_argument("--rows", type=Path, default=OURS)
    parser.add_argument("--data", type=Path, help="a folder of real data, as of `mergeprobe bench`")
    parser.add_argument("--items", type=int, default=32)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted(asked.rows.glob("*/adapters.parquet"))
    if not files:
        parser.error(f"'{asked.rows}' holds no cohorts: expected folders with adapters.parquet")
    read = pl.concat([pl.read_parquet(file) for file in files], how="diagonal_relaxed")
    trained = read.filter(pl.col("base") == asked.base)
    try:
        tasks = BANK_TASKS | (real_tasks(asked.data) if asked.data else {})
        base = load_base(asked.base)
    except MergeProbeError as problem:
        parser.error(str(problem))
    rows = []
    for place, (name, task) in enumerate(tasks.items()):
        print(f"\r{place + 1} of {len(tasks)}: {name:24s}", end="", file=sys.stderr, flush=True)
        batch = batch_of(base, task.generate("test", asked.items, 0))
        with torch.inference_mode():
            found = score(base, None, batch)
            tokens = answer_tokens(base, batch)
        error = float(found.loss.std()) / math.sqrt(asked.items)
        exact = percent(float(found.exact.double().mean()))
        mine = trained.filter(pl.col("task") == name)
        after = [number(mean(mine, "loss_single")), "–"]
        if mine.height:
            after[1] = percent(mean(mine, "accuracy_single"))
        loss = f"{number(float(found.loss.mean()))} ± {number(error)}"
        rows.append((task.domain, name, task.family, loss, percent(tokens), exact, *after))
    page = (
        "# The tasks: before and after training\n\n"
        f"    {command(sys.argv)}\n\n{grid(COLUMNS, rows)}\n\n"
        f"*{asked.items} test items a task, ± the standard error over items; after training: means "
        "over an adapter's cohorts, on the items of its rows, – where no cohort trained it. "
        "Loss in nats per token of the completion. Tokens: of the answer without its end token, "
        "each after the right ones before it.*\n"
    )
    if asked.out is None:
        print(page)
    else:
        asked.out.write_text(page, encoding="utf-8")


def answer_tokens(base: Base, batch: Batch) -> float:
    """Share of the answers' tokens, end tokens left out, that are the base's first choice."""
    logits, targets, items = completion_logits(base.model, batch)
    answer = torch.ones_like(items, dtype=torch.bool)
    answer[:-1] = items[1:] == items[:-1]  # an item's last token is its end token
    answer[-1] = False
    return float((logits.argmax(-1) == targets)[answer].double().mean())


def mean(table: pl.DataFrame, column: str) -> float:
    return float(table[column].cast(pl.Float64).mean() or 0.0) if table.height else math.nan


def command(argv: list[str]) -> str:
    return shlex.join(["python", "benchmarks/task_levels.py", *argv[1:]])


if __name__ == "__main__":
    main()
