"""What could be done with a group of adapters, each possibility with its forecast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from mergeprobe.adapters.checkpoint import Adapter
from mergeprobe.compose import prune
from mergeprobe.compose.logits import MODES, Composition, Mode
from mergeprobe.errors import NotForecastable
from mergeprobe.plan import Action, Forecast, Group
from mergeprobe.predict import surrogate
from mergeprobe.predict.blend import around, clip
from mergeprobe.predict.pruning import harmful
from mergeprobe.predict.trimming import cuts

if TYPE_CHECKING:
    from mergeprobe.predict.forecaster import Forecaster

LOGITS_SPREAD = 0.15
KEPT = Forecast(retention=1.0, low=1.0, high=1.0)
# reweighting and pruning are tried on up to three adapters whose plain merge is this near the floor
RESCUED, RESCUE_MARGIN = 3, 0.15


def candidates(forecaster: Forecaster, names: tuple[str, ...]) -> list[Group]:
    """What could be done with a group: kept as it is or cut (one adapter), merged, reweighted."""
    common = {
        "name": names[0],
        "adapters": names,
        "resident_parameters": forecaster.parameters(names),
    }
    if len(names) == 1:
        whole = Group(action=Action.route, forecast={names[0]: KEPT}, **common)
        # ranks decide between merging and routing only where parameters alone are counted
        return [whole, *cuts(forecaster, whole)] if forecaster.by_rank else [whole]
    found = []
    for method in forecaster.methods(names):
        forecast = {name: forecaster.forecast(name, names, method) for name in names}
        found.append(
            Group(
                action=Action.merge,
                method=method,
                rank=forecaster.rank(names),
                forecast=forecast,
                **common,
            )
        )
    if _asked_together(forecaster, names):
        found += _composed(forecaster, names, common)
    measurable = forecaster.model is not None and len(names) <= RESCUED
    if measurable and _near_miss(found, forecaster.floor):
        found += [*_reweighted(forecaster, names, common), *_pruned(forecaster, names, common)]
    return found


def _asked_together(forecaster: Forecaster, names: tuple[str, ...]) -> bool:
    """Whether the group is one that an answer needs, or several of those that overlap."""
    inside = [asked for asked in forecaster.together if set(asked) <= set(names)]
    return {name for asked in inside for name in asked} == set(names)


def _composed(
    forecaster: Forecaster, names: tuple[str, ...], common: dict[str, Any]
) -> list[Group]:
    """Their logits composed, for adapters that one answer needs: every adapter stays resident."""
    if forecaster.model is None:
        return []
    whole = sum(forecaster.parameters([name]) for name in names)
    groups = []
    for mode in MODES:
        share = 1.0 if mode == "sum" else 1 / len(names)
        how = Composition((share,) * len(names), cast(Mode, mode))
        try:
            kept = {n: clip(forecaster.model.early_logits(n, names, how)) for n in names}
        except NotForecastable:  # the budget is spent
            break
        groups.append(
            Group(
                action=Action.logits,
                method=mode,
                weights=dict.fromkeys(names, share),
                forecast={name: _as_measured(value) for name, value in kept.items()},
                reasons=(f"every token takes a forward pass of {len(names) + 1} rows",),
                **{**common, "resident_parameters": whole},
            )
        )
    return groups


def _as_measured(kept: float) -> Forecast:
    """The snapshots' own retention; LOGITS_SPREAD either way, uncalibrated."""
    low, high = clip(kept - LOGITS_SPREAD), clip(kept + LOGITS_SPREAD)
    return Forecast(retention=kept, low=low, high=high)


def _near_miss(merges: Sequence[Group], floor: float) -> bool:
    """Whether the better plain merge falls short of the floor, but not by much."""
    best = max(min(f.retention for f in group.forecast.values()) for group in merges)
    return floor - RESCUE_MARGIN <= best < floor


def _reweighted(
    forecaster: Forecaster, names: tuple[str, ...], common: dict[str, Any]
) -> list[Group]:
    """Linear merges with other weights: the surrogate's own, and for a pair two tilts."""
    assert forecaster.model is not None
    tried: list[dict[str, float]] = []
    if forecaster.quadratic is not None:
        found = surrogate.reweight(forecaster.quadratic, names, "worst", forecaster.lengths)
        tried.append({name: round(weight, 3) for name, weight in found.items()})
    if len(names) == 2:
        tried += [dict(zip(names, tilt, strict=True)) for tilt in ((0.35, 0.65), (0.65, 0.35))]
    groups = []
    for weights in tried:
        if min(weights.values()) < 0.05:
            continue  # that would be one adapter with another's name
        try:
            forecast = {name: _changed(forecaster, name, names, weights) for name in names}
        except NotForecastable:  # the budget is spent
            break
        groups.append(
            Group(
                action=Action.reweight,
                method="linear",
                weights=weights,
                rank=forecaster.rank(names),
                forecast=forecast,
                **common,
            )
        )
    return groups


def _pruned(forecaster: Forecaster, names: tuple[str, ...], common: dict[str, Any]) -> list[Group]:
    """The mean without the modules or components that harm others more than they help their own."""
    assert forecaster.model is not None
    mine = {probe.name: probe for probe in forecaster.probes if probe.name in names}
    pruned, replaced = {}, {}
    for name in names:
        dropped = harmful(mine[name], [mine[other] for other in names if other != name])
        if dropped.modules or dropped.components:
            pruned[name] = dropped
            replaced[name] = prune(forecaster.model.snapshots[name].update, dropped)
    if not pruned:
        return []
    weights = dict.fromkeys(names, 1.0 / len(names))
    try:
        forecast = {name: _changed(forecaster, name, names, weights, replaced) for name in names}
    except NotForecastable:
        return []
    return [
        Group(
            action=Action.prune,
            method="mean",
            pruned=pruned,
            rank=forecaster.rank(names),
            forecast=forecast,
            **common,
        )
    ]


def _changed(
    forecaster: Forecaster,
    name: str,
    names: tuple[str, ...],
    weights: Mapping[str, float],
    replaced: Mapping[str, Adapter] | None = None,
) -> Forecast:
    """The mean's forecast, moved by half of what the change does to the extrapolated merge
    (the share that the extrapolated merge has in a forecast)."""
    assert forecaster.model is not None
    plain = forecaster.forecast(name, names, "mean")
    uniform = dict.fromkeys(names, 1.0 / len(names))
    before = clip(forecaster.model.extrapolated_merge(name, uniform))
    after = clip(forecaster.model.extrapolated_merge(name, weights, replaced=replaced))
    return around(plain.retention + (after - before) / 2, plain, 0.0)
