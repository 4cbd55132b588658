"""From tokens to text while they come: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 6  # tokens before the answer that its first token is decoded with
PATIENCE = 8  # tokens that may end inside of a character before it counts as broken


class Text:
    """The text of one answer so far; `add` returns what can be sent now.

    Tokens are decoded with those before them (a leading space or half of a character depends on
    them), and text that could be the beginning of a stop string is held back. `stopped` is true
    once a stop string came; it and what follows is never sent. An answer may end inside of a
    character: `close` returns the rest.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.tokens = list(prompt[-CONTEXT:])
        self.start, self.end = 0, len(self.tokens)  # of the tokens that are decoded together
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        self.tokens.append(token)
        known, text = self._decode(self.end), self._decode()
        if text.endswith("\ufffd") and len(self.tokens) - self.end < PATIENCE:
            return ""
        self.start, self.end = self.end, len(self.tokens)
        return self._safe(text[len(known) :])

    def close(self) -> str:
        """What was still held back, at the end of an answer that met no stop string."""
        if self.stopped:
            return ""
        rest = self._decode()[len(self._decode(self.end)) :]
        self.start = self.end = len(self.tokens)
        return self._safe(rest) + ("" if self.stopped else self._release())

    def _decode(self, end: int | None = None) -> str:
        return self.tokenizer.decode(
            self.tokens[self.start : end],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    def _safe(self, text: str) -> str:
        text = self.held + text
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self.held = True, ""
            return text[: min(places)]
        keep = max((_beginning(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _release(self) -> str:
        held, self.held = self.held, ""
        return held


def _beginning(text: str, stop: str) -> int:
    """Characters at the end of the text that begin the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
