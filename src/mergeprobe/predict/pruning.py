"""Which modules of an adapter to drop because they harm others more than they help it."""

from __future__ import annotations

from collections.abc import Sequence

from mergeprobe.capture.probe import Probe
from mergeprobe.capture.sketch import sketch_update
from mergeprobe.lowrank import LowRank
from mergeprobe.plan import Pruned


def harmful_modules(probe: Probe, others: Sequence[Probe]) -> Pruned:
    """Modules whose harm to some other adapter exceeds their own gain, by the probes alone.

    Harm of module m to b: ½ tr(ΔWᵀ D_b ΔW S_b) + ⟨G_b, ΔW⟩ at b's snapshot, the second-order
    change of b's loss (nats a token). Own gain: −⟨G_base, ΔW⟩ − ½ tr(ΔWᵀ D ΔW S), from the base
    point. Both rest on sketches, so single modules are noisy; a planner measures what dropping
    them does before it believes it. Only modules, not components: at an early probe the singular
    directions are not yet those of the finished adapter, its modules are.
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


def _change(probe: Probe, module: str, update: LowRank, *, at_base: bool) -> float | None:
    """Second-order change of `probe`'s loss when `update` is added to one module."""
    gradients = probe.gradient_base if at_base else probe.gradient
    if module not in gradients or module not in probe.inputs or module not in probe.outputs:
        return None
    gradient = gradients[module].double()
    slope = float((gradient * sketch_update(module, update, gradient.shape[0]).double()).sum())
    out, into = update.folded()
    bend = probe.outputs[module].quadratic(out, out) * probe.inputs[module].quadratic(
        into.T, into.T
    )
    return slope + 0.5 * float(bend.sum())
