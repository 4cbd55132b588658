"""Tasks: the demo's, the bank's embedded ones, and those read from a folder of real data."""

from mergeprobe.bench.tasks.bank import BANK_TASKS, RELATIONS, Relation, find_task
from mergeprobe.bench.tasks.demo import DEMO_TASKS, EASY_TASKS
from mergeprobe.bench.tasks.gym import GYM_TASKS
from mergeprobe.bench.tasks.real import real_tasks
from mergeprobe.bench.tasks.task import SHARES, Item, Pool, Split, Task, split_of

__all__ = [
    "BANK_TASKS",
    "DEMO_TASKS",
    "EASY_TASKS",
    "GYM_TASKS",
    "RELATIONS",
    "SHARES",
    "Item",
    "Pool",
    "Relation",
    "Split",
    "Task",
    "find_task",
    "real_tasks",
    "split_of",
]
