"""Signals from the curvature: K-FAC with the empirical Fisher, F ≈ D ⊗ S per module.

S = E[xxᵀ] is the second moment of the module's input, D = E[δδᵀ] that of the gradient of the
token loss at its output; δ comes from the labels of the data, so this is the *empirical* Fisher
(its limits: arXiv:1905.12558). With losses in nats a token, ½ tr(ΔWᵀ D ΔW S) is the loss that the
update costs at second order. Both moments are a few directions and an even tail (Moment).
Sums run over the modules where the measured adapter has moments.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.signals.panel import Panel
from mergeprobe.signals.site import Site, ratio

FULL_TRIPLES = 20  # with more adapters only the diagonal and the (i, a) part of the triples
LOAD = 0.5  # the tolerated load τ at which `capacity` is stated


def products(site: Site) -> dict[str, Tensor]:
    """disturbance [i, a] = ⟨ΔW_a, F_i ΔW_a⟩ and own [i, a] = ⟨ΔW_i, F_i ΔW_a⟩.

    data [i, a] = tr(ΔW_a S_i ΔW_aᵀ); even (n,) = ‖ΔW_i‖² tr S_i / in. NaN where i has no moments
    or does not adapt the module; an absent a contributes 0.
    """
    n, present = site.n, torch.tensor(site.present)
    disturbance, own, data = (torch.full((n, n), torch.nan, dtype=torch.float64) for _ in range(3))
    even = torch.full((n,), torch.nan, dtype=torch.float64)
    if who := [i for i in site.rows("inputs") if i in site.present]:
        seen, tails = _seen(site, who, "inputs")
        length = seen.square().sum(1) + tails[:, None, None]
        data[who] = 0.0
        data[torch.tensor(who)[:, None], present] = (site.sigma.square() * length).sum(-1)
        traces = [site.probes[i].inputs[site.module].trace for i in who]
        energy = site.each(site.energy)[who]
        even[who] = energy * torch.tensor(traces, dtype=torch.float64) / site.right.shape[1]
    if who := _measured(site):
        rows = torch.tensor([site.present.index(i) for i in who])
        everyone = torch.arange(len(present))
        same, mine = site.joint[everyone, everyone], site.joint[rows]
        for part, cross in (("outputs", site.cross_left), ("inputs", site.cross_right)):
            seen, tails = _seen(site, who, part)
            tails = tails[:, None, None, None]
            ours = seen[torch.arange(len(who)), :, rows]
            same = same * (
                torch.einsum("iqak,iqal->iakl", seen, seen) + tails * cross[everyone, everyone]
            )
            mine = mine * (torch.einsum("iqk,iqal->iakl", ours, seen) + tails * cross[rows])
        disturbance[who], own[who] = 0.0, 0.0
        where = torch.tensor(who)[:, None]
        disturbance[where, present] = same.sum((-1, -2))
        own[where, present] = mine.sum((-1, -2))
    return {"disturbance": disturbance, "own": own, "data": data, "even": even}


def triple_products(site: Site) -> dict[str, Tensor]:
    """triples [i, a, b] = ⟨ΔW_a, F_i ΔW_b⟩, NaN where i has no moments or no update here."""
    n, present = site.n, torch.tensor(site.present)
    out = torch.full((n, n, n), torch.nan, dtype=torch.float64)
    if who := _measured(site):
        out[who] = 0.0
        where = torch.tensor(who)[:, None, None]
        out[where, present[:, None], present] = _forms(site, who, list(range(len(present))))
    return {"triples": out}


def set_products(site: Site, sets: tuple[tuple[int, ...], ...]) -> dict[str, Tensor]:
    """joint [s, i] = ⟨T, F_i T⟩ with T the sum of the updates of the others in set s."""
    out = torch.full((len(sets), site.n), torch.nan, dtype=torch.float64)
    measured = set(_measured(site))
    for row, members in enumerate(sets):
        here = [i for i in members if i in site.present]
        who = [i for i in here if i in measured]
        if not who:
            continue
        forms = _forms(site, who, [site.present.index(i) for i in here])
        others = torch.tensor([[float(j != i) for j in here] for i in who], dtype=torch.float64)
        out[row, who] = torch.einsum("iab,ia,ib->i", forms, others, others)
    return {"joint": out}


def _measured(site: Site) -> list[int]:
    """The probes that adapt this module and have both moments of it."""
    with_outputs = set(site.rows("outputs"))
    return [i for i in site.rows("inputs") if i in with_outputs and i in site.present]


def _seen(
    site: Site, who: list[int], part: str, places: list[int] | None = None
) -> tuple[Float[Tensor, "i q p r"], Float[Tensor, " i"]]:
    """Fᵀ U ("outputs") or Fᵀ V ("inputs") for every i in `who`, and the moments' tails.

    places: of the updates within the site; all of them by default.
    """
    holders, seen, tails = site.seen_left if part == "outputs" else site.seen_right
    rows = [holders.index(i) for i in who]
    seen = seen[rows]
    return (seen if places is None else seen[:, :, places]), tails[rows]


def _forms(site: Site, who: list[int], places: list[int]) -> Float[Tensor, "i c c"]:
    """⟨ΔW_a, F_i ΔW_b⟩ = Σ_kl σ_ak σ_bl (U_aᵀD_iU_b)_kl (V_aᵀS_iV_b)_kl."""
    count, r = len(places), site.sigma.shape[1]
    sigma = site.sigma[places].flatten()
    found = sigma[:, None] * sigma[None, :]
    for part, cross in (("outputs", site.cross_left), ("inputs", site.cross_right)):
        seen, tails = _seen(site, who, part, places)
        flat = seen.flatten(2)
        even = cross[places][:, places].permute(0, 2, 1, 3).reshape(count * r, count * r)
        found = found * (flat.mT @ flat + tails[:, None, None] * even)
    return found.reshape(len(who), count, r, count, r).sum((2, 4))


def interference(panel: Panel, region: str) -> Float[Tensor, "*g n n"]:
    """tr(ΔW_aᵀ D_b ΔW_a S_b): twice the loss that a's update costs b at second order."""
    return panel.total("disturbance", region).mT


def interference_ratio(panel: Panel, region: str) -> Float[Tensor, "*g n n"]:
    """The interference over the same form of b's own update."""
    form = panel.total("disturbance", region)
    return ratio(form, form.diagonal(dim1=-2, dim2=-1)[..., :, None]).mT


def fisher_cosine(panel: Panel, region: str) -> Float[Tensor, "*g n n"]:
    """Cosine of ΔW_a and ΔW_b in b's curvature: ⟨ΔW_b, F_b ΔW_a⟩/√(⟨a, F_b a⟩⟨b, F_b b⟩)."""
    form = panel.total("disturbance", region)
    norms = (form * form.diagonal(dim1=-2, dim2=-1)[..., :, None]).clamp_min(0).sqrt()
    return ratio(panel.total("own", region), norms, 0.0).clamp(-1.0, 1.0).mT


def data_weighted(panel: Panel, region: str) -> Float[Tensor, "*g n n"]:
    """E_{a→b} = tr(ΔW_a S_b ΔW_aᵀ)/tr(ΔW_b S_b ΔW_bᵀ): a's output on b's inputs over b's own."""
    moved = panel.total("data", region)
    return ratio(moved, moved.diagonal(dim1=-2, dim2=-1)[..., :, None]).mT


def selectivity(panel: Panel, region: str) -> Float[Tensor, "*g n"]:
    """κ = [tr(ΔW S ΔWᵀ)/‖ΔW‖²]/[tr S/in]: how much better the update fits its own inputs than
    an even one would. Over modules: the sum of tr(ΔW S ΔWᵀ) over the sum for even updates."""
    moved = panel.total("data", region).diagonal(dim1=-2, dim2=-1)
    return ratio(moved, panel.total("even", region))


def n_max(kappa: Float[Tensor, "*g"], tau: float) -> Float[Tensor, "*g"]:
    """1 + τκ: how many adapters of equal norm, even over the inputs, hold the load at τ.

    Each of the others then has E ≈ 1/κ, and Σ E ≤ τ bounds their number.
    """
    return 1.0 + tau * kappa


def capacity(panel: Panel, region: str) -> Float[Tensor, "*g n"]:
    """n_max at a load of LOAD = 0.5."""
    return n_max(selectivity(panel, region), LOAD)


def own_curvature(panel: Panel, region: str) -> Float[Tensor, "*g n"]:
    """tr(ΔWᵀ D ΔW S) of the adapter's own update."""
    return panel.total("disturbance", region).diagonal(dim1=-2, dim2=-1)


def capacity_load(panel: Panel, region: str) -> Float[Tensor, "s n"]:
    """Σ_{j ≠ i} E_{j→i} over the other members."""
    moved = data_weighted(panel, region)
    out = torch.full((len(panel.sets), panel.n), torch.nan, dtype=torch.float64)
    for row, members in enumerate(panel.sets):
        for i in members:
            out[row, i] = moved[[j for j in members if j != i], i].sum()
    return out


def joint_interference(panel: Panel, region: str) -> Float[Tensor, "s n"]:
    """tr(TᵀD_i T S_i) with T the sum of the others' updates, exact (no sum over pairs)."""
    return panel.total("joint", region)


def joint_interference_ratio(panel: Panel, region: str) -> Float[Tensor, "s n"]:
    """The joint interference over the same form of i's own update."""
    return ratio(panel.total("joint", region), own_curvature(panel, region))
