"""What is known at the probe point of a run about merging it with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mergeprobe.capture import Probe
from mergeprobe.errors import NotForecastable, ProbeError
from mergeprobe.plan import Action, Forecast, Group

if TYPE_CHECKING:  # only a run with against= loads the forecaster
    from mergeprobe.predict.early import ModelTier
    from mergeprobe.predict.planning import Forecasts
    from mergeprobe.predict.predictor import Predictor

SHOWN = 3


@dataclass(frozen=True)
class PairForecast:
    """This run and one other, merged by `method`: what each is forecast to keep of its gain."""

    other: str
    method: str
    own: Forecast
    theirs: Forecast

    @property
    def worst(self) -> float:
        return min(self.own.retention, self.theirs.retention)


@dataclass(frozen=True)
class LiveForecast:
    """What is known at the probe point of a run about merging it.

    pairs: by worst, lowest first; of every pair the rule whose worst is highest.
    group: what the plan over all of them does with this run's adapter. left_out: other -> why
    nothing is forecast about it; it takes part in neither pairs nor plan.
    """

    name: str
    step: int | None
    planned_steps: int | None
    tier: str
    calibrated: bool
    pairs: tuple[PairForecast, ...]
    group: Group
    min_retention: float
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The lowest retention that any pair forecasts, of this run or of the other."""
        return self.pairs[0].worst

    def scalars(self) -> dict[str, float]:
        """What is logged. An action is logged as its place in `Action`: 0 merge, 1 reweight,
        2 prune, 3 isolate, 4 logits, 5 route; boards draw numbers only."""
        found = {f"mergeprobe/forecast/{pair.other}": pair.worst for pair in self.pairs}
        action = float(list(Action).index(self.group.action))
        return {**found, "mergeprobe/worst": self.worst, "mergeprobe/action": action}

    def advice(self) -> str:
        """One paragraph for a person."""
        from mergeprobe.predict.reasons import done, spread

        trust = "calibrated" if self.calibrated else "uncalibrated, read intervals as rough"
        lines = [
            f"mergeprobe at step {self.step} of {self.planned_steps} ({self.tier} tier, {trust}):"
        ]
        for pair in self.pairs[:SHOWN]:
            lines.append(
                f"merged with '{pair.other}' by {pair.method}, '{self.name}' is forecast to keep "
                f"{spread(pair.own)} of its gain and '{pair.other}' {spread(pair.theirs)};"
            )
        if len(self.pairs) > SHOWN:
            lines.append(f"{len(self.pairs) - SHOWN} others fare better;")
        others = [f"'{name}'" for name in self.group.adapters if name != self.name]
        if others:
            lines.append(
                f"advice: share one adapter with {', '.join(others)}, {done(self.group)}, which "
                f"keeps {self.min_retention:g} or comes nearest to it."
            )
        else:
            lines.append(
                f"advice: keep '{self.name}' apart and route to it; no merge is forecast to "
                f"keep {self.min_retention:g} for all at a lower cost."
            )
        lines += [f"Left out: '{name}' ({why})." for name, why in self.left_out.items()]
        return " ".join(lines)


def forecast_run(
    probe: Probe,
    against: Sequence[Probe],
    *,
    min_retention: float = 0.9,
    predictor: Predictor | str | Path | None = None,
    model: ModelTier | None = None,
) -> LiveForecast:
    """Forecasts one run against others; for hand-written loops, with what `recorder.step` returned.

    predictor: fitted with `mergeprobe fit` (or its folder), by default the one that comes with
    mergeprobe; "none" for no predictor. model: the model tier over all of the probes.
    An other whose pair cannot be forecast (it gained nothing, say) is left out by name.
    Raises AdapterMismatch for another base, ProbeError where two have one name, NotForecastable
    with the first reason where no other is left.
    """
    from mergeprobe.predict.forecast import forecast_probes

    for other in against:
        if other.name == probe.name:
            raise ProbeError(
                f"'{probe.name}' is the name of this run and of '{other.path or other.name}'; "
                "rename one, or leave it out of against="
            )
    left_out: dict[str, str] = {}
    while True:
        others = [other for other in against if other.name not in left_out]
        if left_out and not others:
            raise NotForecastable(next(iter(left_out.values())))
        forecaster = forecast_probes(
            [probe, *others],
            model=model,
            predictor=predictor,
            floor=min_retention,
            all_pairs=True,
        )
        pairs, failed = _pairs(forecaster, probe.name, [other.name for other in others])
        left_out |= failed
        if not failed:
            break  # a plan over all of them would fail with one that did
    plan = forecaster.plan(min_retention=min_retention)
    return LiveForecast(
        name=probe.name,
        step=probe.meta.get("step"),
        planned_steps=probe.meta.get("planned_steps"),
        tier=forecaster.tier,
        calibrated=plan.calibrated,
        pairs=tuple(sorted(pairs, key=lambda pair: pair.worst)),
        group=plan.group_of(probe.name),
        min_retention=min_retention,
        left_out=left_out,
    )


def _pairs(
    forecaster: Forecasts, mine: str, others: Sequence[str]
) -> tuple[list[PairForecast], dict[str, str]]:
    """Each pair under its better rule, and why for those that cannot be forecast."""
    pairs, failed = [], {}
    for other in others:
        group = (mine, other)
        try:
            found = [
                PairForecast(
                    other, method, *(forecaster.forecast(name, group, method) for name in group)
                )
                for method in forecaster.methods(group)
            ]
        except NotForecastable as problem:
            failed[other] = str(problem)
        else:
            pairs.append(max(found, key=lambda pair: pair.worst))
    return pairs, failed
