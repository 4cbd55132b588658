"""Signals from the directions of the updates, whatever their size.

The output side (left singular vectors of ΔW, where B lives) is what training chooses. The input
side lies in the row space of A, which is mostly where A was initialised: two runs of one task with
independent A hardly overlap there, two unrelated tasks with one A do. It is an *init diagnostic*.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.signals.panel import Panel
from mergeprobe.signals.site import Site, mirrored, ratio, side_by_side, upper_pairs


def products(site: Site) -> dict[str, Tensor]:
    """output_overlap, input_overlap, principal, principal_mean, union (n, n); effective (n,)."""
    single = effective_rank(site.sigma.square())
    largest, average = _principal(site)
    return {
        "output_overlap": site.pairs(_overlap(site, site.cross_left), alone=0.0),
        "input_overlap": site.pairs(_overlap(site, site.cross_right), alone=0.0),
        "principal": site.pairs(largest, alone=0.0),
        "principal_mean": site.pairs(average, alone=0.0),
        "union": site.pairs(_union(site, single), alone=1.0),
        "effective": site.each(ratio(single, (single > 0).double())),
    }


def effective_rank(spectrum: Float[Tensor, "*g r"]) -> Float[Tensor, " *g"]:
    """exp of the entropy of a spectrum of energies (≥ 0, any scale); 0 for a zero spectrum.

    Source: Roy & Vetterli, The effective rank (EUSIPCO 2007). Ours takes energies (σ²), not σ.
    """
    spectrum = spectrum.clamp_min(0)
    total = spectrum.sum(-1, keepdim=True)
    share = ratio(spectrum, total, 0.0)
    return torch.where(total[..., 0] > 0, torch.special.entr(share).sum(-1).exp(), 0.0)


def _overlap(site: Site, cross: Float[Tensor, "p p r r"]) -> Float[Tensor, "p p"]:
    """Σ σ_ak² σ_bl² (x_akᵀx_bl)² / √(Σ σ_ak⁴ Σ σ_bl⁴): the cosine of ΔWΔWᵀ (or ΔWᵀΔW)."""
    shared = (site.joint * cross).square().sum((-1, -2))
    own = site.sigma.square().square().sum(-1)
    return ratio(shared, (own[:, None] * own[None, :]).sqrt(), 0.0).clamp(0.0, 1.0)


def _principal(site: Site) -> tuple[Float[Tensor, "p p"], Float[Tensor, "p p"]]:
    """Largest principal cosine, and their mean over the smaller of the two ranks."""
    first, second = upper_pairs(len(site.present))
    cosines = torch.linalg.svdvals(site.cross_left[first, second]).clamp(0.0, 1.0)
    rank = (site.sigma > 0).double().sum(-1)
    smaller = torch.minimum(rank[first], rank[second])
    moved = (rank > 0).double()
    return (
        mirrored(cosines[..., 0], moved),
        mirrored(ratio(cosines.sum(-1), smaller, 0.0), moved),
    )


def _union(site: Site, single: Float[Tensor, " p"]) -> Float[Tensor, "p p"]:
    """Effective rank of [ΔW_a/‖ΔW_a‖, ΔW_b/‖ΔW_b‖] over the sum of the two."""
    first, second = upper_pairs(len(site.present))
    unit = ratio(site.sigma, site.energy.sqrt()[:, None], 0.0)
    gram = site.cross_left * (unit[:, None, :, None] * unit[None, :, None, :])
    joint = effective_rank(torch.linalg.eigvalsh(side_by_side(gram, first, second)))
    return mirrored(ratio(joint, single[first] + single[second]), ratio(single, 2 * single))


def set_products(site: Site, sets: tuple[tuple[int, ...], ...]) -> dict[str, Tensor]:
    """set_union (s, n): effective rank of the stack over the sum of ranks, on the members."""
    out = torch.full((len(sets), site.n), torch.nan, dtype=torch.float64)
    unit = ratio(site.sigma, site.energy.sqrt()[:, None], 0.0)
    gram = site.cross_left * (unit[:, None, :, None] * unit[None, :, None, :])
    single = effective_rank(site.sigma.square())
    place = {probe: row for row, probe in enumerate(site.present)}
    for row, members in enumerate(sets):
        here = torch.tensor([place[i] for i in members if i in place], dtype=torch.long)
        if len(here):
            part = gram[here[:, None], here].permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
            stack = effective_rank(torch.linalg.eigvalsh(part))
            out[row, list(members)] = ratio(stack, single[here].sum())
    return {"set_union": out}


def output_overlap(panel: Panel, region: str) -> Float[Tensor, "*g n n"]:
    """tr(P_a P_b)/(‖P_a‖ ‖P_b‖) with P = ΔWΔWᵀ, per module, energy-weighted mean."""
    return panel.mean("output_overlap", region)


def input_overlap(panel: Panel, region: str) -> Float[Tensor, "*g n n"]:
    """The same with P = ΔWᵀΔW. An init diagnostic only: it mostly tells whether A was shared."""
    return panel.mean("input_overlap", region)


def principal_cosine(panel: Panel, region: str) -> Float[Tensor, "*g n n"]:
    """Largest cosine between output directions of the two, per module, energy-weighted mean."""
    return panel.mean("principal", region)


def principal_cosine_mean(panel: Panel, region: str) -> Float[Tensor, "*g n n"]:
    """Mean principal cosine over the smaller of the two ranks, energy-weighted mean."""
    return panel.mean("principal_mean", region)


def union_rank(panel: Panel, region: str) -> Float[Tensor, "*g n n"]:
    """Effective rank of the two updates' outputs together over the sum of their own.

    Each update is scaled to norm 1 first, so that the larger does not hide the smaller.
    0.5 when both use the same directions alike; 1 when they share none and have equal ranks.
    """
    return panel.mean("union", region)


def effective_ranks(panel: Panel, region: str) -> Float[Tensor, "*g n"]:
    """exp of the entropy of σ²/Σσ² per module, energy-weighted mean."""
    return panel.mean("effective", region)


def shared_init(panel: Panel, region: str) -> Float[Tensor, "n n"]:
    """1 where both runs drew the same A at init, 0 where not, by the recorded hash."""
    hashes = [probe.meta.get("init_hash") for probe in panel.probes]
    values = [[float(x == y) if x and y else torch.nan for y in hashes] for x in hashes]
    return torch.tensor(values, dtype=torch.float64)


def set_union_rank(panel: Panel, region: str) -> Float[Tensor, "s n"]:
    """Effective rank of all members' outputs stacked over the sum of their own, exact.

    Mean over modules, weighted by the members' shares of their own energy.
    """
    energy = panel.products["energy"].nan_to_num()
    share = energy / energy.sum(0).clamp_min(torch.finfo(energy.dtype).tiny)
    values = panel.products["set_union"]
    out = torch.full(values.shape[1:], torch.nan, dtype=torch.float64)
    for row, members in enumerate(panel.sets):
        where = list(members)
        weight = share[:, where].sum(1)
        one = values[:, row, where[0]]
        known = ~one.isnan()
        out[row, where] = ratio((weight * one.nan_to_num()).sum(), (weight * known).sum())
    return out
