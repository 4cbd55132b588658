"""Signals from the full-weight gradients, through sketches that all runs share.

The gradient of B or A depends on where A was initialised: two runs of one task with independent A
have nearly orthogonal ones. The gradient G of the full weight does not, so these signals live on
its sketch R_outᵀ G R_in, whose inner products are unbiased for those of G. Their error: see
`bounds`; it falls with the number of modules that are summed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.capture.probe import Probe
from mergeprobe.capture.sketch import sketch_update
from mergeprobe.errors import ProbeError
from mergeprobe.signals.files import shape_of
from mergeprobe.signals.panel import Panel
from mergeprobe.signals.site import Site, cosine, ratio
from mergeprobe.signals.stack import Stack

PARTS = ("gradient_base", "gradient", "halfway")


def inner_products(site: Site) -> dict[str, Tensor]:
    """gram_base, gram_snapshot: ⟨G_a, G_b⟩. velocity: ⟨V_a, V_b⟩ with V = ΔW − ΔW at half of the
    steps. Of sketches, NaN where one is missing."""
    one, two = _sketched(site.rows), _sketched(site.columns)
    pairs = "gram_base", "gram_snapshot", "velocity"
    if one is None or two is None:
        return dict.fromkeys(pairs, _none(site))
    found = {name: one[name] @ two[name].mT for name in pairs}
    return {name: (v + v.mT) / 2 if site.diagonal else v for name, v in found.items()}


def transfers(site: Site) -> dict[str, Tensor]:
    """linear_base, linear_snapshot: ⟨G_b, ΔW_a⟩, 0 where a does not adapt the module."""
    one, two = _sketched(site.rows), _sketched(site.columns)
    if one is None or two is None:
        return dict.fromkeys(("linear_base", "linear_snapshot"), _none(site))
    return {f"linear_{at}": one["update"] @ two[f"gram_{at}"].mT for at in ("base", "snapshot")}


def own(stack: Stack) -> dict[str, Tensor]:
    """grown, half: ‖ΔW‖² and ‖ΔW at half of the steps‖² where both are sketched.

    gradient_base, gradient_snapshot, travelled: the squared norms of the others.
    """
    found = _sketched(stack)
    names = {
        "half": "half", "gradient_base": "gram_base", "gradient_snapshot": "gram_snapshot",
        "travelled": "velocity",
    }  # fmt: skip
    if found is None:
        return dict.fromkeys(("grown", *names), stack.nothing())
    squares = {name: found[key].square().sum(-1) for name, key in names.items()}
    return squares | {"grown": (found["update"] + 0 * found["half"]).square().sum(-1)}


def _none(site: Site) -> Float[Tensor, "m rows columns"]:
    shape = len(site.rows.modules), len(site.rows.span), len(site.columns.span)
    return torch.full(shape, torch.nan, dtype=torch.float64, device=site.rows.scale.device)


def _sketched(stack: Stack) -> dict[str, Float[Tensor, "m span kk"]] | None:
    """Each probe's sketches as rows, NaN where it has none; None where nobody anywhere has one.

    Made once a stack: `stack.sketches`.
    """
    if "sketches" not in stack.made:
        stack.made["sketches"] = _sketch_all(stack)
    return stack.made["sketches"]


def _sketch_all(stack: Stack) -> dict[str, Tensor] | None:
    size = size_of(stack.modules[0], stack.probes)
    if size is None:
        return None
    device = stack.scale.device
    base, snapshot, half = (_sketches(stack, part, size).to(device) for part in PARTS)
    update = torch.zeros_like(base)
    for m, row, module, probe in stack.cells("updates"):
        # as capture sketched the half-way update: in float32, so that the two subtract
        change = sketch_update(module, probe.updates[module], size)
        update[m, row] = change.double().flatten()
    return {
        "gram_base": base,
        "gram_snapshot": snapshot,
        "half": half,
        "update": update,
        "velocity": update - half,
    }


def size_of(module: str, probes: Sequence[Probe]) -> int | None:
    """The one k of all probes' sketches of this module; None where nobody has one."""
    first: tuple[Probe, tuple[int, ...]] | None = None
    for part in PARTS:
        for probe in probes:
            held = getattr(probe, part)
            if module not in held:
                continue
            shape = shape_of(held, module)
            first = first or (probe, shape)
            if shape != first[1]:
                raise ProbeError(
                    f"sketches of '{module}' are {first[1]} in '{first[0].name}' and {shape} "
                    f"in '{probe.name}'; record both probes with one sketch size"
                )
    return first[1][0] if first else None


def sketch_size(probes: Sequence[Probe]) -> int | None:
    """The k of the first sketch among these probes; None where there is none."""
    for probe in probes:
        for part in PARTS:
            for module in (held := getattr(probe, part)):
                return shape_of(held, module)[0]
    return None


def _sketches(stack: Stack, part: str, size: int) -> Float[Tensor, "m span kk"]:
    """Each probe's sketch as a row; NaN where it has none."""
    shape = len(stack.modules), len(stack.span), size * size
    out = torch.full(shape, torch.nan, dtype=torch.float64)
    for m, row, module, probe in stack.cells(part):
        out[m, row] = getattr(probe, part)[module].detach().flatten()
    return out


def gradient_cosine_base(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """Cosine of the two tasks' full-weight gradients at the base point."""
    return cosine(
        panel.total("gram_base", region), *panel.inner(panel.own("gradient_base", region))
    )


def gradient_cosine(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """Cosine of the two tasks' full-weight gradients, each at its own snapshot."""
    norms = panel.inner(panel.own("gradient_snapshot", region))
    return cosine(panel.total("gram_snapshot", region), *norms)


def velocity_cosine(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """Cosine of the ways travelled since half of the steps, through sketches.

    Later steps part where the first ones learn a shared format.
    """
    return cosine(panel.total("velocity", region), *panel.inner(panel.own("travelled", region)))


def first_order_transfer(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """−⟨G_b, ΔW_a⟩/L_b at the base point: the share of b's loss that a's update saves, linearly."""
    return _transfer(panel, region, "linear_base", "base_loss")


def first_order_transfer_snapshot(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """−⟨G_b, ΔW_a⟩/L_b with b's gradient and loss at its snapshot."""
    return _transfer(panel, region, "linear_snapshot", "loss")


def _transfer(panel: Panel, region: str, product: str, loss: str) -> Float[Tensor, "a b"]:
    _, of_b = panel.sides(mean_loss(panel, loss))
    return ratio(-panel.total(product, region), of_b)


def mean_loss(panel: Panel, field: str) -> Float[Tensor, " n"]:
    """Mean calibration loss (nats a token), NaN where there is no calibration batch."""
    batches = [probe.calibration for probe in panel.probes]
    values = [torch.nan if b is None else float(getattr(b, field).double().mean()) for b in batches]
    return torch.tensor(values, dtype=torch.float64)
