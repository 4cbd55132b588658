"""The forecast inside a training run: at its probe point, against the probes of other runs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from mergeprobe.adapters.weights import BaseWeights
from mergeprobe.capture import Probe, ProbeCallback, ProbeRecorder
from mergeprobe.capture.batch import Batch
from mergeprobe.capture.model import as_base, measuring, plain
from mergeprobe.capture.probe import read_source
from mergeprobe.capture.processes import all_processes, any_of
from mergeprobe.capture.start import StartWeights
from mergeprobe.errors import MergeProbeError, ProbeError
from mergeprobe.live.forecast import LiveForecast, forecast_run
from mergeprobe.live.others import Source, comparable, read_against
from mergeprobe.live.trainer_log import log

if TYPE_CHECKING:  # only a run with against= loads the forecaster
    from mergeprobe.predict.early import ModelTier


class MergeProbeCallback(TrainerCallback):
    """Writes a probe of a `transformers.Trainer` or TRL `SFTTrainer` run, and may forecast.

    path: the probe file; with several probe points it holds "{point}". fraction: of the planned
    steps, one or several (default 5 %, but never before step 8 nor within 3 steps of the warm-up);
    at_step sets the step itself, one or several. calibration: (prompt, completion) pairs, a Batch,
    or None for 32 rows spread over the training set. tokenizer: by default the trainer's.
    store_text=False keeps the calibration's token ids out of the file. rank: to which every update
    is cut; by default LoRA, AdaLoRA and VeRA are kept whole and others cut to 32. A probe that
    cannot be taken warns, and training goes on; strict=True lets it end the run.

    against: probe files, PEFT folders, folders of either, or Probes of other runs on the same
    base. Every probe of this run is then forecast against them: `mergeprobe/forecast/<other>` (the
    lower retention of the two when merged), `mergeprobe/worst` and `mergeprobe/action` go through
    `Trainer.log`, one paragraph of advice is printed. An other that cannot be read or compared, or
    gained nothing, is left out by name. stop_below: the run ends there where worst is below it
    (what was left out has no say). min_retention: the floor of the plan behind the advice.
    predictor: a folder that `mergeprobe fit` wrote, by default the one that comes with mergeprobe;
    "none" leaves the forecast to the surrogate and the early merge. budget: forward passes over 16
    items that the forecast may make with the base model (the model tier); 0 makes none.

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
        rank: int | None = None,
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
            rank=rank,
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
        assert probe.path is not None
        probe = read_source(probe.path)  # as stored, so that `mergeprobe forecast` agrees
        others, left_out = self._others(probe, kwargs["model"])
        if not others and left_out:
            raise next(iter(left_out.values()))
        if not others:
            _warn(f"no other probe in {[str(s) for s in self.against]} yet, so no forecast")
            return False
        tokenizer = self.capture.tokenizer or kwargs.get("processing_class")
        found = self._ask(probe, others, kwargs["model"], tokenizer)
        reasons = {name: str(why) for name, why in left_out.items()}
        self.forecast = replace(found, left_out=reasons | found.left_out)
        log(state, control, self.forecast.scalars())
        stop = self.stop_below is not None and self.forecast.worst < self.stop_below
        said = self.forecast.advice()
        if stop:
            worst = f"{self.forecast.worst:.2f}"
            said += f" The lowest, {worst}, is below {self.stop_below:g}: training stops here."
        print(said, flush=True)
        return stop

    def _others(self, probe: Probe, model: Any) -> tuple[list[Probe], dict[str, MergeProbeError]]:
        """The others as of now, and why for those that cannot be used."""
        assert self.recorder is not None
        mine = [point.path for point in self.recorder.points]
        with base_weights(model, self.recorder.start) as base:
            found, unreadable = read_against(self.against, leave_out=mine, base=base)
        kept, odd = comparable(probe, found, items=bool(self.budget))
        return kept, unreadable | odd

    def _ask(self, probe: Probe, others: list[Probe], model: Any, tokenizer: Any) -> LiveForecast:
        options: dict[str, Any] = {
            "min_retention": self.min_retention,
            "predictor": self.predictor,
        }
        if not self.budget:
            return forecast_run(probe, others, **options)
        assert self.recorder is not None
        start, probes = self.recorder.start, [probe, *others]
        with _tier_in(model, start, tokenizer, probes, self.budget) as tier:
            return forecast_run(probe, others, model=tier, **options)


@contextmanager
def _tier_in(
    model: Any, start: StartWeights | None, tokenizer: Any, probes: list[Probe], budget: int
) -> Iterator[ModelTier]:
    """The model tier on the model in training: it is the base and nothing learns meanwhile."""
    from mergeprobe.adapters.base import Base
    from mergeprobe.predict.early import open_tier

    model = plain(model)
    inner = model.get_base_model() if start is None else model
    with measuring(model), as_base(model, start):
        meta = probes[0].meta
        base = Base(meta["base"], inner, tokenizer, meta["base_fingerprint"])
        yield open_tier(base, probes, budget=budget)


@contextmanager
def base_weights(model: Any, start: StartWeights | None) -> Iterator[BaseWeights]:
    """The base's weights in the model in training, for folders whose update depends on them."""
    model = plain(model)
    with nullcontext() if start is None else start.in_place(model):
        yield BaseWeights.of(model)


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
    folders = [] if predictor is None or str(predictor) == "none" else [predictor]
    for source in [*against, *folders]:
        if not isinstance(source, Probe) and not Path(source).exists():
            raise MergeProbeError(
                f"'{source}' does not exist; expected a probe, a PEFT folder or a folder of either"
            )


def _warn(message: str) -> None:
    warnings.warn(f"mergeprobe: {message}", stacklevel=3)
