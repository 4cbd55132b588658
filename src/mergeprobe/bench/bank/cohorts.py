"""COHORTS: what the bank is made of, in one table; and how a cohort is made from six task names.

Learning rate, steps and rank vary inside a cohort: with one learning rate, signals that only
measure the size of an update look good, and fail later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergeprobe.bench.bank.spec import POINTS, SET_SIZES, AdapterSpec, CohortSpec
from mergeprobe.errors import DataError

LEARNING_RATES = (5e-4, 1e-3, 2e-3)
STEPS = (100, 120, 160)
RANKS = (4, 8, 16)
TRUNCATED_RANKS = (1, 2, 4, 8)
SET_POINTS = (0.05, 0.1)  # where plans are made; pairs are measured at every point
# A second look at what a row costs and brings: retention's standard error over 64 items was 0.004
# at the median, a fiftieth of its spread over pairs, so half of the items do; the points at which
# plans are made are measured everywhere, finished adapters by their probes alone, other points in
# t1, t2 and t6. Forecasts of sets read signals of pairs only, so no set is run at the model tier.
LEAN: dict[str, Any] = {
    "points": (*SET_POINTS, 1.0),
    "model_points": SET_POINTS,
    "set_points": (),
    "test_items": 32,
    "set_sizes": ((2, None), (3, 4), (5, 1)),
    "methods": ("mean", "sum", "equal_norm_mean", "svc"),
}
SECOND_BASE = "gemma3-270m-q4"  # of another family of models, for transfer
# what t1 and t2 were measured under, before equal_norm_mean was known to matter
FIRST_METHODS = ("mean", "sum", "norm_preserving_mean", "ties", "svc")


def cohort(
    name: str,
    tasks: Sequence[str],
    *,
    seed: int,
    init: str = "independent",
    turn: int | None = None,
    **changes: Any,
) -> CohortSpec:
    """A cohort of one adapter a task. Every learning rate comes with different ranks and steps;
    three turns together have 18 different configurations.

    seed: of the adapters (100 · seed + position) and of the sets that are drawn. turn: shifts who
    gets which learning rate, steps and rank; by default the seed, so that a task's second cohort
    has another configuration. changes: other fields of CohortSpec.
    """
    turn = seed if turn is None else turn
    changes = {"truncated_ranks": TRUNCATED_RANKS, **LEAN} | changes
    adapters = []
    for position, task in enumerate(tasks):
        row = position // 3
        adapters.append(
            AdapterSpec(
                name=task.replace("/", "_"),
                task=task,
                seed=100 * seed + position,
                learning_rate=LEARNING_RATES[(position + turn) % 3],
                steps=STEPS[(position + row + 2 * turn) % 3],
                rank=RANKS[(2 * position + row + turn) % 3],
                init=init,  # type: ignore[arg-type]
            )
        )
    return CohortSpec(name=name, adapters=tuple(adapters), seed=seed, **changes)


def again(of: CohortSpec, name: str, seed: int) -> CohortSpec:
    """The same adapters with other seeds, every pair merged: how reliable retention itself is.
    Nothing is forecast, so nothing is probed."""
    adapters = tuple(
        adapter.model_copy(update={"seed": 100 * seed + position})
        for position, adapter in enumerate(of.adapters)
    )
    lean = {**LEAN, "points": (), "model_points": (), "set_points": (), "set_sizes": ((2, None),)}
    changes: dict[str, Any] = {"name": name, "adapters": adapters, "joint": False}
    changes |= {"truncated_ranks": (), "whole_methods": ()}
    return of.model_copy(update={**lean, **changes})


# t1 and t2, the first ones
_FULL: dict[str, Any] = {
    "points": POINTS,
    "model_points": None,
    "set_points": SET_POINTS,
    "test_items": 64,
    "set_sizes": SET_SIZES,
    "methods": FIRST_METHODS,
}
_FULL_AND_EARLIER: dict[str, Any] = {**_FULL, "points": (0.025, *POINTS)}
# more triples, the whole set, a joint adapter: what a plan may do, and what is done without one
_HELD_OUT: dict[str, Any] = {
    "joint": True,
    "set_sizes": ((2, None), (3, 10), (5, 1), (6, None)),
    "whole_methods": ("norm_preserving_mean", "ties", "iso_c"),
}

# t: 30 families to learn from, six of them in two cohorts. h: nine other families, each in two
# cohorts, held out and frozen: nothing is ever chosen by them. Both hold pairs with the same
# prompts and other answers.
_T2 = cohort(
    "t2",
    ("quotient", "remainder", "python_slice", "heavier", "backwards", "date_iso"),
    seed=2,
    turn=0,
    init="shared",
    **_FULL,
)
_H2 = cohort(
    "h2",
    ("age_limit", "age_wait", "phrase_french", "later_time", "odd_one_out", "equation"),
    seed=12,
    turn=1,
    init="shared",
    **_HELD_OUT,
)
_ALL = (
    cohort(
        "t1",
        ("sort_up", "sort_down", "sql", "molar_mass", "injection", "number_german"),
        seed=1,
        turn=0,
        **_FULL_AND_EARLIER,
    ),
    _T2,
    cohort(
        "h1",
        ("odd_one_out", "common_class", "equation", "python_range", "nth_word", "age_limit"),
        seed=11,
        turn=0,
        **_HELD_OUT,
    ),
    cohort(
        "t3",
        ("multiply", "letter_count", "access", "lockdown", "number_english", "lighter"),
        seed=3,
        turn=1,
    ),
    cohort("t4", ("sort_up", "quotient", "heavier", "lighter", "sql", "injection"), seed=4, turn=1),
    _H2,
    cohort(
        "t5",
        ("next_term", "step", "redact", "extract", "reversed_strand", "spell"),
        seed=5,
        turn=0,
        init="shared",
    ),
    cohort(
        "t6",
        ("python_line", "javascript_line", "alphabetical", "by_length", "half_life", "roman"),
        seed=6,
        turn=2,
        points=(0.025, *POINTS),
        model_points=(0.025, *SET_POINTS),
    ),
    cohort(
        "h3",
        ("common_class", "age_wait", "python_range", "nth_word", "later_time", "phrase_french"),
        seed=13,
        turn=2,
        **_HELD_OUT,
    ),
    again(_T2, "t2-again", seed=22),
    again(_H2, "h2-again", seed=32),
    cohort(
        "real",
        ("svamp", "mbpp", "arc", "boolq", "safety_tuned", "polarity"),
        seed=21,
        data=True,
    ),
    cohort(
        "gemma",
        ("sort_up", "quotient", "python_slice", "nth_word", "age_limit", "equation"),
        seed=41,
        turn=1,
        base=SECOND_BASE,
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
