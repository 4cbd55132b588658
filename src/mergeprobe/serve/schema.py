"""Requests and answers of the OpenAI API, as far as this server goes.

What it knows and cannot do takes its neutral value only; what it does not know is refused. Nothing
is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def whole(value: Any) -> Any:
    """JSON has one kind of number: 3.0 is an integer too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def truth(value: Any) -> Any:
    """JSON tells 0 from false, Python does not."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError("Input should be false")
    return value


WHOLE = BeforeValidator(whole)
No = Annotated[Literal[False], BeforeValidator(truth)]
# no path: neither separators nor a dot in front (the names that a plan allows)
NAME = r"^[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*$"
Name = Annotated[str, Field(pattern=NAME, max_length=200)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
One = Annotated[int, Field(ge=1, le=1), WHOLE]
Zero = Annotated[float, Field(ge=0, le=0)]
Count = Annotated[int, Field(ge=1), WHOLE]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class StreamOptions(_Strict):
    include_usage: bool = False


class _Request(_Strict):
    model: Name
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    # the integers that every reader of JSON agrees about
    seed: Annotated[int, Field(ge=-(2**53), le=2**53), WHOLE] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = Field(False, description="Go on to max_tokens, past the end of the text.")
    user: str | None = Field(None, description="Taken and not used.")
    # one answer for each request, from the model's own distribution
    n: One | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ResponseFormat(_Strict):
    type: Literal["text"]


class ChatRequest(_Request):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: No | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(_Request):
    prompt: str | Annotated[list[Annotated[int, WHOLE]], Field(min_length=1)]
    best_of: One | None = None
    echo: No | None = None
    logprobs: None = None
    suffix: None = None


class LoadRequest(_Strict):
    # 200 bytes in any script
    lora_name: Annotated[str, Field(pattern=NAME, max_length=50)]
    lora_path: Annotated[str, Field(min_length=1, max_length=1000)]


class UnloadRequest(_Strict):
    lora_name: Name


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: Error


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Route(BaseModel):
    """What the router chose for `model: auto`. certain: false where `rivals` have such prompts
    too."""

    model: str
    certain: bool
    rivals: list[str]


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int = 0
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class TextChoice(BaseModel):
    index: int = 0
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class _Answer(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage
    route: Route | None = None


class ChatAnswer(_Answer):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class TextAnswer(_Answer):
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["mergeprobe"] = "mergeprobe"
    root: str
    parent: str | None
    adapters: list[str]
    resident: bool


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Done(BaseModel):
    """What loading or unloading did."""

    message: str


class Health(BaseModel):
    status: Literal["ok"]


def described(problem: dict[str, Any]) -> tuple[str, str | None]:
    """(one line, the field) of pydantic's first finding, without what was sent."""
    place = [str(part) for part in problem["loc"] if part not in ("body", "path", "query")]
    kind, field = problem["type"], ".".join(place)
    if kind == "json_invalid":
        return f"the body is not JSON: {problem.get('ctx', {}).get('error', 'malformed')}", None
    if kind == "extra_forbidden":
        return f"'{place[-1][:80]}' is not supported by this server", place[-1][:80]
    message = f"{field or 'body'}: {problem['msg']}"
    if place[:1] in (["model"], ["lora_name"]) and kind == "string_pattern_mismatch":
        message = f"{place[0]}: a name, not a path"
    return message, place[0] if place else None
