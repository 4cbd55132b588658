"""What of an adapter to drop because it harms others more than it helps its own task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.capture.probe import Probe
from mergeprobe.capture.sketch import projection
from mergeprobe.lowrank import LowRank, factored_svd
from mergeprobe.plan import Pruned


def harmful(probe: Probe, others: Sequence[Probe]) -> Pruned:
    """Components of a finished run's update, whole modules of an earlier snapshot.

    At an early probe the singular directions are not yet those of the finished adapter, which is
    what a plan prunes; its modules are.
    """
    step, planned = probe.meta.get("step"), probe.meta.get("planned_steps")
    ended = probe.meta.get("finished") or (step and planned and step >= planned)
    return harmful_components(probe, others) if ended else harmful_modules(probe, others)


def harmful_modules(probe: Probe, others: Sequence[Probe]) -> Pruned:
    """Modules whose harm to some other adapter exceeds their own gain, by the probes alone.

    Harm of module m to b: ½ tr(ΔWᵀ D_b ΔW S_b) + ⟨G_b, ΔW⟩ at b's snapshot, the second-order
    change of b's loss (nats a token). Own gain: −⟨G_base, ΔW⟩ − ½ tr(ΔWᵀ D ΔW S), from the base
    point. Both rest on sketches, so single modules are noisy; a planner measures what dropping
    them does before it believes it.
    Probes without gradients or moments: nothing is dropped.
    """
    dropped = []
    for module, update in probe.updates.items():
        own = _change(probe, module, update, at_base=True)
        harms = [_change(other, module, update, at_base=False) for other in others]
        known = [harm for harm in harms if harm is not None]
        if own is not None and known and max(known) > max(0.0, -own):
            dropped.append(module)
    if len(dropped) == len(probe.updates):  # an adapter without modules is no adapter
        dropped = []
    return Pruned(modules=tuple(dropped))


def harmful_components(probe: Probe, others: Sequence[Probe]) -> Pruned:
    """Singular components of ΔW (0 = largest) that harm another more than they help their own.

    As `harmful_modules`, but component by component: what a loss changes if c goes from what is
    left of the module's update, −⟨G, c⟩ − ⟨c, F ΔW⟩ + ½⟨c, F c⟩ with F = D ⊗ S. Greedy: the
    component with the largest excess of harm goes first, then the rest is looked at anew, since
    components of one module share directions of F. At least one component of the adapter stays.
    Components are those of `probe`'s own update, so it has to be of the finished adapter.
    """
    dropped: dict[str, tuple[int, ...]] = {}
    left = sum(min(update.r, *update.shape) for update in probe.updates.values())
    for module, update in probe.updates.items():
        u, s, vh = factored_svd(update)
        own = _model(probe, module, u * s, vh, at_base=True)
        rivals = [_model(other, module, u * s, vh, at_base=False) for other in others]
        known = [model for model in rivals if model is not None]
        if own is None or not known:
            continue
        # numerically null directions are no components
        kept = [k for k in range(len(s)) if s[k] > 1e-6 * s[0]]
        gone: list[int] = []
        while kept and left > 1:
            excess = torch.stack([_marginal(model, kept) for model in known]).amax(0)
            excess = excess - (-_marginal(own, kept)).clamp(min=0)
            worst = int(excess.argmax())
            if excess[worst] <= 0:
                break
            gone.append(kept.pop(worst))
            left -= 1
        if gone:
            dropped[module] = tuple(sorted(gone))
    return Pruned(components=dropped)


class _Model(NamedTuple):
    """The change of a loss under a sum of components, to second order: Σ slope + ½ Σ bend."""

    slope: Float[Tensor, " k"]
    bend: Float[Tensor, "k k"]


def _model(
    probe: Probe,
    module: str,
    out: Float[Tensor, "out k"],
    into: Float[Tensor, "k in"],
    *,
    at_base: bool,
) -> _Model | None:
    gradients = probe.gradient_base if at_base else probe.gradient
    if module not in gradients or module not in probe.inputs or module not in probe.outputs:
        return None
    gradient = gradients[module].double()
    size = gradient.shape[0]
    left = projection(module, "out", out.shape[0], size).double().T @ out.double()
    right = into.double() @ projection(module, "in", into.shape[1], size).double()
    bend = probe.outputs[module].quadratic(out, out)
    bend = bend * probe.inputs[module].quadratic(into.T, into.T)
    return _Model(torch.einsum("ak,ab,kb->k", left, gradient, right), bend)


def _marginal(model: _Model, kept: Sequence[int]) -> Float[Tensor, " kept"]:
    """What each component adds to the loss, the other kept ones being there."""
    rows = torch.tensor(kept)
    bend = model.bend[rows][:, rows]
    return model.slope[rows] + bend.sum(1) - 0.5 * bend.diagonal()


def _change(probe: Probe, module: str, update: LowRank, *, at_base: bool) -> float | None:
    """Second-order change of `probe`'s loss when `update` is added to one module."""
    model = _model(probe, module, *update.folded(), at_base=at_base)
    return None if model is None else float(model.slope.sum() + 0.5 * model.bend.sum())
