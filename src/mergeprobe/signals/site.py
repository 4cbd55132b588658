"""Site: a batch of modules, a run of adapters against another, the products of their updates.

(B Q⁻¹, Q A) is the same adapter for every invertible Q, so nothing here is read off B or A alone.
Inner products take both sides' factors together; whatever needs directions takes each update's
thin SVD, ΔW = U diag(σ) Vᵀ, and then only the small matrices U_aᵀU_b and V_aᵀV_b.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.signals.stack import Stack

FINE = 256  # pairs of components; more than these are summed by side, not one by one
FEW = 256  # pairs of adapters; up to these all components are summed at once


@dataclass(frozen=True, eq=False)
class Site:
    """The pairs (a, b), a of `rows` and b of `columns`, two stacks of the same m modules.

    On the diagonal both are the same object, and symmetric quantities are computed once a pair.
    """

    rows: Stack
    columns: Stack

    @property
    def swapped(self) -> Site:
        return Site(self.columns, self.rows)

    @property
    def diagonal(self) -> bool:
        return self.rows is self.columns

    @cached_property
    def gram(self) -> Float[Tensor, "m a b"]:
        """⟨ΔW_a, ΔW_b⟩: one matrix product a side and a sum over blocks, no SVD."""
        left, right = (
            _product(getattr(self.rows, side), getattr(self.columns, side))
            for side in ("left", "right")
        )
        found = _contracted(left, right)
        scaled = found.double() * self.rows.scale[:, :, None] * self.columns.scale[:, None, :]
        return (scaled + scaled.mT) / 2 if self.diagonal else scaled

    @cached_property
    def cross_left(self) -> Float[Tensor, "m a b r s"]:
        """U_aᵀU_b for every a, b."""
        return _product(self.rows.svd[0], self.columns.svd[0]).permute(0, 2, 4, 1, 3).double()

    @cached_property
    def cross_right(self) -> Float[Tensor, "m a b r s"]:
        """V_aᵀV_b for every a, b."""
        return _product(self.rows.svd[2], self.columns.svd[2]).permute(0, 2, 4, 1, 3).double()

    @cached_property
    def joint(self) -> Float[Tensor, "m a b r s"]:
        """σ_ak σ_bl for every a, b, k, l."""
        return self.rows.sigma[:, :, None, :, None] * self.columns.sigma[:, None, :, None, :]

    @cached_property
    def listed(self) -> tuple[Tensor, Tensor]:
        """The pairs to compute: a < b on the diagonal, else all."""
        a, b = len(self.rows.where), len(self.columns.where)
        if self.diagonal:
            first, second = torch.triu_indices(a, a, offset=1)
            return first, second
        first, second = torch.cartesian_prod(torch.arange(a), torch.arange(b)).T
        return first, second

    def filled(
        self, values: Float[Tensor, "m half"], diagonal: Float[Tensor, "m a"]
    ) -> Float[Tensor, "m a b"]:
        """The matrix with these values of the listed pairs, and this diagonal where it has one."""
        if not self.diagonal:
            return values.reshape(len(values), len(self.rows.where), len(self.columns.where))
        out = torch.diag_embed(diagonal)
        first, second = self.listed
        out[:, first, second] = values
        out[:, second, first] = values
        return out

    def side_by_side(
        self,
        own_a: Float[Tensor, "m a r r"],
        cross: Float[Tensor, "m a b r s"],
        own_b: Float[Tensor, "m b s s"],
    ) -> Float[Tensor, "m half both both"]:
        """The Gram matrix of [X_a X_b] for each listed pair, from the blocks X_aᵀX_b."""
        first, second = self.listed
        between = cross[:, first, second]
        top = torch.cat([own_a[:, first], between], -1)
        bottom = torch.cat([between.mT, own_b[:, second]], -1)
        return torch.cat([top, bottom], -2)

    def pairs(
        self, values: Float[Tensor, "m a b"], alone: float
    ) -> Float[Tensor, "m rows columns"]:
        """Over the whole spans; `alone` where only one of the two adapts the modules, NaN where
        none does."""
        shape = len(values), len(self.rows.span), len(self.columns.span)
        if values.shape == shape:
            return values.double()
        out = torch.full(shape, torch.nan, dtype=torch.float64, device=values.device)
        down, across = self.rows.places, self.columns.places
        out[:, down] = alone
        out[:, :, across] = alone
        out[:, torch.tensor(down, dtype=torch.long)[:, None], across] = values.double()
        return out


def _product(
    one: Float[Tensor, "m r a size"], two: Float[Tensor, "m s b size"]
) -> Float[Tensor, "m r a s b"]:
    """one_akᵀ two_bl for every a, b, k, l, as one matrix product a module."""
    flat = one.flatten(1, 2) @ two.flatten(1, 2).mT
    return flat.reshape(*one.shape[:3], *two.shape[1:3])


def _contracted(
    left: Float[Tensor, "m r a s b"], right: Float[Tensor, "m r a s b"]
) -> Float[Tensor, "m a b"]:
    """Σ_kl left_kl right_kl. Over (a, b) at once where that is the long side; all are exact."""
    _, r, a, s, b = left.shape
    if a * b <= FEW:
        return (left * right).sum((1, 3))
    if r * s > FINE:
        return torch.stack([(left[:, k] * right[:, k]).sum(2) for k in range(r)]).sum(0)
    found = left[:, 0, :, 0] * right[:, 0, :, 0]
    for k in range(r):
        for l in range(s):  # noqa: E741
            if k or l:
                found.addcmul_(left[:, k, :, l], right[:, k, :, l])
    return found


def ratio(over: Tensor, under: Tensor, empty: float = torch.nan) -> Tensor:
    """over / under, and `empty` where under is 0. NaN (not measured) stays NaN."""
    return torch.where(under == 0, empty, over / torch.where(under == 0, 1.0, under))


def cosine(
    gram: Float[Tensor, "*g a b"], rows: Float[Tensor, "*g a"], columns: Float[Tensor, "*g b"]
) -> Float[Tensor, "*g a b"]:
    """Cosines from inner products and the squared norms of both sides; 0 where a norm is 0, NaN
    where one was not measured."""
    norms = (rows[..., :, None] * columns[..., None, :]).clamp_min(0).sqrt()
    return ratio(gram, norms, 0.0).clamp(-1.0, 1.0)
