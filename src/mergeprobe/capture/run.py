"""Measuring one run: when, what, into which file. The callback and hand-written loops use it."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from mergeprobe.adapters.base import fingerprint
from mergeprobe.artefact import atomic_file
from mergeprobe.capture.batch import Batch, encode, item_scores
from mergeprobe.capture.drift import measure_drift
from mergeprobe.capture.model import (
    active_adapter,
    adapted_modules,
    current_update,
    init_hash,
    measuring,
    weight_norms,
)
from mergeprobe.capture.probe import Calibration, Probe, provenance, write_probe
from mergeprobe.capture.recorder import record
from mergeprobe.capture.sketch import sketch_update
from mergeprobe.errors import ProbeError
from mergeprobe.version import __version__

CALIBRATION_ITEMS = 32
EARLIEST_STEP = 8
AFTER_WARMUP = 3


def probe_step(planned: int, warmup: int = 0, fraction: float = 0.05) -> int:
    """The optimizer step to probe at: max(fraction of the plan, 8, 3 after warm-up)."""
    return max(math.ceil(fraction * planned), EARLIEST_STEP, warmup + AFTER_WARMUP)


class ProbeRecorder:
    """Writes a probe of a training run; for hand-written loops (the callback uses it too).

        recorder = ProbeRecorder(model, "probes/math.safetensors", planned_steps=1000,
                                 calibration=batch, tokenizer=tokenizer)
        for step, batch in enumerate(loader, start=1):
            ...                       # forward, backward, optimizer.step()
            recorder.step(step, loss)

    model: a PEFT model with one plain LoRA; ProbeError by name otherwise, before training starts.
    calibration: a Batch, or (prompt, completion) pairs, of the task itself; at most 32 are used.
    store_text=False keeps the token ids of the calibration items out of the file.
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
        fraction: float = 0.05,
        at_step: int | None = None,
        store_text: bool = True,
        data_tag: str | None = None,
        seed: int | None = None,
        resumed: bool = False,
    ) -> None:
        adapted_modules(model)  # refuses here, by name, what cannot be probed
        self.model, self.path, self.tokenizer = model, Path(path), tokenizer
        self.planned_steps, self.warmup_steps = planned_steps, warmup_steps
        self.at = at_step or probe_step(planned_steps, warmup_steps, fraction)
        self.half = max(1, self.at // 2)
        self.calibration = calibration
        self.store_text, self.data_tag, self.seed = store_text, data_tag, seed
        self.losses: list[tuple[int, float]] = []
        self.learning_rates: list[tuple[int, float]] = []
        self.done = False
        self._early: dict[str, Any] = {"init_hash": None, "halfway_step": None}
        self._halfway: dict[str, torch.Tensor] = {}
        if resumed:
            self._restore_early()
        else:
            self._early["init_hash"] = init_hash(model)
            self._keep_early()

    @property
    def _early_path(self) -> Path:
        return self.path.with_name(f".{self.path.name}.early")

    def _keep_early(self) -> None:
        """What only the first steps can tell is kept beside the probe, for a resumed run."""
        tensors = self._halfway or {"": torch.zeros(1)}
        with atomic_file(self._early_path) as temporary:
            save_file(tensors, temporary, metadata={"early": json.dumps(self._early)})

    def _restore_early(self) -> None:
        if not self._early_path.exists():
            return
        with safe_open(str(self._early_path), framework="pt") as file:
            self._early = json.loads(file.metadata()["early"])
            self._halfway = {key: file.get_tensor(key) for key in file.keys() if key}

    def step(self, step: int, loss: float | None = None, lr: float | None = None) -> Probe | None:
        """Call after every optimizer step (1, 2, …); returns the probe at the probe point."""
        if loss is not None:
            self.losses.append((step, float(loss)))
        if lr is not None:
            self.learning_rates.append((step, float(lr)))
        if step == self.half and self.half < self.at:
            self._halfway = {n: sketch_update(n, u) for n, u in current_update(self.model).items()}
            self._early["halfway_step"] = step
            self._keep_early()
        if step == self.at and not self.done:
            return self.capture(step)
        return None

    def capture(self, step: int) -> Probe:
        """Measures now and writes the file."""
        probe = take_probe(
            self.model,
            name=self.path.stem,
            calibration=self.calibration,
            tokenizer=self.tokenizer,
            halfway=self._halfway,
            store_text=self.store_text,
            step=step,
            planned_steps=self.planned_steps,
            warmup_steps=self.warmup_steps,
            losses=[list(pair) for pair in self.losses],
            lr_curve=[list(pair) for pair in self.learning_rates],
            data_tag=self.data_tag,
            seed=self.seed,
            **self._early,
        )
        write_probe(probe, self.path)
        self._early_path.unlink(missing_ok=True)
        self.done = True
        return probe


def take_probe(
    model: Any,
    *,
    name: str,
    calibration: Batch | Sequence[tuple[str, str]] | None = None,
    tokenizer: Any = None,
    halfway: dict[str, torch.Tensor] | None = None,
    store_text: bool = True,
    **meta: Any,
) -> Probe:
    """Measures a PEFT model as it is now. `meta` goes into the provenance."""
    modules = adapted_modules(model)
    updates = current_update(model)
    config = model.peft_config[active_adapter(model)]
    base_print = fingerprint(model)
    parts: dict[str, Any] = {}
    with measuring(model):
        if calibration is not None:
            parts |= _measure_task(model, modules, as_batch(calibration, tokenizer), store_text)
        if tokenizer is not None:
            parts["drift"] = measure_drift(
                model, tokenizer, base=model.disable_adapter(), fingerprint=base_print
            )
    return Probe(
        name=name,
        updates=updates,
        halfway=halfway or {},
        weight_norms=weight_norms(model),
        meta=provenance(
            base=config.base_model_name_or_path or "",
            fingerprint=base_print,
            variant=_variant(config),
            ranks=sorted({update.r for update in updates.values()}),
            versions=_versions(),
            model_type=getattr(model.config, "model_type", None),
            layers=getattr(model.config, "num_hidden_layers", None),
            **meta,
        ),
        **parts,
    )


def as_batch(items: Batch | Sequence[tuple[str, str]], tokenizer: Any) -> Batch:
    if not isinstance(items, Batch):
        if tokenizer is None:
            raise ProbeError("calibration items are texts, so a tokenizer is needed to read them")
        items = encode(tokenizer, items)
    return items.rows(0, CALIBRATION_ITEMS) if len(items) > CALIBRATION_ITEMS else items


def _measure_task(
    model: Any, modules: dict[str, Any], batch: Batch, store_text: bool
) -> dict[str, Any]:
    here = record(model, modules, batch)
    with model.disable_adapter():
        base = record(model, modules, batch, moments=False)
        base_loss = item_scores(model, batch).loss
    ids = batch.ids if store_text else batch.ids[:, :0]
    return {
        "gradient": here.mean_gradient(),
        "gradient_base": base.mean_gradient(),
        "inputs": here.input_moments(),
        "outputs": here.output_moments(),
        "calibration": Calibration(
            ids=ids.to(torch.int32),
            attention_mask=batch.attention_mask[:, : ids.shape[1]].to(torch.uint8),
            completion_mask=batch.completion_mask[:, : ids.shape[1]].to(torch.uint8),
            base_loss=base_loss.float(),
            loss=item_scores(model, batch).loss.float(),
        ),
    }


def _variant(config: Any) -> str:
    kind = "rslora" if getattr(config, "use_rslora", False) else "lora"
    return kind + ("+patterns" if config.rank_pattern or config.alpha_pattern else "")


def _versions() -> dict[str, str]:
    return {
        "mergeprobe": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
    }
