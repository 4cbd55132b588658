"""The forecast inside a training run: at its probe point, against the probes of other runs."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback

from mergeprobe.adapters.sources import expand, is_adapter
from mergeprobe.capture import Probe, ProbeCallback, ProbeRecorder
from mergeprobe.capture.batch import Batch
from mergeprobe.capture.model import as_base, measuring, plain
from mergeprobe.capture.probe import read_source
from mergeprobe.capture.processes import all_processes, any_of
from mergeprobe.errors import MergeProbeError, ProbeError
from mergeprobe.plan import Action, Forecast, Group

if TYPE_CHECKING:  # only a run with against= loads the forecaster
    from mergeprobe.predict.early import ModelTier
    from mergeprobe.predict.predictor import Predictor

Source = str | Path | Probe
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

    pairs: by worst, lowest first; of every pair the rule (mean or sum) whose worst is higher.
    group: what the plan over all of them does with this run's adapter.
    """

    name: str
    step: int | None
    planned_steps: int | None
    tier: str
    calibrated: bool
    pairs: tuple[PairForecast, ...]
    group: Group
    min_retention: float

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
        return " ".join(lines)


def forecast_run(
    probe: Probe,
    against: Sequence[Probe],
    *,
    min_retention: float = 0.9,
    predictor: Predictor | None = None,
    model: ModelTier | None = None,
) -> LiveForecast:
    """Forecasts one run against others; for hand-written loops, with what `recorder.step` returned.

    predictor: fitted with `mergeprobe fit`. model: the model tier over all of the probes.
    Raises AdapterMismatch for another base, ProbeError where two have one name.
    """
    from mergeprobe.predict.candidates import METHODS
    from mergeprobe.predict.forecast import forecast_probes

    for other in against:
        if other.name == probe.name:
            raise ProbeError(
                f"'{probe.name}' is the name of this run and of '{other.path or other.name}'; "
                "rename one, or leave it out of against="
            )
    forecaster = forecast_probes(
        [probe, *against], model=model, predictor=predictor, floor=min_retention
    )
    pairs = []
    for other in against:
        group = (probe.name, other.name)
        found = [
            PairForecast(
                other.name, method, *(forecaster.forecast(name, group, method) for name in group)
            )
            for method in METHODS
        ]
        pairs.append(max(found, key=lambda pair: pair.worst))
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
    )


def read_against(sources: Sequence[Source], *, leave_out: Sequence[Path] = ()) -> list[Probe]:
    """Probes as they are; files, PEFT folders and folders of either as of now.

    leave_out: files that are this run's own. A folder without anything in it is no error: other
    runs may get there later.
    """
    own = {path.resolve() for path in leave_out}
    found = []
    for source in sources:
        if isinstance(source, Probe):
            found.append(source)
            continue
        path = Path(source)
        if path.is_dir() and not is_adapter(path) and not _filled(path):
            continue
        found += [read_source(p) for p in expand([path]) if p.resolve() not in own]
    return found


def _filled(folder: Path) -> bool:
    return any(
        is_adapter(child) or (child.suffix == ".safetensors" and not child.name.startswith("."))
        for child in folder.iterdir()
    )


class MergeProbeCallback(TrainerCallback):
    """Writes a probe of a `transformers.Trainer` or TRL `SFTTrainer` run, and may forecast.

    path: the probe file; with several probe points it holds "{point}". fraction: of the planned
    steps, one or several (default 5 %, but never before step 8 nor within 3 steps of the warm-up);
    at_step sets the step itself, one or several. calibration: (prompt, completion) pairs, a Batch,
    or None for 32 rows spread over the training set. tokenizer: by default the trainer's.
    store_text=False keeps the calibration's token ids out of the file. A probe that cannot be
    taken warns, and training goes on; strict=True lets it end the run.

    against: probe files, PEFT folders, folders of either, or Probes of other runs on the same
    base. Every probe of this run is then forecast against them: `mergeprobe/forecast/<other>` (the
    lower retention of the two when merged), `mergeprobe/worst` and `mergeprobe/action` go through
    `Trainer.log`, one paragraph of advice is printed. stop_below: the run ends there where worst
    is below it. min_retention: the floor of the plan behind the advice. predictor: a folder that
    `mergeprobe fit` wrote. budget: forward passes over 16 items that the forecast may make with
    the base model (the model tier); 0 makes none.

    Training itself is not changed: the same seed gives the same weights with and without.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fraction: float | Sequence[float] = 0.05,
        at_step: int | Sequence[int] | None = None,
        calibration: Batch | Sequence[tuple[str, str]] | None = None,
        tokenizer: Any = None,
        store_text: bool = True,
        data_tag: str | None = None,
        strict: bool = False,
        against: Source | Sequence[Source] = (),
        stop_below: float | None = None,
        min_retention: float = 0.9,
        predictor: str | Path | None = None,
        budget: int = 0,
    ) -> None:
        self.capture = ProbeCallback(
            path,
            fraction=fraction,
            at_step=at_step,
            calibration=calibration,
            tokenizer=tokenizer,
            store_text=store_text,
            data_tag=data_tag,
            strict=strict,
        )
        one = isinstance(against, str | Path | Probe)
        self.against: list[Source] = [against] if one else list(against)  # type: ignore[list-item]
        self.stop_below, self.min_retention = stop_below, min_retention
        self.predictor, self.budget = predictor, budget
        self.forecast: LiveForecast | None = None
        _check(self.against, stop_below, predictor, budget)

    @property
    def recorder(self) -> ProbeRecorder | None:
        return self.capture.recorder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.forecast = None
        self.capture.on_train_begin(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.capture.on_train_end(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        recorder = self.capture.recorder
        due = recorder is not None and any(p.step == state.global_step for p in recorder.waiting)
        self.capture.on_step_end(args, state, control, **kwargs)
        if not due or not self.against:
            return
        stop = False
        if self.capture.probe is not None:
            try:
                stop = self._say(self.capture.probe, state, control, kwargs)
            except Exception as problem:  # any: hours of training are worth more than a forecast
                if self.capture.strict:
                    raise
                said = f"{type(problem).__name__}: {problem}".splitlines()[0]
                _warn(f"no forecast at step {state.global_step}, training goes on: {said}")
        if self.stop_below is not None and args.world_size > 1:
            stop = any_of(all_processes(), stop, args.device)
        if stop:
            control.should_training_stop = True

    def _say(self, probe: Probe, state: Any, control: Any, kwargs: dict[str, Any]) -> bool:
        """Forecasts, logs and prints; True where the run is to stop."""
        assert self.recorder is not None
        mine = [point.path for point in self.recorder.points]
        others = read_against(self.against, leave_out=mine)
        if not others:
            _warn(f"no other probe in {[str(s) for s in self.against]} yet, so no forecast")
            return False
        tokenizer = self.capture.tokenizer or kwargs.get("processing_class")
        assert probe.path is not None
        probe = read_source(probe.path)  # as stored, so that `mergeprobe forecast` agrees
        self.forecast = self._ask(probe, others, kwargs["model"], tokenizer)
        log(state, control, self.forecast.scalars())
        stop = self.stop_below is not None and self.forecast.worst < self.stop_below
        said = self.forecast.advice()
        if stop:
            worst = f"{self.forecast.worst:.2f}"
            said += f" The lowest, {worst}, is below {self.stop_below:g}: training stops here."
        print(said, flush=True)
        return stop

    def _ask(self, probe: Probe, others: list[Probe], model: Any, tokenizer: Any) -> LiveForecast:
        from mergeprobe.predict.predictor import load_predictor

        options: dict[str, Any] = {"min_retention": self.min_retention}
        if self.predictor is not None:
            options["predictor"] = load_predictor(self.predictor)
        if not self.budget:
            return forecast_run(probe, others, **options)
        with _tier_in(model, tokenizer, [probe, *others], self.budget) as tier:
            return forecast_run(probe, others, model=tier, **options)


@contextmanager
def _tier_in(model: Any, tokenizer: Any, probes: list[Probe], budget: int) -> Iterator[ModelTier]:
    """The model tier on the model in training: its adapter is off and nothing learns meanwhile."""
    from mergeprobe.adapters.base import Base
    from mergeprobe.predict.early import open_tier

    model = plain(model)
    with measuring(model), as_base(model):
        meta = probes[0].meta
        base = Base(meta["base"], model.get_base_model(), tokenizer, meta["base_fingerprint"])
        yield open_tier(base, probes, budget=budget)


def log(state: Any, control: Any, scalars: dict[str, float]) -> None:
    """Logs through the trainer that is calling us.

    A callback is not told its trainer, so it is looked up among the callers. Trainer.log itself is
    called, not a subclass's: TRL's would add and reset the averages that belong to the step's own
    entry. Whether that entry is still to come is left as it was. Without a trainer (a loop that
    calls callbacks itself) the scalars go to the state's history.
    """
    trainer = _calling_trainer(state)
    if trainer is None:
        state.log_history.append({**scalars, "step": state.global_step})
        return
    to_come = control.should_log
    Trainer.log(trainer, dict(scalars))
    control.should_log = to_come


def _calling_trainer(state: Any) -> Trainer | None:
    frame = sys._getframe()
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer) and candidate.state is state:
            return candidate
        frame = frame.f_back
    return None


def _check(
    against: Sequence[Source],
    stop_below: float | None,
    predictor: str | Path | None,
    budget: int,
) -> None:
    """What can be known to be wrong before hours of training."""
    wants = stop_below is not None or predictor is not None or budget
    if wants and not against:
        raise ProbeError(
            "stop_below, predictor and budget belong to a forecast; name other probes with against="
        )
    if stop_below is not None and not math.isfinite(stop_below):
        raise ProbeError(f"stop_below is {stop_below}; expected a retention, such as 0.3")
    if budget < 0:
        raise ProbeError(f"budget is {budget}; expected a number of forward passes, 0 for none")
    for source in [*against, *([] if predictor is None else [predictor])]:
        if not isinstance(source, Probe) and not Path(source).exists():
            raise MergeProbeError(
                f"'{source}' does not exist; expected a probe, a PEFT folder or a folder of either"
            )


def _warn(message: str) -> None:
    warnings.warn(f"mergeprobe: {message}", stacklevel=3)
