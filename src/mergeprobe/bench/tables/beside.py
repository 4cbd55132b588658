"""What is measured of a cohort apart from its rows, because it needs adapters, which rows do not
hold: files beside the rows, written by a benchmark each.

AUDIT_FILE: the post-hoc audit of `gradience` on finished adapters (benchmarks/gradience_audit.py).
TUNED_FILE: merges of all adapters at other lengths than their own (benchmarks/tuned_merges.py):
outcome rows with a `length` that the merged update was multiplied by.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

AUDIT_FILE, TUNED_FILE = "audits.parquet", "tuned.parquet"


def read_beside(folders: Path | Sequence[Path], file: str) -> pl.DataFrame | None:
    """This file of every cohort that has it, as one table; None where none has."""
    listed = [Path(folders)] if isinstance(folders, str | Path) else [Path(f) for f in folders]
    files = [found for f in listed for found in (*f.glob(file), *sorted(f.glob(f"*/{file}")))]
    if not files:
        return None
    return pl.concat([pl.read_parquet(found) for found in files], how="diagonal_relaxed")
