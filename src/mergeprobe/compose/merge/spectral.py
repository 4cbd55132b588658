"""Rules on the singular values and vectors of the merge, computed from the factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.compose.merge.spaces import RANK_FLOOR, canonical, core_coordinates
from mergeprobe.errors import MergeError
from mergeprobe.lowrank import LowRank, concat, factored_svd, norm

# a response below this share of its update's norm is rounding of float32 factors, not a response
RESPONSE_FLOOR = 1e-6


def svc(updates: Sequence[LowRank], weights: Sequence[float], *, alpha: float = 0.1) -> LowRank:
    """Singular value calibration: undo the over-counting of directions that adapters share.

    M = Σ wᵢ ΔWᵢ = U Σ Vᵀ (wᵢ = 1 unless given). With s_ir = ⟨u_rᵀM, u_rᵀΔWᵢ⟩ / ‖u_rᵀΔWᵢ‖² each
    σ_r becomes σ_r · T / Σᵢ max(alpha, s_ir): an identical pair, summed, is the adapter again.
    An update that does not respond along u_r (0/0 in the formula) counts as s_ir = 0, so alpha.
    alpha > 0. The published rule divides by a tiny response without bound; so do we, down to
    RESPONSE_FLOOR. Source: arXiv:2602.05536.

    u_rᵀM = σ_r v_rᵀ and u_rᵀΔWᵢ = (u_rᵀ sᵢBᵢ) Aᵢ, so a module costs (out + in) · (Σ r)².

    Assumes: that a direction which several adapters share is the same knowledge counted twice.
    Fails: where shared directions are opposed on purpose, and for negative weights, whose responses
    are clamped to alpha.
    Cost: (out + in) · (Σ r)² a module; no ΔW is formed.
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise MergeError(f"alpha is {alpha}; expected a finite number above 0, such as 0.1")
    merged = concat(updates, weights)
    u, s, vh = factored_svd(merged)
    along_merge = s[:, None] * vh
    counted = torch.zeros_like(s)
    for update in updates:
        counted += _coefficient(u, along_merge, update).clamp(min=alpha)
    root = (s * (len(updates) / counted)).sqrt()
    dtype = merged.B.dtype
    return LowRank((u * root).to(dtype), (root[:, None] * vh).to(dtype))


def _coefficient(
    u: Float[Tensor, "out k"], along_merge: Float[Tensor, "k in"], update: LowRank
) -> Float[Tensor, " k"]:
    """s_r of one update: how often the merge counts what this update does along each u_r."""
    response = (u.T @ update.B.double() * update.scaling) @ update.A.double()
    size = response.square().sum(dim=1)
    silent = size <= RESPONSE_FLOOR**2 * size.sum()
    return torch.where(
        silent, 0.0, (along_merge * response).sum(dim=1) / size.masked_fill(silent, 1.0)
    )


def tsv_m(updates: Sequence[LowRank], weights: Sequence[float], *, scale: float = 1.0) -> LowRank:
    """TSV-M: the updates' leading singular vectors, made orthogonal to each other, then summed.

    Of T updates each keeps its largest min(out, in)/T singular triplets (at least one; for
    adapters of small rank that is all of them). With U = [U₁ … U_T] and V likewise, both are
    replaced by the nearest matrices with orthonormal columns, X ↦ P Qᵀ for X = P D Qᵀ, and the
    merge is scale · U⊥ diag(wᵢσ) V⊥ᵀ, wᵢ = 1 unless given.

    Source: arXiv:2412.00081. Ours differs: null directions of U and V stay null, where P Qᵀ would
    be arbitrary in them; so copies of an adapter merge to it.

    Assumes: that interference is the overlap of singular vectors, and that each task needs its
    leading ones only.
    Fails: where tasks share directions because they agree: they are turned away from each other all
    the same.
    Cost: (out + in) · (Σ r)² a module; no ΔW is formed.
    """
    kept = max(1, min(updates[0].shape) // len(updates))
    left, right, matrices = core_coordinates(updates)
    parts = [canonical(LowRank(matrix, _identity(matrix))) for matrix in matrices]
    u = _orthogonal(torch.cat([u[:, :kept] for u, _, _ in parts], dim=1))
    v = _orthogonal(torch.cat([vh[:kept].T for _, _, vh in parts], dim=1))
    s = torch.cat([w * s[:kept] for w, (_, s, _) in zip(weights, parts, strict=True)])
    return LowRank((scale * left @ (u * s)).float(), (v.T @ right).float())


def iso_c(updates: Sequence[LowRank], weights: Sequence[float], *, scale: float = 1.0) -> LowRank:
    """Iso-C: the sum with a flat spectrum, scale · σ̄ U Vᵀ for Σ wᵢ ΔWᵢ = U Σ Vᵀ.

    wᵢ = 1 unless given. Source: arXiv:2502.04959, which looks for its scale on validation data.
    Ours differs: σ̄ is the mean over the core space of the updates, as in arXiv:2509.17786; over
    all min(out, in) singular values of a low-rank sum nearly all would be 0, and their directions
    arbitrary. A flat spectrum has no best truncation: write it at its exact rank.

    Assumes: that the sum's small singular directions are skills that its large ones drown.
    Fails: where they are noise, which it raises to full size; and under truncation, since no
    direction is smaller than another.
    Cost: (out + in) · (Σ r)² a module; no ΔW is formed.
    """
    left, right, matrices = core_coordinates(updates)
    total = sum(w * matrix for w, matrix in zip(weights, matrices, strict=True))
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    # where the sum is zero its directions are rounding
    flat = torch.where(s > RANK_FLOOR * s.max(), scale * s.mean(), 0.0)
    return LowRank((left @ (u * flat)).float(), (vh @ right).float())


def iso_cts(
    updates: Sequence[LowRank],
    weights: Sequence[float],
    *,
    common: float = 0.8,
    scale: float = 1.0,
) -> LowRank:
    """Iso-CTS: the leading directions of the sum, the rest of the room for each adapter's own.

    Of R directions (the size of the core space) the sum's first `common` share is kept, and the
    remaining ones are dealt out evenly (so rounded to a multiple of T): update i gives the leading
    singular vectors of what of it lies outside the common output directions. U and V of all of
    them are made orthonormal as in TSV-M, and every singular value becomes the mean of theirs.
    common in (0, 1]; wᵢ = 1 unless given.

    Source: arXiv:2502.04959. Ours differs as `iso_c` does.

    Assumes: what Iso-C assumes, and that each task has directions of its own that the sum lacks.
    Fails: where Iso-C does; its equal singular values make truncation arbitrary.
    Cost: (out + in) · (Σ r)² a module; no ΔW is formed.
    """
    if not 0 < common <= 1:
        raise MergeError(f"common is {common}; expected the common share of directions, in (0, 1]")
    left, right, matrices = core_coordinates(updates)
    weighted = [w * matrix for w, matrix in zip(weights, matrices, strict=True)]
    size, floor = min(weighted[0].shape), RANK_FLOOR * max(float(m.norm()) for m in weighted)
    own = min(size, round((size - int(size * common)) / len(updates)))
    shared = max(0, size - own * len(updates))
    found = [_leading(torch.stack(weighted).sum(dim=0), shared, floor)]
    outputs = found[0][0]
    for matrix in weighted:
        found.append(_leading(matrix - outputs @ (outputs.T @ matrix), own, floor))
    us, ss, vs = zip(*found, strict=True)
    level = scale * torch.cat(ss).mean()
    merged_u, merged_v = _orthogonal(torch.cat(us, dim=1)), _orthogonal(torch.cat(vs, dim=1))
    return LowRank((level * left @ merged_u).float(), (merged_v.T @ right).float())


def pico(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Pico: output directions that carry too much are scaled down before the mean; norm restored.

    The calibrated updates (see `calibrated`) are summed with the weights, and the sum is stretched
    to the mean norm of the original ones, Σ|wᵢ|‖ΔWᵢ‖ / Σ|wᵢ|. Only the ratios of the weights
    matter. Updates that cancel stay zero. Source: arXiv:2604.16826.

    Assumes: that an output direction to which many adapters contribute is over-counted.
    Fails: where adapters share directions because they agree (copies of one adapter do not merge to
    it).
    Cost: (out + in) · (Σ r)² a module; no ΔW is formed.
    """
    merged = concat(calibrated(updates), weights)
    length, mass = norm(merged), sum(abs(weight) for weight in weights)
    longest = max(abs(w) * norm(update) for update, w in zip(updates, weights, strict=True))
    # rounding leaves cancelled updates a little above zero: noise must not be stretched
    if length <= 1e-6 * longest or mass == 0:
        return merged * 0.0
    target = sum(abs(w) * norm(update) for update, w in zip(updates, weights, strict=True)) / mass
    return merged * (target / length)


def calibrated(updates: Sequence[LowRank]) -> list[LowRank]:
    """Pico's calibration, to be followed by any rule: ΔWᵢ ↦ (I + Σⱼ (αⱼ − 1) uⱼuⱼᵀ) ΔWᵢ.

    (σⱼ, uⱼ) are the left singular pairs of [ΔW₁ | … | ΔW_T], αⱼ = 1/(1 + (T − 1) sⱼ), and sⱼ =
    σⱼ²/Σσ² is the direction's share of all energy. T counts the updates that are not zero.
    Source: arXiv:2604.16826. Ours differs: it stacks the updates, not the trained B's, whose
    spectrum another factorisation of the same update would change.
    """
    parts = [canonical(update) for update in updates]
    count = sum(1 for _, s, _ in parts if len(s))
    if count == 0:
        return list(updates)
    u, s, _ = torch.linalg.svd(torch.cat([u * s for u, s, _ in parts], 1), full_matrices=False)
    share = s.square() / s.square().sum()
    change = 1 / (1 + (count - 1) * share) - 1
    return [
        LowRank((b * e + (u * change) @ (u.T @ (b * e))).float(), vh.float()) for b, e, vh in parts
    ]


def _leading(
    matrix: Float[Tensor, "a b"], count: int, floor: float
) -> tuple[Float[Tensor, "a count"], Float[Tensor, " count"], Float[Tensor, "b count"]]:
    """The leading singular triplets, zero where σ is below `floor`: vectors there are arbitrary."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    real = (s[:count] > floor).to(s)
    return u[:, :count] * real, s[:count] * real, vh[:count].T * real


def _orthogonal(columns: Float[Tensor, "side n"]) -> Float[Tensor, "side n"]:
    """P Qᵀ for columns = P D Qᵀ, over the directions where D is not zero."""
    p, d, qh = torch.linalg.svd(columns, full_matrices=False)
    found = int((d > RANK_FLOOR * d.max()).sum()) if d.numel() else 0
    return p[:, :found] @ qh[:found]


def _identity(matrix: Float[Tensor, "a b"]) -> Float[Tensor, "b b"]:
    return torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
