"""The planner's reasons, in words for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from mergeprobe.plan import Action, Forecast, Group
from mergeprobe.predict.partition import BILLION, Option, Options, Partition, cheapest

Confidence = Literal["point", "lower"]
LISTED = 12  # more than these are counted


@dataclass(frozen=True)
class Setting:
    """What the reasons speak about.

    names, parameters, ranks: per adapter, bit i of a mask is adapter i. floor: the asked
    retention, in billionths; reached: whether a partition keeps it. blocks: masks that no group
    may reach across.
    """

    names: tuple[str, ...]
    parameters: tuple[int, ...]
    ranks: tuple[int, ...]
    options: Options
    confidence: Confidence
    floor: int
    reached: bool
    blocks: tuple[int, ...] = ()

    def apart(self, one: int, other: int) -> bool:
        """Whether two sets could be no group, in different blocks."""
        return bool(self.blocks) and not any(one & block and other & block for block in self.blocks)


def group_reasons(setting: Setting, chosen: Partition, option: Option) -> list[str]:
    """Why this group's members are together, and why it stays apart from its nearest groups."""
    others = [
        other
        for other in chosen.options
        if other is not option and not setting.apart(option.mask, other.mask)
    ]
    nearest = sorted(others, key=lambda other: -_best_worst(setting, option.mask | other.mask))
    apart = [_apart(setting, chosen, option, other) for other in nearest[:3]]
    return [_together(setting, option), *apart]


def plan_reasons(
    setting: Setting, chosen: Partition, frontier: Sequence[Partition]
) -> tuple[str, ...]:
    """The whole plan: groups, forecast, cost, what the next cheaper choice would break."""
    count, full = len(setting.names), sum(setting.parameters)
    sizes = f"{_plural(count, 'adapter')} in {_plural(len(chosen.options), 'group')}"
    weakest = min(chosen.options, key=lambda option: option.worst)
    name, forecast = weakest_member(weakest.group, setting.confidence)
    lines = [
        f"{sizes}: {_outline(chosen)}",
        f"forecast retention at worst {number(_measure(forecast, setting.confidence))} ('{name}'"
        f"{', low end' if setting.confidence == 'lower' else ''}), "
        f"on average {number(chosen.total / count / BILLION)}",
        f"holds {amount(chosen.parameters)}, {_share(chosen.parameters, full)} "
        f"of full routing's {amount(full)}",
    ]
    if not setting.reached:
        lines.append(
            f"no partition is forecast to keep the floor {number(setting.floor / BILLION)}; "
            "this one has the best worst case"
        )
    if all(len(option.group.adapters) == 1 for option in chosen.options):
        lines.append(_closest_pair(setting, chosen))
    cheaper = [point for point in frontier if point.cost < chosen.cost]
    if not cheaper:
        lines.append("nothing cheaper was found")
    else:
        next_one = max(cheaper, key=lambda point: point.cost)
        broken = min(next_one.options, key=lambda option: option.worst)
        lines.append(
            f"the next cheaper choice ({amount(next_one.parameters)}: {_shape(next_one)}) was "
            f"refused: {_refusal(setting, chosen, broken)}"
        )
    return tuple(lines)


def _outline(chosen: Partition) -> str:
    """Groups of several one by one, single adapters collected by what is done with them."""
    several = [o.group for o in chosen.options if len(o.group.adapters) > 1]
    alone: dict[str, list[str]] = {}
    for option in chosen.options:
        if len(option.group.adapters) == 1:
            alone.setdefault(done(option.group), []).extend(option.group.adapters)
    parts = [f"{_listed(group.adapters)} {done(group)}" for group in several]
    parts += [
        f"{_listed(names)} {'each ' if len(names) > 1 else ''}{what}"
        if len(names) <= LISTED
        else f"{_plural(len(names), 'adapter')} each {what}"
        for what, names in alone.items()
    ]
    return "; ".join(parts)


def _together(setting: Setting, option: Option) -> str:
    group, members = option.group, _members(setting, option.mask)
    apart = sum(setting.parameters[i] for i in members)
    saved = apart - option.parameters
    saves = f"saves {amount(saved)}" if saved > 0 else "saves no parameters"
    name, forecast = weakest_member(group, setting.confidence)
    if len(members) == 1:
        if saved <= 0 and group.action is Action.route:
            return f"'{name}' is kept whole and routed, so it keeps all of its gain"
        of = f" of {setting.ranks[members[0]]}" if group.rank else ""
        return f"'{name}' is {done(group)}{of}: forecast {spread(forecast)}, {saves}"
    worst = _measure(forecast, setting.confidence)
    together = "go together" if group.action is Action.logits else "share one adapter"
    return (
        f"{_listed(group.adapters)} {together}, {done(group)}: forecast {number(worst)} "
        f"worst-case ('{name}', {spread(forecast)}), {saves}"
    )


def _apart(setting: Setting, chosen: Partition, one: Option, other: Option) -> str:
    """Blames the worst pair across the two groups if it falls short alone, else the whole."""
    floor = _floor(setting, chosen)
    crossing = [
        (1 << a) | (1 << b)
        for a in _members(setting, one.mask)
        for b in _members(setting, other.mask)
    ]
    pair = min(crossing, key=lambda mask: _best_worst(setting, mask))
    both = pair if _best_worst(setting, pair) < floor else one.mask | other.mask
    names = _listed([setting.names[i] for i in _members(setting, both)])
    best = _best(setting, both)
    if best is None:
        return f"{names} stay apart: there is no way to merge them"
    if best.worst < floor:
        return f"{names} stay apart: {_refusal(setting, chosen, best)}"
    return f"{names} could share one adapter: {_no_saving(setting, chosen, both)}"


def _closest_pair(setting: Setting, chosen: Partition) -> str:
    if len(setting.names) == 1:
        return "there is only one adapter, so there is nothing to merge"
    pairs = [
        (1 << a) | (1 << b)
        for a, b in combinations(range(len(setting.names)), 2)
        if not setting.apart(1 << a, 1 << b)
    ]
    if not pairs:
        return "every adapter stays on its own: no two of them may share a group"
    closest = max(pairs, key=lambda mask: _best_worst(setting, mask))
    best = _best(setting, closest)
    if best is None:
        return "every adapter stays on its own: there is no way to merge any two of them"
    falls_short = best.worst < _floor(setting, chosen)
    why = _refusal(setting, chosen, best) if falls_short else _no_saving(setting, chosen, closest)
    pair = _listed(best.group.adapters)
    return f"every adapter stays on its own: the closest pair was {pair}; {why}"


def _refusal(setting: Setting, chosen: Partition, option: Option) -> str:
    name, forecast = weakest_member(option.group, setting.confidence)
    floor = _floor(setting, chosen) / BILLION
    value = _measure(forecast, setting.confidence)
    digits = next((d for d in range(2, 9) if round(value, d) < round(floor, d)), 9)
    bar = "the floor" if setting.reached else "the worst case of this plan,"
    low = "with its low end " if setting.confidence == "lower" else ""
    return (
        f"{done(option.group)}, '{name}' would keep {number(forecast.retention, digits)} "
        f"({number(forecast.low, digits)} to {number(forecast.high, digits)}) of its gain, "
        f"{low}below {bar} {number(floor, digits)}"
    )


def _no_saving(setting: Setting, chosen: Partition, mask: int) -> str:
    option = cheapest(setting.options(mask), _floor(setting, chosen))
    assert option is not None, "asked only of a set that keeps the floor"
    apart = sum(other.parameters for other in chosen.options if other.mask & mask)
    return (
        f"{done(option.group)}, forecast {number(option.worst / BILLION)} worst-case; but that "
        f"takes {amount(option.parameters)}, no less than apart ({amount(apart)})"
    )


def _floor(setting: Setting, chosen: Partition) -> int:
    return setting.floor if setting.reached else chosen.worst


def _best(setting: Setting, mask: int) -> Option | None:
    """What keeps the worst member highest; of equals the cheapest."""
    return max(setting.options(mask), key=lambda o: (o.worst, -o.cost), default=None)


def _best_worst(setting: Setting, mask: int) -> float:
    best = _best(setting, mask)
    return float("-inf") if best is None else best.worst


def _members(setting: Setting, mask: int) -> list[int]:
    return [i for i in range(len(setting.names)) if mask >> i & 1]


def weakest_member(group: Group, confidence: Confidence) -> tuple[str, Forecast]:
    """The member with the lowest forecast; of equals the first."""
    name = min(group.adapters, key=lambda name: _measure(group.forecast[name], confidence))
    return name, group.forecast[name]


def _measure(forecast: Forecast, confidence: Confidence) -> float:
    return forecast.retention if confidence == "point" else forecast.low


def done(group: Group) -> str:
    """What the plan does with a group, such as "merged by mean"."""
    match group.action:
        case Action.merge:
            return f"merged by {group.method}"
        case Action.reweight:
            return f"merged by {group.method} with tuned weights"
        case Action.prune:
            return f"pruned, then merged by {group.method}"
        case Action.isolate:
            return "merged with isolated cores"
        case Action.logits:
            return "mixed by their logits"
        case Action.route:
            return "routed" + (f" at rank {group.rank}" if group.rank else "")


def _shape(partition: Partition) -> str:
    if len(partition.options) > LISTED:
        return _plural(len(partition.options), "group")
    return " | ".join("+".join(option.group.adapters) for option in partition.options)


def _listed(names: Sequence[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "all"


def number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}"


def spread(forecast: Forecast) -> str:
    """Such as "0.97 (0.90 to 1.00)"."""
    return f"{number(forecast.retention)} ({number(forecast.low)} to {number(forecast.high)})"


def amount(parameters: int) -> str:
    """Such as "2.4 M parameters"."""
    for size, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if parameters >= size:
            return f"{parameters / size:.1f}".removesuffix(".0") + f"{unit} parameters"
    return f"{parameters} parameters"
