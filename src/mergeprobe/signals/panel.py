"""Panel: the probes that are compared, and the sums of their per-module products.

Every signal over modules is a ratio of sums, so a module is read once, reduced tile by tile to a
few numbers a pair, added to the sums of the place where it sits, and forgotten. Memory is one
module of all adapters and the sums; no pair of adapters is ever held whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mergeprobe.adapters.regions import KINDS, THIRDS
from mergeprobe.capture.probe import Probe

EACH = "each"  # the region that stands for "every module by itself"


@dataclass(frozen=True)
class Place:
    """Where modules sit: a depth third (None outside the layers), a kind, perhaps the layer."""

    third: str | None
    kind: str
    layer: int | None = None

    def within(self, region: str) -> bool:
        if region in THIRDS:
            return self.third == region
        return self.kind == region if region in KINDS else region == "all"


@dataclass(frozen=True, eq=False)
class Panel:
    """The ordered pairs (a, b), a of `rows` and b of `columns`: indices among n probes.

    each: product -> (m, n), one value a module and probe. pair: product -> (places, rows, columns),
    summed over the modules of each of `places`. weighted: the same of products whose
    energy-weighted mean is taken, times a's ‖ΔW‖² there, and times b's. largest: signal -> its
    largest value over single modules. All float64, NaN where nothing was measured.
    sets: tuples of probe indices; set_rows: (set, member) of every row of a table of sets;
    set_each: product -> (m, sets) or (m, set rows). triples: (n, n, n), see curvature.
    """

    probes: tuple[Probe, ...]
    modules: tuple[str, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    at: tuple[Place, ...]
    each: dict[str, Float[Tensor, "m n"]]
    places: tuple[Place, ...] = ()
    pair: dict[str, Float[Tensor, "places rows columns"]] = field(default_factory=dict)
    weighted: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    largest: dict[str, Float[Tensor, "rows columns"]] = field(default_factory=dict)
    sets: tuple[tuple[int, ...], ...] = ()
    set_each: dict[str, Float[Tensor, "m _"]] = field(default_factory=dict)
    triples: Float[Tensor, "n n n"] | None = None
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [probe.name for probe in self.probes]

    @property
    def n(self) -> int:
        return len(self.probes)

    @property
    def square(self) -> bool:
        """Whether it holds all pairs."""
        return self.rows == self.columns == tuple(range(self.n))

    @cached_property
    def set_rows(self) -> list[tuple[int, int]]:
        return [(row, i) for row, members in enumerate(self.sets) for i in members]

    def total(self, product: str, region: str) -> Float[Tensor, "rows columns"]:
        """The sum over a region's modules; NaN where no module of it was measured."""
        if product not in self.pair:
            return self.unmeasured
        return known_sum(self.pair[product][self._inside(region)])

    def mean(self, product: str, region: str) -> Float[Tensor, "rows columns"]:
        """Energy-weighted mean over a region's modules.

        Weighted by the sum of the two adapters' shares of their own energy, so that the larger
        adapter does not decide alone. NaN where an adapter has no update in the region.
        """
        if product not in self.weighted:
            return self.unmeasured
        inside = self._inside(region)
        energy = self.own("energy", region)
        e_a, e_b = self.sides(energy)
        by_a, by_b = (part[inside].sum(0) for part in self.weighted[product])
        counted = (e_a > 0).double() + (e_b > 0).double()
        mean = (ratio_or_zero(by_a, e_a) + ratio_or_zero(by_b, e_b)) / counted
        return torch.where(e_a.isnan() | e_b.isnan(), torch.nan, mean)

    def own(self, product: str, region: str) -> Float[Tensor, "*g n"]:
        """The sum of an adapter's own product over a region's modules, NaN where there is none.

        With region "each": (m, n), one value a module.
        """
        if product not in self.each:
            shape = (len(self.modules), self.n) if region == EACH else (self.n,)
            return torch.full(shape, torch.nan, dtype=torch.float64)
        values = self.each[product]
        return values if region == EACH else known_sum(values[self._modules(region)])

    def own_mean(self, product: str, region: str) -> Float[Tensor, "*g n"]:
        """The mean of an adapter's own product, weighted by ‖ΔW‖²."""
        if product not in self.each or region == EACH:
            return self.own(product, region)
        inside = self._modules(region)
        values, energy = self.each[product][inside], self.each["energy"][inside].nan_to_num()
        weight = energy * ~values.isnan()
        mean = (weight * values.nan_to_num()).sum(0) / weight.sum(0)
        return torch.where(self.own("energy", region).isnan(), torch.nan, mean)

    def sides(
        self, values: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "1 columns"]]:
        """One value a probe, as a's and as b's."""
        return values[list(self.rows)][:, None], values[list(self.columns)][None, :]

    def inner(self, values: Float[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        """One value a probe, of the rows and of the columns."""
        return values[list(self.rows)], values[list(self.columns)]

    @property
    def unmeasured(self) -> Float[Tensor, "rows columns"]:
        return torch.full((len(self.rows), len(self.columns)), torch.nan, dtype=torch.float64)

    def part(self, start: int, stop: int) -> Panel:
        """The same pairs for some of the rows only."""
        here = slice(start, stop)
        return replace(
            self,
            rows=self.rows[here],
            pair={name: values[:, here] for name, values in self.pair.items()},
            weighted={n: (x[:, here], y[:, here]) for n, (x, y) in self.weighted.items()},
            largest={name: values[here] for name, values in self.largest.items()},
        )

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Something of all probes that is made on its first use, for every part of the panel."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]

    def _inside(self, region: str) -> Bool[Tensor, " places"]:
        return torch.tensor([place.within(region) for place in self.places], dtype=torch.bool)

    def _modules(self, region: str) -> Bool[Tensor, " m"]:
        return torch.tensor([place.within(region) for place in self.at], dtype=torch.bool)


def known_sum(values: Float[Tensor, "k ..."]) -> Float[Tensor, "..."]:
    """The sum over the first axis of what was measured; NaN where nothing was."""
    known = ~values.isnan()
    return torch.where(known.any(0), values.nan_to_num().sum(0), torch.nan)


def ratio_or_zero(over: Tensor, under: Tensor) -> Tensor:
    return torch.where(under > 0, over / torch.where(under > 0, under, 1.0), 0.0)
