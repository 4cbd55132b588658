"""A tiny cohort, and what its rows are compared by."""

import polars as pl

from mergeprobe.bench.bank.rows import TABLES
from mergeprobe.bench.bank.spec import AdapterSpec, CohortSpec

METHODS = ("mean", "sum", "ties")
KEYS = {
    "adapters": ["cohort", "adapter"],
    "pairs": ["cohort", "point", "i", "j"],
    "sets": ["cohort", "point", "adapter", "set"],
    "truncations": ["cohort", "point", "adapter", "rank"],
    "outcomes": ["cohort", "adapter", "set", "method", "rank"],
}
THREE = ("math", "instruction", "safety")
SORTED = tuple(sorted(THREE))


def tiny(base, **changes):
    """Three adapters of rank 2, 3 and 4; the first is longer than a checkpoint's 20 steps."""
    adapters = tuple(
        AdapterSpec(
            name=task, task=task, seed=k, rank=2 + k, steps=(24, 12, 14)[k], learning_rate=1e-2
        )
        for k, task in enumerate(THREE)
    )
    options = {
        "points": (0.25, 1.0),
        "test_items": 8,
        "calibration_items": 8,
        "forecast_items": 4,
        "methods": METHODS,
    }
    return CohortSpec(name="tiny", base=str(base), adapters=adapters, **options | changes)


def read(rows):
    return {name: pl.read_parquet(rows / f"{name}.parquet") for name in TABLES}


def same_rows(ours, theirs):
    """The same keys, and the same numbers up to rounding."""
    for name, columns in KEYS.items():
        tables = [read(rows)[name] for rows in (ours, theirs)]
        if not any(len(table) for table in tables):  # nothing of that kind was asked for
            continue
        a, b = (table.sort(columns) for table in tables)
        assert a.select(columns).equals(b.select(columns)), name
        assert a.columns == b.columns
        for column in a.columns:
            if a[column].dtype.is_float():
                far = (a[column] - b[column]).abs() > 1e-3 + 1e-3 * b[column].abs()
                assert not far.any(), (name, column)
                assert a[column].is_null().equals(b[column].is_null())
            elif column != "note":
                assert a[column].equals(b[column]), (name, column)
