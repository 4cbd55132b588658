"""Probing one training run: when, what, into which files. For the callback and for own loops."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergeprobe.capture.batch import Batch
from mergeprobe.capture.first_steps import FirstSteps, read_first_steps
from mergeprobe.capture.measure import BaseSide, as_batch, assemble, measure_task
from mergeprobe.capture.model import check_whole, plain
from mergeprobe.capture.points import ProbePoint, probe_points
from mergeprobe.capture.probe import Probe, write_probe
from mergeprobe.capture.processes import ALONE, all_processes
from mergeprobe.capture.recorder import BATCH_SIZE
from mergeprobe.capture.sketch import sketch_update
from mergeprobe.capture.start import StartWeights, read_start, start_weights
from mergeprobe.capture.trained import check_readable, current_update, init_hash
from mergeprobe.errors import ProbeError


class ProbeRecorder:
    """Writes the probes of a training run; for hand-written loops (the callback uses it too).

        recorder = ProbeRecorder(model, "probes/math.safetensors", planned_steps=1000,
                                 calibration=batch, tokenizer=tokenizer)
        for step, batch in enumerate(loader, start=1):
            ...                       # forward, backward, optimizer.step()
            recorder.step(step, loss)

    model: a PEFT model with one adapter of a type that docs/peft-types.md lists, or a model without
    adapters that trains chosen Linear modules; ProbeError by name otherwise, before training
    starts. rank: to which updates are cut (`trained.snapshot` says which are by default).
    fraction, at_step: when, one or several (points.probe_points). calibration: a Batch, or (prompt,
    completion) pairs, of the task itself; at most 32 are used, batch_size at a time.
    store_text=False keeps the token ids of the calibration items out of the file.
    start_step: the step that a resumed run goes on from. distributed=True: every process of
    torch.distributed calls `step`, each measures a share of the items, rank 0 writes.
    Measuring runs in eval mode on the side: weights, gradients, random state and the modules'
    modes are left as they were.
    """

    def __init__(
        self,
        model: Any,
        path: str | Path,
        *,
        planned_steps: int,
        calibration: Batch | Sequence[tuple[str, str]] | None = None,
        tokenizer: Any = None,
        warmup_steps: int = 0,
        fraction: float | Sequence[float] = 0.05,
        at_step: int | Sequence[int] | None = None,
        store_text: bool = True,
        data_tag: str | None = None,
        seed: int | None = None,
        start_step: int = 0,
        batch_size: int = BATCH_SIZE,
        distributed: bool = False,
        rank: int | None = None,
    ) -> None:
        self.model, self.tokenizer = plain(model), tokenizer
        check_whole(self.model)
        check_rank(rank)
        self.rank = rank
        self.points = probe_points(
            path, planned_steps, warmup=warmup_steps, fraction=fraction, at_step=at_step
        )
        self.batch = None if calibration is None else as_batch(calibration, tokenizer)
        self.batch_size, self.store_text = batch_size, store_text
        self.meta = {
            "planned_steps": planned_steps,
            "warmup_steps": warmup_steps,
            "data_tag": data_tag,
            "seed": seed,
        }
        self.losses: list[tuple[int, float]] = []
        self.learning_rates: list[tuple[int, float]] = []
        self.processes = all_processes() if distributed else ALONE
        self.waiting = [point for point in self.points if point.step > start_step]
        self._base: BaseSide | None = None
        self.start = self._begun(start_step)
        check_readable(self.model, self.start)  # refuses here, by name, what cannot be probed
        self._say_lost(start_step)
        self._first = self._begin(start_step)

    @property
    def at(self) -> int:
        """The step of the last probe point."""
        return self.points[-1].step

    @property
    def done(self) -> bool:
        """Whether no probe point lies ahead any more."""
        return not self.waiting

    @property
    def _early_path(self) -> Path:
        path = self.points[-1].path
        return path.with_name(f".{path.name}.early")

    @property
    def _start_path(self) -> Path:
        path = self.points[-1].path
        return path.with_name(f".{path.name}.start")

    def _begun(self, start_step: int) -> StartWeights | None:
        """The weights that full fine-tuning began from; None for a PEFT model, which has them."""
        if hasattr(self.model, "peft_config"):
            return None
        if start_step > 0 and not self.done:
            return read_start(self._start_path, self.model)
        start = start_weights(self.model)
        if not self.done and self.processes.writes:
            start.keep(self._start_path)
        return start

    def _say_lost(self, start_step: int) -> None:
        for point in self.points:
            if point.step <= start_step and not point.path.exists() and self.processes.writes:
                warnings.warn(
                    f"mergeprobe: training goes on from step {start_step}, past the probe point "
                    f"{point.step}, and '{point.path}' does not exist: it will not be written",
                    stacklevel=4,
                )

    def _begin(self, start_step: int) -> FirstSteps:
        if self.done or not self.processes.writes:
            return FirstSteps()
        if start_step > 0:
            return read_first_steps(self._early_path)
        first = FirstSteps(init_hash(self.model, self.start))
        first.keep(self._early_path)
        return first

    def step(
        self, step: int, loss: float | Tensor | None = None, lr: float | None = None
    ) -> Probe | None:
        """Call after every optimizer step (1, 2, …); returns the probe at a probe point."""
        if loss is not None:
            self.losses.append((step, float(loss.detach() if isinstance(loss, Tensor) else loss)))
        if lr is not None:
            self.learning_rates.append((step, float(lr)))
        due = [point for point in self.waiting if point.step == step]
        half = self.processes.writes and any(p.half == step < p.step for p in self.waiting)
        self.waiting = [point for point in self.waiting if point.step > step]
        # the call may stand inside the loop's autocast, which would round what we compute
        with torch.autocast(next(self.model.parameters()).device.type, enabled=False):
            if half:
                self._sketch_halfway(step)
            return self._capture(due) if due else None

    def _sketch_halfway(self, step: int) -> None:
        update = current_update(self.model, rank=self.rank, start=self.start)
        self._first.halfway[step] = {n: sketch_update(n, u) for n, u in update.items()}
        self._first.keep(self._early_path)

    def _capture(self, due: Sequence[ProbePoint]) -> Probe | None:
        """Measures now and writes the files; None on a process that does not write."""
        task = None
        if self.batch is not None:
            task = measure_task(
                self.model,
                self.batch,
                base=self._base,
                processes=self.processes,
                batch_size=self.batch_size,
                start=self.start,
            )
            self._base = task.base
        if not self.processes.writes:
            return None
        point = due[0]
        measured = assemble(
            self.model,
            name=point.path.stem,
            batch=self.batch,
            task=task,
            tokenizer=self.tokenizer,
            halfway=self._first.halfway.get(point.half),
            store_text=self.store_text,
            rank=self.rank,
            start=self.start,
            step=point.step,
            losses=[list(pair) for pair in self.losses],
            lr_curve=[list(pair) for pair in self.learning_rates],
            init_hash=self._first.init_hash,
            halfway_step=point.half if point.half in self._first.halfway else None,
            **self.meta,
        )
        for point in due:
            write_probe(replace(measured, name=point.path.stem), point.path)
        if self.done:
            self._early_path.unlink(missing_ok=True)
            self._start_path.unlink(missing_ok=True)
        return replace(measured, path=due[0].path)


def check_rank(rank: int | None) -> None:
    """Refuses a rank below 1."""
    if rank is not None and rank < 1:
        raise ProbeError(f"rank is {rank}; expected 1 or more, or None for each type's own")
