"""Signals from the updates alone: size, direction, how they add, where their signs disagree."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergeprobe.signals.panel import Panel, known_sum
from mergeprobe.signals.site import Site, cosine, ratio
from mergeprobe.signals.stack import Stack

# rows of each module whose entries are looked at for sign conflict; over the 210 modules of
# SmolLM2-135M the standard error is then below 0.001
SIGN_ROWS = 32
EXACT_ROWS = 64  # taken at a time where all are looked at


def own(stack: Stack) -> dict[str, Tensor]:
    """energy: ‖ΔW‖². weighed, weight: ‖ΔW‖² and ‖W‖² where ‖W‖ is known."""
    known = [stack.probes[i].weight_norms for i in stack.span]
    norms = [[each.get(module, torch.nan) for each in known] for module in stack.modules]
    weight = torch.tensor(norms, dtype=torch.float64, device=stack.energy.device).square()
    energy = stack.each(stack.energy)
    return {
        "energy": energy,
        "weighed": torch.where(weight.isnan(), torch.nan, energy),
        "weight": torch.where(energy.isnan(), torch.nan, weight),
    }


def own_spectrum(stack: Stack) -> dict[str, Tensor]:
    """stable: ‖ΔW‖²/σ1²."""
    return {"stable": stack.each(ratio(stack.energy, stack.sigma[..., 0].square()))}


def inner_products(site: Site) -> dict[str, Tensor]:
    """gram: ⟨ΔW_a, ΔW_b⟩."""
    return {"gram": site.pairs(site.gram, alone=0.0)}


def spectral_norms(site: Site) -> dict[str, Tensor]:
    """spectral: see spectral_amplification."""
    return {"spectral": site.pairs(_spectral(site), alone=1.0)}


def _spectral(site: Site) -> Float[Tensor, "m a b"]:
    """σ1(ΔW_a + ΔW_b) / max(σ1(ΔW_a), σ1(ΔW_b)); NaN where both are zero."""
    first, second = site.listed
    rows, columns = site.rows, site.columns
    # ΔW_a + ΔW_b = L Rᵀ with L = [U_a σ_a, U_b σ_b], R = [V_a, V_b]; σ1² is the largest
    # eigenvalue of Cᵀ (LᵀL) C with RᵀR = C Cᵀ. The shift keeps copies factorable.
    right = site.side_by_side(_alone(rows), site.cross_right, _alone(columns))
    shift = 1e-13 if rows.left.dtype == torch.float64 else 1e-6
    right = right + shift * torch.eye(right.shape[-1], dtype=right.dtype, device=right.device)
    root = torch.linalg.cholesky(right)
    one, two = rows.sigma[..., 0], columns.sigma[..., 0]
    # in units of the larger σ1, so that the squares stay in range
    larger = torch.maximum(one[:, first], two[:, second])
    unit = ratio(torch.ones_like(larger), larger, 0.0)
    left = site.side_by_side(
        torch.diag_embed(rows.sigma.square()),
        site.cross_left * site.joint,
        torch.diag_embed(columns.sigma.square()),
    )
    left = left * unit.square()[..., None, None]
    top = torch.linalg.eigvalsh(root.mT @ left @ root)[..., -1].clamp_min(0).sqrt()
    return site.filled(torch.where(larger == 0, torch.nan, top), ratio(2 * one, one))


def _alone(stack: Stack) -> Float[Tensor, "m p r r"]:
    """VᵀV of each: 1 for every direction that the update has."""
    return torch.diag_embed((stack.sigma > 0).double())


def sign_products(site: Site, rows: int | None = SIGN_ROWS) -> dict[str, Tensor]:
    """Sums over the entries of `rows` rows (None: all), scaled up to the whole module.

    sign_total: Σ |ΔW_a||ΔW_b|; sign_conflict: the part with opposite signs. sign_yy, _xy, _xx:
    the sampling (co)variances of the two, for the error of their ratio.
    The rows are drawn by (module, height) alone: the same for every adapter and every call. The
    whole matrices are never formed: all rows are taken EXACT_ROWS at a time.
    """
    height = site.rows.left.shape[3]
    count = height if rows is None else min(max(2, rows), height)
    if count == height:
        product, total = _exact_sums(site)
        conflict = (total - product).clamp_min(0) / 2
        nothing = torch.zeros_like(total)
        sums = total, conflict, nothing, nothing, nothing
    else:
        chosen = torch.stack([_drawn(module, height, count) for module in site.rows.modules])
        sums = _sampled_sums(site, chosen, height)
    size = site.rows.scale[:, :, None] * site.columns.scale[:, None, :]
    powers = {"total": 1, "conflict": 1, "yy": 2, "xy": 2, "xx": 2}
    return {
        f"sign_{name}": site.pairs(value * size**power, alone=0.0)
        for (name, power), value in zip(powers.items(), sums, strict=True)
    }


@lru_cache(maxsize=1024)
def _drawn(module: str, height: int, count: int) -> Int[Tensor, " count"]:
    seed = hashlib.sha256(f"sign rows|{module}|{height}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "big") >> 1)
    return torch.randperm(height, generator=generator)[:count]


def _sampled_sums(
    site: Site, chosen: Int[Tensor, "m count"], height: int
) -> tuple[Float[Tensor, "m a b"], ...]:
    """total, conflict and their sampling (co)variances yy, xy, xx, for scale 1."""
    count = chosen.shape[1]
    (one, large_one), (two, large_two) = (
        _sampled(stack, chosen) for stack in (site.rows, site.columns)
    )
    total = large_one @ large_two.mT
    conflict = (total - one @ two.mT).clamp_min_(0) / 2
    sums = [values.sum(1, dtype=torch.float64) for values in (total, conflict)]
    # sampling variance of the rows' sums, with the finite-population correction
    spread = height**2 * (1 - count / height) / (count * (count - 1))
    means = [(each / count).to(total)[:, None] for each in sums]
    x, y = total - means[0], conflict - means[1]
    squares = [(v * w).sum(1, dtype=torch.float64) * spread for v, w in ((y, y), (y, x), (x, x))]
    found = *(values * (height / count) for values in sums), *squares
    return tuple((v + v.mT) / 2 for v in found) if site.diagonal else found


def _sampled(stack: Stack, chosen: Int[Tensor, "m count"]) -> tuple[Tensor, Tensor]:
    """The chosen rows of every update and their sizes, made once a stack."""
    if "sampled" not in stack.made:
        entries = _entries(stack, chosen)
        stack.made["sampled"] = entries, entries.abs()
    return stack.made["sampled"]


def _exact_sums(site: Site) -> tuple[Float[Tensor, "m a b"], Float[Tensor, "m a b"]]:
    """Σ ΔW_a ΔW_b and Σ |ΔW_a||ΔW_b| over all entries, for scale 1."""
    modules, height = len(site.rows.modules), site.rows.left.shape[3]
    product = total = torch.zeros(
        modules, len(site.rows.where), len(site.columns.where), dtype=torch.float64,
        device=site.rows.left.device,
    )  # fmt: skip
    for start in range(0, height, EXACT_ROWS):
        some = torch.arange(start, min(start + EXACT_ROWS, height)).expand(modules, -1)
        one, two = (
            _entries(stack, some).transpose(1, 2).flatten(2) for stack in (site.rows, site.columns)
        )
        product = product + (one @ two.mT).double()
        total = total + (one.abs() @ two.abs().mT).double()
    if site.diagonal:
        return (product + product.mT) / 2, (total + total.mT) / 2
    return product, total


def _entries(stack: Stack, rows: Int[Tensor, "m rows"]) -> Float[Tensor, "m rows p into"]:
    """These rows of every update, for scale 1."""
    where = rows.to(stack.left.device)[:, None, None].expand(*stack.left.shape[:3], -1)
    left = stack.left.gather(3, where).permute(0, 2, 3, 1)
    return (left @ stack.right.transpose(1, 2)).transpose(1, 2).contiguous()


def frobenius_cosine(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """⟨ΔW_a, ΔW_b⟩ / (‖ΔW_a‖ ‖ΔW_b‖); below 0 one undoes the other.

    Modules that only one adapts count in its norm; a zero update conflicts with nothing (0).
    """
    return cosine(panel.total("gram", region), *panel.inner(panel.own("energy", region)))


def norm_ratio(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """‖ΔW_a‖ / ‖ΔW_b‖. Early norms follow the learning rate: read it beside other signals."""
    a, b = panel.sides(panel.own("energy", region))
    return ratio(a, b).sqrt()


def amplification(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """‖ΔW_a + ΔW_b‖² / (‖ΔW_a‖² + ‖ΔW_b‖²); 1 when orthogonal, 2 for copies, 0 for opposites."""
    a, b = panel.sides(panel.own("energy", region))
    return ratio(a + b + 2 * panel.total("gram", region), a + b).clamp(0.0, 2.0)


def spectral_amplification(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """σ1(ΔW_a + ΔW_b) / max(σ1(ΔW_a), σ1(ΔW_b)) per module, energy-weighted mean.

    The larger of the two is the divisor (not their mean), so that orthogonal updates give 1
    whatever their norms; a module that only one adapts gives 1.
    """
    return panel.mean("spectral", region)


def sign_conflict(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """Share of Σ |ΔW_a||ΔW_b| over entries where the signs differ; 0.5 for unrelated updates.

    The weight |ΔW_a||ΔW_b| is the geometric mean of the two energies, so the value does not
    change with the scale of either adapter. Estimated from sampled rows (sign_products).
    """
    return ratio(panel.total("sign_conflict", region), panel.total("sign_total", region))


def sign_conflict_error(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """Standard error of sign_conflict from sampling rows (stratified ratio estimate)."""
    share = sign_conflict(panel, region)
    yy, xy, xx = (panel.total(f"sign_{part}", region) for part in ("yy", "xy", "xx"))
    variance = (yy - 2 * share * xy + share * share * xx).clamp_min(0)
    return ratio(variance.sqrt(), panel.total("sign_total", region))


def update_norm(panel: Panel, region: str) -> Float[Tensor, "*g n"]:
    """‖ΔW‖ over the modules."""
    return panel.own("energy", region).sqrt()


def relative_norm(panel: Panel, region: str) -> Float[Tensor, "*g n"]:
    """‖ΔW‖/‖W‖ over the modules whose frozen weight's norm is known."""
    return ratio(panel.own("weighed", region), panel.own("weight", region)).sqrt()


def stable_rank(panel: Panel, region: str) -> Float[Tensor, "*g n"]:
    """‖ΔW‖²/σ1² per module, energy-weighted mean: how many directions carry the update."""
    return panel.own_mean("stable", region)


def set_amplification(panel: Panel, region: str) -> Float[Tensor, " rows"]:
    """‖Σ_S ΔW‖² / Σ_S ‖ΔW‖², exact; the same for every member of a set."""
    found = []
    gram = panel.total("gram", region)
    energy = panel.own("energy", region)
    for members in panel.sets:
        where = torch.tensor(members)
        apart = known_sum(energy[where])
        both = gram[where[:, None], where]
        value = ratio(apart + both.sum() - both.trace(), apart).clamp_min(0)
        found += [value] * len(members)
    return torch.tensor(found, dtype=torch.float64)


def cosine_to_rest(panel: Panel, region: str) -> Float[Tensor, " rows"]:
    """Cosine of ΔW_i with the sum of the others' updates, exact."""
    gram = panel.total("gram", region)
    energy = panel.own("energy", region)
    found = []
    for row, i in panel.set_rows:
        rest = torch.tensor([j for j in panel.sets[row] if j != i])
        square = gram[rest[:, None], rest].sum().clamp_min(0)
        norms = (energy[i] * square).sqrt()
        found.append(ratio(gram[i, rest].sum(), norms, 0.0).clamp(-1.0, 1.0))
    return torch.tensor(found, dtype=torch.float64)
