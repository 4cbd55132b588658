"""Signals from the full-weight gradients, through sketches that all runs share.

The gradient of B or A depends on where A was initialised: two runs of one task with independent A
have nearly orthogonal ones. The gradient G of the full weight does not, so these signals live on
its sketch R_outᵀ G R_in, whose inner products are unbiased for those of G. The error of one
module's inner product is about ‖G_a‖ ‖G_b‖ √2 / √k at worst (rank-one gradients) with k = 32,
and falls with the number of modules that are summed.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.capture.probe import Probe
from mergeprobe.capture.sketch import sketch_update
from mergeprobe.errors import ProbeError
from mergeprobe.signals.panel import Panel
from mergeprobe.signals.site import Site, cosine, ratio

PARTS = ("gradient_base", "gradient", "halfway")


def products(site: Site) -> dict[str, Tensor]:
    """Inner products of sketches, (n, n), NaN where one is missing.

    gram_base, gram_snapshot: ⟨G_a, G_b⟩. linear_base, linear_snapshot [i, a]: ⟨G_i, ΔW_a⟩, 0 where
    a does not adapt the module. velocity: ⟨V_a, V_b⟩ with V = ΔW − ΔW at half of the steps.
    grown, half (n,): ‖ΔW‖² and ‖ΔW at half of the steps‖² where both are sketched.
    """
    size = _sketch_size(site)
    if size is None:
        both = torch.full((site.n, site.n), torch.nan, dtype=torch.float64)
        pairs = "gram_base", "gram_snapshot", "linear_base", "linear_snapshot", "velocity"
        missing = dict.fromkeys(pairs, both)
        return missing | {"grown": both[0], "half": both[0]}
    base, snapshot, half = (_sketches(site, part, size) for part in PARTS)
    update = torch.zeros(site.n, size * size, dtype=torch.float64)
    for i in site.present:
        change = site.probes[i].updates[site.module]
        update[i] = sketch_update(site.module, change, size).double().cpu().flatten()
    travelled = update - half
    return {
        "gram_base": base @ base.T,
        "gram_snapshot": snapshot @ snapshot.T,
        "linear_base": base @ update.T,
        "linear_snapshot": snapshot @ update.T,
        "velocity": travelled @ travelled.T,
        "grown": (update + 0 * half).square().sum(-1),
        "half": half.square().sum(-1),
    }


def _sketch_size(site: Site) -> int | None:
    """The one k of all sketches of this module; None where nobody has one."""
    first: tuple[Probe, tuple[int, ...]] | None = None
    for part in PARTS:
        for i in site.rows(part):
            probe = site.probes[i]
            shape = tuple(getattr(probe, part)[site.module].shape)
            first = first or (probe, shape)
            if shape != first[1]:
                raise ProbeError(
                    f"sketches of '{site.module}' are {first[1]} in '{first[0].name}' and {shape} "
                    f"in '{probe.name}'; record both probes with one sketch size"
                )
    return first[1][0] if first else None


def _sketches(site: Site, part: str, size: int) -> Float[Tensor, "n kk"]:
    """Each probe's sketch as a row; NaN where it has none."""
    out = torch.full((site.n, size * size), torch.nan, dtype=torch.float64)
    for i in site.rows(part):
        out[i] = getattr(site.probes[i], part)[site.module].detach().double().cpu().flatten()
    return out


def gradient_cosine_base(panel: Panel, region: str) -> Float[Tensor, "*g n n"]:
    """Cosine of the two tasks' full-weight gradients at the base point."""
    return cosine(panel.total("gram_base", region))


def gradient_cosine(panel: Panel, region: str) -> Float[Tensor, "*g n n"]:
    """Cosine of the two tasks' full-weight gradients, each at its own snapshot."""
    return cosine(panel.total("gram_snapshot", region))


def velocity_cosine(panel: Panel, region: str) -> Float[Tensor, "*g n n"]:
    """Cosine of the ways travelled since half of the steps, through sketches.

    Later steps part where the first ones learn a shared format.
    """
    return cosine(panel.total("velocity", region))


def first_order_transfer(panel: Panel, region: str) -> Float[Tensor, "*g n n"]:
    """−⟨G_b, ΔW_a⟩/L_b at the base point: the share of b's loss that a's update saves, linearly."""
    return _transfer(panel, region, "linear_base", "base_loss")


def first_order_transfer_snapshot(panel: Panel, region: str) -> Float[Tensor, "*g n n"]:
    """−⟨G_b, ΔW_a⟩/L_b with b's gradient and loss at its snapshot."""
    return _transfer(panel, region, "linear_snapshot", "loss")


def _transfer(panel: Panel, region: str, product: str, loss: str) -> Float[Tensor, "*g n n"]:
    linear = panel.total(product, region)
    return ratio(-linear.mT, mean_loss(panel, loss))


def mean_loss(panel: Panel, field: str) -> Float[Tensor, " n"]:
    """Mean calibration loss (nats a token), NaN where there is no calibration batch."""
    batches = [probe.calibration for probe in panel.probes]
    values = [torch.nan if b is None else float(getattr(b, field).double().mean()) for b in batches]
    return torch.tensor(values, dtype=torch.float64)
