"""Where a cohort's tasks come from: the bank's own, the demo's, or a folder of real data."""

from __future__ import annotations

from pathlib import Path

from mergeprobe.bench.tasks import BANK_TASKS, DEMO_TASKS, Task
from mergeprobe.errors import DataError


def known_tasks(data: Path | None) -> dict[str, Task]:
    """Every task by name."""
    return DEMO_TASKS | BANK_TASKS


def task_of(name: str, data: Path | None) -> Task:
    """The task; DataError if there is none of that name (or it needs a data folder)."""
    known = known_tasks(data)
    if name not in known:
        hint = "" if data is not None else " (real tasks need --data FOLDER)"
        raise DataError(f"no task '{name}'{hint}; known are {', '.join(sorted(known))}")
    return known[name]
