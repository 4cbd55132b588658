"""Stack: a run of adapters' updates of a batch of modules, in one tensor a side.

The modules of a batch have one shape and the same adapters: a few adapters' products are too small
to be worth a call each.


Every adapter's factors are scaled to entries up to 1, their true size kept as one float64 number,
so that neither a large alpha nor a tiny update leaves the range of float32. The norms, the thin
SVDs and factors that cancel are taken in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.capture.probe import Probe
from mergeprobe.errors import ProbeError

# directions below this share of the largest singular value are rounding of the stored fp32
# factors, not directions of the update
ROUNDING = 1e-6
# ‖B‖‖A‖/‖ΔW‖ is at most √r for balanced factors. Rounding in a product of raw factors grows with
# it, so an adapter beyond this many times √r enters by its SVD, which has no gauge to cancel.
CANCELLING = 4.0
SIDES = ("left", "right")
SVD = tuple[Float[Tensor, "m r p out"], Float[Tensor, "m p r"], Float[Tensor, "m r p into"]]
"""U, σ, V."""


@dataclass(frozen=True, eq=False)
class Stack:
    """The probes `span` (indices among `probes`) at m modules; those in `where` adapt each.

    left (m, r, p, out), right (m, r, p, in): ΔW = scale Σ_k left_k right_kᵀ for each module and
    each of the p in `where`, in the working precision, padded with zero components to one r.
    scale ≥ 0, unit (‖ΔW‖² for scale 1) and everything derived are float64.
    """

    modules: tuple[str, ...]
    probes: tuple[Probe, ...]
    span: tuple[int, ...]
    where: tuple[int, ...]
    left: Float[Tensor, "m r p out"]
    right: Float[Tensor, "m r p into"]
    scale: Float[Tensor, "m p"]
    unit: Float[Tensor, "m p"]
    made: dict[str, Any] = field(default_factory=dict)  # what families keep of a stack

    @classmethod
    def of(
        cls,
        modules: Sequence[str],
        probes: tuple[Probe, ...],
        span: Sequence[int],
        *,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
    ) -> Stack:
        """Reads the factors of modules that one set of adapters adapts in one shape. ProbeError
        names an adapter with a NaN or infinite entry."""
        first = modules[0]
        where = tuple(i for i in span if first in probes[i].updates)
        updates = [[probes[i].updates[module] for i in where] for module in modules]
        if where:
            shape = updates[0][0].shape
        else:  # nobody in this span, but somebody: else it would be no module of theirs
            shape = next(p.updates[first].shape for p in probes if first in p.updates)
        width, (out, into) = max((u.r for each in updates for u in each), default=1), shape
        left = torch.zeros(len(modules), width, len(where), out, dtype=dtype)
        right = torch.zeros(len(modules), width, len(where), into, dtype=dtype)
        for m, each in enumerate(updates):
            for row, update in enumerate(each):
                left[m, : update.r, row] = update.B.detach().T
                right[m, : update.r, row] = update.A.detach()
        left, right = left.to(device), right.to(device)
        scalings = [[update.scaling for update in each] for each in updates]
        scale = torch.tensor(scalings, dtype=torch.float64, device=device)
        left *= scale.sign()[:, None, :, None].to(left.dtype)  # no scaling: no update
        scale = scale.abs() * _centred(left) * _centred(right)
        sound = scale.isfinite()
        if not bool(sound.all()):
            m, row = (~sound).nonzero()[0].tolist()
            raise ProbeError(
                f"'{probes[where[row]].name}' has NaN or infinite entries in its update of "
                f"'{modules[m]}': its training diverged; leave it out or train it again"
            )
        unit = _uncancelled(left, right)
        return cls(tuple(modules), probes, tuple(span), where, left, right, scale, unit)

    @property
    def places(self) -> list[int]:
        """Where in the span those that adapt the module stand."""
        place = {i: row for row, i in enumerate(self.span)}
        return [place[i] for i in self.where]

    @cached_property
    def energy(self) -> Float[Tensor, "m p"]:
        """‖ΔW‖² of each."""
        return self.scale.square() * self.unit

    @property
    def svd(self) -> SVD:
        """Thin SVDs ΔW = U diag(σ) Vᵀ; U and V in the working precision. Directions that are only
        rounding are zero."""
        if "svd" not in self.made:
            u, sigma, v = _thin_svd(self.left.permute(0, 2, 3, 1), self.right.permute(0, 2, 3, 1))
            u, v = (side.permute(0, 3, 1, 2).to(self.left.dtype).contiguous() for side in (u, v))
            self.made["svd"] = u, sigma * self.scale[..., None], v
        return self.made["svd"]

    @property
    def sigma(self) -> Float[Tensor, "m p r"]:
        return self.svd[1]

    def gathered(self, members: Sequence[int], others: Sequence[Stack] = ()) -> Stack:
        """The listed probes as one stack, out of this one and `others` of the same modules."""
        stacks = (self, *others)
        found = {i: (stack, row) for stack in stacks for row, i in enumerate(stack.where)}
        where = tuple(i for i in members if i in found)
        width = max((found[i][0].left.shape[1] for i in where), default=1)

        def pick(part: Callable[[Stack], Tensor], like: Tensor, r: int, p: int) -> Tensor:
            """One row a member along axis p, padded with zeros to one width along axis r."""
            shape = list(like.shape)
            shape[r], shape[p] = width, len(where)
            whole = like.new_zeros(shape)
            for row, i in enumerate(where):
                stack, place = found[i]
                values = part(stack).select(p, place)
                whole.select(p, row).narrow(1, 0, values.shape[1]).copy_(values)
            return whole

        sides = [pick(lambda s, n=n: getattr(s, n), getattr(self, n), 1, 2) for n in SIDES]
        numbers = [
            torch.stack([getattr(found[i][0], n)[:, found[i][1]] for i in where], 1)
            if where
            else getattr(self, n)[:, :0]
            for n in ("scale", "unit")
        ]
        made = {}
        if where and all("svd" in found[i][0].made for i in where):
            axes = ((1, 2), (2, 1), (1, 2))
            made["svd"] = tuple(
                pick(lambda s, k=k: s.svd[k], self.svd[k], *axis) for k, axis in enumerate(axes)
            )
        return Stack(self.modules, self.probes, tuple(members), where, *sides, *numbers, made=made)

    def each(self, values: Float[Tensor, "m p"]) -> Float[Tensor, "m span"]:
        """One value a probe of the span, NaN for those that do not adapt the modules."""
        out = self.nothing()
        out[:, self.places] = values.double()
        return out

    def nothing(self) -> Float[Tensor, "m span"]:
        """NaN for every probe of the span."""
        shape = len(self.modules), len(self.span)
        return torch.full(shape, torch.nan, dtype=torch.float64, device=self.scale.device)

    def cells(self, part: str) -> Iterator[tuple[int, int, str, Probe]]:
        """(module's place, place in the span, module, probe) of those whose `part` (a field's name)
        covers the module."""
        for m, module in enumerate(self.modules):
            for row, i in enumerate(self.span):
                if module in getattr(self.probes[i], part):
                    yield m, row, module, self.probes[i]


def _centred(side: Float[Tensor, "m r p size"]) -> Float[Tensor, "m p"]:
    """Divides each matrix, in place, by the power of 2 next to its largest entry, which rounds
    nothing; the powers, or that entry where it is no number or 0."""
    peaks = torch.maximum(side.amax(3), -side.amin(3)).amax(1).double()
    sound = (peaks > 0) & peaks.isfinite()
    powers = torch.where(sound, peaks, 1.0).log2().round().exp2()
    side /= powers[:, None, :, None].to(side.dtype)
    return torch.where(sound, powers, peaks)


def _uncancelled(
    left: Float[Tensor, "m r p out"], right: Float[Tensor, "m r p into"]
) -> Float[Tensor, "m p"]:
    """‖left rightᵀ‖² of each; where the product cancels the factors become those of its SVD."""
    rows = (side.transpose(1, 2).contiguous() for side in (left, right))
    one, two = (side @ side.mT for side in rows)
    energy = (one * two).sum((-2, -1)).double().clamp_min(0)
    largest = one.diagonal(dim1=-2, dim2=-1).sum(-1) * two.diagonal(dim1=-2, dim2=-1).sum(-1)
    m, p = (energy * CANCELLING**2 * left.shape[1] < largest.double()).nonzero(as_tuple=True)
    if len(m):
        u, sigma, v = _thin_svd(left[m, :, p].mT, right[m, :, p].mT)
        root = sigma.sqrt()[:, None, :]
        for side, balanced in ((left, u * root), (right, v * root)):
            side[m, :, p] = balanced.mT.to(side.dtype)
        energy[m, p] = sigma.square().sum(-1)
    return energy


def _thin_svd(
    left: Float[Tensor, "*p out r"], right: Float[Tensor, "*p into r"]
) -> tuple[Float[Tensor, "*p out r"], Float[Tensor, "*p r"], Float[Tensor, "*p into r"]]:
    """U, σ, V of left rightᵀ in float64, zero where only rounding is left, padded to width r."""
    q_out, r_out = torch.linalg.qr(left.double())
    q_in, r_in = torch.linalg.qr(right.double())
    u, sigma, vh = torch.linalg.svd(r_out @ r_in.mT, full_matrices=False)
    sound = sigma > ROUNDING * sigma[..., :1]
    keep = sound[..., None, :]
    r, pad = left.shape[-1], torch.nn.functional.pad
    u, v = (q @ pad(w * keep, (0, r - w.shape[-1])) for q, w in ((q_out, u), (q_in, vh.mT)))
    return u, pad(sigma * sound, (0, r - sigma.shape[-1])), v
