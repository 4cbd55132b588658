"""One line in a training script: `callbacks=[MergeProbeCallback("probes/math.safetensors")]`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from mergeprobe.capture.batch import Batch, from_features
from mergeprobe.capture.run import CALIBRATION_ITEMS, ProbeRecorder
from mergeprobe.errors import ProbeError


class MergeProbeCallback(TrainerCallback):
    """Writes a probe of a `transformers.Trainer` or TRL `SFTTrainer` run; nothing else.

    path: the probe file. fraction: of the planned steps (default 5 %, but never before step 8 nor
    within 3 steps of the warm-up); at_step sets the step itself. calibration: (prompt, completion)
    pairs, a Batch, or None for 32 rows spread over the training set. tokenizer: by default the
    trainer's. store_text=False keeps the calibration's token ids out of the file.
    Training itself is not changed: the same seed gives the same weights with and without.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fraction: float = 0.05,
        at_step: int | None = None,
        calibration: Batch | Sequence[tuple[str, str]] | None = None,
        tokenizer: Any = None,
        store_text: bool = True,
        data_tag: str | None = None,
    ) -> None:
        if not 0.0 < fraction <= 1.0:
            raise ProbeError(f"fraction is {fraction}; expected a share of training in (0, 1]")
        self.path = Path(path)
        self.options = {"fraction": fraction, "at_step": at_step, "store_text": store_text}
        self.options["data_tag"] = data_tag
        self.calibration, self.tokenizer = calibration, tokenizer
        self.recorder: ProbeRecorder | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, tokenizer = kwargs["model"], self.tokenizer or kwargs.get("processing_class")
        items = self.calibration
        if items is None:
            items = spread_rows(kwargs.get("train_dataloader"))
        if items is None:
            warnings.warn(
                "mergeprobe: the training set has no random access, so the probe will hold no "
                "gradients and moments; pass calibration=[(prompt, completion), ...]",
                stacklevel=2,
            )
        self.recorder = ProbeRecorder(
            model,
            self.path,
            planned_steps=state.max_steps,
            warmup_steps=args.get_warmup_steps(state.max_steps),
            calibration=items,
            tokenizer=tokenizer,
            seed=args.seed,
            resumed=state.global_step > 0,
            **self.options,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        recorder = self.recorder
        if recorder is None or not state.is_world_process_zero:
            return
        if state.global_step == recorder.at:
            logged = [entry for entry in state.log_history if "loss" in entry]
            recorder.losses = [(entry["step"], entry["loss"]) for entry in logged]
            recorder.learning_rates = [
                (entry["step"], entry["learning_rate"])
                for entry in logged
                if "learning_rate" in entry
            ]
        recorder.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        recorder = self.recorder
        if recorder is not None and not recorder.done and state.global_step < recorder.at:
            warnings.warn(
                f"mergeprobe: training stopped at step {state.global_step}, before the probe point "
                f"{recorder.at}; '{self.path}' was not written",
                stacklevel=2,
            )


def spread_rows(loader: Any) -> Batch | None:
    """32 rows spread evenly over a loader's dataset, collated as in training; draws nothing."""
    dataset = getattr(loader, "dataset", None)
    if dataset is None or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return None
    count = min(CALIBRATION_ITEMS, len(dataset))
    with torch.random.fork_rng(devices=[]):
        rows = [dataset[index * len(dataset) // count] for index in range(count)]
        return from_features(loader.collate_fn(rows))
