"""The audit of `gradience` (PyPI) on a bank's finished adapters, for `mergeprobe bench report`.

    pip install --no-deps gradience==0.11.0
    python benchmarks/gradience_audit.py --work runs/bank --rows runs/bank/rows

Writes audits.parquet into every cohort's folder of rows: its compatibility score of every pair,
from the adapters in WORK/<cohort>/adapters (kept unless --no-keep-snapshots). Symmetric, so each
pair stands there in both orders.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import polars as pl
from gradience.vnext.merge import merge_audit

from mergeprobe.artefact import write_parquet
from mergeprobe.bench.tables.beside import AUDIT_FILE


def audit(cohort: str, adapters: Path) -> pl.DataFrame:
    names = sorted(path.name for path in adapters.iterdir() if path.name != "joint")
    rows = []
    for one, other in combinations(names, 2):
        found = merge_audit(adapters / one, adapters / other)
        for i, j in ((one, other), (other, one)):
            rows.append(
                {
                    "cohort": cohort,
                    "i": i,
                    "j": j,
                    "compatibility": float(found.aggregate["compatibility_score"]),
                    "verdict": str(found.aggregate["overall_verdict"]),
                    "gradience": found.gradience_version,
                }
            )
    return pl.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="bench run's folder of work")
    parser.add_argument("--rows", type=Path, required=True, help="the folder of cohorts' rows")
    asked = parser.parse_args()
    for rows in sorted(path.parent for path in asked.rows.glob("*/outcomes.parquet")):
        adapters = asked.work / rows.name / "adapters"
        if not adapters.is_dir():
            print(f"{rows.name}: no adapters in '{adapters}', passed over")
            continue
        write_parquet(audit(rows.name, adapters), rows / AUDIT_FILE)
        print(f"{rows.name}: {rows / AUDIT_FILE}")


if __name__ == "__main__":
    main()
