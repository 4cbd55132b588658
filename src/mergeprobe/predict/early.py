"""The model tier: snapshots scaled to their own best length, merged, and run on calibration items.

At 5 % of training an update is tiny, and merging tiny updates looks harmless or even helpful: it
acts like a bigger step. What matters shows when each snapshot is scaled to its own best length
c* = argmin over c ∈ {1, 2, 4, … 32} of L(θ₀ + c ΔW) on its own calibration items; U = c* ΔW.
Everything here is measured teacher-forced on adapter i's own items, at answer positions.

c* is where an early direction serves its own task best, not how long the update will be: training
goes on and norms grow (2.2 to 3.3 times from step 8 to step 100 in the demo, whatever c*). So the
extrapolated early merge keeps i at c* and takes the others at `reach` times theirs, which makes
them max(c*, (T/s)^¼) times as long as the snapshot at step s of T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergeprobe.adapters.attach import attached
from mergeprobe.adapters.base import Base
from mergeprobe.adapters.checkpoint import Adapter
from mergeprobe.capture.batch import Batch, item_scores
from mergeprobe.capture.model import measuring
from mergeprobe.capture.probe import Probe
from mergeprobe.capture.recorder import record
from mergeprobe.compose import merge
from mergeprobe.compose.logits import Composition
from mergeprobe.errors import BaseModelError, NotForecastable
from mergeprobe.evaluate.score import score_composed
from mergeprobe.lowrank import norm
from mergeprobe.predict.states import State, distance, js, kl, state_of, top1_disagreement

LENGTHS = (1, 2, 4, 8, 16, 32)
# measured norm growth gave exponents of 0.32 to 0.47; directions still turn, so less is taken
GROWTH_EXPONENT = 0.25
Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One run at its probe point, scaled. update: U = c* ΔW as an Adapter; length: c*; reach: how
    many times longer it is taken to be at the end of training. base_loss, own_loss:
    (items,) nats per token at θ₀ and θ₀ + U on its own calibration items."""

    name: str
    update: Adapter
    batch: Batch
    length: float
    reach: float
    base_loss: Float[Tensor, " items"]
    own_loss: Float[Tensor, " items"]

    @property
    def own_gain(self) -> float:
        """[L(θ₀) − L(θ₀ + U)] / L(θ₀), relative: 1 is a perfect fit."""
        return float((self.base_loss.mean() - self.own_loss.mean()) / self.base_loss.mean())

    @cached_property
    def final_norm(self) -> float:
        """‖ΔW‖ as it is taken to be at the end of training: that of U, `reach` times."""
        return self.reach * math.hypot(*(norm(u) for u in self.update.modules.values()))


@dataclass
class ModelTier:
    """Runs the measurements it is asked for, once each, within a budget of forward passes.

    budget: the most forward passes over a calibration batch (a backward counts as two); None for
    no limit. `spent` says how many were made. Exceeding it raises NotForecastable.
    """

    base: Base
    snapshots: dict[str, Snapshot]
    budget: int | None = None
    spent: int = 0
    _states: dict[Any, State] = field(default_factory=dict)
    _rows: dict[Any, dict[str, float]] = field(default_factory=dict)
    _kept: dict[Any, float] = field(default_factory=dict)

    def left(self) -> float:
        return math.inf if self.budget is None else self.budget - self.spent

    def spend(self, passes: int = 1) -> None:
        if passes > self.left():
            raise NotForecastable(
                f"the budget of {self.budget} forward passes is used up; raise --budget"
            )
        self.spent += passes

    def state(self, of: str, point: Any, update: Adapter | None, *, keep: bool = True) -> State:
        """The model at θ₀ + update on `of`'s items; `point` names the update in the cache."""
        key = (of, point)
        if key not in self._states:
            self.spend()
            found = state_of(self.base, self.snapshots[of].batch, update)
            if not keep:
                return found
            self._states[key] = found
        return self._states[key]

    def final_norms(self, names: Sequence[str]) -> dict[str, float]:
        """Norms of the updates as they are taken to be at the end of training, by name."""
        return {name: self.snapshots[name].final_norm for name in names}

    def set_features(
        self, name: str, group: Sequence[str], method: str = "sum"
    ) -> dict[str, float]:
        """Every model-tier signal of adapter `name` inside `group` (itself included).

        For a pair {i, j} these are the signals of SIGNALS.md. In a larger set the others act as
        one: U_j becomes their sum. Columns are described in `early_signals`; those that depend
        on the merge carry its name (`..._sum`, `..._mean`).
        """
        others = tuple(sorted(set(group) - {name}))
        key = (name, others, method)
        if key not in self._rows:
            self._rows[key] = self._measure(name, others, method)
        return self._rows[key]

    def _measure(self, name: str, others: tuple[str, ...], method: str) -> dict[str, float]:
        own = self.snapshots[name]
        zero = self.state(name, "base", None)
        alone = self.state(name, "own", own.update)
        updates = [self.snapshots[other].update for other in others]
        theirs = updates[0] if len(updates) == 1 else merge(updates, "sum").adapter
        other = self.state(name, ("others", others), theirs)
        merged = self.state(
            name, (method, others), merge([own.update, *updates], method).adapter, keep=False
        )
        step_late, step_final = distance(alone.late, zero.late), distance(alone.final, zero.final)
        gain = max(zero.loss - alone.loss, 1e-9)
        lengths = [self.snapshots[o].length for o in others]
        return {
            "own_gain": own.own_gain,
            "log_c": math.log(own.length),
            "log_c_ratio": sum(map(math.log, lengths)) / len(lengths) - math.log(own.length),
            "disturbance_late": distance(other.late, zero.late) / step_late,
            "disturbance_final": distance(other.final, zero.final) / step_final,
            f"nonadditivity_{method}_late": distance(merged.late, alone.late) / step_late,
            f"nonadditivity_{method}_final": distance(merged.final, alone.final) / step_final,
            f"kl_merge_{method}": kl(alone.logprob, merged.logprob),
            "kl_base_other": kl(zero.logprob, other.logprob),
            "kl_own_other": kl(alone.logprob, other.logprob),
            "js_own_other": js(alone.logprob, other.logprob),
            "top1_disagreement": top1_disagreement(zero.logprob, other.logprob),
            f"early_retention_{method}": (zero.loss - merged.loss) / gain,
            "early_transfer": (other.loss - zero.loss) / gain,
        }

    def early_retention(self, name: str, update: Adapter) -> float:
        """(L(θ₀) − L(θ₀ + update)) / (L(θ₀) − L(θ₀ + U)) on `name`'s items, for any merge."""
        own = self.snapshots[name]
        self.spend()
        with attached(self.base.model, update.modules):
            loss = item_scores(self.base.model, own.batch).loss
        base, alone = float(own.base_loss.mean()), float(own.own_loss.mean())
        return (base - float(loss.mean())) / max(base - alone, 1e-9)

    def extrapolated_merge(
        self,
        name: str,
        weights: Mapping[str, float],
        *,
        replaced: Mapping[str, Adapter] | None = None,
    ) -> float:
        """The extrapolated early merge: forecast gain retention of `name` in Σ w_a ΔW_a.

        Runs θ₀ + s (w_i U_i + Σ_{a≠i} w_a reach_a U_a) on i's items, divides the retention by that
        of w_i U_i alone and multiplies it by that of min(1, w_i reach_i) U_i: a snapshot at half
        length loses what a finished adapter at half length does not (it keeps .96–1.02).
        What the others do for i counts as i's own length: s ≤ 1 keeps w_i + Σ w_a reach_a help_a
        at 1, help_a the share of i's gain that U_a alone brings. Without it two adapters of one
        skill would seem to harm each other by overshooting together, which training does not.
        weights: by name, of the whole group. replaced: other updates for some (pruned ones).
        """
        replaced = replaced or {}
        key = (name, tuple(sorted(weights.items())), tuple(sorted(replaced)))
        if key not in self._kept or replaced:
            updates, factors, length = [], [], 0.0
            for other, weight in sorted(weights.items()):
                snapshot, factor = self.snapshots[other], weight
                updates.append(replaced.get(other, snapshot.update))
                if other != name:
                    factor *= snapshot.reach
                length += factor * (1.0 if other == name else self._help(name, other))
                factors.append(factor)
            shrink = 1.0 / max(1.0, length)
            merged = merge(updates, "linear", weights=[shrink * f for f in factors]).adapter
            kept = self.early_retention(name, merged)
            weight = weights[name]
            diluted = min(1.0, weight * self.snapshots[name].reach)
            still = self._alone(name, diluted) / max(0.25, self._alone(name, weight))
            self._kept[key] = kept * max(1.0, still)
        return self._kept[key]

    def early_logits(self, name: str, group: Sequence[str], how: Composition) -> float:
        """Gain retention of `name` when the logits of `group`'s snapshots are composed: (L(θ₀) −
        L(composed)) / (L(θ₀) − L(θ₀ + U)) on its items. Costs a pass for each adapter and one."""
        own = self.snapshots[name]
        self.spend(len(group) + 1)
        updates = [self.snapshots[other].update.modules for other in group]
        loss = score_composed(self.base, updates, how, own.batch).loss
        base, alone = float(own.base_loss.mean()), float(own.own_loss.mean())
        return (base - float(loss.mean())) / max(base - alone, 1e-9)

    def _help(self, name: str, other: str) -> float:
        """The share of `name`'s gain that `other`'s update alone brings, in [0, 1]."""
        own = self.snapshots[name]
        zero = self.state(name, "base", None)
        theirs = self.state(name, ("others", (other,)), self.snapshots[other].update)
        gain = float(own.base_loss.mean() - own.own_loss.mean())
        return min(1.0, max(0.0, (zero.loss - theirs.loss) / max(gain, 1e-9)))

    def _alone(self, name: str, weight: float) -> float:
        """Retention of w_i U_i alone, at most 1."""
        key = (name, weight)
        if weight >= 1.0:
            return 1.0
        if key not in self._kept:
            own = self.snapshots[name].update
            scaled = replace(own, modules={m: u * weight for m, u in own.modules.items()})
            self._kept[key] = min(1.0, self.early_retention(name, scaled))
        return self._kept[key]

    def joint_gradient_cosine(self, a: str, b: str) -> float:
        """Cosine of the sketched full-weight gradients of a and b at θ₀ + U_a + U_b, in [−1, 1]."""
        key = ("joint", *sorted((a, b)))
        if key not in self._rows:
            self.spend(6)
            both = merge([self.snapshots[a].update, self.snapshots[b].update], "sum").adapter
            model, found = self.base.model, []
            modules = {name: model.get_submodule(name) for name in both.modules}
            with measuring(model), attached(model, both.modules):
                for name in (a, b):
                    seen = record(model, modules, self.snapshots[name].batch, moments=False)
                    found.append(_stack(seen.mean_gradient()))
            cosine = nn.functional.cosine_similarity(found[0], found[1], dim=0)
            self._rows[key] = {"cosine": float(cosine)}
        return self._rows[key]["cosine"]


def open_tier(
    base: Base,
    probes: Sequence[Probe],
    *,
    items: int = 16,
    budget: int | None = None,
    progress: Progress = lambda message: None,
) -> ModelTier:
    """Scales every probe's snapshot to its own best length c*. About five forward passes each.

    items: calibration items used of each probe. Raises BaseModelError if a probe belongs to
    another base, NotForecastable (naming it) if one holds no calibration items.
    """
    tier = ModelTier(base, {}, budget)
    for probe in probes:
        theirs = probe.meta.get("base_fingerprint")
        if theirs and theirs != base.fingerprint:
            raise BaseModelError(
                f"probe '{probe.name}' was taken on base {theirs} ({probe.meta.get('base')}), "
                f"but the base given is {base.fingerprint} ({base.name})"
            )
        progress(f"{probe.name}: finding its best length")
        tier.snapshots[probe.name] = _scaled(tier, probe, calibration_batch(probe, items))
    return tier


def calibration_batch(probe: Probe, items: int) -> Batch:
    kept = probe.calibration
    if kept is None or kept.ids.shape[1] == 0:
        raise NotForecastable(
            f"probe '{probe.name}' holds no calibration items (store_text=False, or none were "
            "given), so the model tier cannot run; use the file tier"
        )
    batch = Batch(kept.ids.long(), kept.attention_mask.long(), kept.completion_mask.long())
    return batch.rows(0, min(items, len(batch)))


def _scaled(tier: ModelTier, probe: Probe, batch: Batch) -> Snapshot:
    """Tries c = 1, 2, 4, … and stops after the loss has risen: it is near convex along the ray."""
    adapter = probe.to_adapter()
    model = tier.base.model
    tier.spend()
    base_loss = item_scores(model, batch).loss
    best, best_loss = 1.0, None
    for length in LENGTHS:
        tier.spend()
        with attached(model, {m: u * length for m, u in adapter.modules.items()}):
            loss = item_scores(model, batch).loss
        if best_loss is None or float(loss.mean()) < float(best_loss.mean()):
            best, best_loss = float(length), loss
        else:
            break
    assert best_loss is not None
    scaled = replace(adapter, modules={m: u * best for m, u in adapter.modules.items()})
    return Snapshot(probe.name, scaled, batch, best, reach(probe, best), base_loss, best_loss)


def reach(probe: Probe, length: float) -> float:
    """(T/s)^¼ / c*, at least 1; 1 for a finished adapter or where the plan is unknown."""
    step, planned = probe.meta.get("step"), probe.meta.get("planned_steps")
    if not step or not planned or planned <= step:
        return 1.0
    return max(1.0, (planned / step) ** GROWTH_EXPONENT / length)


def _stack(sketches: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([sketches[name].flatten() for name in sorted(sketches)])
