"""COHORTS: what the bank is made of, in one table; and how a cohort is made from six task names.

Learning rate, steps and rank vary inside a cohort: with one learning rate, signals that only
measure the size of an update look good, and fail later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergeprobe.bench.bank.spec import AdapterSpec, CohortSpec
from mergeprobe.errors import DataError

LEARNING_RATES = (5e-4, 1e-3, 2e-3)
STEPS = (100, 120, 160)
RANKS = (4, 8, 16)


def cohort(
    name: str,
    tasks: Sequence[str],
    *,
    seed: int,
    init: str = "independent",
    turn: int | None = None,
    **changes: Any,
) -> CohortSpec:
    """A cohort of one adapter a task. Every learning rate comes with different ranks and steps.

    seed: of the adapters (100 · seed + position) and of the sets that are drawn. turn: shifts who
    gets which learning rate, steps and rank; by default the seed, so that a task's second cohort
    has another configuration. changes: other fields of CohortSpec.
    """
    turn = seed if turn is None else turn
    adapters = []
    for position, task in enumerate(tasks):
        k, row = position + turn, position // 3
        adapters.append(
            AdapterSpec(
                name=task.replace("/", "_"),
                task=task,
                seed=100 * seed + position,
                learning_rate=LEARNING_RATES[k % 3],
                steps=STEPS[(k + row) % 3],
                rank=RANKS[(2 * k + row) % 3],
                init=init,  # type: ignore[arg-type]
            )
        )
    return CohortSpec(name=name, adapters=tuple(adapters), seed=seed, **changes)


def again(of: CohortSpec, name: str, seed: int) -> CohortSpec:
    """The same cohort with other seeds, and the same sets: how reliable retention itself is."""
    adapters = tuple(
        adapter.model_copy(update={"seed": 100 * seed + position})
        for position, adapter in enumerate(of.adapters)
    )
    return of.model_copy(update={"name": name, "adapters": adapters})


_ALL = (
    cohort(
        "c01",
        ("sort_up", "sort_down", "snake_case", "molar_mass", "redact", "number_german"),
        seed=1,
    ),
    cohort(
        "c02",
        ("quotient", "remainder", "sql", "complement", "backwards", "date_iso"),
        seed=2,
        init="shared",
        points=(0.025, 0.05, 0.1, 0.25, 1.0),
    ),
)
COHORTS: dict[str, CohortSpec] = {spec.name: spec for spec in _ALL}


def chosen(names: Sequence[str], *, with_data: bool) -> list[CohortSpec]:
    """The cohorts of these names, in the table's order; all (that need no data folder, unless
    there is one) where none is named. DataError for an unknown one, or one that needs data."""
    unknown = [name for name in names if name not in COHORTS]
    if unknown:
        raise DataError(
            f"no cohort {', '.join(map(repr, unknown))}; known are {', '.join(COHORTS)}"
        )
    if not names:
        return [spec for spec in COHORTS.values() if with_data or not spec.data]
    found = [spec for spec in COHORTS.values() if spec.name in names]
    lacking = [spec.name for spec in found if spec.data and not with_data]
    if lacking:
        raise DataError(f"{', '.join(lacking)} has tasks of real data: pass --data FOLDER")
    return found
