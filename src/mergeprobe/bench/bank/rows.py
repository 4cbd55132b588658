"""Rows of a cohort: its working files, collated into five tables.

adapters: one row per adapter. pairs: one per (point, i, j): what j does to i. sets: one per
(point, adapter, set) of three or more. truncations: one per (point, adapter, smaller rank): what
the snapshot keeps. outcomes: one per (adapter, set, method, rank). Collating reads only files that
are never changed, so doing it twice gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import polars as pl

from mergeprobe.artefact import atomic_folder, read_json, write_parquet
from mergeprobe.bench.bank.folder import CohortFolder, read_spec, refuse_other, write_spec
from mergeprobe.bench.bank.tasks import task_of
from mergeprobe.bench.measure import Measured, read_measured
from mergeprobe.bench.outcomes import outcome_row
from mergeprobe.errors import DataError, NotForecastable
from mergeprobe.evaluate.retention import retention
from mergeprobe.predict import surrogate
from mergeprobe.predict.signal_rows import signal_rows

TABLES = ("adapters", "pairs", "sets", "truncations", "outcomes")
SPEC = "cohort.json"


def collated(folder: CohortFolder, out: Path) -> bool:
    """Whether the cohort's rows are in `out`; OutputExists if those of another spec are."""
    target = out / folder.spec.name
    if not (target / SPEC).exists():
        return False
    refuse_other(read_spec(target / SPEC)[0], folder.spec, target)
    return all((target / f"{name}.parquet").exists() for name in TABLES)


def collate(folder: CohortFolder, out: Path) -> Path:
    """Writes OUT/<cohort>/ with the tables and the spec, whole or not at all."""
    made_by = folder.made_by()
    rows = {
        "adapters": adapter_rows(folder, made_by),
        "pairs": _joined(folder, pair_rows),
        "sets": _joined(folder, set_rows),
        "truncations": _joined(folder, truncation_rows),
        "outcomes": outcomes(folder),
    }
    target = out / folder.spec.name
    with atomic_folder(target, force=True) as temporary:
        for name in TABLES:
            write_parquet(rows[name], temporary / f"{name}.parquet")
        write_spec(temporary / SPEC, folder.spec, made_by)
    return target


def adapter_rows(folder: CohortFolder, made_by: str) -> pl.DataFrame:
    """What each adapter is, and what it gained alone; losses in nats a token."""
    spec, rows = folder.spec, []
    for name in spec.names:
        mine, task = spec.adapter(name), task_of(spec.adapter(name).task, folder.data)
        base, single = (read_measured(folder.measured, m) for m in folder.singles(name))
        own = retention(base.losses[name], single.losses[name], single.losses[name])
        rows.append(
            {
                "cohort": spec.name,
                "base": spec.base,
                "base_fingerprint": _fingerprint(folder, name),
                "adapter": name,
                "task": mine.task,
                "family": task.family,
                "domain": task.domain,
                "seed": mine.seed,
                "rank": mine.rank,
                "alpha": mine.alpha,
                "learning_rate": mine.learning_rate,
                "steps": mine.steps,
                "batch_size": mine.batch_size,
                "init": mine.init,
                "data_items": len(folder.training_examples(name)),
                "loss_base": float(base.losses[name].mean()),
                "loss_single": float(single.losses[name].mean()),
                "own_gain": own.own_gain,
                "own_gain_se": own.own_gain_se,
                "accuracy_base": base.accuracy(name),
                "accuracy_single": single.accuracy(name),
                "made_by": made_by,
            }
        )
    return pl.DataFrame(rows)


def _fingerprint(folder: CohortFolder, name: str) -> str:
    card = read_json(folder.adapters / name / "mergeprobe.json", DataError)
    return card["base_fingerprint"]


def outcomes(folder: CohortFolder) -> pl.DataFrame:
    """Retention of every adapter under every merge, and of it alone at smaller ranks; also on the
    even and the odd test items apart, to choose on one half and score on the other."""
    spec, rows = folder.spec, []
    alone = {
        name: tuple(read_measured(folder.measured, m) for m in folder.singles(name))
        for name in spec.names
    }
    for wanted in [*folder.merges(), *folder.truncations()]:
        found = read_measured(folder.measured, wanted)
        for name in wanted.adapters:
            base, single = alone[name]
            row = outcome_row(name, wanted, base, single, found, seed=spec.adapter(name).seed)
            apart = halves(name, base, single, found)
            rows.append({"cohort": spec.name, "size": len(wanted.adapters), **row, **apart})
    return pl.DataFrame(rows, infer_schema_length=None)


def halves(name: str, *parts: Measured) -> dict[str, float | None]:
    """Retention on the even and on the odd test items, of (base, single, merged)."""
    losses = [part.losses[name] for part in parts]
    even, odd = (retention(*(loss[half::2] for loss in losses)).gain for half in (0, 1))
    return {"gain_retention_even": even, "gain_retention_odd": odd}


class PointFiles:
    """Everything measured at one probe point, read once."""

    def __init__(self, folder: CohortFolder, point: float) -> None:
        self.folder, self.spec, self.point = folder, folder.spec, point
        tier = folder.file_tier(point)
        found = {path.stem: pl.read_parquet(path) for path in sorted(tier.glob("*.parquet"))}
        quadratic = surrogate.from_tables(found["quadratic"], found["linear"], found["facts"])
        try:
            lengths = surrogate.lengths(quadratic, found["facts"])
        except NotForecastable:  # a probe at the first step has no half-way sketch
            lengths = None
        self.signals = signal_rows(found, found["facts"], quadratic, lengths)
        names = self.spec.names
        self.measured = point in self.spec.measured_points
        self.early = {
            name: read_json(folder.early(name, point), DataError) if self.measured else {}
            for name in names
        }

    @property
    def key(self) -> dict[str, Any]:
        return {"cohort": self.spec.name, "point": self.point}


def pair_rows(files: PointFiles) -> list[dict[str, Any]]:
    pairs = permutations(files.spec.names, 2)
    return [files.key | files.signals.pair(i, j, _early_pair(files, i, j)) for i, j in pairs]


def _early_pair(files: PointFiles, i: str, j: str) -> dict[str, float]:
    """The model tier's part of a row, where it was measured."""
    if not files.measured:
        return {}
    both = read_json(files.folder.early_pair(i, j, files.point), DataError)
    return {
        **files.early[i]["pairs"][j],
        **{f"early_retention_{m}": v for m, v in both["retention"][i].items()},
        "joint_gradient_cosine": both["cosine"],
    }


def set_rows(files: PointFiles) -> list[dict[str, Any]]:
    rows = []
    for group in files.spec.larger_sets():
        for name in group:
            # only at set_points
            early = files.early[name].get("sets", {}).get("+".join(group), {})
            rows.append(files.key | files.signals.group(name, group, early))
    return rows


def truncation_rows(files: PointFiles) -> list[dict[str, Any]]:
    """early_retention: share of the snapshot's own gain at its best length; error: of the cut."""
    rows = []
    for name in dict(files.spec.truncations()) if files.measured else ():
        found = read_json(files.folder.cut(name, files.point), DataError)
        for rank, kept in found["ranks"].items():
            rows.append(files.key | {"adapter": name, "rank": int(rank)} | kept)
    return rows


EXACT = ("point",)  # kept in double precision: they are compared for equality


def _joined(folder: CohortFolder, make: Any) -> pl.DataFrame:
    """Rows of all points as one table; measured numbers in single precision, not finite as null."""
    rows = []
    for point in folder.spec.points:
        rows += [_finite(row) for row in make(PointFiles(folder, point))]
    if not rows:  # of a kind that the cohort does not have
        return pl.DataFrame(schema={"cohort": pl.String, "point": pl.Float64})
    frame = pl.DataFrame(rows, infer_schema_length=None)
    # a column without any value has no type of its own
    measured = [
        name
        for name, dtype in frame.schema.items()
        if name not in EXACT and dtype in (pl.Float64, pl.Null)
    ]
    return frame.with_columns(pl.col(measured).cast(pl.Float32))


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
