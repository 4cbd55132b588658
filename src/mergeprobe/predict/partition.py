"""The search behind the planner: the cheapest partition whose worst member keeps a floor.

Sets of adapters are bitmasks; what can be done with a set is a short list of Options. Retentions
are whole billionths, so that sums are exact and equal partitions compare equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from operator import ge

from mergeprobe.plan import Group

BILLION = 10**9
NO_FLOOR = -(10**30)  # below any retention


@dataclass(frozen=True)
class Option:
    """One thing that can be done with one set of adapters.

    worst: lowest retention among members; total: their sum; low_worst, low_total: the same of
    the intervals' low ends; all in billionths. parameters: resident. cost: what is made small,
    a whole number that adds up over groups.
    """

    mask: int
    group: Group
    worst: int
    total: int
    parameters: int
    cost: int
    low_worst: int
    low_total: int


@dataclass(frozen=True)
class Partition:
    """Options whose sets are disjoint and cover all adapters, ordered by their first adapter."""

    options: tuple[Option, ...]

    @property
    def worst(self) -> int:
        return min(option.worst for option in self.options)

    @property
    def total(self) -> int:
        return sum(option.total for option in self.options)

    @property
    def parameters(self) -> int:
        return sum(option.parameters for option in self.options)

    @property
    def cost(self) -> int:
        return sum(option.cost for option in self.options)


Options = Callable[[int], tuple[Option, ...]]
Solve = Callable[[int], Partition | None]  # floor in billionths -> cheapest partition above it


def pareto(options: Sequence[Option]) -> tuple[Option, ...]:
    """Those that no other beats on cost and all four retentions; of equals the first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, *(-v for v in _kept(o)))):
        if not any(all(map(ge, _kept(other), _kept(option))) for other in kept):
            kept.append(option)
    return tuple(kept)


def _kept(option: Option) -> tuple[int, int, int, int]:
    return option.worst, option.total, option.low_worst, option.low_total


def cheapest(options: Sequence[Option], floor: int) -> Option | None:
    """Least cost with worst ≥ floor; among equals the highest total."""
    above = (option for option in options if option.worst >= floor)
    return min(above, key=lambda o: (o.cost, -o.total, -o.worst), default=None)


def exact(options: Options, count: int, most: int | None = None) -> Solve:
    """Solves over all set partitions of `count` adapters into at most `most` groups (None: any).

    Dynamic programming over bitmasks: for one floor, cost and total retention add up over
    groups, so the best partition of a set is its lowest adapter's group plus the best partition of
    the rest: 3^count / 2 steps, times `most`.
    """
    everything = (1 << count) - 1

    def solve(floor: int) -> Partition | None:
        choice = [None, *(cheapest(options(mask), floor) for mask in range(1, everything + 1))]
        # one table a number of groups; without a limit one table, whose rest is in itself
        tables: list[list[Best | None]] = []
        for groups_left in range(1 if most is None else min(most, count)):
            best: list[Best | None] = [(0, 0, 0)] + [None] * everything
            fewer = best if most is None else tables[-1] if groups_left else [(0, 0, 0)]
            for mask in range(1, everything + 1):
                best[mask] = _best_first(mask, choice, fewer)
            tables.append(best)
        if tables[-1][everything] is None:
            return None
        groups, mask = [], everything
        while mask:
            at = tables[-1] if most is None else tables[len(tables) - 1 - len(groups)]
            groups.append(choice[at[mask][2]])  # pyright: ignore[reportOptionalSubscript]
            mask ^= groups[-1].mask
        return Partition(tuple(groups))

    return solve


Best = tuple[int, int, int]  # (cost, -total, first group) of the best partition of a set


def _best_first(
    mask: int, choice: Sequence[Option | None], fewer: Sequence[Best | None]
) -> Best | None:
    """The best group of the lowest adapter in `mask`, the rest as in `fewer`."""
    held = None
    for group in with_lowest(mask):
        option, left = choice[group], mask ^ group
        rest = fewer[left] if left < len(fewer) else None
        if option is None or rest is None:
            continue
        value = (option.cost + rest[0], rest[1] - option.total, group)
        if held is None or value[:2] < held[:2]:
            held = value
    return held


def with_lowest(mask: int) -> Iterator[int]:
    """The subsets of `mask` that hold its lowest bit, ascending: small groups win ties."""
    lowest = mask & -mask
    rest, part = mask ^ lowest, 0
    while True:
        yield lowest | part
        if part == rest:
            return
        part = (part - rest) & rest


def frontier(solve: Solve) -> list[Partition]:
    """Every trade of worst-case retention against cost, ascending in both.

    From no floor at all, each next floor is just above what the last partition reached. Where
    solve is exact so is this, and each point has the highest total among its equals.
    """
    steps: list[Partition] = []
    floor = NO_FLOOR
    while (found := solve(floor)) is not None:
        steps.append(found)
        floor = found.worst + 1
    return undominated(steps)


def undominated(partitions: Iterable[Partition]) -> list[Partition]:
    """Those that no other beats on worst and cost, ascending in both."""
    kept: list[Partition] = []
    for one in sorted(partitions, key=lambda p: (p.cost, -p.worst, -p.total)):
        if not kept or one.worst > kept[-1].worst:
            kept.append(one)
    return kept


def tightened(solve: Solve, floor: int) -> list[Partition]:
    """The cheapest partition at `floor`, then those as cheap with a higher worst case."""
    found = solve(floor)
    steps = [found] if found else []
    while steps and (higher := solve(steps[-1].worst + 1)):
        if higher.cost > steps[0].cost:
            break
        steps.append(higher)
    return steps


def cautious(options: Options, floor: int) -> Options:
    """The options that keep `floor`, measured by their intervals' low ends."""

    @cache
    def lowered(mask: int) -> tuple[Option, ...]:
        return tuple(
            replace(option, worst=option.low_worst, total=option.low_total)
            for option in options(mask)
            if option.worst >= floor
        )

    return lowered
