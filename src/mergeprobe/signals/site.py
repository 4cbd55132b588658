"""Site: one weight matrix and every update of it, in a form that no gauge change can alter.

(B Q⁻¹, Q A) is the same adapter for every invertible Q, so nothing here is read off B or A. Each
update enters as its own thin SVD, ΔW = U diag(σ) Vᵀ; all products of two updates then need only
the small matrices U_aᵀU_b and V_aᵀV_b, and all adapters of a module are taken in one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.capture.probe import Probe

# directions below this share of the largest singular value are rounding of the stored fp32
# factors, not directions of the update
ROUNDING = 1e-6

# (indices of the probes with the moment F Fᵀ + tail, Fᵀ vectors for each, the tails)
Seen = tuple[list[int], Float[Tensor, "i q p r"], Float[Tensor, " i"]]


@dataclass(frozen=True, eq=False)
class Site:
    """One module under the p probes that adapt it, out of n.

    present: their indices among `probes`. left, sigma, right: their thin SVDs in float64, padded
    with zeros to one width r; directions that are only rounding are zero too.
    """

    module: str
    probes: tuple[Probe, ...]
    present: tuple[int, ...]
    left: Float[Tensor, "p out r"]
    sigma: Float[Tensor, "p r"]
    right: Float[Tensor, "p in r"]

    @classmethod
    def of(cls, module: str, probes: tuple[Probe, ...]) -> Site:
        present = tuple(i for i, probe in enumerate(probes) if module in probe.updates)
        updates = [probes[i].updates[module] for i in present]
        width = max(update.r for update in updates)
        out, into = updates[0].shape
        left = torch.zeros(len(updates), out, width, dtype=torch.float64)
        right = torch.zeros(len(updates), into, width, dtype=torch.float64)
        for row, update in enumerate(updates):
            left[row, :, : update.r] = update.B.detach()
            right[row, :, : update.r] = update.A.detach().T
            left[row] *= update.scaling
        q_out, r_out = torch.linalg.qr(left)
        q_in, r_in = torch.linalg.qr(right)
        u, sigma, vh = torch.linalg.svd(r_out @ r_in.mT, full_matrices=False)
        sound = sigma > ROUNDING * sigma[:, :1]
        keep = sound[:, None, :]
        return cls(
            module, probes, present, (q_out @ u) * keep, sigma * sound, (q_in @ vh.mT) * keep
        )

    @property
    def n(self) -> int:
        return len(self.probes)

    @cached_property
    def energy(self) -> Float[Tensor, " p"]:
        """‖ΔW‖² of each."""
        return self.sigma.square().sum(-1)

    @cached_property
    def cross_left(self) -> Float[Tensor, "p p r r"]:
        """U_aᵀU_b for every a, b."""
        return blocks(self.left, self.left)

    @cached_property
    def cross_right(self) -> Float[Tensor, "p p r r"]:
        """V_aᵀV_b for every a, b."""
        return blocks(self.right, self.right)

    @cached_property
    def joint(self) -> Float[Tensor, "p p r r"]:
        """σ_ak σ_bl for every a, b, k, l."""
        return self.sigma[:, None, :, None] * self.sigma[None, :, None, :]

    @cached_property
    def seen_left(self) -> Seen:
        """The updates' output directions through every output moment."""
        return self._seen("outputs", self.left)

    @cached_property
    def seen_right(self) -> Seen:
        """The updates' input directions through every input moment."""
        return self._seen("inputs", self.right)

    def _seen(self, part: str, vectors: Float[Tensor, "p size r"]) -> Seen:
        holders = self.rows(part)
        moments = [getattr(self.probes[i], part)[self.module] for i in holders]
        count, size, r = vectors.shape
        q = max((moment.factor.shape[1] for moment in moments), default=0)
        factors = torch.zeros(len(holders), q, size, dtype=torch.float64)
        for row, moment in enumerate(moments):
            factors[row, : moment.factor.shape[1]] = moment.factor.detach().T
        flat = factors.flatten(0, 1) @ vectors.permute(1, 0, 2).reshape(size, count * r)
        tails = torch.tensor([moment.tail for moment in moments], dtype=torch.float64)
        return holders, flat.reshape(len(holders), q, count, r), tails

    def each(self, values: Float[Tensor, " p"]) -> Float[Tensor, " n"]:
        """One value an adapter, NaN for those that do not adapt the module."""
        out = torch.full((self.n,), torch.nan, dtype=torch.float64)
        out[list(self.present)] = values.double()
        return out

    def pairs(self, values: Float[Tensor, "p p"], alone: float) -> Float[Tensor, "n n"]:
        """One value a pair; `alone` where only one of the two adapts the module, NaN where none."""
        out = torch.full((self.n, self.n), torch.nan, dtype=torch.float64)
        where = torch.tensor(self.present)
        out[where] = alone
        out[:, where] = alone
        out[where[:, None], where[None, :]] = values.double()
        return out

    def rows(self, part: str) -> list[int]:
        """Indices of the probes whose `part` (a field's name) covers this module."""
        return [i for i, probe in enumerate(self.probes) if self.module in getattr(probe, part)]


def blocks(
    left: Float[Tensor, "p size r"], right: Float[Tensor, "q size s"]
) -> Float[Tensor, "p q r s"]:
    """left_aᵀ right_b for every a, b, as one matrix product."""
    p, size, r = left.shape
    q, _, s = right.shape
    flat = left.permute(1, 0, 2).reshape(size, p * r).T @ right.permute(1, 0, 2).reshape(
        size, q * s
    )
    return flat.reshape(p, r, q, s).permute(0, 2, 1, 3)


def upper_pairs(p: int) -> tuple[Tensor, Tensor]:
    """Indices (a, b) with a < b: symmetric quantities are computed once."""
    first, second = torch.triu_indices(p, p, offset=1)
    return first, second


def mirrored(values: Float[Tensor, " half"], diagonal: Float[Tensor, " p"]) -> Float[Tensor, "p p"]:
    """The symmetric matrix with these upper-triangle values and this diagonal."""
    out = torch.diag(diagonal)
    first, second = upper_pairs(len(diagonal))
    out[first, second] = values
    out[second, first] = values
    return out


def side_by_side(
    cross: Float[Tensor, "p p r r"], first: Tensor, second: Tensor
) -> Float[Tensor, "half two_r two_r"]:
    """The Gram matrix of [X_a X_b] for each listed pair, from the blocks X_aᵀX_b."""
    top = torch.cat([cross[first, first], cross[first, second]], -1)
    bottom = torch.cat([cross[second, first], cross[second, second]], -1)
    return torch.cat([top, bottom], -2)


def ratio(over: Tensor, under: Tensor, empty: float = torch.nan) -> Tensor:
    """over / under, and `empty` where under is 0. NaN (not measured) stays NaN."""
    return torch.where(under == 0, empty, over / torch.where(under == 0, 1.0, under))


def cosine(gram: Float[Tensor, "*g n n"]) -> Float[Tensor, "*g n n"]:
    """Cosines from inner products; 0 where a norm is 0, NaN where one was not measured."""
    square = gram.diagonal(dim1=-2, dim2=-1)
    norms = (square[..., :, None] * square[..., None, :]).clamp_min(0).sqrt()
    return ratio(gram, norms, 0.0).clamp(-1.0, 1.0)
