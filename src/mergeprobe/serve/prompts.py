"""From a request's text to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergeprobe.errors import DataError
from mergeprobe.serve.schema import Message

TITLES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}


def chat_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The conversation in the tokenizer's chat template, or in a plain one where it has none.

    Raises DataError where the template refuses it.
    """
    turns = [{"role": m.role, "content": m.text()} for m in messages]
    if not getattr(tokenizer, "chat_template", None):
        return text_ids(tokenizer, plain(messages))
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise DataError(f"the chat template refuses these messages: {reason}") from None
    # the template writes its own special tokens
    return _some(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


def plain(messages: Sequence[Message]) -> str:
    """'User: …' by lines, the assistant's turn last."""
    lines = [f"{TITLES[message.role]}: {message.text()}\n" for message in messages]
    return "".join(lines) + "Assistant:"


def text_ids(tokenizer: Any, text: str) -> list[int]:
    return _some(tokenizer, tokenizer(text)["input_ids"])


def _some(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """An empty prompt begins as a text does."""
    if len(ids):
        return list(ids)
    for start in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if start is not None:
            return [start]
    raise DataError("the prompt has no tokens; expected some text")


def routed_text(messages: Sequence[Message]) -> str:
    """What the router sees of a conversation: the last thing that the user said."""
    said = [m.text() for m in messages if m.role == "user"]
    return said[-1] if said else messages[-1].text()
