"""A cohort's merges at other lengths than the rule's own, for `mergeprobe bench report`.

    python benchmarks/tuned_merges.py --work runs/bank --rows runs/bank/rows --cohorts h1 h2

What people tune when they merge by hand is how far the merged update goes (task arithmetic's λ).
Writes tuned.parquet into a cohort's folder of rows: retention of every adapter under the merge of
all, times each of LENGTHS, also on the even and the odd test items apart, so that a length can be
chosen on one half and scored on the other. Length 1 is among the cohort's own outcomes. The
adapters have to be in WORK/<cohort>/adapters, and the base and the singles measured.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import polars as pl

from mergeprobe.adapters.base import load_base
from mergeprobe.artefact import write_parquet
from mergeprobe.bench.bank.folder import CohortFolder, read_spec
from mergeprobe.bench.bank.rows import halves
from mergeprobe.bench.measure import Bench, Measured, Measurement, read_measured
from mergeprobe.bench.outcomes import outcome_row
from mergeprobe.bench.tables.beside import TUNED_FILE
from mergeprobe.compose import merge
from mergeprobe.evaluate.score import score

METHODS = ("mean", "equal_norm_mean", "ties", "svc")
LENGTHS = (1.5, 2.0, 3.0)


def tuned(folder: CohortFolder) -> pl.DataFrame:
    spec = folder.spec
    bench = Bench(
        load_base(spec.base),
        adapters=folder.adapters,
        items=folder.test_items,
        measured=folder.measured,
    )
    alone = {
        name: tuple(read_measured(folder.measured, m) for m in folder.singles(name))
        for name in spec.names
    }
    rows = []
    for method in METHODS:
        wanted = Measurement(method, spec.names, spec.rank_of(spec.names))
        merged = merge([bench.adapter(n) for n in spec.names], method, rank=wanted.rank)
        for length in LENGTHS:
            modules = {
                module: replace(update, scaling=length * update.scaling)
                for module, update in merged.adapter.modules.items()
            }
            serving = replace(merged.adapter, modules=modules)
            found = {n: score(bench.base, serving, bench.batch(n)) for n in spec.names}
            measured = Measured(
                {name: scores.loss.double() for name, scores in found.items()},
                {name: scores.exact for name, scores in found.items()},
                serving.parameters,
                merged.certificate.total,
            )
            for name in spec.names:
                parts = (*alone[name], measured)
                row = outcome_row(name, wanted, *parts, seed=spec.adapter(name).seed)
                rows.append({"cohort": spec.name, "length": length, **row, **halves(name, *parts)})
            print(f"{spec.name}: {method} × {length:g}", flush=True)
    return pl.DataFrame(rows, infer_schema_length=None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="bench run's folder of work")
    parser.add_argument("--rows", type=Path, required=True, help="the folder of cohorts' rows")
    parser.add_argument("--cohorts", nargs="+", required=True)
    parser.add_argument("--data", type=Path, help="as of `mergeprobe bench run`")
    asked = parser.parse_args()
    for name in asked.cohorts:
        spec, _ = read_spec(asked.rows / name / "cohort.json")
        target = asked.rows / name / TUNED_FILE
        write_parquet(tuned(CohortFolder(asked.work, spec, asked.data)), target)
        print(f"{name}: {target}")


if __name__ == "__main__":
    main()
