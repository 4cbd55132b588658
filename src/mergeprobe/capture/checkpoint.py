"""A saved checkpoint -> a probe, for runs that were started without the callback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergeprobe.adapters.attach import placed
from mergeprobe.adapters.base import Base
from mergeprobe.adapters.checkpoint import CONFIG, read_adapter
from mergeprobe.adapters.finetuned import changed_parameters, is_model_folder
from mergeprobe.adapters.refusals import refuse_unreadable
from mergeprobe.adapters.variants import PEFT_TYPES, kind_of
from mergeprobe.adapters.weights import BaseWeights
from mergeprobe.artefact import read_json
from mergeprobe.capture.items import CALIBRATION_ITEMS, spread
from mergeprobe.capture.measure import take_probe
from mergeprobe.capture.probe import Probe
from mergeprobe.capture.start import StartWeights, exchanged
from mergeprobe.errors import AdapterError, AdapterMismatch

STATE = "trainer_state.json"  # transformers writes it into every checkpoint


def probe_checkpoint(
    folder: str | Path,
    base: Base,
    calibration: Sequence[tuple[str, str]],
    *,
    name: str | None = None,
    step: int | None = None,
    planned_steps: int | None = None,
    store_text: bool = True,
    rank: int | None = None,
) -> Probe:
    """Measures a checkpoint as the callback would have measured the run at that step.

    folder: a PEFT folder of any type that is read, or a whole model of which chosen Linear modules
    were fine-tuned. calibration: (prompt, completion) pairs of the task itself; 32 spread over them
    are used. step, planned_steps: by default what the trainer's own state in the folder says. rank:
    see `trained.snapshot`. What only the first steps can tell (the init, the way to half of the
    steps) stays absent. `base` is given back as it was. Raises AdapterError, AdapterMismatch for
    another base, DataError.
    """
    folder = Path(folder)
    meta: dict[str, Any] = trainer_state(folder) | {
        key: value
        for key, value in (("step", step), ("planned_steps", planned_steps))
        if value is not None
    }
    pairs = [calibration[index] for index in spread(len(calibration), CALIBRATION_ITEMS)]
    trained = _finetuned if is_model_folder(folder) else _with_adapter
    with trained(folder, base) as (model, start):
        return take_probe(
            model,
            name=name or folder.resolve().name,
            calibration=pairs,
            tokenizer=base.tokenizer,
            store_text=store_text,
            rank=rank,
            start=start,
            **meta,
        )


Trained = tuple[Any, StartWeights | None]


@contextmanager
def _with_adapter(folder: Path, base: Base) -> Iterator[Trained]:
    from peft import PeftModel
    from peft.utils.other import ModulesToSaveWrapper

    needs_base = PEFT_TYPES[_kind(folder)].base == "weights"
    # only looked at, to refuse here, by name, what does not fit; so a full rank is not needed
    adapter = read_adapter(folder, base, rank=1 if needs_base else None)
    if adapter.fingerprint and adapter.fingerprint != base.fingerprint:
        raise AdapterMismatch(
            f"'{adapter.name}' was trained on base {adapter.fingerprint} "
            f"({adapter.base or 'unnamed'}), but the base given is {base.fingerprint} ({base.name})"
        )
    placed(base.model, adapter.modules)
    model: Any = PeftModel.from_pretrained(base.model, str(folder))
    originals = {
        module_name: module.original_module
        for module_name, module in base.model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    try:
        yield model, None
    finally:
        model.unload()
        for module_name, module in originals.items():  # PEFT leaves the trained ones in their place
            base.model.set_submodule(module_name, module)
        base.model.requires_grad_(False).eval()


@contextmanager
def _finetuned(folder: Path, base: Base) -> Iterator[Trained]:
    weights, trained, before = BaseWeights.of(base), {}, {}
    for name, value, original in changed_parameters(folder, weights):
        module, _, last = name.rpartition(".")
        if last != "weight" or not weights.is_linear(module):
            raise AdapterError(
                f"'{folder}' also trained '{name}', which is no Linear's weight, so no update "
                "shows it"
            )
        trained[module], before[module] = value, original
    if not trained:
        raise AdapterError(f"'{folder}' holds the base's own weights: nothing was trained")
    with exchanged(base.model, trained):
        yield base.model, StartWeights(before)


def check_folder(folder: str | Path) -> None:
    """Refuses a folder that cannot be a checkpoint, without its base and without its weights."""
    folder = Path(folder)
    if is_model_folder(folder):
        return
    needs_base = PEFT_TYPES[_kind(folder)].base or _config(folder).get("modules_to_save")
    if not needs_base:
        read_adapter(folder)


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise AdapterError(f"'{folder}' is not a folder; expected a PEFT adapter with {CONFIG}")
    config = read_json(folder / CONFIG, AdapterError)
    if not isinstance(config, dict):
        raise AdapterError(f"'{folder / CONFIG}' holds no JSON object")
    return config


def _kind(folder: Path) -> str:
    kind = kind_of(_config(folder))
    refuse_unreadable(_config(folder), folder, extras=True)
    return kind


def trainer_state(folder: Path) -> dict[str, Any]:
    """step, planned_steps, losses and lr_curve as the trainer noted them; {} without its file."""
    if not (folder / STATE).exists():
        return {}
    state = read_json(folder / STATE, AdapterError)
    if not isinstance(state, dict):
        raise AdapterError(f"'{folder / STATE}' holds no JSON object")
    history = [entry for entry in state.get("log_history", []) if "step" in entry]
    return {
        "step": state.get("global_step"),
        "planned_steps": state.get("max_steps"),
        "losses": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        "lr_curve": [
            [entry["step"], entry["learning_rate"]] for entry in history if "learning_rate" in entry
        ],
    }
