"""Whether the parts of a probe fit each other, once it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergeprobe.adapters.stored import FLOATS

if TYPE_CHECKING:
    from mergeprobe.capture.probe import Calibration, Drift, Probe


def refuse_unsound(probe: Probe) -> None:
    """Raises ValueError for parts that do not fit each other: files are not trusted, digests only
    say that nobody changed them since."""
    if not isinstance(probe.name, str):
        raise ValueError("its name is no text")
    for module, update in probe.updates.items():
        _number(update.scaling, f"the scaling of '{module}'")
        out, into = update.shape
        for what, moment, side in (
            ("inputs", probe.inputs.get(module), into),
            ("outputs", probe.outputs.get(module), out),
        ):
            if moment is not None and (moment.factor.ndim != 2 or len(moment.factor) != side):
                raise ValueError(f"{what} of '{module}' do not fit its update")
            if moment is not None:
                _number(moment.tail, f"the tail of '{module}'")
        if not (update.A.dtype in FLOATS and update.B.dtype in FLOATS and update.r):
            raise ValueError(f"the update of '{module}' is no pair of factors")
    for part in ("halfway", "gradient_base", "gradient"):
        for module, value in getattr(probe, part).items():
            if value.ndim != 2 or value.dtype not in FLOATS:
                raise ValueError(f"{part} of '{module}' is no matrix")
    for module, size in probe.weight_norms.items():
        _number(size, f"the weight norm of '{module}'")
    _refuse_unsound_drift(probe.drift)
    _refuse_unsound_calibration(probe.calibration)


def _refuse_unsound_drift(drift: Drift | None) -> None:
    if drift is None:
        return
    if drift.hidden.ndim != 3:
        raise ValueError(f"its drift is {tuple(drift.hidden.shape)}")
    for logprob, index, tail in (
        (drift.logprob, drift.index, drift.tail),
        (drift.base_logprob, drift.base_index, drift.base_tail),
    ):
        if logprob.ndim != 2 or index.shape != logprob.shape or tail.shape != logprob.shape[:1]:
            raise ValueError("its next-token distributions do not fit each other")


def _refuse_unsound_calibration(items: Calibration | None) -> None:
    if items is None:
        return
    masks = (items.attention_mask, items.completion_mask)
    if items.ids.ndim != 2 or any(mask.shape != items.ids.shape for mask in masks):
        raise ValueError("its calibration items and their masks do not fit each other")
    if any(loss.shape != items.ids.shape[:1] for loss in (items.base_loss, items.loss)):
        raise ValueError("its calibration items and their losses do not fit each other")


def _number(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        raise ValueError(f"{what} is {str(value)[:40]}, no number")
