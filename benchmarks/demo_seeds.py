"""The demo over several seeds: the tables of docs/results/demo.md.

    mergeprobe demo --out runs/s0 --seed 0      (and s1, s2; runs/easy0 with --control easy)
    python benchmarks/demo_seeds.py runs/s0 runs/s1 runs/s2 --easy runs/easy0

Means over runs with their standard error (SD over runs / √runs). Retention is gain retention on the
test items. Regret: the plan against the best partition of at most its parameters, all partitions
measured under mean and sum, chosen on one half of the test items and scored on the other.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from statistics import mean, stdev

from mergeprobe.bench.folder import RunFolder
from mergeprobe.bench.outcomes import PLAN, Outcomes, regret


def spread(values: Sequence[float], digits: int = 2) -> str:
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values) / math.sqrt(len(values)):.{digits}f}"


def table(runs: Sequence[Outcomes]) -> list[str]:
    seeds = ", ".join(str(run.config.seed) for run in runs)
    lines = [
        f"Seeds {seeds}; {runs[0].config.test_items} test items a task; ± is the standard error "
        "over seeds.",
        "",
        "| strategy | mean retention | worst retention | resident parameters |",
        "|---|---|---|---|",
    ]
    found = [{s.name: s for s in run.strategies()} for run in runs]
    for name in found[0]:
        rows = [each[name] for each in found]
        label = f"**{name}**" if name == PLAN else name
        parameters = mean(row.resident_parameters for row in rows) / 1e6
        lines.append(
            f"| {label} | {spread([row.total.mean for row in rows])} "
            f"| {spread([row.total.worst for row in rows])} | {parameters:.1f} M |"
        )
    return lines


def decisions(runs: Sequence[Outcomes]) -> list[str]:
    lines = [
        "",
        "| seed | plan | forecast worst | measured worst | regret, worst | best partition |",
    ]
    lines.append("|---|---|---|---|---|---|")
    regrets, inside, total = [], 0, 0
    for run in runs:
        lost = regret(run)
        regrets.append(lost)
        measured = {s.name: s for s in run.strategies()}[PLAN]
        forecast = {n: f for group in run.plan.groups for n, f in group.forecast.items()}
        for name, kept in measured.retentions.items():
            if kept.gain is not None and len(run.plan.group_of(name).adapters) > 1:
                total += 1
                inside += forecast[name].low <= kept.gain <= forecast[name].high
        groups = "; ".join(
            f"{' + '.join(g.adapters)} ({g.method or g.action})" for g in run.plan.groups
        )
        best = lost.best.replace("|", "\\|")
        lines.append(
            f"| {run.config.seed} | {groups} | {min(f.retention for f in forecast.values()):.2f} "
            f"| {measured.total.worst:.2f} | {lost.worst:+.3f} | {best} |"
        )
    lines += [
        "",
        f"Regret in worst-case retention {spread([lost.worst for lost in regrets], 3)}, in mean "
        f"retention {spread([lost.mean for lost in regrets], 3)} (below 0: the plan is better, as "
        "its methods go beyond mean and sum). "
        f"Measured retention of merged adapters inside the forecast interval: {inside} of {total}.",
    ]
    return lines


def pairs(runs: Sequence[Outcomes]) -> list[str]:
    """Forecast error and rank correlation of all ordered pairs under mean and sum."""
    import polars as pl

    from mergeprobe.bench.measure import Measurement

    lines = ["", "| pairs | n | MAE | Spearman | in the interval |", "|---|---|---|---|---|"]
    for method in ("mean", "sum"):
        rows = []
        for run in runs:
            frame = pl.read_parquet(run.folder.forecasts).filter(pl.col("method") == method)
            for row in frame.filter(~pl.col("others").str.contains("+", literal=True)).to_dicts():
                pair = tuple(n for n in run.config.tasks if n in (row["adapter"], row["others"]))
                kept = run.retention(row["adapter"], Measurement(method, pair, run.config.rank))
                if kept.gain is not None:
                    rows.append((row["retention"], kept.gain, row["low"], row["high"]))
        data = pl.DataFrame(rows, schema=["forecast", "true", "low", "high"], orient="row")
        error = (data["forecast"] - data["true"]).abs().mean()
        rank = data.select(pl.corr("forecast", "true", method="spearman")).item()
        inside = ((data["low"] <= data["true"]) & (data["true"] <= data["high"])).mean()
        lines.append(f"| {method} | {len(data)} | {error:.3f} | {rank:.2f} | {inside:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--easy", nargs="*", default=[])
    arguments = parser.parse_args()
    runs = [Outcomes(RunFolder(path)) for path in arguments.runs]
    print("\n".join([*table(runs), *decisions(runs), *pairs(runs)]))
    if arguments.easy:
        easy = [Outcomes(RunFolder(path)) for path in arguments.easy]
        print("\nControl without the planted conflict (`--control easy`):\n")
        print("\n".join([*table(easy), *decisions(easy)]))


if __name__ == "__main__":
    main()
