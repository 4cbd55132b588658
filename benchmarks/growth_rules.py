"""How long to take the other adapters in the extrapolated early merge: rules compared on runs.

    python benchmarks/growth_rules.py runs/s0 runs/s1 runs/s2

For every pair of a finished run under the mean: the extrapolated early merge of the snapshots under
each rule, against the measured retention. Mean absolute error and bias, after clipping at 1.02.
About six minutes a run on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations

import numpy as np

from mergeprobe.adapters.base import load_base
from mergeprobe.bench.folder import RunFolder
from mergeprobe.bench.measure import Measurement
from mergeprobe.bench.outcomes import Outcomes
from mergeprobe.capture.probe import read_probe
from mergeprobe.predict.early import ModelTier, open_tier

# (c*, T/s) -> how many times the others' U they are taken at
RULES: dict[str, Callable[[float, float], float]] = {
    "c*": lambda length, growth: 1.0,
    "2 c*": lambda length, growth: 2.0,
    "c* (T/s)^1/4": lambda length, growth: growth**0.25,
    "max(c*, (T/s)^1/4)": lambda length, growth: max(1.0, growth**0.25 / length),
    "max(c*, (T/s)^1/3)": lambda length, growth: max(1.0, growth ** (1 / 3) / length),
}


def errors(tier: ModelTier, outcomes: Outcomes, rule: str, growth: float) -> list[float]:
    """Forecast minus measured, one for every ordered pair."""
    own = dict(tier.snapshots)
    found = []
    for name, snapshot in own.items():
        reach = RULES[rule](snapshot.length, growth)
        tier.snapshots[name] = replace(snapshot, reach=reach)
    tier._kept.clear()
    for name, other in permutations(outcomes.config.tasks, 2):
        group = tuple(task for task in outcomes.config.tasks if task in (name, other))
        measured = outcomes.retention(name, Measurement("mean", group, outcomes.config.rank)).gain
        if measured is not None:
            early = tier.extrapolated_merge(name, {name: 0.5, other: 0.5})
            found.append(min(1.02, early) - measured)
    tier.snapshots.update(own)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--items", type=int, default=16)
    asked = parser.parse_args()
    base = None
    print("| run | rule | MAE | bias | pairs |\n|---|---|---|---|---|")
    for path in asked.runs:
        folder = RunFolder(path)
        config = folder.config()
        base = base or load_base(config.base)
        probes = [read_probe(folder.probe(name)) for name in config.tasks]
        tier = open_tier(base, probes, items=asked.items)
        growth = config.steps / int(probes[0].meta["step"])
        for rule in RULES:
            off = np.array(errors(tier, Outcomes(folder), rule, growth))
            print(f"| {path} | {rule} | {abs(off).mean():.3f} | {off.mean():+.3f} | {len(off)} |")


if __name__ == "__main__":
    main()
