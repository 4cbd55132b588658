"""Signals from the updates alone: size, direction, how they add, where their signs disagree."""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.signals.panel import Panel
from mergeprobe.signals.site import Site, cosine, mirrored, ratio, side_by_side, upper_pairs

# rows of each module whose entries are looked at for sign conflict; over the 210 modules of
# SmolLM2-135M the standard error is then below 0.001
SIGN_ROWS = 32


def products(site: Site) -> dict[str, Tensor]:
    """energy (n,): ‖ΔW‖². gram (n, n): ⟨ΔW_a, ΔW_b⟩. spectral (n, n): see spectral_amplification.
    stable (n,): ‖ΔW‖²/σ1². weighed, weight (n,): ‖ΔW‖² and ‖W‖² where ‖W‖ is known."""
    gram = (site.joint * site.cross_left * site.cross_right).sum((-1, -2))
    weight = torch.tensor(
        [probe.weight_norms.get(site.module, torch.nan) for probe in site.probes],
        dtype=torch.float64,
    ).square()
    energy = site.each(site.energy)
    return {
        "energy": energy,
        "gram": site.pairs(gram, alone=0.0),
        "spectral": site.pairs(_spectral(site), alone=1.0),
        "stable": site.each(ratio(site.energy, site.sigma[:, 0].square())),
        "weighed": torch.where(weight.isnan(), torch.nan, energy),
        "weight": torch.where(energy.isnan(), torch.nan, weight),
    }


def _spectral(site: Site) -> Float[Tensor, "p p"]:
    """σ1(ΔW_a + ΔW_b) / max(σ1(ΔW_a), σ1(ΔW_b)); NaN where both are zero."""
    first, second = upper_pairs(len(site.present))
    # ΔW_a + ΔW_b = L Rᵀ with L = [U_a σ_a, U_b σ_b], R = [V_a, V_b]; σ1² is the largest
    # eigenvalue of Cᵀ (LᵀL) C with RᵀR = C Cᵀ. The shift keeps copies factorable.
    right = side_by_side(site.cross_right, first, second)
    right = right + 1e-13 * torch.eye(right.shape[-1], dtype=right.dtype)
    root = torch.linalg.cholesky(right)
    left = side_by_side(site.cross_left * site.joint, first, second)
    top = torch.linalg.eigvalsh(root.mT @ left @ root)[..., -1].clamp_min(0).sqrt()
    own = site.sigma[:, 0]
    larger = torch.maximum(own[first], own[second])
    return mirrored(ratio(top, larger), ratio(2 * own, own))


def sign_products(site: Site, rows: int | None = SIGN_ROWS) -> dict[str, Tensor]:
    """Sums over the entries of `rows` rows (None: all), scaled up to the whole module.

    sign_total: Σ |ΔW_a||ΔW_b|; sign_conflict: the part with opposite signs. sign_yy, _xy, _xx:
    the sampling (co)variances of the two, for the error of their ratio. All (n, n).
    The rows are drawn by (module, height) alone: the same for every adapter and every call.
    """
    height = site.left.shape[1]
    count = height if rows is None else min(max(2, rows), height)
    seed = hashlib.sha256(f"sign rows|{site.module}|{height}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "big") >> 1)
    chosen = torch.randperm(height, generator=generator)[:count]
    scaled = (site.left[:, chosen] * site.sigma[:, None, :]).float()
    entries = scaled @ site.right.float().mT
    scale, spread = height / count, 0.0
    if count == height:  # exact: no sampling error to state, so no sums by row
        flat = entries.flatten(1)
        product, total = ((x @ x.mT).double()[None] for x in (flat, flat.abs()))
    else:
        entries = entries.permute(1, 0, 2).contiguous()
        product, total = ((x @ x.mT).double() for x in (entries, entries.abs()))
        spread = height**2 * (1 - count / height) / (count * (count - 1))
    conflict = ((total - product) / 2).clamp_min(0)
    y, x = conflict - conflict.mean(0), total - total.mean(0)
    return {
        "sign_total": site.pairs(scale * total.sum(0), alone=0.0),
        "sign_conflict": site.pairs(scale * conflict.sum(0), alone=0.0),
        "sign_yy": site.pairs(spread * (y * y).sum(0), alone=0.0),
        "sign_xy": site.pairs(spread * (y * x).sum(0), alone=0.0),
        "sign_xx": site.pairs(spread * (x * x).sum(0), alone=0.0),
    }


def frobenius_cosine(panel: Panel, region: str) -> Float[Tensor, "*g n n"]:
    """⟨ΔW_a, ΔW_b⟩ / (‖ΔW_a‖ ‖ΔW_b‖); below 0 one undoes the other.

    Modules that only one adapts count in its norm; a zero update conflicts with nothing (0).
    """
    return cosine(panel.total("gram", region))


def norm_ratio(panel: Panel, region: str) -> Float[Tensor, "*g n n"]:
    """‖ΔW_a‖ / ‖ΔW_b‖. Early norms follow the learning rate: read it beside other signals."""
    energy = panel.total("energy", region)
    return ratio(energy[..., :, None], energy[..., None, :]).sqrt()


def amplification(panel: Panel, region: str) -> Float[Tensor, "*g n n"]:
    """‖ΔW_a + ΔW_b‖² / (‖ΔW_a‖² + ‖ΔW_b‖²); 1 when orthogonal, 2 for copies, 0 for opposites."""
    gram = panel.total("gram", region)
    square = gram.diagonal(dim1=-2, dim2=-1)
    apart = square[..., :, None] + square[..., None, :]
    return ratio(apart + 2 * gram, apart).clamp_min(0)


def spectral_amplification(panel: Panel, region: str) -> Float[Tensor, "*g n n"]:
    """σ1(ΔW_a + ΔW_b) / max(σ1(ΔW_a), σ1(ΔW_b)) per module, energy-weighted mean.

    The larger of the two is the divisor (not their mean), so that orthogonal updates give 1
    whatever their norms; a module that only one adapts gives 1.
    """
    return panel.mean("spectral", region)


def sign_conflict(panel: Panel, region: str) -> Float[Tensor, "*g n n"]:
    """Share of Σ |ΔW_a||ΔW_b| over entries where the signs differ; 0.5 for unrelated updates.

    The weight |ΔW_a||ΔW_b| is the geometric mean of the two energies, so the value does not
    change with the scale of either adapter. Estimated from sampled rows (sign_products).
    """
    return ratio(panel.total("sign_conflict", region), panel.total("sign_total", region))


def sign_conflict_error(panel: Panel, region: str) -> Float[Tensor, "*g n n"]:
    """Standard error of sign_conflict from sampling rows (stratified ratio estimate)."""
    share = sign_conflict(panel, region)
    yy, xy, xx = (panel.total(f"sign_{part}", region) for part in ("yy", "xy", "xx"))
    variance = (yy - 2 * share * xy + share * share * xx).clamp_min(0)
    return ratio(variance.sqrt(), panel.total("sign_total", region))


def update_norm(panel: Panel, region: str) -> Float[Tensor, "*g n"]:
    """‖ΔW‖ over the modules."""
    return panel.total("energy", region).sqrt()


def relative_norm(panel: Panel, region: str) -> Float[Tensor, "*g n"]:
    """‖ΔW‖/‖W‖ over the modules whose frozen weight's norm is known."""
    return ratio(panel.total("weighed", region), panel.total("weight", region)).sqrt()


def stable_rank(panel: Panel, region: str) -> Float[Tensor, "*g n"]:
    """‖ΔW‖²/σ1² per module, energy-weighted mean: how many directions carry the update."""
    return panel.mean("stable", region)


def set_amplification(panel: Panel, region: str) -> Float[Tensor, "s n"]:
    """‖Σ_S ΔW‖² / Σ_S ‖ΔW‖², exact; the same for every member of a set."""
    gram = panel.total("gram", region)
    out = torch.full((len(panel.sets), panel.n), torch.nan, dtype=torch.float64)
    for row, members in enumerate(panel.sets):
        where = torch.tensor(members)
        part = gram[where[:, None], where]
        out[row, where] = ratio(part.sum(), part.trace()).clamp_min(0)
    return out


def cosine_to_rest(panel: Panel, region: str) -> Float[Tensor, "s n"]:
    """Cosine of ΔW_i with the sum of the others' updates, exact."""
    gram = panel.total("gram", region)
    out = torch.full((len(panel.sets), panel.n), torch.nan, dtype=torch.float64)
    for row, members in enumerate(panel.sets):
        for i in members:
            rest = torch.tensor([j for j in members if j != i])
            square = gram[rest[:, None], rest].sum().clamp_min(0)
            norms = (gram[i, i] * square).sqrt()
            out[row, i] = ratio(gram[i, rest].sum(), norms, 0.0).clamp(-1.0, 1.0)
    return out
