"""Panel: the probes that are compared, and their per-module products, ready to be summed.

Every signal over modules is a ratio of sums, so a module is visited once, reduced to a few numbers
a pair, and forgotten; a signal over all modules, a depth third or a kind of module is then the
same formula on another sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mergeprobe.adapters.checkpoint import check_same_base, natural
from mergeprobe.adapters.regions import KINDS, THIRDS, kind_of, layer_of, third_of
from mergeprobe.capture.probe import Probe
from mergeprobe.errors import AdapterMismatch, ProbeError
from mergeprobe.signals.site import Site

EACH = "each"  # the region that stands for "every module by itself"

Products = Callable[[Site], dict[str, Tensor]]
SetProducts = Callable[[Site, tuple[tuple[int, ...], ...]], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Panel:
    """n probes over m modules.

    regions: name -> which modules belong to it ("all", the depth thirds, the kinds).
    products: name -> (m, …) float64, NaN where it was not measured; the axes after the first run
    over the probes (or over `sets`, tuples of probe indices).
    """

    probes: tuple[Probe, ...]
    modules: tuple[str, ...]
    regions: dict[str, Bool[Tensor, " m"]]
    products: dict[str, Float[Tensor, "m ..."]]
    sets: tuple[tuple[int, ...], ...] = ()

    @property
    def names(self) -> list[str]:
        return [probe.name for probe in self.probes]

    @property
    def n(self) -> int:
        return len(self.probes)

    def total(self, product: str, region: str) -> Float[Tensor, "..."]:
        """The sum over a region's modules; NaN where no module of it was measured.

        With region "each" the first axis stays: one value a module.
        """
        values = self.products[product]
        if region == EACH:
            return values
        values = values[self.regions[region]]
        known = ~values.isnan()
        return torch.where(known.any(0), values.nan_to_num().sum(0), torch.nan)

    def adapted(self, region: str) -> Float[Tensor, "..."]:
        """1 where an adapter has an update in the region, else NaN; shape (n,) or (m, n)."""
        return torch.where(self.total("energy", region).isnan(), torch.nan, 1.0)

    def mean(self, product: str, region: str) -> Float[Tensor, "..."]:
        """Energy-weighted mean over a region's modules.

        Of an adapter: weighted by ‖ΔW‖². Of a pair: by the sum of the two adapters' shares of
        their own energy, so that the larger adapter does not decide alone. NaN where an adapter
        has no update in the region.
        """
        values = self.products[product]
        here = self.adapted(region)
        if values.ndim == 3:
            here = here[..., :, None] * here[..., None, :]
        if region == EACH:
            return values * here
        mask = self.regions[region]
        energy = self.products["energy"][mask].nan_to_num()
        weight = energy / energy.sum(0).clamp_min(torch.finfo(energy.dtype).tiny)
        if values.ndim == 3:
            weight = weight[:, :, None] + weight[:, None, :]
        values = values[mask]
        known = ~values.isnan()
        summed = (weight * values.nan_to_num()).sum(0) / (weight * known).sum(0)
        return summed * here


def measure(
    probes: Sequence[Probe],
    products: Sequence[Products],
    *,
    sets: Sequence[Sequence[str]] = (),
    set_products: Sequence[SetProducts] = (),
) -> Panel:
    """Visits every module once and keeps the products.

    Raises ProbeError for no probes or two of one name, AdapterMismatch for other bases.
    """
    probes = tuple(probes)
    check_probes(probes)
    modules = tuple(sorted({m for probe in probes for m in probe.updates}, key=natural))
    members = tuple(resolve(chosen, probes) for chosen in sets)
    found: dict[str, list[Tensor]] = {}
    for module in modules:
        site = Site.of(module, probes)
        parts = [product(site) for product in products]
        parts += [product(site, members) for product in set_products]
        for part in parts:
            for name, value in part.items():
                found.setdefault(name, []).append(value)
    stacked = {name: torch.stack(values) for name, values in found.items()}
    return Panel(probes, modules, regions(modules, probes), stacked, members)


def check_probes(probes: tuple[Probe, ...]) -> None:
    if not probes:
        raise ProbeError("no probes to measure; give at least one")
    names = [probe.name for probe in probes]
    for name in names:
        if names.count(name) > 1:
            raise ProbeError(f"two probes are named '{name}'; give each its own name")
    for probe in probes:
        if not probe.updates:
            raise ProbeError(f"probe '{probe.name}' holds no updates; capture it again")
    check_same_base([probe.to_adapter() for probe in probes])


def check_in_common(probes: Sequence[Probe]) -> None:
    """Raises AdapterMismatch for the first two probes that adapt no module in common."""
    for place, one in enumerate(probes):
        for two in probes[place + 1 :]:
            if not one.updates.keys() & two.updates.keys():
                raise AdapterMismatch(
                    f"'{one.name}' and '{two.name}' adapt no module in common: "
                    f"{sorted(one.updates, key=natural)[:2]}... and "
                    f"{sorted(two.updates, key=natural)[:2]}..."
                )


def resolve(chosen: Sequence[str], probes: tuple[Probe, ...]) -> tuple[int, ...]:
    """Probe indices of the named adapters, in input order."""
    names = [probe.name for probe in probes]
    for name in chosen:
        if name not in names:
            raise ProbeError(f"set {list(chosen)} names '{name}'; the probes are {names}")
    if len(set(chosen)) < 2 or len(set(chosen)) != len(chosen):
        raise ProbeError(f"set {list(chosen)} needs at least two adapters, each once")
    return tuple(sorted(names.index(name) for name in chosen))


def regions(modules: Sequence[str], probes: Sequence[Probe]) -> dict[str, Bool[Tensor, " m"]]:
    """Which modules belong to "all", to each third of the depth, and to each kind.

    The depth is what the probes' provenance says, or the deepest adapted layer where it says
    nothing (a finished adapter).
    """
    layers = [layer_of(module) for module in modules]
    said = [probe.meta.get("layers") for probe in probes]
    seen = [layer + 1 for layer in layers if layer is not None]
    depth = max([*seen, *(count for count in said if isinstance(count, int))], default=1)
    third = [third_of(module, depth) for module in modules]
    kind = [kind_of(module) for module in modules]
    found = {"all": torch.ones(len(modules), dtype=torch.bool)}
    found |= {name: torch.tensor([value == name for value in third]) for name in THIRDS}
    found |= {name: torch.tensor([value == name for value in kind]) for name in KINDS}
    return found
