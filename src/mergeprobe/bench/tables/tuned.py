"""Merges of all adapters of a cohort at other lengths than the rule's own: what is tuned by hand.

They need adapters, which rows do not hold: benchmarks/tuned_merges.py writes them beside a cohort's
rows, as tuned.parquet: outcome rows with a `length` that the merged update was multiplied by.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

FILE = "tuned.parquet"


def read_tuned(folders: Path | Sequence[Path]) -> pl.DataFrame | None:
    """Outcome rows with `length`; None where there is no such file."""
    listed = [Path(folders)] if isinstance(folders, str | Path) else [Path(f) for f in folders]
    files = [file for f in listed for file in (*f.glob(FILE), *sorted(f.glob(f"*/{FILE}")))]
    if not files:
        return None
    return pl.concat([pl.read_parquet(file) for file in files], how="diagonal_relaxed")
