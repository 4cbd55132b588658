"""A saved PEFT checkpoint -> a probe, for runs that were started without the callback."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergeprobe.adapters.attach import placed
from mergeprobe.adapters.base import Base
from mergeprobe.adapters.checkpoint import read_adapter
from mergeprobe.artefact import read_json
from mergeprobe.capture.items import CALIBRATION_ITEMS, spread
from mergeprobe.capture.measure import take_probe
from mergeprobe.capture.probe import Probe
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
) -> Probe:
    """Measures a PEFT folder as the callback would have measured the run at that step.

    calibration: (prompt, completion) pairs of the task itself; 32 spread over them are used.
    step, planned_steps: by default what the trainer's own state in the folder says. What only the
    first steps can tell (the init, the way to half of the steps) stays absent. `base` is given
    back as it was. Raises AdapterError, AdapterMismatch for another base, DataError.
    """
    from peft import PeftModel

    adapter = read_adapter(folder)
    if adapter.fingerprint and adapter.fingerprint != base.fingerprint:
        raise AdapterMismatch(
            f"'{adapter.name}' was trained on base {adapter.fingerprint} "
            f"({adapter.base or 'unnamed'}), but the base given is {base.fingerprint} ({base.name})"
        )
    placed(base.model, adapter.modules)  # refuses here, by name, what does not fit
    meta: dict[str, Any] = trainer_state(Path(folder)) | {
        key: value
        for key, value in (("step", step), ("planned_steps", planned_steps))
        if value is not None
    }
    pairs = [calibration[index] for index in spread(len(calibration), CALIBRATION_ITEMS)]
    model: Any = PeftModel.from_pretrained(base.model, str(folder))
    try:
        return take_probe(
            model,
            name=name or adapter.name,
            calibration=pairs,
            tokenizer=base.tokenizer,
            store_text=store_text,
            **meta,
        )
    finally:
        model.unload()
        base.model.eval()


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
