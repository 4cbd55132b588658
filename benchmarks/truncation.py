"""What finished adapters keep at smaller ranks, against what their snapshots kept: the bank's rows.

    python benchmarks/truncation.py [--rows src/mergeprobe/bank]

Residual: measured retention of the finished adapter cut to a rank, minus the snapshot's share at
the same rank (at most 1). trimming.BELOW and ABOVE are its range at 5 and 10 % of training.
"""

import argparse
from pathlib import Path

import polars as pl


def residuals(rows: Path) -> pl.DataFrame:
    found = []
    for folder in sorted(path.parent for path in rows.glob("*/truncations.parquet")):
        early = pl.read_parquet(folder / "truncations.parquet")
        final = pl.read_parquet(folder / "outcomes.parquet").filter(method="truncated")
        both = early.join(final, on=["cohort", "adapter", "rank"], suffix="_final")
        found.append(
            both.select("cohort", "point", "adapter", "rank", "early_retention", "gain_retention")
        )
    share = pl.col("early_retention").clip(upper_bound=1.0)
    return pl.concat(found).with_columns((pl.col("gain_retention") - share).alias("residual"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=Path("src/mergeprobe/bank"))
    table = residuals(parser.parse_args().rows)
    cohorts = ", ".join(table["cohort"].unique().sort())
    print(f"cohorts {cohorts}: {table['adapter'].n_unique()} adapters, one run each")
    by_point = table.group_by("point").agg(
        pl.len().alias("n"),
        pl.col("gain_retention").min().alias("measured, worst"),
        pl.col("residual").abs().mean().alias("MAE"),
        pl.col("residual").min().alias("residual from"),
        pl.col("residual").max().alias("to"),
    )
    by_rank = (
        table.filter(point=0.05)
        .group_by("rank")
        .agg(
            pl.len().alias("n"),
            pl.col("gain_retention").mean().alias("measured, mean"),
            pl.col("gain_retention").min().alias("measured, worst"),
        )
    )
    with pl.Config(
        tbl_hide_dataframe_shape=True, float_precision=3, tbl_hide_column_data_types=True
    ):
        print(by_point.sort("point"), by_rank.sort("rank"), sep="\n")


if __name__ == "__main__":
    main()
