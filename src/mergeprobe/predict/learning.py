"""Bank tables -> learning rows: features and retention of every (adapter, set, method, point).

A bank is a folder of cohorts, each with adapters.parquet, pairs.parquet and outcomes.parquet; the
user's own rows have the same layout. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Bool, Float

from mergeprobe.errors import DataError
from mergeprobe.predict.feature_rows import feature_matrix
from mergeprobe.predict.features import COLUMNS
from mergeprobe.predict.ridge import METHODS

LOWEST, HIGHEST = -1.0, 1.2
"""Targets are clipped here: beyond, a retention says how small its denominator was."""
MIN_GAIN_SE = 2.0
HALF_WEIGHT_SE = 4.0
KEYS = ("cohort", "base", "point", "i", "set", "method")
NEEDED = {
    "adapters": ("cohort", "base", "adapter", "family"),
    "pairs": ("cohort", "point", "i", "j"),
    "outcomes": (
        *("cohort", "adapter", "set", "method", "gain_retention", "own_gain", "own_gain_se"),
        *("loss", "loss_single"),
    ),
}


@dataclass(frozen=True, eq=False)
class Rows:
    """Learning rows.

    table: KEYS, size, others, tasks, family_i, families, learning_rates, ranks, steps, domains
    (lists: of i first, then of the others), excess = log(L_merged/L_single). values: COLUMNS.
    target: retention in [LOWEST, HIGHEST]. weight: in (0, 1], a row whose own gain is four of its
    standard errors counts half. dropped: reason -> number of outcome rows left out.
    """

    table: pl.DataFrame
    values: Float[np.ndarray, "rows columns"]
    target: Float[np.ndarray, " rows"]
    weight: Float[np.ndarray, " rows"]
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.target)

    def pick(self, mask: Bool[np.ndarray, " rows"]) -> Rows:
        """The rows of a mask (or of indices, repeated ones too)."""
        mask = np.asarray(mask)
        index = np.flatnonzero(mask) if mask.dtype == bool else mask
        return Rows(self.table[index], self.values[index], self.target[index], self.weight[index])

    def select(self, columns: Sequence[str]) -> Float[np.ndarray, "rows picked"]:
        return self.values[:, [COLUMNS.index(name) for name in columns]]

    @property
    def cohort(self) -> np.ndarray:
        return self.table["cohort"].to_numpy()

    @property
    def method(self) -> np.ndarray:
        return self.table["method"].to_numpy()

    @property
    def size(self) -> np.ndarray:
        return self.table["size"].to_numpy()

    @property
    def point(self) -> np.ndarray:
        return self.table["point"].to_numpy()

    @property
    def family(self) -> np.ndarray:
        """Of i."""
        return self.table["family_i"].to_numpy()

    def holds(self, column: str = "families") -> tuple[list, Bool[np.ndarray, "rows values"]]:
        """The distinct entries of a list column, sorted, and which row holds which."""
        entries = self.table[column].to_list()
        names = sorted({one for row in entries for one in row})
        place = {name: k for k, name in enumerate(names)}
        held = np.zeros((len(entries), len(names)), bool)
        for row, members in enumerate(entries):
            held[row, [place[member] for member in members]] = True
        return names, held


def read_rows(
    folders: Path | Sequence[Path],
    *,
    cohorts: Sequence[str] | None = None,
    points: Sequence[float] | None = None,
) -> Rows:
    """Learning rows of every cohort in the folders (a cohort's own folder, or one that holds
    several). cohorts, points: only these. DataError if there is no cohort, or a table lacks what
    it must have."""
    return learning_rows(**read_tables(folders, cohorts=cohorts, points=points))


def read_tables(
    folders: Path | Sequence[Path],
    *,
    cohorts: Sequence[str] | None = None,
    points: Sequence[float] | None = None,
) -> dict[str, pl.DataFrame]:
    """The same as tables: adapters, pairs and outcomes."""
    found = [cohort for folder in _listed(folders) for cohort in _cohorts(folder)]
    if cohorts is not None:
        found = [folder for folder in found if folder.name in set(cohorts)]
    if not found:
        raise DataError(
            f"no cohort in {', '.join(str(f) for f in _listed(folders))}: expected a folder with "
            "adapters.parquet, pairs.parquet and outcomes.parquet"
        )
    each = [_read(folder) for folder in found]
    tables = {name: pl.concat([t[name] for t in each], how="diagonal_relaxed") for name in NEEDED}
    if points is not None:
        near = pl.any_horizontal([(pl.col("point") - p).abs() < 1e-9 for p in points])
        tables["pairs"] = tables["pairs"].filter(near)
    return tables


def learning_rows(
    adapters: pl.DataFrame,
    pairs: pl.DataFrame,
    outcomes: pl.DataFrame,
) -> Rows:
    """One row per outcome (sets of two or more, methods of ridge.METHODS) and probe point.

    Outcomes whose own gain is below MIN_GAIN_SE of its standard error have no retention and are
    dropped with a count; so are failed measurements, other methods, and adapters of a cohort that
    has no pair rows. In a fixed order: that of the keys.
    """
    for name, table in (("adapters", adapters), ("pairs", pairs), ("outcomes", outcomes)):
        if lost := [c for c in NEEDED[name] if c not in table.columns]:
            raise DataError(f"{name}.parquet lacks {', '.join(lost)}; got {table.columns[:8]} …")
    kept, dropped = _defined(outcomes)
    points = pairs.select("cohort", "point").unique()
    without = kept.join(points, on="cohort", how="anti").height
    kept = kept.join(points, on="cohort").sort("cohort", "point", "adapter", "set", "method")
    table = _described(kept, adapters)
    gain, noise = (kept[c].cast(pl.Float64).to_numpy() for c in ("own_gain", "own_gain_se"))
    return Rows(
        table=table,
        values=feature_matrix(table, pairs),
        target=kept["gain_retention"].cast(pl.Float64).clip(LOWEST, HIGHEST).to_numpy(),
        weight=1.0 / (1.0 + (HALF_WEIGHT_SE * noise / gain) ** 2),
        dropped=dropped | ({"no pair rows": without} if without else {}),
    )


def measured_rows(adapters: pl.DataFrame, outcomes: pl.DataFrame) -> pl.DataFrame:
    """The outcomes that have a retention (gain_retention), described as Rows.table is but for the
    point; also of cohorts without signals."""
    kept, _ = _defined(outcomes)
    table = _described(kept.with_columns(pl.lit(None, pl.Float64).alias("point")), adapters)
    return table.drop("point").with_columns(kept["gain_retention"])


def _defined(outcomes: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """The rows that have a retention to learn from, and how many of the others there were."""
    members = pl.col("set").str.split("+")
    tests = {
        "single adapters and other methods": (members.list.len() > 1)
        & pl.col("method").is_in(list(METHODS)),
        "own gain below two standard errors": (
            (pl.col("own_gain") >= MIN_GAIN_SE * pl.col("own_gain_se")) & (pl.col("own_gain") > 0)
        ).fill_null(False),
        "not measured": pl.col("gain_retention").is_not_null()
        & pl.col("gain_retention").cast(pl.Float64).is_finite(),
    }
    dropped = {}
    for reason, test in tests.items():
        before = outcomes.height
        outcomes = outcomes.filter(test)
        if before > outcomes.height:
            dropped[reason] = before - outcomes.height
    dropped.pop("single adapters and other methods", None)  # nobody expects those
    return outcomes, dropped


def _described(kept: pl.DataFrame, adapters: pl.DataFrame) -> pl.DataFrame:
    """KEYS and what is known of the adapters, i's own value first in every list."""
    facts = {(row["cohort"], row["adapter"]): row for row in adapters.iter_rows(named=True)}
    rows = []
    for row in kept.iter_rows(named=True):
        cohort, name = row["cohort"], row["adapter"]
        members = row["set"].split("+")
        others = sorted(set(members) - {name})
        unknown = [m for m in (name, *others) if (cohort, m) not in facts]
        if unknown or len(others) + 1 != len(members):
            raise DataError(
                f"cohort '{cohort}', set '{row['set']}': {unknown or name} is not an adapter of it"
            )
        group = [facts[cohort, m] for m in (name, *others)]
        own = max(row["loss_single"], 1e-9)
        rows.append(
            {
                "cohort": cohort,
                "base": group[0]["base"],
                "base_fingerprint": group[0].get("base_fingerprint") or "",
                "point": row["point"],
                "i": name,
                "set": "+".join(sorted(members)),
                "method": row["method"],
                "size": len(members),
                "others": others,
                "tasks": [m.get("task") or m["adapter"] for m in group],
                "family_i": group[0]["family"],
                "families": [m["family"] for m in group],
                "learning_rates": [float(m.get("learning_rate") or 0.0) for m in group],
                "ranks": [int(m.get("rank") or 0) for m in group],
                "steps": [int(m.get("steps") or 0) for m in group],
                "domains": [m.get("domain") or "" for m in group],
                "excess": float(np.log(max(row["loss"], 1e-9) / own)),
            }
        )
    return pl.DataFrame(rows, schema=SCHEMA)


_TEXT, _TEXTS = pl.String, pl.List(pl.String)
SCHEMA = {
    "cohort": _TEXT,
    "base": _TEXT,
    "base_fingerprint": _TEXT,
    "point": pl.Float64,
    "i": _TEXT,
    "set": _TEXT,
    "method": _TEXT,
    "size": pl.Int64,
    "others": _TEXTS,
    "tasks": _TEXTS,
    "family_i": _TEXT,
    "families": _TEXTS,
    "learning_rates": pl.List(pl.Float64),
    "ranks": pl.List(pl.Int64),
    "steps": pl.List(pl.Int64),
    "domains": _TEXTS,
    "excess": pl.Float64,
}


def _listed(folders: Path | Sequence[Path]) -> list[Path]:
    return [Path(folders)] if isinstance(folders, str | Path) else [Path(f) for f in folders]


def _cohorts(folder: Path) -> list[Path]:
    if (folder / "outcomes.parquet").exists():
        return [folder]
    return sorted(file.parent for file in folder.glob("*/outcomes.parquet"))


def _read(folder: Path) -> dict[str, pl.DataFrame]:
    tables = {}
    for name in NEEDED:
        file = folder / f"{name}.parquet"
        try:
            tables[name] = pl.read_parquet(file)
        except FileNotFoundError:
            raise DataError(f"cohort '{folder}' has no {name}.parquet") from None
        except pl.exceptions.PolarsError as problem:
            line = str(problem).splitlines()[0]
            raise DataError(f"'{file}' cannot be read as Parquet: {line}") from None
    return tables
