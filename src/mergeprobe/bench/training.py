"""Training one adapter with TRL, with probes on the way; in one sitting or in two.

A killed run goes on from a checkpoint. The trainer writes the checkpoint of a step after the probe
of that step, so no probe point falls between the two.
"""

from __future__ import annotations

import gc
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback

from mergeprobe.adapters.base import Base, quiet_transformers
from mergeprobe.adapters.checkpoint import CARD, CARD_SCHEMA, CONFIG, WEIGHTS
from mergeprobe.artefact import MADE_BY, atomic_folder, sha256, write_json
from mergeprobe.capture import ProbeCallback
from mergeprobe.evaluate.data import Example

CHECKPOINT_EVERY = 20


@dataclass(frozen=True)
class ProbePoint:
    """A probe of a run: its file, and its optimizer step (None: the callback's own choice)."""

    path: Path
    step: int | None = None


@dataclass(frozen=True)
class Run:
    """One adapter's training: what, how long, and where its files go.

    checkpoints: a folder that is gone when the run is done. adapter: where the PEFT folder goes.
    probes: in the order of their steps. init_seed: of the LoRA matrices (equal seeds give a shared
    init to adapters of equal rank).
    """

    name: str
    examples: tuple[Example, ...]
    calibration: tuple[Example, ...]
    checkpoints: Path
    probes: tuple[ProbePoint, ...]
    adapter: Path
    steps: int = 100
    learning_rate: float = 1e-3
    rank: int = 8
    batch_size: int = 8
    warmup_steps: int = 3
    seed: int = 0
    init_seed: int = 0

    def missing(self) -> list[ProbePoint]:
        """The probes whose file is not there."""
        return [point for point in self.probes if not point.path.exists()]

    def done(self) -> bool:
        return self.adapter.exists() and not self.missing()


def train(run: Run, base: Base, *, to_probe: bool, on_step: Callable[[int, float], None]) -> None:
    """Trains up to the last probe point (to_probe) or to the end, from the newest checkpoint.

    Does nothing where the work is done already. Uses `base.model` and gives it back unchanged.
    """
    if (to_probe and not run.missing()) or run.done():
        return
    quiet_transformers()
    torch.manual_seed(run.init_seed)
    config = LoraConfig(
        r=run.rank, lora_alpha=2 * run.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(base.model, config)
    model.peft_config["default"].base_model_name_or_path = base.name
    pairs = [(item.prompt, item.completion) for item in run.calibration]
    probing = [
        ProbeCallback(
            point.path,
            calibration=pairs,
            tokenizer=base.tokenizer,
            at_step=point.step,
            strict=True,  # the run is for the probe
        )
        for point in run.missing()
    ]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            watch = _Watch(on_step, probing[-1] if to_probe else None)
            trainer = _trainer(run, model, base, [*probing, watch])
            # a checkpoint at or after a probe's step cannot give that probe back, and from the last
            # step the trainer would go one step further
            steps = [point.step for point in run.missing() if point.step]
            first = min([*steps, run.steps])
            trainer.train(resume_from_checkpoint=newest_checkpoint(run.checkpoints, before=first))
        if not to_probe:
            _save(run, model, base, trainer.state.log_history)
    finally:
        base_model = model.unload()
        base_model.requires_grad_(False)
        base_model.eval()
        del model
        gc.collect()


def _trainer(run: Run, model: Any, base: Base, callbacks: list[TrainerCallback]) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

    rows = [{"prompt": item.prompt, "completion": item.completion} for item in run.examples]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(run.checkpoints),
            max_steps=run.steps,
            per_device_train_batch_size=run.batch_size,
            learning_rate=run.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=run.warmup_steps,
            logging_steps=1,
            save_strategy="steps",
            save_steps=CHECKPOINT_EVERY,
            save_total_limit=2,
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=base.device.type == "cpu",
            dataloader_pin_memory=False,
            max_length=256,
            seed=run.seed,
            data_seed=run.seed,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=base.tokenizer,
        callbacks=callbacks,
    )
    _quiet(trainer)
    return trainer


def newest_checkpoint(folder: Path, before: int | None = None) -> str | None:
    """The newest whole checkpoint; half-written ones (a kill while saving) are removed.

    The trainer writes a checkpoint file by file, its state last. before: only checkpoints of
    earlier steps than this one.
    """
    if not folder.exists():
        return None
    found = sorted(folder.glob("checkpoint-*"), key=_step_of)
    for path in reversed(found):
        if before is not None and _step_of(path) >= before:
            continue
        try:
            json.loads((path / "trainer_state.json").read_text("utf-8"))
            with safe_open(str(path / WEIGHTS), framework="pt"):
                return str(path)
        except (OSError, ValueError, SafetensorError):
            shutil.rmtree(path)
    return None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


class _Watch(TrainerCallback):
    """Reports every step, and stops after the probe point when told to (saving a checkpoint)."""

    def __init__(self, on_step: Callable[[int, float], None], stop_at: ProbeCallback | None):
        self.on_step, self.stop_at = on_step, stop_at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        recorder = self.stop_at.recorder if self.stop_at else None
        if recorder is not None and state.global_step >= recorder.at:
            control.should_save = True
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.on_step(state.global_step, float(logs["loss"]))


def _save(run: Run, model: Any, base: Base, history: list[dict[str, Any]]) -> None:
    """PEFT's own files and our card (fingerprint, checksum); then the checkpoints may go."""
    with atomic_folder(run.adapter, force=True) as folder:
        model.save_pretrained(str(folder))
        assert (folder / CONFIG).exists()
        card = {
            "schema": CARD_SCHEMA,
            "made_by": MADE_BY,
            "base_fingerprint": base.fingerprint,
            "weights_sha256": sha256(folder / WEIGHTS),
            "steps": run.steps,
            "seed": run.seed,
            "losses": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        }
        write_json(folder / CARD, card)
    shutil.rmtree(run.checkpoints, ignore_errors=True)


def _quiet(trainer: Any) -> None:
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
