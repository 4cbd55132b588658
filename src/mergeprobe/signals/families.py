"""FAMILIES of products, and what a measurement may choose: its Effort."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mergeprobe.errors import ProbeError
from mergeprobe.signals import curvature, gradient, subspace, update
from mergeprobe.signals.site import Site
from mergeprobe.signals.stack import Stack

# rank components of a tile's side: its products are large enough for the full speed of a matrix
# product and small enough for the cache
LARGEST_TILE, SMALLEST_TILE = 1024, 256
LARGEST_ON_GPU = 8192
TILES = 4  # a side at least, where they are not too small: half of a tile on the diagonal is idle

Own = Callable[[Stack], dict[str, Tensor]]
Pairs = Callable[[Site], dict[str, Tensor]]
PRECISIONS = {"double": torch.float64, "single": torch.float32}


@dataclass(frozen=True)
class Family:
    """Products that are measured together, or not at all.

    own: of one adapter. pairs: the same for (a, b) and (b, a). ordered: not the same.
    weighted: those of `pairs` that enter signals as energy-weighted means.
    """

    own: tuple[Own, ...] = ()
    pairs: tuple[Pairs, ...] = ()
    ordered: tuple[Pairs, ...] = ()
    weighted: tuple[str, ...] = ()


FAMILIES = {
    "gram": Family(pairs=(update.inner_products,)),
    "sign": Family(pairs=(update.sign_products,)),
    "spectral": Family(
        own=(update.own_spectrum, subspace.own),
        pairs=(update.spectral_norms, subspace.products),
        weighted=("spectral", *subspace.WEIGHTED),
    ),
    "gradient": Family(
        own=(gradient.own,), pairs=(gradient.inner_products,), ordered=(gradient.transfers,)
    ),
    "curvature": Family(own=(curvature.own,), ordered=(curvature.products,)),
}
"""By what they cost: gram is one matrix product a side, sign the entries of sampled rows, spectral
small decompositions for every pair; gradient and curvature need a probe's own parts. Signals of
drifts and of single adapters need no family."""

SOLE = {
    update.sign_products: ("sign_conflict", "sign_conflict_error"),
    update.spectral_norms: ("spectral_amplification",),
}
"""Products that no signal but these reads; they are among the dearest."""


@dataclass(frozen=True)
class Effort:
    """families: names in FAMILIES, or None for all. sign_rows: rows of each module sampled for
    sign_conflict; None takes all (exact). precision: of the factors' products, "double" or
    "single"; norms, small decompositions and sums are double either way. device: "auto" takes a
    GPU where there is one. components: rank components in a side of a tile; None: by their
    number. signals: those of pairs that will be asked for, or None for all: SOLE products of others
    are not taken."""

    families: Sequence[str] | None = None
    sign_rows: int | None = update.SIGN_ROWS
    precision: str = "double"
    device: str = "auto"
    components: int | None = None
    signals: Collection[str] | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.families or () if name not in FAMILIES]
        if unknown:
            raise ProbeError(f"no family of signals '{unknown[0]}'; there are {[*FAMILIES]}")
        if self.precision not in PRECISIONS:
            raise ProbeError(f"precision is '{self.precision}'; expected one of {[*PRECISIONS]}")

    @property
    def names(self) -> list[str]:
        return [name for name in FAMILIES if name in (self.families or FAMILIES)]

    def chosen(self) -> list[Family]:
        return [self._asked_for(FAMILIES[name]) for name in self.names]

    def _asked_for(self, family: Family) -> Family:
        pairs: list[Pairs] = []
        for products in family.pairs:
            readers = SOLE.get(products, ())
            if readers and self.signals is not None and not {*readers} & {*self.signals}:
                continue
            if products is update.sign_products:
                pairs.append(partial(update.sign_products, rows=self.sign_rows))
            else:
                pairs.append(products)
        return replace(family, pairs=tuple(pairs))

    def side(self, components: int) -> int:
        """Of a tile, in rank components, for so many in all."""
        if self.components is not None:
            return self.components
        largest = LARGEST_TILE if self.placed().type == "cpu" else LARGEST_ON_GPU
        return max(SMALLEST_TILE, min(largest, -(-components // TILES)))

    def placed(self) -> torch.device:
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
