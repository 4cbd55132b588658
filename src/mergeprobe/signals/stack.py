"""Stack: a run of adapters' updates of one module, in one tensor a side.

Every adapter's factors are scaled to entries up to 1, their true size kept as one float64 number,
so that neither a large alpha nor a tiny update leaves the range of float32. The norms, the thin
SVDs and factors that cancel are taken in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
# U (r, p, out), σ (p, r), V (r, p, in)
SVD = tuple[Float[Tensor, "r p out"], Float[Tensor, "p r"], Float[Tensor, "r p into"]]


@dataclass(frozen=True, eq=False)
class Stack:
    """The probes `span` (indices among `probes`) at one module; those in `where` adapt it.

    left (r, p, out), right (r, p, in): ΔW = scale Σ_k left_k right_kᵀ for each of the p in
    `where`, in the working precision, padded with zero components to one r. scale ≥ 0, unit (‖ΔW‖²
    for scale 1) and everything derived are float64.
    """

    module: str
    probes: tuple[Probe, ...]
    span: tuple[int, ...]
    where: tuple[int, ...]
    left: Float[Tensor, "r p out"]
    right: Float[Tensor, "r p into"]
    scale: Float[Tensor, " p"]
    unit: Float[Tensor, " p"]
    made: dict[str, Any] = field(default_factory=dict)  # what families keep of a stack

    @classmethod
    def of(
        cls,
        module: str,
        probes: tuple[Probe, ...],
        span: Sequence[int],
        *,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
    ) -> Stack:
        """Reads the factors. ProbeError names an adapter with a NaN or infinite entry."""
        where = tuple(i for i in span if module in probes[i].updates)
        updates = [probes[i].updates[module] for i in where]
        if updates:
            shape = updates[0].shape
        else:  # nobody in this span, but somebody: else it would be no module of theirs
            shape = next(p.updates[module].shape for p in probes if module in p.updates)
        width, (out, into) = max((update.r for update in updates), default=1), shape
        left = torch.zeros(width, len(updates), out, dtype=dtype)
        right = torch.zeros(width, len(updates), into, dtype=dtype)
        for row, update in enumerate(updates):
            left[: update.r, row] = update.B.detach().T
            right[: update.r, row] = update.A.detach()
        left, right = left.to(device), right.to(device)
        scale = torch.tensor([u.scaling for u in updates], dtype=torch.float64, device=device)
        left *= scale.sign()[:, None].to(left.dtype)  # no scaling: no update
        scale = scale.abs() * _centred(left) * _centred(right)
        sound = scale.isfinite()
        if not bool(sound.all()):
            name = probes[where[int((~sound).nonzero()[0, 0])]].name
            raise ProbeError(
                f"'{name}' has NaN or infinite entries in its update of '{module}': its training "
                "diverged; leave it out or train it again"
            )
        unit = _uncancelled(left, right)
        return cls(module, probes, tuple(span), where, left, right, scale, unit)

    @property
    def places(self) -> list[int]:
        """Where in the span those that adapt the module stand."""
        place = {i: row for row, i in enumerate(self.span)}
        return [place[i] for i in self.where]

    @cached_property
    def energy(self) -> Float[Tensor, " p"]:
        """‖ΔW‖² of each."""
        return self.scale.square() * self.unit

    @property
    def svd(
        self,
    ) -> tuple[Float[Tensor, "r p out"], Float[Tensor, "p r"], Float[Tensor, "r p into"]]:
        """Thin SVDs ΔW = U diag(σ) Vᵀ; U and V in the working precision. Directions that are only
        rounding are zero."""
        if "svd" not in self.made:
            u, sigma, v = _thin_svd(self.left.permute(1, 2, 0), self.right.permute(1, 2, 0))
            u, v = (side.permute(2, 0, 1).to(self.left.dtype).contiguous() for side in (u, v))
            self.made["svd"] = u, sigma * self.scale[:, None], v
        return self.made["svd"]

    @property
    def sigma(self) -> Float[Tensor, "p r"]:
        return self.svd[1]

    def gathered(self, members: Sequence[int], others: Sequence[Stack] = ()) -> Stack:
        """The listed probes as one stack, out of this one and `others` of the same module."""
        stacks = (self, *others)
        found = {i: (stack, row) for stack in stacks for row, i in enumerate(stack.where)}
        where = tuple(i for i in members if i in found)
        width = max((found[i][0].left.shape[0] for i in where), default=1)

        def pick(part: Callable[[Stack], Tensor], like: Tensor, r: int, p: int) -> Tensor:
            """One row a member along axis p, padded with zeros to one width along axis r."""
            shape = list(like.shape)
            shape[r], shape[p] = width, len(where)
            whole = like.new_zeros(shape)
            for row, i in enumerate(where):
                stack, place = found[i]
                values = part(stack).select(p, place)
                whole.select(p, row).narrow(0, 0, values.shape[0]).copy_(values)
            return whole

        sides = [pick(lambda s, n=n: getattr(s, n), getattr(self, n), 0, 1) for n in SIDES]
        numbers = [
            torch.stack([getattr(found[i][0], n)[found[i][1]] for i in where])
            if where
            else getattr(self, n)[:0]
            for n in ("scale", "unit")
        ]
        made = {}
        if where and all("svd" in found[i][0].made for i in where):
            axes = ((0, 1), (1, 0), (0, 1))
            made["svd"] = tuple(
                pick(lambda s, k=k: s.svd[k], self.svd[k], *axis) for k, axis in enumerate(axes)
            )
        return Stack(self.module, self.probes, tuple(members), where, *sides, *numbers, made=made)

    def each(self, values: Float[Tensor, " p"]) -> Float[Tensor, " span"]:
        """One value a probe of the span, NaN for those that do not adapt the module."""
        out = torch.full((len(self.span),), torch.nan, dtype=torch.float64, device=values.device)
        out[self.places] = values.double()
        return out

    def rows(self, part: str) -> list[int]:
        """Places in the span of the probes whose `part` (a field's name) covers this module."""
        return [
            row for row, i in enumerate(self.span) if self.module in getattr(self.probes[i], part)
        ]


def _centred(side: Float[Tensor, "r p size"]) -> Float[Tensor, " p"]:
    """Divides each matrix, in place, by the power of 2 next to its largest entry, which rounds
    nothing; the powers, or that entry where it is no number or 0."""
    peaks = torch.maximum(side.amax(2), -side.amin(2)).amax(0).double()
    sound = (peaks > 0) & peaks.isfinite()
    powers = torch.where(sound, peaks, 1.0).log2().round().exp2()
    side /= powers[:, None].to(side.dtype)
    return torch.where(sound, powers, peaks)


def _uncancelled(
    left: Float[Tensor, "r p out"], right: Float[Tensor, "r p into"]
) -> Float[Tensor, " p"]:
    """‖left rightᵀ‖² of each; where the product cancels the factors become those of its SVD."""
    grams = [side.transpose(0, 1) @ side.permute(1, 2, 0) for side in (left, right)]
    energy = (grams[0] * grams[1]).sum((1, 2)).double().clamp_min(0)
    largest = grams[0].diagonal(dim1=1, dim2=2).sum(1) * grams[1].diagonal(dim1=1, dim2=2).sum(1)
    bad = (energy * CANCELLING**2 * left.shape[0] < largest.double()).nonzero()[:, 0]
    if len(bad):
        u, sigma, v = _thin_svd(left[:, bad].permute(1, 2, 0), right[:, bad].permute(1, 2, 0))
        root = sigma.sqrt()[:, None, :]
        for side, balanced in ((left, u * root), (right, v * root)):
            side[:, bad] = balanced.permute(2, 0, 1).to(side.dtype)
        energy[bad] = sigma.square().sum(-1)
    return energy


def _thin_svd(
    left: Float[Tensor, "p out r"], right: Float[Tensor, "p into r"]
) -> tuple[Float[Tensor, "p out r"], Float[Tensor, "p r"], Float[Tensor, "p into r"]]:
    """U, σ, V of left rightᵀ in float64, zero where only rounding is left, padded to width r."""
    q_out, r_out = torch.linalg.qr(left.double())
    q_in, r_in = torch.linalg.qr(right.double())
    u, sigma, vh = torch.linalg.svd(r_out @ r_in.mT, full_matrices=False)
    sound = sigma > ROUNDING * sigma[:, :1]
    keep = sound[:, None, :]
    r, pad = left.shape[2], torch.nn.functional.pad
    u, v = (pad(q @ w * keep, (0, r - w.shape[2])) for q, w in ((q_out, u), (q_in, vh.mT)))
    return u, pad(sigma * sound, (0, r - sigma.shape[1])), v
