"""Scalars into the log of the trainer that is running, as if it had logged them itself."""

from __future__ import annotations

import sys
from typing import Any

from transformers import Trainer


def log(state: Any, control: Any, scalars: dict[str, float]) -> None:
    """Logs through the trainer that is calling us.

    A callback is not told its trainer, so it is looked up among the callers. Trainer.log itself is
    called, not a subclass's: TRL's would add and reset the averages that belong to the step's own
    entry. Whether that entry is still to come is left as it was. Without a trainer (a loop that
    calls callbacks itself) the scalars go to the state's history.
    """
    trainer = _calling_trainer(state)
    if trainer is None:
        state.log_history.append({**scalars, "step": state.global_step})
        return
    to_come = control.should_log
    Trainer.log(trainer, dict(scalars))
    control.should_log = to_come


def _calling_trainer(state: Any) -> Trainer | None:
    frame = sys._getframe()
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer) and candidate.state is state:
            return candidate
        frame = frame.f_back
    return None
