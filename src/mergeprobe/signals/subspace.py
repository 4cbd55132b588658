"""Signals from the directions of the updates, whatever their size.

The output side (left singular vectors of ΔW, where B lives) is what training chooses. The input
side lies in the row space of A, which is mostly where A was initialised: two runs of one task with
independent A hardly overlap there, two unrelated tasks with one A do. It is an *init diagnostic*.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.signals.panel import EACH, Panel
from mergeprobe.signals.site import Site, ratio
from mergeprobe.signals.stack import Stack

WEIGHTED = ("output_overlap", "input_overlap", "principal", "principal_mean", "union")


def own(stack: Stack) -> dict[str, Tensor]:
    """effective: the effective rank of each."""
    single = effective_rank(stack.sigma.square())
    return {"effective": stack.each(ratio(single, (single > 0).double()))}


def products(site: Site) -> dict[str, Tensor]:
    """output_overlap, input_overlap, principal, principal_mean, union: one value a pair."""
    largest, average = _principal(site)
    return {
        "output_overlap": site.pairs(_overlap(site, site.cross_left), alone=0.0),
        "input_overlap": site.pairs(_overlap(site, site.cross_right), alone=0.0),
        "principal": site.pairs(largest, alone=0.0),
        "principal_mean": site.pairs(average, alone=0.0),
        "union": site.pairs(_union(site), alone=1.0),
    }


def effective_rank(spectrum: Float[Tensor, "*g r"]) -> Float[Tensor, " *g"]:
    """exp of the entropy of a spectrum of energies (≥ 0, any scale); 0 for a zero spectrum.

    Source: Roy & Vetterli, The effective rank (EUSIPCO 2007). Ours takes energies (σ²), not σ.
    """
    spectrum = spectrum.clamp_min(0)
    total = spectrum.sum(-1, keepdim=True)
    share = ratio(spectrum, total, 0.0)
    return torch.where(total[..., 0] > 0, torch.special.entr(share).sum(-1).exp(), 0.0)


def _unit(stack: Stack) -> Float[Tensor, "m p r"]:
    """The singular values of each update scaled to norm 1."""
    return ratio(stack.sigma, torch.linalg.vector_norm(stack.sigma, dim=-1, keepdim=True), 0.0)


def _overlap(site: Site, cross: Float[Tensor, "m a b r s"]) -> Float[Tensor, "m a b"]:
    """Σ σ_ak² σ_bl² (x_akᵀx_bl)² / √(Σ σ_ak⁴ Σ σ_bl⁴): the cosine of ΔWΔWᵀ (or ΔWᵀΔW)."""
    one, two = _unit(site.rows).square(), _unit(site.columns).square()
    shared = torch.einsum("mak,mabkl,mbl->mab", one, cross.square(), two)
    own = one.square().sum(-1)[:, :, None] * two.square().sum(-1)[:, None, :]
    found = ratio(shared, own.sqrt(), 0.0).clamp(0.0, 1.0)
    return (found + found.mT) / 2 if site.diagonal else found


def _principal(site: Site) -> tuple[Float[Tensor, "m a b"], Float[Tensor, "m a b"]]:
    """Largest principal cosine, and their mean over the smaller of the two ranks."""
    first, second = site.listed
    cosines = torch.linalg.svdvals(site.cross_left[:, first, second]).clamp(0.0, 1.0)
    ranks = [(stack.sigma > 0).double().sum(-1) for stack in (site.rows, site.columns)]
    smaller = torch.minimum(ranks[0][:, first], ranks[1][:, second])
    moved = (ranks[0] > 0).double()
    return (
        site.filled(cosines[..., 0], moved),
        site.filled(ratio(cosines.sum(-1), smaller, 0.0), moved),
    )


def _union(site: Site) -> Float[Tensor, "m a b"]:
    """Effective rank of [ΔW_a/‖ΔW_a‖, ΔW_b/‖ΔW_b‖] over the sum of the two."""
    first, second = site.listed
    one, two = _unit(site.rows), _unit(site.columns)
    single = [effective_rank(unit.square()) for unit in (one, two)]
    cross = site.cross_left * (one[:, :, None, :, None] * two[:, None, :, None, :])
    grams = site.side_by_side(torch.diag_embed(one.square()), cross, torch.diag_embed(two.square()))
    joint = effective_rank(torch.linalg.eigvalsh(grams))
    apart = single[0][:, first] + single[1][:, second]
    return site.filled(ratio(joint, apart), ratio(single[0], 2 * single[0]))


def set_products(stack: Stack) -> Float[Tensor, " m"]:
    """set_union: effective rank of the members' stack over the sum of their ranks; NaN where
    nobody of them adapts the module."""
    unit = _unit(stack)
    single = effective_rank(unit.square())
    weighed = stack.svd[0].double() * unit.mT[..., None]
    flat = weighed.flatten(1, 2)
    return ratio(effective_rank(torch.linalg.eigvalsh(flat @ flat.mT)), single.sum(-1))


def output_overlap(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """tr(P_a P_b)/(‖P_a‖ ‖P_b‖) with P = ΔWΔWᵀ, per module, energy-weighted mean."""
    return panel.mean("output_overlap", region)


def input_overlap(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """The same with P = ΔWᵀΔW. An init diagnostic only: it mostly tells whether A was shared."""
    return panel.mean("input_overlap", region)


def principal_cosine(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """Largest cosine between output directions of the two, per module, energy-weighted mean."""
    return panel.mean("principal", region)


def principal_cosine_mean(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """Mean principal cosine over the smaller of the two ranks, energy-weighted mean."""
    return panel.mean("principal_mean", region)


def union_rank(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """Effective rank of the two updates' outputs together over the sum of their own.

    Each update is scaled to norm 1 first, so that the larger does not hide the smaller.
    0.5 when both use the same directions alike; 1 when they share none and have equal ranks.
    """
    return panel.mean("union", region)


def effective_ranks(panel: Panel, region: str) -> Float[Tensor, "*g n"]:
    """exp of the entropy of σ²/Σσ² per module, energy-weighted mean."""
    return panel.own_mean("effective", region)


def shared_init(panel: Panel, region: str) -> Float[Tensor, "rows columns"]:
    """1 where both runs drew the same A at init, 0 where not, by the recorded hash."""
    hashes = [probe.meta.get("init_hash") for probe in panel.probes]
    kinds = {value: float(kind) for kind, value in enumerate(dict.fromkeys(hashes)) if value}
    drawn = torch.tensor([kinds.get(value, torch.nan) for value in hashes], dtype=torch.float64)
    a, b = panel.sides(drawn)
    return torch.where(a.isnan() | b.isnan(), torch.nan, (a == b).double())


def set_union_rank(panel: Panel, region: str) -> Float[Tensor, " rows"]:
    """Effective rank of all members' outputs stacked over the sum of their own, exact.

    Mean over modules, weighted by the members' shares of their own energy.
    """
    if "set_union" not in panel.set_each:
        return torch.full((len(panel.set_rows),), torch.nan, dtype=torch.float64)
    energy = panel.own("energy", EACH).nan_to_num()
    share = energy / energy.sum(0).clamp_min(torch.finfo(energy.dtype).tiny)
    found = []
    for values, members in zip(panel.set_each["set_union"].T, panel.sets, strict=True):
        weight = share[:, list(members)].sum(1)
        mean = ratio((weight * values.nan_to_num()).sum(), (weight * ~values.isnan()).sum())
        found += [mean] * len(members)
    return torch.tensor(found, dtype=torch.float64)
