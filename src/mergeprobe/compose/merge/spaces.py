"""The small spaces that hold every update of a module exactly; any rule can run inside one.

`SPACES[name](updates)` gives a Space: the updates in its coordinates, all of one shape, and the
way back. Linear rules give the same merge in every space; rules on entries do not, because the
entries are other numbers. The coordinates depend on the updates alone, not on how they are
factored: the sign of an axis is all that is free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.lowrank import LowRank, factored_svd

# directions below this share of the largest singular value are float32 rounding, not directions
RANK_FLOOR = 1e-5


@dataclass(frozen=True, eq=False)
class Space:
    """One module's updates in a space, ΔWᵢ = left · stack[i] · right.

    left: (out, a) with orthonormal columns, or None for the identity; right: (b, in) with
    orthonormal rows, or None. stack: (n, a, b), float32.
    """

    stack: Float[Tensor, "n a b"]
    left: Float[Tensor, "out a"] | None
    right: Float[Tensor, "b in"] | None

    def back(self, merged: Float[Tensor, "a b"]) -> LowRank:
        """The merged matrix as an update of the module, of rank min(a, b), exactly."""
        wide = merged.double()
        left = wide if self.left is None else self.left.double() @ wide
        if self.right is not None:
            return LowRank(left.to(merged.dtype), self.right.to(merged.dtype))
        if self.left is not None:
            return LowRank(self.left.to(merged.dtype), merged)
        return as_lowrank(merged)


def canonical(
    update: LowRank,
) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "k in"]]:
    """Thin SVD (U, S, Vh) of an update without its null directions, float64; k = 0 if it is zero.

    The same for (B Q⁻¹, Q A) as for (B, A), up to the signs of the pairs (u, v): rules defined
    on factors run on it.
    """
    u, s, vh = factored_svd(update)
    kept = int((s > RANK_FLOOR * s.max()).sum()) if s.numel() else 0
    return u[:, :kept], s[:kept], vh[:kept]


def as_lowrank(matrix: Float[Tensor, "a b"]) -> LowRank:
    """A matrix as an update of full rank, for low-rank rules in a small space."""
    a, b = matrix.shape
    if b <= a:
        return LowRank(matrix, torch.eye(b, dtype=matrix.dtype, device=matrix.device))
    return LowRank(torch.eye(a, dtype=matrix.dtype, device=matrix.device), matrix)


def full(updates: Sequence[LowRank]) -> Space:
    """The weight's own entries: a = out, b = in."""
    return Space(torch.stack([update.dense() for update in updates]), None, None)


def knots(updates: Sequence[LowRank]) -> Space:
    """KnOTS: with [ΔW₁ | … | ΔW_T] = U S [V₁ | … | V_T], update i is S Vᵢ and U leads back.

    a = the rank of the stack, b = in. Source: arXiv:2410.19735. Ours differs: it keeps σ above
    RANK_FLOOR of the largest, where the authors keep σ > 1e-5 whatever the scale; and U comes
    from the factors, as the left singular vectors of [U₁S₁ | … | U_T S_T].
    """
    # ΔWᵢ ΔWᵢᵀ = (UᵢSᵢ)(UᵢSᵢ)ᵀ, so this stack has the dense stack's left singular vectors
    parts = [canonical(update) for update in updates]
    left = _basis(torch.cat([u * s for u, s, _ in parts], dim=1))
    stack = torch.stack([(left.T @ u * s) @ vh for u, s, vh in parts])
    return Space(stack.float(), left.float(), None)


def core(updates: Sequence[LowRank]) -> Space:
    """Core Space: U spans every B, V every A; update i is the small matrix Uᵀ ΔWᵢ V.

    a and b are the ranks of the stacked factors, at most Σ rᵢ. Source: arXiv:2509.17786. Ours
    differs: the factors are balanced, U√S and √S Vᵀ of each update's SVD, so that the axes do not
    depend on how an update was factored.
    """
    left, right, matrices = core_coordinates(updates)
    return Space(torch.stack(matrices).float(), left.float(), right.float())


def core_coordinates(
    updates: Sequence[LowRank],
) -> tuple[Float[Tensor, "out a"], Float[Tensor, "b in"], list[Float[Tensor, "a b"]]]:
    """(U, Vᵀ, [Uᵀ ΔWᵢ V]) of the core space, in float64.

    Singular values and vectors of any Σ wᵢ ΔWᵢ are those of Σ wᵢ Uᵀ ΔWᵢ V, turned by U and V, so
    a rule on spectra may run here at the cost of small matrices.
    """
    parts = [canonical(update) for update in updates]
    left = _basis(torch.cat([u * s.sqrt() for u, s, _ in parts], dim=1))
    right = _basis(torch.cat([(s.sqrt()[:, None] * vh).T for _, s, vh in parts], dim=1)).T
    return left, right, [(left.T @ u * s) @ (vh @ right.T) for u, s, vh in parts]


SPACES: dict[str, Callable[[Sequence[LowRank]], Space]] = {
    "full": full,
    "knots": knots,
    "core": core,
}


def _basis(columns: Float[Tensor, "side n"]) -> Float[Tensor, "side k"]:
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    if not s.any():
        # one axis even where every update is zero: rules need not know empty matrices
        return torch.eye(columns.shape[0], 1, dtype=columns.dtype, device=columns.device)
    return u[:, : int((s > RANK_FLOOR * s.max()).sum())]
