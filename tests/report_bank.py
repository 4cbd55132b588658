"""The synthetic bank with names, costs and half-measured retention, as reports need them."""

from __future__ import annotations

import numpy as np
import polars as pl
from synthetic_bank import METHODS, bank

from mergeprobe.artefact import write_parquet

PER_RANK = 1000


def reported(*, trained=5, held=3, members=4, repeats=1, seed=0, everything=True):
    """Tables of cohorts t1… and h1… whose families differ; h1-again repeats h1.

    everything: also the whole set, a joint adapter, and adapters cut to rank 2.
    """
    learnt = bank(trained, 4 * members, members=members, seed=seed).tables()
    frozen = bank(held, 2 * members, members=members, repeats=repeats, seed=seed + 1).tables()
    tables = {}
    for name in learnt:
        mine = _renamed(learnt[name], "t", "")
        tables[name] = pl.concat([mine, _renamed(frozen[name], "h", "new_")], how="diagonal")
    tables["outcomes"] = _complete(tables, everything, np.random.default_rng(seed))
    return tables


def write_cohorts(tables, folder):
    for cohort in tables["adapters"]["cohort"].unique().to_list():
        for name, table in tables.items():
            write_parquet(
                table.filter(pl.col("cohort") == cohort), folder / cohort / f"{name}.parquet"
            )
    return folder


def _renamed(table, letter, prefix):
    number = pl.col("cohort").str.extract(r"c(\d+)").cast(pl.Int64) + 1
    again = pl.when(pl.col("cohort").str.ends_with("again")).then(pl.lit("-again"))
    named = pl.lit(letter) + number.cast(pl.String) + again.otherwise(pl.lit(""))
    changed = [named.alias("cohort")]
    if "family" in table.columns:
        # other families than those that are trained on, with tasks of the same names
        changed.append((pl.lit(prefix) + pl.col("family")).alias("family"))
        changed.append((pl.lit(prefix) + pl.col("task")).alias("task"))
    return table.with_columns(changed)


def _complete(tables, everything, generator):
    ranks = {(r["cohort"], r["adapter"]): r["rank"] for r in tables["adapters"].to_dicts()}
    rows = [_costed(row, ranks, generator) for row in tables["outcomes"].to_dicts()]
    if everything:
        for cohort in sorted({cohort for cohort, _ in ranks}):
            rows += _whole(cohort, ranks, rows, generator)
    return pl.DataFrame(rows, infer_schema_length=None)


def _costed(row, ranks, generator):
    members = row["set"].split("+")
    rank = row.get("rank") or max(ranks[row["cohort"], name] for name in members)
    kept = row["gain_retention"]
    halves = {f"gain_retention_{h}": kept + generator.normal(0, 0.02) for h in ("even", "odd")}
    return {**row, "rank": rank, "resident_parameters": PER_RANK * rank, **halves}


def _whole(cohort, ranks, rows, generator):
    """The whole set: every pair's harm added up; the joint adapter; each adapter at rank 2."""
    names = sorted(name for c, name in ranks if c == cohort)
    pairs = {
        (row["adapter"], row["set"], row["method"]): row for row in rows if row["cohort"] == cohort
    }
    found = []
    for name in names:
        first = pairs[name, "+".join(sorted((name, next(n for n in names if n != name)))), "mean"]
        for method in METHODS:
            harm = sum(
                1.0 - pairs[name, "+".join(sorted((name, other))), method]["gain_retention"]
                for other in names
                if other != name
            )
            found.append(
                {**first, "set": "+".join(names), "method": method, "gain_retention": 1.0 - harm}
            )
        found.append({**first, "set": "+".join(names), "method": "joint", "gain_retention": 0.93})
        cut = {"set": name, "method": "truncated", "rank": 2, "gain_retention": 0.97}
        found.append({**first, **cut})
    return [
        _costed(
            {**row, "rank": row["rank"] if row["method"] == "truncated" else None}, ranks, generator
        )
        for row in found
    ]
