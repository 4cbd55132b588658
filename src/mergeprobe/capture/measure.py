"""What is measured of a PEFT model as it is now, and the passes that it takes.

On the calibration items one forward and backward pass at the snapshot and one at the base, which
give gradients, moments and losses at once; on the probe set one forward pass, two where the base's
side is not in the cache yet.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from mergeprobe.adapters.base import fingerprint
from mergeprobe.capture.batch import Batch, encode
from mergeprobe.capture.drift import measure_drift
from mergeprobe.capture.items import CALIBRATION_ITEMS
from mergeprobe.capture.model import (
    active_adapter,
    adapted_modules,
    as_base,
    current_update,
    measuring,
    plain,
    weight_norms,
)
from mergeprobe.capture.probe import Calibration, Moment, Probe, provenance
from mergeprobe.capture.processes import ALONE, Processes, agree, joined
from mergeprobe.capture.recorder import BATCH_SIZE, Recording, record
from mergeprobe.errors import BaseModelError, ProbeError
from mergeprobe.version import __version__


@dataclass(frozen=True, eq=False)
class BaseSide:
    """The base on the calibration items: the same at every probe point of a run.

    gradient: module -> (k, k) sketch of the gradient of the mean token loss. loss: (items,) nats.
    """

    gradient: dict[str, Float[Tensor, "k k"]]
    loss: Float[Tensor, " items"]


@dataclass(frozen=True, eq=False)
class TaskSide:
    """The snapshot on the calibration items, and the base on the same."""

    gradient: dict[str, Float[Tensor, "k k"]]
    inputs: dict[str, Moment]
    outputs: dict[str, Moment]
    loss: Float[Tensor, " items"]
    base: BaseSide


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
    """Measures a PEFT model as it is now, on this process alone. `meta` goes into the provenance.

    calibration: a Batch or (prompt, completion) pairs, at most 32 are used; without it there are no
    gradients and moments. tokenizer: without it there is no drift.
    """
    model = plain(model)
    batch = None if calibration is None else as_batch(calibration, tokenizer)
    task = None if batch is None else measure_task(model, batch)
    return assemble(
        model,
        name=name,
        batch=batch,
        task=task,
        tokenizer=tokenizer,
        halfway=halfway,
        store_text=store_text,
        **meta,
    )


def as_batch(items: Batch | Sequence[tuple[str, str]], tokenizer: Any) -> Batch:
    if not isinstance(items, Batch):
        if tokenizer is None:
            raise ProbeError("calibration items are texts, so a tokenizer is needed to read them")
        items = encode(tokenizer, items[:CALIBRATION_ITEMS])
    return items.rows(0, CALIBRATION_ITEMS) if len(items) > CALIBRATION_ITEMS else items


def measure_task(
    model: Any,
    batch: Batch,
    *,
    base: BaseSide | None = None,
    processes: Processes = ALONE,
    batch_size: int = BATCH_SIZE,
) -> TaskSide:
    """Gradients, moments and losses on `batch`; with several processes, on a share in each.

    base: from an earlier probe point of the same run; measured where it is None. To be called on
    all `processes` at once, and then the same on each; if one of them cannot, all raise.
    """
    modules = adapted_modules(model)
    device = next(model.parameters()).device
    mine, here, there, problem = processes.share(batch), None, None, None
    try:
        with measuring(model):
            here = record(model, modules, mine, batch_size=batch_size)
            if base is None:
                with as_base(model):
                    there = record(model, modules, mine, moments=False, batch_size=batch_size)
    except Exception as caught:  # any: the other processes must hear of it
        problem = caught
    agree(processes, problem, device)
    assert here is not None
    here = joined(here, processes, batch)
    if base is None:
        assert there is not None
        base = _base_side(joined(there, processes, batch))
    return TaskSide(
        gradient=here.mean_gradient(),
        inputs=here.input_moments(),
        outputs=here.output_moments(),
        loss=here.item_loss.float(),
        base=base,
    )


def _base_side(recording: Recording) -> BaseSide:
    return BaseSide(recording.mean_gradient(), recording.item_loss.float())


def assemble(
    model: Any,
    *,
    name: str,
    batch: Batch | None,
    task: TaskSide | None,
    tokenizer: Any,
    halfway: dict[str, torch.Tensor] | None,
    store_text: bool,
    **meta: Any,
) -> Probe:
    """The probe: the task's side as measured, the update and the drift as they are now."""
    updates = current_update(model)
    config = model.peft_config[active_adapter(model)]
    base_print = _fingerprint(model)
    parts: dict[str, Any] = {}
    if batch is not None and task is not None:
        parts |= _task_parts(batch, task, store_text)
    if tokenizer is not None:
        with measuring(model):
            parts["drift"] = measure_drift(
                model, tokenizer, base=as_base(model), fingerprint=base_print
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


def _task_parts(batch: Batch, task: TaskSide, store_text: bool) -> dict[str, Any]:
    ids = batch.ids if store_text else batch.ids[:, :0]
    return {
        "gradient": task.gradient,
        "gradient_base": task.base.gradient,
        "inputs": task.inputs,
        "outputs": task.outputs,
        "calibration": Calibration(
            ids=ids.to(torch.int32),
            attention_mask=batch.attention_mask[:, : ids.shape[1]].to(torch.uint8),
            completion_mask=batch.completion_mask[:, : ids.shape[1]].to(torch.uint8),
            base_loss=task.base.loss,
            loss=task.loss,
        ),
    }


def _fingerprint(model: Any) -> str | None:
    """None for a quantised base: its packed weights cannot be read, so the base is unverified."""
    try:
        return fingerprint(model)
    except BaseModelError:
        return None


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
