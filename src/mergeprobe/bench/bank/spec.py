"""What a cohort is, as data: its adapters, when they are probed, and which merges are measured.

A cohort is self-contained: every retention in it has its own base, singles and test items. Equal
specs give equal rows, up to floating point.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

COHORT_SCHEMA = 1
METHODS = ("mean", "sum", "norm_preserving_mean", "equal_norm_mean", "ties", "svc")
POINTS = (0.05, 0.1, 0.25, 1.0)
SET_SIZES = ((2, None), (3, 8), (5, 2))
BASE = "smollm2-135m-instruct-q4"


class AdapterSpec(BaseModel):
    """One adapter: LoRA of `rank` (alpha twice that) on all linear layers.

    name: unique in the cohort; letters, digits, ".", "_", "-". seed: of the data's draw, the
    training order and, with independent init, the LoRA matrices. init: "shared" adapters of equal
    rank in a cohort start from the same matrices.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    task: str
    seed: int
    rank: int = Field(8, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    steps: int = Field(120, ge=1)
    init: Literal["shared", "independent"] = "independent"
    batch_size: int = Field(8, ge=1)

    @property
    def alpha(self) -> int:
        return 2 * self.rank

    def step_at(self, point: float) -> int:
        """The optimizer step at a share of training, at least 1; the last one at 1.0."""
        return max(1, round(point * self.steps))


class CohortSpec(BaseModel):
    """One cohort. points: shares of training at which probes are taken. model_points: those of
    them at which the model tier is measured, too; set_points: those at which it measures sets of
    three or more; None for all.

    set_sizes: (size, how many sets of it; None for all). seed: which sets are drawn; cohorts of
    equal seed and size have the same ones by position. methods: merges to measure. whole_methods:
    more of them, for the set of all adapters alone, where it is among the sets. merge_rank:
    "largest" truncates a merge to the largest rank among its members, as a plan's deployment does;
    "exact" keeps what the rule gives. truncated_ranks: each adapter alone is measured cut to those
    of these that are below its own rank, as method "truncated". joint: one more adapter, trained on
    the data of all, measured as method "joint". data: it needs tasks read from a data folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = COHORT_SCHEMA
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: str = BASE
    adapters: tuple[AdapterSpec, ...] = Field(min_length=2)
    points: tuple[float, ...] = POINTS
    model_points: tuple[float, ...] | None = None
    set_points: tuple[float, ...] | None = None
    test_items: int = Field(64, ge=2)
    calibration_items: int = Field(32, ge=1)
    forecast_items: int = Field(16, ge=1)
    set_sizes: tuple[tuple[int, int | None], ...] = SET_SIZES
    seed: int = 0
    methods: tuple[str, ...] = METHODS
    whole_methods: tuple[str, ...] = ()
    merge_rank: Literal["largest", "exact"] = "largest"
    truncated_ranks: tuple[int, ...] = ()
    joint: bool = False
    data: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> CohortSpec:
        names = [adapter.name for adapter in self.adapters]
        if len(set(names)) != len(names) or "joint" in names:
            raise ValueError(f"adapter names must differ, and none be 'joint': got {names}")
        if list(self.points) != sorted(set(self.points)) or not all(
            0 < point <= 1 for point in self.points
        ):
            raise ValueError(f"points must rise inside (0, 1]: got {list(self.points)}")
        for field, known in (("model_points", self.points), ("set_points", self.measured_points)):
            if unknown := sorted(set(getattr(self, field) or ()) - set(known)):
                raise ValueError(f"{field} must be among {list(known)}: got {unknown}")
        cut = list(self.truncated_ranks)
        if cut != sorted(set(cut)) or any(rank < 1 for rank in cut):
            raise ValueError(f"truncated_ranks must rise from 1 or more: got {cut}")
        return self

    @property
    def measured_points(self) -> tuple[float, ...]:
        """The points at which the model tier is measured."""
        return self.points if self.model_points is None else self.model_points

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, sorted: their order everywhere."""
        return tuple(sorted(adapter.name for adapter in self.adapters))

    def adapter(self, name: str) -> AdapterSpec:
        return next(adapter for adapter in self.adapters if adapter.name == name)

    def sets(self) -> list[tuple[str, ...]]:
        """Every set to merge, names sorted inside; smaller sets first."""
        drawn = random.Random(self.seed)
        in_order = [adapter.name for adapter in self.adapters]
        found: list[tuple[str, ...]] = []
        for size, count in sorted(self.set_sizes):
            groups = list(combinations(in_order, size))
            if count is not None and count < len(groups):
                groups = _even_draw(groups, count, drawn)
            found += [tuple(sorted(group)) for group in groups]
        return found

    def larger_sets(self) -> list[tuple[str, ...]]:
        return [group for group in self.sets() if len(group) > 2]

    def methods_of(self, group: tuple[str, ...]) -> tuple[str, ...]:
        """The merges to measure of a set."""
        whole = len(group) == len(self.adapters)
        return (*self.methods, *(self.whole_methods if whole else ()))

    def sets_at(self, point: float) -> bool:
        """Whether the model tier measures larger sets at this point."""
        return self.set_points is None or point in self.set_points

    def rank_of(self, group: tuple[str, ...]) -> int | None:
        """The rank of a group's merge; None keeps it exact."""
        if self.merge_rank == "exact":
            return None
        return max(self.adapter(name).rank for name in group)

    def truncations(self) -> list[tuple[str, int]]:
        """(adapter, rank) of every single adapter that is measured cut to a rank."""
        return [
            (name, rank)
            for name in self.names
            for rank in self.truncated_ranks
            if rank < self.adapter(name).rank
        ]

    def joint_spec(self) -> AdapterSpec:
        """The joint adapter: as many steps as all together, the largest rank, the median rate."""
        rates = sorted(adapter.learning_rate for adapter in self.adapters)
        return AdapterSpec(
            name="joint",
            task="+".join(self.names),
            seed=self.adapters[0].seed,
            rank=max(adapter.rank for adapter in self.adapters),
            learning_rate=rates[len(rates) // 2],
            steps=sum(adapter.steps for adapter in self.adapters),
            batch_size=self.adapters[0].batch_size,
        )


def _even_draw(
    groups: list[tuple[str, ...]], count: int, drawn: random.Random
) -> list[tuple[str, ...]]:
    """`count` groups at random, but such that every member is in about as many."""
    drawn.shuffle(groups)
    used: Counter[str] = Counter()
    chosen = []
    for _ in range(count):
        best = min(groups, key=lambda group: sum(used[name] for name in group))
        groups.remove(best)
        chosen.append(best)
        used.update(best)
    return chosen
