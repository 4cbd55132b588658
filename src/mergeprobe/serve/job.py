"""One request on its way through the engine, and what the engine says about it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mergeprobe.serve.batch import Sequenced
from mergeprobe.serve.catalogue import Target
from mergeprobe.serve.sampling import Sampling
from mergeprobe.serve.text import Text

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Asked:
    """What a request wants. ids: the prompt, at least one token. target: None lets the router
    choose, by the prompt `routed_by`. deadline: by time.monotonic()."""

    ids: tuple[int, ...]
    target: Target | None
    max_tokens: int
    deadline: float
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False
    routed_by: tuple[int, ...] = ()


@dataclass(frozen=True)
class Routed:
    """The router's choice: certain is False where `rivals` have prompts like this one."""

    model: str
    certain: bool
    rivals: tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """Text that is new, and at the end the reason. tokens: of the answer so far, the end-of-text
    token included. model: that answers."""

    text: str
    model: str
    tokens: int
    reason: Reason | None = None
    routed: Routed | None = None


@dataclass(frozen=True)
class Failure:
    """Why there is no answer, or no more of it. status: of HTTP."""

    status: int
    message: str
    retry_after: int | None = None


Tell = Callable[[Piece | Failure], None]


@dataclass(eq=False)
class Job:
    """tell: called in the engine's thread with every piece, the last one with a reason, or with
    one Failure. cancelled: set by the caller, who hears no more. target, weights (of a
    composition) and routed: once they are decided."""

    asked: Asked
    tell: Tell
    target: Target | None = None
    routed: Routed | None = None
    weights: tuple[float, ...] | None = None
    text: Text | None = None
    draw: Any = None
    sequence: Sequenced | None = None
    overtaken: int = 0
    started: float = field(default_factory=time.monotonic)
    _gone: threading.Event = field(default_factory=threading.Event)

    @property
    def cancelled(self) -> bool:
        return self._gone.is_set()

    def cancel(self) -> None:
        self._gone.set()

    @property
    def answered(self) -> int:
        """Tokens of the answer so far."""
        return len(self.sequence.tokens) - len(self.asked.ids) if self.sequence else 0

    def begin(self, tokenizer: Any) -> Sequenced:
        """The sequence that the batch takes."""
        assert self.target is not None
        self.text = Text(tokenizer, self.asked.ids, self.asked.stops)
        self.draw = self.asked.sampling.generator()
        self.sequence = Sequenced(self.target, list(self.asked.ids), self.weights or ())
        return self.sequence

    def take(self, token: int, ends: Sequence[int]) -> Piece | None:
        """One more token: what there is to tell of it, with a reason where the answer ends."""
        assert self.sequence is not None
        assert self.text is not None
        assert self.target is not None
        self.sequence.tokens.append(token)
        ended = token in ends and not self.asked.ignore_eos
        text = "" if ended else self.text.add(token)
        reason: Reason | None = None
        if ended or self.text.stopped:
            reason = "stop"
        elif self.answered >= self.asked.max_tokens:
            reason = "length"
        if reason is not None:
            text += self.text.close()
            if self.text.stopped:  # a stop string in what was held back
                reason = "stop"
        if not (text or reason or self.answered == 1):
            return None
        return Piece(text, self.target.name, self.answered, reason, self.routed)
