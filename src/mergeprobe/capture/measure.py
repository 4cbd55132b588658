"""What is measured of a model in training as it is now, and the passes that it takes.

On the calibration items one forward and backward pass at the snapshot and one at the base, which
give gradients, moments and losses at once; on the probe set one forward pass, two where the base's
side is not in the cache yet.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from mergeprobe.capture.batch import Batch, encode
from mergeprobe.capture.compact import compacted
from mergeprobe.capture.drift import measure_drift, open_positions
from mergeprobe.capture.items import CALIBRATION_ITEMS
from mergeprobe.capture.model import as_base, measuring, plain
from mergeprobe.capture.probe import Calibration, Moment, Probe, provenance
from mergeprobe.capture.processes import ALONE, Processes, agree, joined
from mergeprobe.capture.recorder import BATCH_SIZE, Recording, record
from mergeprobe.capture.start import StartWeights
from mergeprobe.capture.trained import (
    adapted_modules,
    base_fingerprint,
    base_name,
    described,
    snapshot,
    weight_norms,
)
from mergeprobe.errors import ProbeError
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
    rank: int | None = None,
    start: StartWeights | None = None,
    **meta: Any,
) -> Probe:
    """Measures a model as it is now, on this process alone. `meta` goes into the provenance.

    model: a PEFT model, or one without adapters and, as `start`, the weights that it began from.
    calibration: a Batch or (prompt, completion) pairs, at most 32 are used; without it there are no
    gradients and moments. tokenizer: without it there is no drift. rank: see `trained.snapshot`.
    """
    model = plain(model)
    batch = None if calibration is None else as_batch(calibration, tokenizer)
    task = None if batch is None else measure_task(model, batch, start=start)
    return assemble(
        model,
        name=name,
        batch=batch,
        task=task,
        tokenizer=tokenizer,
        halfway=halfway,
        store_text=store_text,
        rank=rank,
        start=start,
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
    start: StartWeights | None = None,
) -> TaskSide:
    """Gradients, moments and losses on `batch`; with several processes, on a share in each.

    base: from an earlier probe point of the same run; measured where it is None. To be called on
    all `processes` at once, and then the same on each; if one of them cannot, all raise.
    """
    modules = adapted_modules(model, start)
    device = next(model.parameters()).device
    mine, here, there, problem = processes.share(batch), None, None, None
    try:
        with measuring(model):
            here = record(model, modules, mine, batch_size=batch_size)
            if base is None:
                with as_base(model, start):
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
    rank: int | None = None,
    start: StartWeights | None = None,
    **meta: Any,
) -> Probe:
    """The probe: the task's side as measured, the update and the drift as they are now."""
    adapter = snapshot(model, rank=rank, start=start)
    base_print = base_fingerprint(model, start)
    parts: dict[str, Any] = {}
    if batch is not None and task is not None:
        parts |= _task_parts(batch, task, store_text)
    if tokenizer is not None:
        with measuring(model):
            parts["drift"] = measure_drift(
                model, tokenizer, base=as_base(model, start), fingerprint=base_print
            )
        meta["open_positions"] = open_positions(tokenizer)
    probe = Probe(
        name=name,
        updates=adapter.modules,
        halfway=halfway or {},
        weight_norms=weight_norms(model, start),
        meta=provenance(
            base=base_name(model, start),
            fingerprint=base_print,
            versions=_versions(),
            model_type=getattr(model.config, "model_type", None),
            layers=getattr(model.config, "num_hidden_layers", None),
            **described(adapter, model, start),
            **meta,
        ),
        **parts,
    )
    return compacted(_of_modules(probe, adapter.modules))


def _of_modules(probe: Probe, modules: Mapping[str, Any]) -> Probe:
    """Without the measurements of modules that AdaLoRA has pruned away: they have no update."""
    parts = ("halfway", "gradient", "gradient_base", "inputs", "outputs", "weight_norms")
    kept = {
        part: {name: value for name, value in getattr(probe, part).items() if name in modules}
        for part in parts
    }
    return replace(probe, **kept)


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


def _versions() -> dict[str, str]:
    return {
        "mergeprobe": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
    }
