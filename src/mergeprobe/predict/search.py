"""Partitions of more adapters than can be searched exactly: agglomeration, then local search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import combinations

from mergeprobe.predict.partition import (
    NO_FLOOR,
    Options,
    Partition,
    Solve,
    cheapest,
    tightened,
    undominated,
    with_lowest,
)

IMPOSSIBLE = 10**30  # the shortfall of a set for which there is no option

Score = tuple[int, int, int]  # shortfall below the floor, cost, -total: lower is better
Value = Callable[[int], Score]
Change = tuple[tuple[int, ...], tuple[int, ...]]  # groups taken away, groups put in their place
Step = tuple[Score, Change]


def searched_frontier(
    options: Options, count: int, floor: int, *, levels: int = 10, most: int | None = None
) -> list[Partition]:
    """The frontier as `local_search` finds it: thoroughly at `floor`, and at `levels` besides.

    The levels are spread evenly over the best worst cases of the pairs, where choices change.
    """
    solve = local_search(options, count, thorough=False, most=most)
    pairs = (options((1 << i) | (1 << j)) for i, j in combinations(range(count), 2))
    values = sorted({max(o.worst for o in found) for found in pairs if found})
    picked = {values[(len(values) - 1) * k // max(1, levels - 1)] for k in range(levels) if values}
    found = [solve(level) for level in [NO_FLOOR, *sorted(picked)]]
    # above every pair only single adapters are left, so this ends where nothing goes higher
    top = tightened(solve, values[-1] + 1) if values else []
    asked = tightened(local_search(options, count, most=most), floor)
    return undominated([p for p in [*found, *asked, *top] if p is not None])


def local_search(
    options: Options, count: int, *, thorough: bool = True, most: int | None = None
) -> Solve:
    """Solves for more adapters than `exact` can. Deterministic; a local optimum.

    Merges the two groups that cost least to merge until no merge is possible, takes the best
    partition on that way, then the best merge, move, swap or split until none helps; `thorough`
    also breaks up every two groups and starts again from there (on random sets of ten it then
    misses the optimum about once in ten, by one group). Not looked at: sets with a pair that
    already falls short by itself (a third adapter seldom heals a conflict between two), and
    splits of groups above six other than one member leaving. With more than `most` groups left at
    the end, those that cost least to merge are merged until there are `most`.
    """

    def solve(floor: int) -> Partition | None:
        known: dict[int, Score] = {}

        def value(mask: int) -> Score:
            if mask not in known:
                known[mask] = _value(options, mask, floor, value)
            return known[mask]

        def crowded(mask: int) -> Score:
            # like packing bins: filling the large groups is what empties the small ones
            return *value(mask)[:2], -(mask.bit_count() ** 2)

        start = _agglomerate([1 << i for i in range(count)], value)
        dense = _descend(start, crowded)
        ends = [start, _kicked(dense, crowded) if thorough else dense]
        groups = min((_descend(end, value) for end in ends), key=lambda g: _score(g, value))
        groups = _squeezed(groups, value, most)
        if any(value(mask)[0] for mask in groups):
            return None
        chosen = [cheapest(options(mask), floor) for mask in groups]
        return Partition(tuple(option for option in chosen if option is not None))

    return solve


def _value(options: Options, mask: int, floor: int, value: Value) -> Score:
    """The score of one set; those of a partition's sets add up."""
    bits = _bits(mask)
    if len(bits) > 2 and any(value(a | b)[0] for a, b in combinations(bits, 2)):
        return IMPOSSIBLE, 0, 0
    found = options(mask)
    option = cheapest(found, floor)
    if option is not None:
        return 0, option.cost, -option.total
    if not found:
        return IMPOSSIBLE, 0, 0
    best = max(found, key=lambda o: o.worst)
    return floor - best.worst, best.cost, -best.total


def _agglomerate(groups: list[int], value: Value) -> list[int]:
    """Uphill too: two merged can cost more than two cut to a low rank, and five still less."""
    best, gain, total = groups, (0, 0, 0), (0, 0, 0)
    while (step := _best_step(_merges(groups), value)) and step[0][0] <= 0:
        groups, total = _taken(groups, step), _plus(total, step[0])
        if total < gain:
            best, gain = groups, total
    return best


def _descend(groups: list[int], value: Value) -> list[int]:
    while (step := _best_step(_neighbours(groups), value)) and step[0] < (0, 0, 0):
        groups = _taken(groups, step)
    return groups


def _squeezed(groups: list[int], value: Value, most: int | None) -> list[int]:
    while most is not None and len(groups) > most:
        step = _best_step(_merges(groups), value)
        assert step is not None, "two groups can always be merged"
        groups = _taken(groups, step)
    return groups


def _kicked(groups: list[int], value: Value) -> list[int]:
    """Breaks two groups up, merges and descends again, as long as some two make it better."""
    for g, h in combinations(groups, 2):
        broken = sorted([*(x for x in groups if x not in (g, h)), *_bits(g | h)], key=_lowest)
        again = _descend(_agglomerate(broken, value), value)
        if _score(again, value) < _score(groups, value):
            return _kicked(again, value)
    return groups


def _score(groups: Iterable[int], value: Value) -> Score:
    total = (0, 0, 0)
    for mask in groups:
        total = _plus(total, value(mask))
    return total


def _best_step(changes: Iterable[Change], value: Value) -> Step | None:
    """The change that lowers the score most, or raises it least; of equals the first."""
    best = None
    for removed, added in changes:
        score = _plus(_score(added, value), _score(removed, value), -1)
        if best is None or score < best[0]:
            best = score, (removed, added)
    return best


def _taken(groups: list[int], step: Step) -> list[int]:
    removed, added = step[1]
    return sorted([*(g for g in groups if g not in removed), *added], key=_lowest)


def _plus(a: Score, b: Score, sign: int = 1) -> Score:
    return a[0] + sign * b[0], a[1] + sign * b[1], a[2] + sign * b[2]


def _merges(groups: list[int]) -> Iterator[Change]:
    for g, h in combinations(groups, 2):
        yield (g, h), (g | h,)


def _neighbours(groups: list[int]) -> Iterator[Change]:
    yield from _merges(groups)
    for g in groups:
        members = _bits(g)
        for x in members if len(members) > 1 else ():
            yield (g,), (g ^ x, x)
            for h in groups:
                if h != g:
                    yield (g, h), (g ^ x, h | x)
        if 4 <= len(members) <= 6:
            for part in with_lowest(g):
                if part.bit_count() > 1 and (g ^ part).bit_count() > 1:
                    yield (g,), (part, g ^ part)
    for g, h in combinations(groups, 2):
        if g.bit_count() > 1 or h.bit_count() > 1:
            for x in _bits(g):
                for y in _bits(h):
                    yield (g, h), (g ^ x | y, h ^ y | x)


def _bits(mask: int) -> list[int]:
    return [1 << i for i in range(mask.bit_length()) if mask >> i & 1]


def _lowest(mask: int) -> int:
    return mask & -mask
