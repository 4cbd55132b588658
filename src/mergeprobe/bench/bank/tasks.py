"""Where a cohort's tasks come from: the bank's own, the demo's, or a folder of real data."""

from __future__ import annotations

from pathlib import Path

from mergeprobe.bench.bank.spec import CohortSpec
from mergeprobe.bench.tasks import DEMO_TASKS, Task, find_task
from mergeprobe.errors import DataError


def task_of(name: str, data: Path | None) -> Task:
    """The task; DataError if there is none of that name (or it needs a data folder)."""
    return DEMO_TASKS[name] if name in DEMO_TASKS else find_task(name, data)


def check_tasks(spec: CohortSpec, data: Path | None) -> None:
    """DataError now, rather than in hours, for a task that is unknown or too small."""
    for adapter in spec.adapters:
        task = task_of(adapter.task, data)
        wanted = {"train": 1, "calibration": spec.calibration_items, "test": spec.test_items}
        for split, count in wanted.items():
            found = task.size(split)  # type: ignore[arg-type]
            if found < count:
                raise DataError(
                    f"cohort '{spec.name}': task '{task.name}' has {found} {split} items, "
                    f"{count} are needed"
                )
