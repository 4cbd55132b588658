"""The callback of a transformers Trainer that writes probes, and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mergeprobe.capture.batch import Batch
from mergeprobe.capture.items import spread_rows
from mergeprobe.capture.points import check_points
from mergeprobe.capture.probe import Probe
from mergeprobe.capture.recorder import BATCH_SIZE
from mergeprobe.capture.run import ProbeRecorder, check_rank


class ProbeCallback(TrainerCallback):
    """Writes probes of a `transformers.Trainer` or TRL `SFTTrainer` run.

    `mergeprobe.MergeProbeCallback` is this one with a forecast; its docstring explains the options.
    recorder: of the run in progress. probe: what was measured last, on the process that writes.
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
        rank: int | None = None,
    ) -> None:
        check_points(path, fraction=fraction, at_step=at_step)
        check_rank(rank)
        self.path, self.strict = Path(path), strict
        self.options: dict[str, Any] = {"fraction": fraction, "at_step": at_step}
        self.options |= {"store_text": store_text, "data_tag": data_tag, "rank": rank}
        self.calibration, self.tokenizer = calibration, tokenizer
        self.recorder: ProbeRecorder | None = None
        self.probe: Probe | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        items = self.calibration
        if items is None:
            items = spread_rows(kwargs.get("train_dataloader"))
        self.probe = None
        self.recorder = ProbeRecorder(
            kwargs["model"],
            self.path,
            planned_steps=state.max_steps,
            warmup_steps=args.get_warmup_steps(state.max_steps),
            calibration=items,
            tokenizer=self.tokenizer or kwargs.get("processing_class"),
            seed=args.seed,
            start_step=state.global_step,
            # no more at a time than training itself has memory for
            batch_size=max(1, min(BATCH_SIZE, args.per_device_train_batch_size)),
            distributed=args.world_size > 1,
            **self.options,
        )
        if not state.is_world_process_zero:
            return
        if items is None:
            warn(
                "the training set has no random access, so the probe will hold no gradients and "
                "moments; pass calibration=[(prompt, completion), ...]"
            )
        if self.recorder.at > state.max_steps:
            warn(
                f"the run is planned for {state.max_steps} steps and the probe point is step "
                f"{self.recorder.at}, so there will be no probe; at_step= sets another point"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        recorder = self.recorder
        self.probe = None
        if recorder is None or recorder.done:
            return
        if state.global_step == recorder.waiting[0].step:
            logged = [entry for entry in state.log_history if "loss" in entry]
            recorder.losses = [(entry["step"], entry["loss"]) for entry in logged]
            recorder.learning_rates = [
                (entry["step"], entry["learning_rate"])
                for entry in logged
                if "learning_rate" in entry
            ]
        try:
            self.probe = recorder.step(state.global_step)
        except Exception as problem:  # any: hours of training are worth more than a probe
            if self.strict:
                raise
            if state.is_world_process_zero:
                said = f"{type(problem).__name__}: {problem}".splitlines()[0]
                warn(f"no probe at step {state.global_step}, training goes on: {said}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        recorder = self.recorder
        if recorder is not None and not recorder.done and state.is_world_process_zero:
            lacking = ", ".join(f"'{point.path}'" for point in recorder.waiting)
            warn(
                f"training stopped at step {state.global_step}, before the probe point "
                f"{recorder.waiting[0].step}; {lacking} was not written"
            )


def warn(message: str) -> None:
    warnings.warn(f"mergeprobe: {message}", stacklevel=3)
