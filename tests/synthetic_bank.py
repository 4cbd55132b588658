"""A made-up bank in the real one's layout, whose retention follows from its signals by a formula.

Families differ in how easily they are hurt (`fragility`) and how much they hurt (`force`); pairs
clash on top of that. Signals show these with noise, so a forecast has something to learn that is
not the family's name.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import polars as pl

METHODS = {"mean": 0.35, "sum": 1.0, "ties": 0.6}
POINTS = (0.05, 0.1)


@dataclass(frozen=True)
class Bank:
    adapters: pl.DataFrame
    pairs: pl.DataFrame
    sets: pl.DataFrame
    outcomes: pl.DataFrame

    def tables(self) -> dict[str, pl.DataFrame]:
        """What learning_rows reads; it needs no rows of sets."""
        return {name: getattr(self, name) for name in ("adapters", "pairs", "outcomes")}


def bank(
    cohorts: int = 8,
    families: int = 16,
    *,
    members: int = 4,
    repeats: int = 0,
    noise: float = 0.02,
    told: bool = True,
    seed: int = 0,
) -> Bank:
    """repeats: how many of the first cohorts come again with new noise. told: whether the signals
    say anything; without, retention still depends on the families (what a leak would pick up)."""
    generator = np.random.default_rng(seed)
    fragility, force = generator.uniform(0.2, 1.0, families), generator.uniform(0.2, 1.0, families)
    clash = generator.uniform(0.0, 1.0, (families, families))
    rows: dict[str, list[dict]] = {"adapters": [], "pairs": [], "sets": [], "outcomes": []}
    chosen = [generator.permutation(families)[:members] for _ in range(cohorts)]
    named = [(f"c{k}", group) for k, group in enumerate(chosen)]
    named += [(f"c{k}again", chosen[k]) for k in range(repeats)]
    for cohort, group in named:
        _cohort(rows, cohort, group, fragility, force, clash, noise, told, generator)
    return Bank(**{name: pl.DataFrame(table) for name, table in rows.items()})


def _cohort(rows, cohort, group, fragility, force, clash, noise, told, generator) -> None:
    names = [f"task{f}" for f in group]
    place = dict(zip(names, group, strict=True))
    for k, name in enumerate(names):
        rows["adapters"].append(
            {
                "cohort": cohort,
                "base": "tiny",
                "adapter": name,
                "task": name,
                "family": f"family{place[name]}",
                "learning_rate": (5e-4, 1e-3, 2e-3)[k % 3],
                "rank": (4, 8)[k % 2],
                "steps": (100, 120, 160)[(k + 1) % 3],
                "domain": ("code", "math", "science")[place[name] % 3],
            }
        )
    harm = {(i, j): fragility[place[i]] * force[place[j]] * clash[place[i], place[j]]
            for i, j in itertools.permutations(names, 2)}  # fmt: skip
    own = {i: 1.0 - 0.6 * fragility[place[i]] + generator.normal(0, 0.02) for i in names}
    for point, (i, j) in itertools.product(POINTS, harm):
        rows["pairs"].append(
            {
                "cohort": cohort,
                "point": point,
                "i": i,
                "j": j,
                "step": round(100 * point),
                "planned_steps": 100,
                **_signals(harm[i, j], own[i], told, generator),
            }
        )
    groups = [*itertools.combinations(sorted(names), 2), *itertools.combinations(sorted(names), 3)]
    for members in groups:
        for i in members:
            total = sum(harm[i, j] for j in members if j != i)
            if len(members) > 2:
                for point in POINTS:
                    label = {"cohort": cohort, "point": point, "adapter": i}
                    signals = _signals(total, own[i], told, generator)
                    rows["sets"].append({**label, "set": "+".join(members), **signals})
            for method, share in METHODS.items():
                kept = 1.0 - share * total + generator.normal(0, noise)
                rows["outcomes"].append(
                    {
                        "cohort": cohort,
                        "adapter": i,
                        "set": "+".join(members),
                        "method": method,
                        "gain_retention": kept,
                        "own_gain": 2.0,
                        "own_gain_se": 0.1,
                        "loss_single": 0.5,
                        "loss": 0.5 + 2.0 * (1.0 - kept),
                    }
                )


def _signals(harm: float, own: float, told: bool, generator) -> dict[str, float]:
    seen, gain = (harm, own) if told else (0.3, 0.7)

    def about(value: float) -> float:
        return value + generator.normal(0, 0.02)

    return {
        "frobenius_cosine": about(0.0),
        "norm_ratio": np.exp(about(0.0)),
        "gradient_cosine_base": about(0.1),
        "i_own_gain_relative": about(gain),
        "interference_ratio": np.exp(about(seen)),
        "own_gain": about(gain),
        "disturbance_late": np.exp(about(2 * seen)),
        "disturbance_final": np.exp(about(seen)),
        "early_retention_mean": about(1 - 0.35 * seen),
        "early_retention_sum": about(1 - seen),
        "early_retention_ties": about(1 - 0.6 * seen),
        "extrapolated_mean": about(1 - 0.35 * seen),
        "extrapolated_sum": about(1 - seen),
    }
