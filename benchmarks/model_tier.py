"""Forecast and plan at the model tier: seconds and forward passes a pair, within budgets.

    mergeprobe demo --out runs/demo
    python benchmarks/model_tier.py runs/demo/probes --base smollm2-135m-instruct-q4

The probes of a run are read and the base is loaded once; then each budget of forward passes (none,
and those of --budgets) is planned with from nothing: the snapshots' best lengths, all pairs under
every rule worth asking, sets, ranks. A pass is one over an adapter's calibration items (--items). A
budget that runs out leaves pairs to the file tier, which `measured` counts.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

from mergeprobe.adapters.base import load_base
from mergeprobe.capture.probe import read_probe
from mergeprobe.predict.early import open_tier
from mergeprobe.predict.forecast import forecast_probes

COLUMNS = (
    "budget", "passes", "of them lengths", "of them pairs", "pairs", "measured", "lengths, s",
    "pairs, s", "seconds a pair", "sets and ranks, s", "all, s", "worst forecast",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("probes", type=Path, help="a folder of probes of one base")
    parser.add_argument("--base", required=True, help="as of `mergeprobe plan`")
    parser.add_argument("--items", type=int, default=16, help="as of `mergeprobe plan`")
    parser.add_argument("--budgets", type=int, nargs="*", default=[200, 60])
    asked = parser.parse_args()
    probes = [read_probe(path) for path in sorted(asked.probes.glob("*.safetensors"))]
    base = load_base(asked.base)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for budget in (None, *asked.budgets):
        row = timed(base, probes, asked.items, budget)
        print(f"| {' | '.join(str(value) for value in row)} |", flush=True)


def timed(base, probes, items: int, budget: int | None) -> tuple:
    start = time.perf_counter()
    tier = open_tier(base, probes, items=items, budget=budget)
    lengths, after_lengths = time.perf_counter(), tier.spent
    forecaster = forecast_probes(probes, model=tier)
    signals = time.perf_counter()
    forecaster.ask_pairs()
    pairs, after_pairs = time.perf_counter(), tier.spent
    plan = forecaster.plan()
    end = time.perf_counter()
    count = math.comb(len(probes), 2)
    rows = forecaster.forecast_rows()
    single = rows.filter(~rows["others"].str.contains("+", literal=True))
    measured = single.drop_nulls("extrapolated_merge").select("adapter", "others").n_unique()
    return (
        budget or "none",
        tier.spent,
        after_lengths,
        after_pairs - after_lengths,
        count,
        f"{measured} of {2 * count} ordered",
        round(lengths - start, 1),
        round(pairs - signals, 1),
        round((pairs - signals) / count, 2),
        round(end - pairs, 1),
        round(end - start, 1),
        round(min(f.retention for group in plan.groups for f in group.forecast.values()), 2),
    )


if __name__ == "__main__":
    main()
