"""When a run is probed, and into which file each probe goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergeprobe.errors import ProbeError

EARLIEST_STEP = 8
AFTER_WARMUP = 3
POINT = "{point}"
"""What stands for the probe point in a path, when there are several: "5pct", or "step25"."""


@dataclass(frozen=True)
class ProbePoint:
    """step: the optimizer step after which the probe is taken; half: the step of the half-way
    sketch; path: its file. Two points may fall on one step: measured once, written twice."""

    step: int
    path: Path

    @property
    def half(self) -> int:
        return max(1, self.step // 2)


def probe_step(planned: int, warmup: int = 0, fraction: float = 0.05) -> int:
    """The optimizer step to probe at: max(fraction of the plan, 8, 3 after warm-up)."""
    return max(math.ceil(fraction * planned), EARLIEST_STEP, warmup + AFTER_WARMUP)


def probe_points(
    path: str | Path,
    planned: int,
    *,
    warmup: int = 0,
    fraction: float | Sequence[float] = 0.05,
    at_step: int | Sequence[int] | None = None,
) -> tuple[ProbePoint, ...]:
    """The points of one run, by step. at_step, where given, goes before fraction.

    Several points need several files: `path` then holds "{point}", as in
    "probes/{point}/math.safetensors". So all runs' probes of one point lie in one folder.
    Raises ProbeError for a path without it, a fraction outside (0, 1] or a step below 1.
    """
    check_points(path, fraction=fraction, at_step=at_step)
    if at_step is not None:
        steps = [(f"step{step}", step) for step in _several(at_step)]
    else:
        shares = _several(fraction)
        steps = [(f"{100 * s:g}pct", probe_step(planned, warmup, s)) for s in shares]
    found = [ProbePoint(step, Path(str(path).replace(POINT, label))) for label, step in steps]
    return tuple(sorted(found, key=lambda point: point.step))


def check_points(
    path: str | Path, *, fraction: float | Sequence[float], at_step: int | Sequence[int] | None
) -> None:
    """Refuses what probe_points would refuse, before the plan of the run is known."""
    wanted: Sequence[float] = _several(fraction if at_step is None else at_step)
    if not wanted:
        raise ProbeError("no probe point is given; expected a fraction or a step, or several")
    for value in wanted:
        if at_step is None and not 0.0 < value <= 1.0:
            raise ProbeError(f"fraction is {value}; expected a share of training in (0, 1]")
        if at_step is not None and (value < 1 or value != int(value)):
            raise ProbeError(f"at_step is {value}; expected an optimizer step, 1 or more")
    if len(set(wanted)) < len(wanted):
        raise ProbeError(f"a probe point is given twice: {list(wanted)}")
    if len(wanted) > 1 and POINT not in str(path):
        raise ProbeError(
            f"{len(wanted)} probe points need {len(wanted)} files, but '{path}' is one: put "
            f"{POINT} into it, such as 'probes/{POINT}/{Path(path).name}'"
        )


def _several(value: float | Sequence[float]) -> Sequence:
    return (value,) if isinstance(value, int | float) else tuple(value)
