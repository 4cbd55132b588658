"""Signals from the curvature: K-FAC with the empirical Fisher, F ≈ D ⊗ S per module.

S = E[xxᵀ] is the second moment of the module's input, D = E[δδᵀ] that of the gradient of the
token loss at its output; δ comes from the labels of the data, so this is the *empirical* Fisher
(its limits: arXiv:1905.12558). With losses in nats a token, ½ tr(ΔWᵀ D ΔW S) is the loss that the
update costs at second order. Both moments are a few directions and an even tail (Moment).
Sums run over the modules where the measured adapter has moments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.capture.probe import Probe
from mergeprobe.signals.panel import Panel, known_sum
from mergeprobe.signals.site import Site, ratio
from mergeprobe.signals.stack import Stack

FULL_TRIPLES = 20  # with more adapters only the diagonal and the (i, a) part of the triples
LOAD = 0.5  # the tolerated load τ at which `capacity` is stated

SIDES = {"outputs": 0, "inputs": 2}  # which of U, σ, V a moment is on the side of
OWN = ("form", "moved", "even")

# Fᵀ of every moment, zero-padded to one q, and the tails
Factors = tuple[Float[Tensor, "m b q size"], Float[Tensor, "m b"]]


def products(site: Site) -> dict[str, Tensor]:
    """disturbance: ⟨ΔW_a, F_b ΔW_a⟩. cross: ⟨ΔW_b, F_b ΔW_a⟩. data: tr(ΔW_a S_b ΔW_aᵀ).

    NaN where b has no moments or does not adapt the module; an absent a contributes 0.
    """
    shape = len(site.rows.modules), len(site.rows.span), len(site.columns.span)
    like = site.rows.scale
    out = {
        name: torch.full(shape, torch.nan, dtype=torch.float64, device=like.device)
        for name in ("disturbance", "cross", "data")
    }
    a = torch.tensor(site.rows.places, dtype=torch.long)[:, None]
    if who := _with(site.columns, "inputs"):
        there = _places(site.columns, who)
        out["data"][:, :, there] = 0.0
        out["data"][:, a, there] = _data(site.rows, site.columns, who)
    if who := _with(site.columns, "inputs", "outputs"):
        there = _places(site.columns, who)
        out["disturbance"][:, :, there] = out["cross"][:, :, there] = 0.0
        forms = _disturbance(site, who)
        out["disturbance"][:, a, there], out["cross"][:, a, there] = forms
    return out


def own(stack: Stack) -> dict[str, Tensor]:
    """form: ⟨ΔW, F ΔW⟩ of the own moments; moved: tr(ΔW S ΔWᵀ); even: ‖ΔW‖² tr S / in."""
    out = {name: stack.nothing() for name in OWN}
    if who := _with(stack, "inputs"):
        there, sigma = _places(stack, who), stack.sigma[:, who]
        seen, tails = _own_seen(stack, "inputs", who)
        length = seen.square().sum(2) + tails[..., None]
        out["moved"][:, there] = (sigma.square() * length).sum(-1)
        inputs = [stack.probes[stack.where[w]].inputs for w in who]
        traces = [[each[module].trace for each in inputs] for module in stack.modules]
        even = torch.tensor(traces, dtype=torch.float64) / stack.right.shape[3]
        out["even"][:, there] = stack.energy[:, who] * even.to(sigma)
    if who := _with(stack, "inputs", "outputs"):
        sigma = stack.sigma[:, who]
        form = sigma[..., :, None] * sigma[..., None, :]
        for part in ("outputs", "inputs"):
            seen, tails = _own_seen(stack, part, who)
            same = torch.diag_embed((sigma > 0).double())
            form = form * (seen.mT @ seen + tails[..., None, None] * same)
        out["form"][:, _places(stack, who)] = form.sum((-1, -2))
    return out


def triples(stack: Stack) -> Float[Tensor, "n n n"]:
    """[i, a, b] = ⟨ΔW_a, F_i ΔW_b⟩ over the modules, NaN where i has no moments or no update."""
    n, present = len(stack.span), torch.tensor(stack.places)
    out = torch.full((n, n, n), torch.nan, dtype=torch.float64)
    if who := _with(stack, "inputs", "outputs"):
        there = torch.tensor(_places(stack, who))
        out[there] = 0.0
        out[there[:, None, None], present[:, None], present] = _forms(stack, who).sum(0).cpu()
    return out


def set_products(stack: Stack) -> Float[Tensor, "m span"]:
    """joint: ⟨T, F_i T⟩ with T the sum of the others' updates, for each member i; NaN where it
    was not measured."""
    out = stack.nothing()
    if who := _with(stack, "inputs", "outputs"):
        others = torch.ones(len(who), len(stack.where)).to(out)
        others[torch.arange(len(who)), who] = 0.0
        forms = _forms(stack, who)
        out[:, _places(stack, who)] = torch.einsum("miab,ia,ib->mi", forms, others, others)
    return out


def parts_of(module: str, probes: Sequence[Probe]) -> tuple[tuple[bool, bool], ...]:
    """Of every probe, whether it has moments of the module's inputs and outputs: the same for all
    modules of a Stack."""
    return tuple((module in probe.inputs, module in probe.outputs) for probe in probes)


def _with(stack: Stack, *parts: str) -> list[int]:
    """Which of `where` have these parts of the modules."""
    return [
        place
        for place, i in enumerate(stack.where)
        if all(stack.modules[0] in getattr(stack.probes[i], part) for part in parts)
    ]


def _places(stack: Stack, who: list[int]) -> list[int]:
    places = stack.places
    return [places[place] for place in who]


def _factors(stack: Stack, part: str, who: list[int]) -> Factors:
    """The moments of `who` (made once a stack for all of its probes)."""
    key = f"{part} {who}"
    if key not in stack.made:
        held = [getattr(stack.probes[stack.where[w]], part) for w in who]
        moments = [[each[module] for each in held] for module in stack.modules]
        q = max(moment.factor.shape[1] for each in moments for moment in each)
        size = moments[0][0].factor.shape[0]
        factors = torch.zeros(len(moments), len(who), q, size, dtype=torch.float64)
        for m, each in enumerate(moments):
            for row, moment in enumerate(each):
                factors[m, row, : moment.factor.shape[1]] = moment.factor.detach().T
        numbers = [[moment.tail for moment in each] for each in moments]
        tails = torch.tensor(numbers, dtype=torch.float64)
        stack.made[key] = factors.to(stack.scale.device), tails.to(stack.scale.device)
    return stack.made[key]


def _seen(
    factors: Float[Tensor, "m b q size"], vectors: Float[Tensor, "m r a size"]
) -> Float[Tensor, "m b q a r"]:
    """Every direction of every update through every moment."""
    flat = factors.flatten(1, 2) @ vectors.flatten(1, 2).double().mT
    return flat.reshape(*factors.shape[:3], *vectors.shape[1:3]).transpose(3, 4)


def _own_seen(
    stack: Stack, part: str, who: list[int]
) -> tuple[Float[Tensor, "m b q r"], Float[Tensor, "m b"]]:
    """Each one's own directions through its own moment (made once a stack)."""
    factors, tails = _factors(stack, part, who)
    key = f"own {part} {who}"
    if key not in stack.made:
        vectors = stack.svd[SIDES[part]][:, :, who].double()
        stack.made[key] = torch.einsum("mbqx,mrbx->mbqr", factors, vectors)
    return stack.made[key], tails


def _data(rows: Stack, columns: Stack, who: list[int]) -> Float[Tensor, "m a b"]:
    """tr(ΔW_a S_b ΔW_aᵀ) for a of the rows, b of `who`."""
    factors, tails = _factors(columns, "inputs", who)
    length = _seen(factors, rows.svd[2]).square().sum(2) + tails[..., None, None]
    return (rows.sigma.square()[:, None] * length).sum(-1).mT


def _disturbance(
    site: Site, who: list[int]
) -> tuple[Float[Tensor, "m a b"], Float[Tensor, "m a b"]]:
    """⟨ΔW_a, F_b ΔW_a⟩ and ⟨ΔW_b, F_b ΔW_a⟩ for a of the rows, b of `who`."""
    rows, columns = site.rows, site.columns
    same = torch.diag_embed((rows.sigma > 0).double())[:, None]
    form = (rows.sigma[..., :, None] * rows.sigma[..., None, :])[:, None]
    cross = site.joint[:, :, who].permute(0, 2, 1, 4, 3)
    for part, between in (("outputs", site.cross_left), ("inputs", site.cross_right)):
        ours, tails = _own_seen(columns, part, who)
        tails = tails[..., None, None, None]
        seen = _seen(_factors(columns, part, who)[0], rows.svd[SIDES[part]])
        form = form * (torch.einsum("mbqak,mbqal->mbakl", seen, seen) + tails * same)
        even = between[:, :, who].permute(0, 2, 1, 4, 3)
        cross = cross * (torch.einsum("mbqk,mbqal->mbakl", ours, seen) + tails * even)
    return form.sum((-1, -2)).mT, cross.sum((-1, -2)).mT


def _forms(stack: Stack, who: list[int]) -> Float[Tensor, "m i c c"]:
    """⟨ΔW_a, F_i ΔW_b⟩ = Σ_kl σ_ak σ_bl (U_aᵀD_iU_b)_kl (V_aᵀS_iV_b)_kl."""
    modules, count, r = stack.sigma.shape
    sigma = stack.sigma.flatten(1)
    found = (sigma[:, :, None] * sigma[:, None, :])[:, None]
    for part, side in SIDES.items():
        factors, tails = _factors(stack, part, who)
        flat = _seen(factors, stack.svd[side]).flatten(3)
        vectors = stack.svd[side].transpose(1, 2).flatten(1, 2).double()
        even = (vectors @ vectors.mT)[:, None]
        found = found * (flat.mT @ flat + tails[..., None, None] * even)
    return found.reshape(modules, len(who), count, r, count, r).sum((3, 5))


def interference(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """tr(ΔW_aᵀ D_b ΔW_a S_b): twice the loss that a's update costs b at second order."""
    return panel.total("disturbance", region)


def interference_ratio(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """The interference over the same form of b's own update."""
    _, of_b = panel.sides(panel.own("form", region))
    return ratio(panel.total("disturbance", region), of_b)


def fisher_cosine(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """Cosine of ΔW_a and ΔW_b in b's curvature: ⟨ΔW_b, F_b ΔW_a⟩/√(⟨a, F_b a⟩⟨b, F_b b⟩)."""
    _, of_b = panel.sides(panel.own("form", region))
    norms = (panel.total("disturbance", region) * of_b).clamp_min(0).sqrt()
    return ratio(panel.total("cross", region), norms, 0.0).clamp(-1.0, 1.0)


def data_weighted(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """E_{a→b} = tr(ΔW_a S_b ΔW_aᵀ)/tr(ΔW_b S_b ΔW_bᵀ): a's output on b's inputs over b's own."""
    _, of_b = panel.sides(panel.own("moved", region))
    return ratio(panel.total("data", region), of_b)


def selectivity(panel: Panel, region: str) -> Float[Tensor, "*g n"]:
    """κ = [tr(ΔW S ΔWᵀ)/‖ΔW‖²]/[tr S/in]: how much better the update fits its own inputs than
    an even one would. Over modules: the sum of tr(ΔW S ΔWᵀ) over the sum for even updates."""
    return ratio(panel.own("moved", region), panel.own("even", region))


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
    return panel.own("form", region)


def capacity_load(panel: Panel, region: str) -> Float[Tensor, " rows"]:
    """Σ_{j ≠ i} E_{j→i} over the other members."""
    moved = data_weighted(panel, region)
    loads = [moved[[j for j in panel.sets[s] if j != i], i].sum() for s, i in panel.set_rows]
    return torch.tensor(loads, dtype=torch.float64)


def joint_interference(panel: Panel, region: str) -> Float[Tensor, " rows"]:
    """tr(TᵀD_i T S_i) with T the sum of the others' updates, exact (no sum over pairs)."""
    return _joint(panel)


def joint_interference_ratio(panel: Panel, region: str) -> Float[Tensor, " rows"]:
    """The joint interference over the same form of i's own update."""
    mine = own_curvature(panel, region)
    return ratio(_joint(panel), mine[[i for _, i in panel.set_rows]])


def _joint(panel: Panel) -> Float[Tensor, " rows"]:
    if "joint" not in panel.set_each:
        return torch.full((len(panel.set_rows),), torch.nan, dtype=torch.float64)
    return known_sum(panel.set_each["joint"])
