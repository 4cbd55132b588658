"""The bank as the tables see it: its rows, and which cohorts are trained on and which held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from mergeprobe.bench.tables.beside import AUDIT_FILE, TUNED_FILE, read_beside
from mergeprobe.bench.tables.page import listed
from mergeprobe.errors import DataError
from mergeprobe.predict.learning import Rows, learning_rows, measured_rows, read_tables
from mergeprobe.predict.splits import Fold, unseen_cohorts

TRAINED, HELD_OUT = "t", "h"
"""What the names of cohorts to learn from, and of frozen ones, begin with; others ("real", a
second base) are in cross-validation and transfer only."""


@dataclass(frozen=True, eq=False)
class Bank:
    """tables: adapters, pairs, outcomes; of all cohorts. rows: what is learned from.
    measured: learning.measured_rows, of repeats that nothing is forecast of, too.
    trained, held_out: names of cohorts; either can be empty. audits, tuned: see beside."""

    tables: dict[str, pl.DataFrame]
    rows: Rows
    measured: pl.DataFrame
    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    audits: pl.DataFrame | None = None
    tuned: pl.DataFrame | None = None

    def held_out_fold(self) -> Fold | None:
        """Trained on `trained` without families of the held-out cohorts, tested on these; None
        where one side is empty."""
        if not self.trained or not self.held_out:
            return None
        return unseen_cohorts(self.rows, [self.held_out], among=self.trained)[0]

    def apart(self) -> list[str]:
        """Cohorts on a base model that is trained on, neither trained on nor held out."""
        cohort, base = self.rows.cohort, self.rows.table["base"].to_numpy()
        known = set(base[np.isin(cohort, self.trained)].tolist())
        there = set(cohort[np.isin(base, list(known))].tolist())
        return sorted(there - {*self.trained, *self.held_out})

    def cohort(self, name: str) -> dict[str, pl.DataFrame]:
        found = {key: t.filter(pl.col("cohort") == name) for key, t in self.tables.items()}
        if self.tuned is not None:
            found["tuned"] = self.tuned.filter(pl.col("cohort") == name)
        return found

    def said(self, what: str) -> str:
        """The middle of a caption: what was trained on and tested, of how many adapters."""
        fold = self.held_out_fold()
        if fold is None:
            return what
        tested = self.rows.pick(fold.test)
        families = len(tested.holds()[0])
        return (
            f"{what}; trained on {len(self.trained)} cohorts ({listed(self.trained)}), tested on "
            f"{len(self.held_out)} ({listed(self.held_out)}) with {families} other families; one "
            "run an adapter"
        )


def open_bank(folders: Path | Sequence[Path], *, held_out: Sequence[str] = ()) -> Bank:
    """held_out: names of cohorts; by default those whose name begins with HELD_OUT. DataError for
    an unknown one, or as of learning.read_tables."""
    tables = read_tables(folders)
    bank = made_bank(tables, held_out=held_out)
    audits, tuned = read_beside(folders, AUDIT_FILE), read_beside(folders, TUNED_FILE)
    return replace(bank, audits=audits, tuned=tuned)


def made_bank(tables: dict[str, pl.DataFrame], *, held_out: Sequence[str] = ()) -> Bank:
    names = sorted(tables["adapters"]["cohort"].unique().to_list())
    if unknown := sorted(set(held_out) - set(names)):
        raise DataError(f"no cohort '{unknown[0]}' to hold out; there are {', '.join(names)}")
    rows = learning_rows(**tables)
    probed = set(rows.table["cohort"].unique())
    frozen = tuple(held_out) or tuple(n for n in names if n.startswith(HELD_OUT) and n in probed)
    rest = [name for name in names if name not in frozen and name in probed]
    trained = [name for name in rest if name.startswith(TRAINED)] or rest
    measured = measured_rows(tables["adapters"], tables["outcomes"])
    return Bank(tables, rows, measured, tuple(trained), frozen)


def near(rows: Rows, point: float) -> np.ndarray:
    return np.abs(rows.point - point) < 1e-9


def points_of(rows: Rows) -> list[float]:
    return sorted({round(float(p), 6) for p in rows.point})
