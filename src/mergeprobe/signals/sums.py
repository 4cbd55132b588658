"""measure: probes -> Panel, a batch of modules at a time, tile by tile of pairs.

Per module all factors are stacked; a tile of pairs is one matrix product a side, reduced at once
to a few numbers a pair. Modules of one shape go together as long as their stacks are small: a few
adapters' products are not worth a call each. With `rows` (the new adapters) and `columns` (all of
them) only those pairs are visited, so adding one adapter to N costs N pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mergeprobe.adapters.checkpoint import natural
from mergeprobe.adapters.regions import kind_of, layer_of, third_of
from mergeprobe.capture.probe import Probe
from mergeprobe.signals import curvature, gradient, subspace, update
from mergeprobe.signals.checks import check_probes, resolve
from mergeprobe.signals.families import PRECISIONS, Effort, Family, Pairs
from mergeprobe.signals.files import rank_of, shape_of
from mergeprobe.signals.panel import Panel, Place, known_sum
from mergeprobe.signals.site import Site
from mergeprobe.signals.stack import Stack
from mergeprobe.threads import one_thread

# probes: below, a second thread gains little on an idle machine (5 adapters: 1.5 s for 2.7 s) and
# loses everything on a busy one, where its operations wait for a core (minutes), and training runs
# that ask for a forecast are busy
FEW = 32
BATCH = 128  # updates (a module of an adapter) and
BATCH_COMPONENTS = 2048  # rank components that are stacked at a time, where one module has fewer


def measure(
    probes: Sequence[Probe],
    effort: Effort | None = None,
    *,
    rows: Sequence[int] | None = None,
    columns: Sequence[int] | None = None,
    pairs: bool = True,
    sets: Sequence[Sequence[str]] = (),
    layers: bool = False,
    triples: bool = False,
    largest: Mapping[str, Callable[[Panel, str], Tensor]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Panel:
    """Visits every module once.

    rows, columns: indices of the pairs' a and b; by default all. pairs: False measures single
    adapters only. layers: keep sums by layer too (30 times the memory of a table of pairs).
    largest: signals by name whose largest value over modules is wanted.
    Raises ProbeError for no probes, two of one name or one with entries that are not finite,
    AdapterMismatch for other bases.
    """
    work = _work(probes, effort, rows, columns, pairs, sets, layers, triples, largest)
    _visit([work], progress)
    return work.panel()


def measure_blocks(
    probes: Sequence[Probe],
    effort: Effort | None,
    blocks: Sequence[tuple[Sequence[int] | None, Sequence[int] | None]],
    *,
    largest: Mapping[str, Callable[[Panel, str], Tensor]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Panel]:
    """`measure` for several (rows, columns) at once: every module is read once for all of them."""
    works = [_work(probes, effort, *block, largest=largest) for block in blocks]
    _visit(works, progress)
    return [work.panel() for work in works]


def _work(
    probes: Sequence[Probe],
    effort: Effort | None,
    rows: Sequence[int] | None,
    columns: Sequence[int] | None,
    pairs: bool = True,
    sets: Sequence[Sequence[str]] = (),
    layers: bool = False,
    triples: bool = False,
    largest: Mapping[str, Callable[[Panel, str], Tensor]] | None = None,
) -> _Work:
    probes, effort = tuple(probes), effort or Effort()
    check_probes(probes)
    modules = tuple(sorted({m for probe in probes for m in probe.updates}, key=natural))
    everyone = range(len(probes))
    return _Work(
        probes,
        tuple(rows if rows is not None else everyone) if pairs else (),
        tuple(columns if columns is not None else everyone) if pairs else (),
        modules,
        places(modules, probes, layers=layers),
        tuple(resolve(chosen, probes) for chosen in sets),
        effort,
        effort.chosen(),
        dict(largest or {}),
        triples,
    )


def _visit(works: Sequence[_Work], progress: Callable[[str], None] | None) -> None:
    first = works[0]
    for work in works[1:]:
        work.each = first.each  # of single adapters: taken once
    done = 0
    with one_thread() if len(first.probes) < FEW else nullcontext():
        for batch in first.batches():
            done += len(batch)
            if progress is not None:
                progress(f"module {done} of {len(first.modules)}")
            stacks = first.read(batch)
            first.alone(batch, stacks)
            for work in works:
                work.pairs(batch, stacks)


def places(modules: Sequence[str], probes: Sequence[Probe], *, layers: bool) -> tuple[Place, ...]:
    """The place of every module.

    The depth is what the probes' provenance says, or the deepest adapted layer where it says
    nothing (a finished adapter).
    """
    found = [layer_of(module) for module in modules]
    said = [probe.meta.get("layers") for probe in probes]
    seen = [layer + 1 for layer in found if layer is not None]
    depth = max([*seen, *(count for count in said if isinstance(count, int))], default=1)
    return tuple(
        Place(third_of(module, depth), kind_of(module), layer if layers else None)
        for module, layer in zip(modules, found, strict=True)
    )


@dataclass
class _Work:
    """The sums while they grow."""

    probes: tuple[Probe, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    modules: tuple[str, ...]
    at: tuple[Place, ...]
    sets: tuple[tuple[int, ...], ...]
    effort: Effort
    families: list[Family]
    wanted: dict[str, Callable[[Panel, str], Tensor]]
    with_triples: bool
    each: dict[str, Tensor] = field(default_factory=dict)
    pair: dict[str, Tensor] = field(default_factory=dict)
    weighted: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    largest: dict[str, Tensor] = field(default_factory=dict)
    set_each: dict[str, Tensor] = field(default_factory=dict)
    triples: Tensor | None = None

    def __post_init__(self) -> None:
        self.device = self.effort.placed()
        self.places = tuple(dict.fromkeys(self.at))
        self.square = self.rows == self.columns == tuple(range(len(self.probes)))
        self.means = {name for family in self.families for name in family.weighted}

    def batches(self) -> Iterator[list[int]]:
        """All modules by index, those together that one Stack can hold: of one shape, adapted by
        the same probes, which have the same parts of them."""
        alike: dict[Any, list[int]] = {}
        for index, module in enumerate(self.modules):
            there = [probe for probe in self.probes if module in probe.updates]
            of = tuple(module in probe.updates for probe in self.probes)
            parts = curvature.parts_of(module, self.probes), gradient.size_of(module, self.probes)
            kind = shape_of(there[0].updates, module), of, parts
            alike.setdefault(kind, []).append(index)
        for together in alike.values():
            first = self.modules[together[0]]
            components = sum(self._ranks([first]).values())
            count = min(BATCH // len(self.probes), BATCH_COMPONENTS // components)
            for start in range(0, len(together), max(1, count)):
                yield together[start : start + max(1, count)]

    def alone(self, batch: list[int], stacks: list[Stack]) -> None:
        where = torch.tensor(batch)[:, None]
        for stack in stacks:
            parts = [update.own(stack)]
            parts += [own(stack) for family in self.families for own in family.own]
            for name, values in (item for part in parts for item in part.items()):
                self._own(name)[where, list(stack.span)] = values.to("cpu")

    def pairs(self, batch: list[int], stacks: list[Stack]) -> None:
        for one, first in enumerate(down := self._of(stacks, self.rows)):
            for two, second in enumerate(down if self.square else self._of(stacks, self.columns)):
                if self.square and two < one:
                    continue
                self._tile(batch, Site(first, second))
        if self.sets and self.square:
            self._sets(batch, stacks)
        if self.with_triples:
            found = curvature.triples(stacks[0].gathered(range(len(self.probes)), stacks[1:]))
            self.triples = _added(self.triples, found)

    def _ranks(self, modules: Sequence[str]) -> dict[int, int]:
        """By probe, its largest rank in these modules; 1 where it has none."""
        return {
            i: max((rank_of(p.updates, m) for m in modules if m in p.updates), default=1)
            for i, p in enumerate(self.probes)
        }

    def read(self, batch: list[int]) -> list[Stack]:
        """All probes at some modules, in runs whose products are tiles of a good size."""
        dtype = PRECISIONS[self.effort.precision]
        modules = [self.modules[index] for index in batch]
        ranks = self._ranks(modules)
        side = self.effort.side(sum(ranks.values()))
        spans, width = [[]], 1
        for i in ranks:
            if spans[-1] and (len(spans[-1]) + 1) * max(width, ranks[i]) > side:
                spans.append([])
                width = 1
            spans[-1].append(i)
            width = max(width, ranks[i])
        return [
            Stack.of(modules, self.probes, span, dtype=dtype, device=self.device) for span in spans
        ]

    def _of(self, stacks: list[Stack], chosen: tuple[int, ...]) -> list[Stack]:
        """The stacks of the chosen probes: the whole ones where all of theirs are chosen."""
        if chosen == tuple(range(len(self.probes))):
            return stacks
        wanted = set(chosen)
        parts = [[i for i in stack.span if i in wanted] for stack in stacks]
        return [
            stack if len(part) == len(stack.span) else stack.gathered(part)
            for stack, part in zip(stacks, parts, strict=True)
            if part
        ]

    def _tile(self, batch: list[int], site: Site) -> None:
        both = _merged(site, [f for family in self.families for f in family.pairs])
        ordered = [f for family in self.families for f in family.ordered]
        self._add(batch, site, both | _merged(site, ordered))
        if self.square and not site.diagonal:
            back = site.swapped
            there = {name: values.mT for name, values in both.items()}
            self._add(batch, back, there | _merged(back, ordered))

    def _add(self, batch: list[int], site: Site, found: dict[str, Tensor]) -> None:
        here = self._where(site)
        energies = [s.each(s.energy).nan_to_num() for s in (site.rows, site.columns)]
        for at in dict.fromkeys(self.at[index] for index in batch):
            place = self.places.index(at)
            inside = [row for row, index in enumerate(batch) if self.at[index] == at]
            e_a, e_b = (energy[inside] for energy in energies)
            for name, values in found.items():
                values = values[inside]
                if name in self.means:
                    known = values.nan_to_num()
                    by_a, by_b = self._weighted(name)
                    by_a[(place, *here)] += (known * e_a[:, :, None]).sum(0)
                    if not self.square:  # else it is the transpose
                        by_b[(place, *here)] += (known * e_b[:, None, :]).sum(0)
                else:
                    held = self._pair(name)
                    held[(place, *here)] = _added(held[(place, *here)], known_sum(values))
        for row, index in enumerate(batch if self.wanted else ()):
            of_one = {name: values[row] for name, values in found.items()}
            alone = self._alone(index, site, of_one, [energy[row] for energy in energies])
            for name, signal in self.wanted.items():
                held = self._largest(name)
                held[here] = torch.fmax(held[here], signal(alone, "all"))

    def _where(self, site: Site) -> tuple:
        """Where the tile lies in the sums; slices where they can be, which are views."""
        ends = []
        for span, whole in ((site.rows.span, self.rows), (site.columns.span, self.columns)):
            start = whole.index(span[0])
            assert whole[start : start + len(span)] == span
            ends.append(slice(start, start + len(span)))
        return tuple(ends)

    def _alone(
        self, index: int, site: Site, found: dict[str, Tensor], energies: list[Tensor]
    ) -> Panel:
        """The tile as a panel of one module."""
        one = self.at[index : index + 1]
        n = len(self.probes)
        weighted = {
            name: (
                (found[name].nan_to_num() * energies[0][:, None])[None],
                (found[name].nan_to_num() * energies[1][None, :])[None],
            )
            for name in found.keys() & self.means
        }
        return Panel(
            self.probes,
            self.modules[index : index + 1],
            site.rows.span,
            site.columns.span,
            one,
            {name: values[index : index + 1, :n] for name, values in self.each.items()},
            one,
            {name: values[None] for name, values in found.items() if name not in self.means},
            weighted,
        )

    def _sets(self, batch: list[int], stacks: list[Stack]) -> None:
        names = self.effort.names
        rows = [0]
        for members in self.sets:
            rows.append(rows[-1] + len(members))
        for place, members in enumerate(self.sets):
            stack = stacks[0].gathered(members, stacks[1:])
            if "spectral" in names:
                held = self._set("set_union", len(self.sets))
                if stack.where:
                    held[batch, place] = subspace.set_products(stack).cpu()
            if "curvature" in names:
                held = self._set("joint", rows[-1])
                held[batch, rows[place] : rows[place + 1]] = curvature.set_products(stack).cpu()

    def _own(self, name: str) -> Tensor:
        return self._made(self.each, name, (len(self.modules), len(self.probes)), "cpu")

    def _pair(self, name: str) -> Tensor:
        shape = len(self.places), len(self.rows), len(self.columns)
        return self._made(self.pair, name, shape, self.device)

    def _weighted(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self.weighted:
            shape = len(self.places), len(self.rows), len(self.columns)
            by_a = torch.zeros(shape, dtype=torch.float64, device=self.device)
            self.weighted[name] = by_a, by_a.mT if self.square else torch.zeros_like(by_a)
        return self.weighted[name]

    def _largest(self, name: str) -> Tensor:
        shape = len(self.rows), len(self.columns)
        return self._made(self.largest, name, shape, self.device)

    def _set(self, name: str, count: int) -> Tensor:
        return self._made(self.set_each, name, (len(self.modules), count), "cpu")

    def _made(self, held: dict[str, Tensor], name: str, shape: tuple, device) -> Tensor:
        if name not in held:
            held[name] = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        return held[name]

    def panel(self) -> Panel:
        def home(held: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: values.to("cpu") for name, values in held.items()}

        return Panel(
            self.probes,
            self.modules,
            self.rows,
            self.columns,
            self.at,
            self.each,
            self.places,
            home(self.pair),
            {name: (a.to("cpu"), b.to("cpu")) for name, (a, b) in self.weighted.items()},
            home(self.largest),
            self.sets,
            self.set_each,
            self.triples,
        )


def _merged(site: Site, functions: Sequence[Pairs]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for function in functions:
        found |= function(site)
    return found


def _added(held: Tensor | None, values: Tensor) -> Tensor:
    """Their sum; NaN only where neither was measured."""
    if held is None:
        return values
    return torch.where(held.isnan(), values, held + values.nan_to_num())
