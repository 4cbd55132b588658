"""Forecasts -> Plan: which adapters share one, by what method, at what cost. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, pairwise
from typing import Literal

from mergeprobe.errors import PlanError
from mergeprobe.plan import (
    SEPARABLE,
    AdapterRef,
    FrontierPoint,
    Group,
    Plan,
    Route,
    check_name,
)
from mergeprobe.predict.options import Candidates, Cost, measured
from mergeprobe.predict.partition import (
    BILLION,
    NO_FLOOR,
    Option,
    Options,
    Partition,
    cautious,
    exact,
    frontier,
    tightened,
    undominated,
)
from mergeprobe.predict.reasons import Confidence, Setting, group_reasons, number, plan_reasons
from mergeprobe.predict.search import local_search, searched_frontier

EXACT_UP_TO = 10  # Bell(10) = 115,975 partitions of 1,023 sets; beyond, a local search
LEVELS = 20  # points of a frontier that is put together


@dataclass(frozen=True)
class AdapterInfo:
    """What the planner needs to know of an adapter. parameters: resident if kept whole."""

    name: str
    rank: int
    parameters: int
    path: str | None = None
    weights_sha256: str | None = None


def make_plan(
    adapters: Sequence[AdapterInfo],
    candidates: Candidates,
    *,
    min_retention: float = 0.9,
    max_adapters: int | None = None,
    confidence: Confidence = "point",
    cost: Cost = "adapters",
    together: Sequence[Sequence[str]] = (),
    within: Sequence[Sequence[str]] = (),
    route_by: Literal["name", "prompt"] = "name",
    prompt_auc: Mapping[tuple[str, str], float] | None = None,
    tier: Literal["weights", "file", "model", "hand"],
    base: str = "",
    base_fingerprint: str | None = None,
    calibrated: Callable[[Group], bool] = lambda group: False,
    missing: Sequence[str] = (),
) -> Plan:
    """The cheapest partition whose worst forecast keeps the floor.

    candidates: called at most once per set of names (in the order of `adapters`), returns what
    could be done with it, each a Group with a forecast for every member and its
    resident_parameters; its name is replaced. For a single adapter one of them must be `route`
    at full rank, with retention 1 by definition. An empty answer for more than one means that
    they cannot be merged; `route` for more than one is passed over, being the same as each alone.
    min_retention: the floor for every adapter, in [0, 1]. max_adapters: the most adapters that may
    stay resident, that is groups; it goes before the floor. confidence: whether the point forecast
    or the low end of its interval has to keep it; the frontier is in the same measure.
    cost: "adapters" counts the adapters that stay resident (composed logits keep all of theirs) and
    between equals their parameters; "parameters" counts these alone.
    together: names that must share a group, because one answer needs all of them. within: sets of
    names that a group may not reach across, each name in one of them; by default all are in one.
    They are searched one by one.
    prompt_auc: how well two adapters' prompts separate, as a router measured it; needed for
    route_by="prompt".
    calibrated: whether the forecasts of a group that was chosen are; the plan is where all are.

    Ties go to the partition whose lowest low end is highest, then to the higher sum of low ends:
    between two that are forecast to do, the one that is more certain to. Exact up to 10 adapters, a
    local search beyond. If nothing keeps the floor the best worst case is taken and the reasons
    say so.
    The frontier is ascending in cost and always holds full routing, even if dominated.
    Raises PlanError.
    """
    _check(adapters, min_retention, max_adapters)
    names = tuple(adapter.name for adapter in adapters)
    check_together(names, together)
    options = measured(names, candidates, confidence, cost)
    floor = round(min_retention * BILLION)
    blocks = [_mask(names, each) for each in within] or [(1 << len(names)) - 1]
    found = _searched_each(options, _units(names, together), blocks, floor, max_adapters)
    if found is None:
        kept = f" with {', '.join(together[0])} together" if together else ""
        into = f" into {max_adapters}" if max_adapters else ""
        raise PlanError(f"there is no way to merge {len(names)} adapters{kept}{into}")
    chosen, points = found
    setting = Setting(
        names=names,
        parameters=tuple(adapter.parameters for adapter in adapters),
        ranks=tuple(adapter.rank for adapter in adapters),
        options=options,
        confidence=confidence,
        floor=floor,
        reached=chosen.worst >= floor,
        blocks=tuple(blocks),
    )
    routed = _check_routing(chosen, prompt_auc) if route_by == "prompt" else ()
    groups = _written(setting, chosen)
    sure = all(map(calibrated, groups))
    caution = () if sure else ("the forecasts are uncalibrated: read intervals as rough",)
    return Plan(
        base=base,
        base_fingerprint=base_fingerprint,
        adapters=tuple(
            AdapterRef(name=a.name, path=a.path, weights_sha256=a.weights_sha256) for a in adapters
        ),
        groups=groups,
        route=Route(by=route_by),
        tier=tier,
        calibrated=sure,
        confidence=confidence,
        cost=cost,
        min_retention=min_retention,
        resident_parameters=chosen.parameters,
        full_routing_parameters=sum(setting.parameters),
        frontier=_with_full_routing(points, adapters),
        reasons=(*plan_reasons(setting, chosen, points), *routed, *caution),
        missing=tuple(missing),
    )


def check_together(names: Sequence[str], together: Sequence[Sequence[str]]) -> None:
    """PlanError for a name that is not among `names`, or for fewer than two in one set."""
    for wanted in together:
        if unknown := [name for name in wanted if name not in names]:
            raise PlanError(
                f"'{unknown[0]}' is to stay together with others but is not planned for; "
                f"known are {', '.join(names)}"
            )
        if len(set(wanted)) < 2:
            raise PlanError(
                f"{list(wanted)} are to stay together: name at least two adapters, as in A,B"
            )


def _units(names: tuple[str, ...], together: Sequence[Sequence[str]]) -> list[int]:
    """What the search moves about, as bitmasks of adapters: single ones, or sets that must stay
    together (sets that overlap are one)."""
    units = [1 << position for position in range(len(names))]
    for wanted in together:
        joint = _mask(names, wanted)
        met = [unit for unit in units if unit & joint]
        units = [unit for unit in units if not unit & joint] + [sum(met)] * bool(met)
    return sorted(units, key=lambda unit: unit & -unit)


def _mask(names: tuple[str, ...], chosen: Sequence[str]) -> int:
    return sum(1 << names.index(name) for name in dict.fromkeys(chosen))


def _searched_each(
    options: Options, units: Sequence[int], blocks: Sequence[int], floor: int, most: int | None
) -> tuple[Partition, list[Partition]] | None:
    """As _searched, of every block by itself and then together: what is chosen adds up, and so does
    the frontier, at the worst cases that some block has a point for. With more than `most` groups
    the highest of those worst cases that takes no more."""
    inside = [[unit for unit in units if unit & block] for block in blocks]
    for unit in {unit for each in inside for unit in each}:
        if sum(unit in each for each in inside) > 1:
            raise PlanError(
                f"{unit.bit_count()} adapters are to stay together, but they are planned for in "
                "different sets"
            )
    if len(blocks) == 1:
        return _searched(options, units, floor, most)
    found = [_searched(options, each, floor, None) for each in inside]
    parts = [each for each in found if each is not None]
    if len(parts) < len(found):
        return None
    chosen = _joined([best for best, _ in parts])
    points = _levelled([points for _, points in parts])
    if most is not None:
        points = [point for point in points if len(point.options) <= most]
        if not points:  # what is cheapest is not what is fewest
            fewest = zip(inside, _shared_out(most, blocks), strict=True)
            limited = [_searched(options, each, floor, share) for each, share in fewest]
            if None in limited:
                return None
            chosen = _joined([best for best, _ in filter(None, limited)])
            points = [chosen]
        elif len(chosen.options) > most:
            chosen = points[-1]
    shown = [points[(len(points) - 1) * k // (LEVELS - 1)] for k in range(LEVELS)]
    return chosen, undominated([*shown, chosen])


def _levelled(frontiers: Sequence[Sequence[Partition]]) -> list[Partition]:
    """Frontiers put together: at each worst case the cheapest that each has, ascending in both."""
    highest = min(points[-1].worst for points in frontiers)
    levels = sorted({p.worst for points in frontiers for p in points if p.worst <= highest})
    return undominated(
        _joined([next(p for p in points if p.worst >= level) for points in frontiers])
        for level in levels
    )


def _shared_out(most: int, blocks: Sequence[int]) -> list[int]:
    """How many groups each block may make, so that together there are at most `most`."""
    if most < len(blocks):
        raise PlanError(
            f"max_adapters is {most}, but the adapters are planned for in {len(blocks)} sets that "
            "need a group each"
        )
    total = sum(block.bit_count() for block in blocks)
    ends = [0]
    for block in blocks:
        ends.append(ends[-1] + block.bit_count())
    spare = most - len(blocks)
    return [1 + spare * end // total - spare * start // total for start, end in pairwise(ends)]


def _joined(partitions: Sequence[Partition]) -> Partition:
    options = [option for partition in partitions for option in partition.options]
    return Partition(tuple(sorted(options, key=lambda option: option.mask & -option.mask)))


def _searched(
    options: Options, units: Sequence[int], floor: int, most: int | None
) -> tuple[Partition, list[Partition]] | None:
    """The partition to choose and the frontier, over `units` that are never split; None if there
    is none at all."""

    @cache
    def over_units(mask: int) -> tuple[Option, ...]:
        found = options(_members(mask, units))
        return tuple(replace(option, mask=mask) for option in found)

    def of_adapters(point: Partition) -> Partition:
        of = {id(o.group): o for part in point.options for o in options(_members(part.mask, units))}
        return Partition(tuple(of[id(part.group)] for part in point.options))

    if len(units) <= EXACT_UP_TO:
        points = frontier(exact(over_units, len(units), most))
    else:
        points = searched_frontier(over_units, len(units), floor, most=most)
    if not points:
        return None
    reaching = [point for point in points if point.worst >= floor]
    chosen = points[-1]
    if reaching:
        chosen = _most_certain(reaching[0], over_units, len(units), floor, most)
    return of_adapters(chosen), [of_adapters(point) for point in points]


def _members(mask: int, units: Sequence[int]) -> int:
    return sum(unit for position, unit in enumerate(units) if mask >> position & 1)


def _most_certain(
    cheapest: Partition, options: Options, count: int, floor: int, most: int | None
) -> Partition:
    """Of the partitions as cheap that keep the floor, the one with the highest low end."""
    lowered = cautious(options, floor)
    if count <= EXACT_UP_TO:
        solve = exact(lowered, count, most)
    else:
        solve = local_search(lowered, count, most=most)
    found = tightened(solve, NO_FLOOR)
    if not found or found[-1].cost > cheapest.cost:  # a local search can miss it
        return cheapest
    by_group = {id(o.group): o for part in found[-1].options for o in options(part.mask)}
    return Partition(tuple(by_group[id(part.group)] for part in found[-1].options))


def _check(adapters: Sequence[AdapterInfo], min_retention: float, max_adapters: int | None) -> None:
    if not adapters:
        raise PlanError("there are no adapters to plan for; name at least one")
    names = [check_name(adapter.name) for adapter in adapters]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PlanError(f"two adapters are called '{twice[0]}'; give each its own name")
    if not (math.isfinite(min_retention) and 0 <= min_retention <= 1):
        raise PlanError(
            f"min_retention is {min_retention}; expected 0 to 1, where 0.9 means that every "
            "adapter keeps 90 % of its gain"
        )
    if max_adapters is not None and max_adapters < 1:
        raise PlanError(f"max_adapters is {max_adapters}; expected at least 1")


def _written(setting: Setting, chosen: Partition) -> tuple[Group, ...]:
    """The chosen candidates under their names, the planner's reasons before their own."""
    labels = group_names([option.group.adapters for option in chosen.options], setting.names)
    groups = []
    for label, option in zip(labels, chosen.options, strict=True):
        reasons = (*group_reasons(setting, chosen, option), *option.group.reasons)
        groups.append(option.group.model_copy(update={"name": label, "reasons": reasons}))
    return tuple(groups)


def group_names(groups: Sequence[tuple[str, ...]], adapters: Sequence[str]) -> list[str]:
    """One folder name per group: the adapter's own, 'math+code' if short, else 'group-1'.

    A group of several never takes the name of an adapter or of another group.
    """
    taken = set(adapters)
    labels = []
    for members in groups:
        label = members[0] if len(members) == 1 else "+".join(members)
        if len(members) > 1 and (len(label) > 60 or label in taken):
            label = next(
                name for i in range(1, len(taken) + 2) if (name := f"group-{i}") not in taken
            )
        taken.add(label)
        labels.append(check_name(label))
    return labels


def _with_full_routing(
    points: Sequence[Partition], adapters: Sequence[AdapterInfo]
) -> tuple[FrontierPoint, ...]:
    """The points as they are (ascending in cost), full routing last unless it is among them."""
    routing = FrontierPoint(
        groups=tuple((adapter.name,) for adapter in adapters),
        methods=(None,) * len(adapters),
        mean_retention=1.0,
        worst_retention=1.0,
        resident_parameters=sum(adapter.parameters for adapter in adapters),
    )
    rows = [
        FrontierPoint(
            groups=tuple(option.group.adapters for option in point.options),
            methods=tuple(option.group.method for option in point.options),
            mean_retention=point.total / len(adapters) / BILLION,
            worst_retention=point.worst / BILLION,
            resident_parameters=point.parameters,
        )
        for point in points
    ]
    return tuple(rows if routing in rows else [*rows, routing])


def _check_routing(
    chosen: Partition, aucs: Mapping[tuple[str, str], float] | None
) -> tuple[str, ...]:
    """A reason in words, or PlanError naming the two adapters whose prompts look alike."""
    groups = [option.group.adapters for option in chosen.options]
    if len(groups) == 1:
        return ("there is one group, so no prompt has to be told apart from another",)
    crossing = [(a, b) for one, other in combinations(groups, 2) for a in one for b in other]
    known = dict(aucs or {}) | {(b, a): auc for (a, b), auc in (aucs or {}).items()}
    if lacking := [pair for pair in crossing if pair not in known]:
        raise PlanError(
            f"routing by prompt needs calibration prompts of every adapter; '{lacking[0][0]}' or "
            f"'{lacking[0][1]}' has none: route by name, or capture a probe with calibration items"
        )
    auc, a, b = min((known[pair], *pair) for pair in crossing)
    if auc < SEPARABLE:
        raise PlanError(
            f"prompts of '{a}' and '{b}' cannot be told apart (AUC {number(auc)}, needed "
            f"{number(SEPARABLE)}) but they stand in different groups; route by name"
        )
    return (
        f"a router can tell the groups apart by prompt: AUC {number(auc)} at worst "
        f"('{a}' and '{b}', needed {number(SEPARABLE)})",
    )
