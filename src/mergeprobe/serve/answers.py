"""From a checked request to its answer: whole, or piece by piece as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from mergeprobe.errors import DeploymentError
from mergeprobe.serve.catalogue import AUTO
from mergeprobe.serve.engine import Engine
from mergeprobe.serve.gate import error_body
from mergeprobe.serve.job import Asked, Failure, Job, Piece
from mergeprobe.serve.sampling import Sampling
from mergeprobe.serve.schema import ChatRequest, CompletionRequest


class Refused(Exception):
    """A request that gets an error for an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after


def error_response(problem: Refused) -> JSONResponse:
    headers = {"Retry-After": str(problem.retry_after)} if problem.retry_after else None
    body = error_body(problem.status, problem.message, param=problem.param, code=problem.code)
    return JSONResponse(body, problem.status, headers=headers)


@dataclass(frozen=True)
class Form:
    """How an endpoint's answers look."""

    prefix: str
    object: str
    chunk: str
    chat: bool

    def whole(self, text: str, reason: str) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": 0, **said, "finish_reason": reason, "logprobs": None}

    def part(self, text: str, reason: str | None, *, first: bool) -> dict[str, Any]:
        if not self.chat:
            said: dict[str, Any] = {"text": text}
        else:
            role = {"role": "assistant"} if first else {}
            said = {"delta": role | ({"content": text} if text or first else {})}
        return {"index": 0, **said, "finish_reason": reason, "logprobs": None}


CHAT = Form("chatcmpl-", "chat.completion", "chat.completion.chunk", True)
TEXT = Form("cmpl-", "text_completion", "text_completion", False)


def asked_for(
    engine: Engine,
    body: ChatRequest | CompletionRequest,
    ids: Sequence[int],
    routed_by: Sequence[int],
    max_tokens: int | None,
    default: int | None,
) -> Asked:
    """What the engine is asked; Refused where it can't be done. default: of max_tokens, None for
    as many as there is room for."""
    target = None
    if body.model == AUTO and engine.router is None:
        raise Refused(
            404, "this deployment has no router; name the adapter", "model", "model_not_found"
        )
    if body.model != AUTO:
        try:
            target = engine.catalogue.find(body.model)
        except DeploymentError as problem:
            raise Refused(404, str(problem), "model", "model_not_found") from None
    room = engine.limits.tokens - len(ids)
    if max_tokens is None:
        max_tokens = max(1, min(room, default or room))
    if room < max_tokens:
        raise too_long(engine, len(ids), max_tokens)
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return Asked(
        ids=tuple(ids),
        target=target,
        max_tokens=max_tokens,
        deadline=time.monotonic() + engine.limits.timeout,
        sampling=Sampling(
            1.0 if body.temperature is None else body.temperature,
            1.0 if body.top_p is None else body.top_p,
            body.seed,
        ),
        stops=stops,
        ignore_eos=body.ignore_eos,
        routed_by=tuple(routed_by),
    )


def too_long(engine: Engine, prompt: int, answer: int) -> Refused:
    return Refused(
        400,
        f"{prompt} tokens of prompt and {answer} of answer are more than the "
        f"{engine.limits.tokens} that this server takes",
        code="context_length_exceeded",
    )


async def answered(
    engine: Engine,
    asked: Asked,
    body: ChatRequest | CompletionRequest,
    request: Request,
    form: Form,
) -> Response:
    """The answer, or a stream of it. A client that goes away frees its place in the batch."""
    loop = asyncio.get_running_loop()
    heard: asyncio.Queue[Piece | Failure] = asyncio.Queue()
    job = engine.submit(asked, lambda said: _tell(loop, heard, said))
    gone = asyncio.create_task(_gone(request))
    try:
        first = await _next(heard, gone)
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            stream = _stream(heard, first, job, form, usage)
            job_left, job = job, None  # the stream's own now
            return _Streaming(stream, job_left)
        pieces = [first]
        while pieces[-1].reason is None:
            pieces.append(await _next(heard, gone))
    except ClientGone:
        return Response(status_code=499)  # nobody reads it
    finally:
        gone.cancel()
        if job is not None:
            job.cancel()
    last = pieces[-1]
    text = "".join(piece.text for piece in pieces)
    whole = _head(form.prefix, form.object, last) | {
        "choices": [form.whole(text, last.reason or "stop")],
        "usage": _usage(asked, last),
    }
    return JSONResponse(whole)


class ClientGone(Exception):
    """The client has closed its connection."""


def _tell(loop: asyncio.AbstractEventLoop, heard: asyncio.Queue, said: Piece | Failure) -> None:
    try:
        loop.call_soon_threadsafe(heard.put_nowait, said)
    except RuntimeError:
        return  # the loop has ended, and with it whoever asked


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _next(heard: asyncio.Queue[Piece | Failure], gone: asyncio.Task[None]) -> Piece:
    """The next piece. Refused for a failure, ClientGone where the client left first."""
    coming = asyncio.create_task(heard.get())
    await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
    if not coming.done():
        coming.cancel()
        raise ClientGone
    said = coming.result()
    if isinstance(said, Failure):
        raise Refused(said.status, said.message, retry_after=said.retry_after)
    return said


class _Streaming(StreamingResponse):
    """Server-sent events; whatever ends the response frees the job."""

    def __init__(self, stream: AsyncIterator[str], job: Job) -> None:
        super().__init__(stream, media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-cache"
        self.job = job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancel()


async def _stream(
    heard: asyncio.Queue[Piece | Failure], first: Piece, job: Job, form: Form, usage: bool
) -> AsyncIterator[str]:
    head = _head(form.prefix, form.chunk, first)
    said: Piece | Failure = first
    while True:
        if isinstance(said, Failure):
            yield _event(error_body(said.status, said.message))
            break
        choice = form.part(said.text, said.reason, first=said is first)
        yield _event(head | {"choices": [choice]} | ({"usage": None} if usage else {}))
        if said.reason is not None:
            if usage:
                yield _event(head | {"choices": [], "usage": _usage(job.asked, said)})
            break
        said = await heard.get()
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _head(prefix: str, kind: str, piece: Piece) -> dict[str, Any]:
    head: dict[str, Any] = {
        "id": prefix + uuid.uuid4().hex,
        "object": kind,
        "created": int(time.time()),
        "model": piece.model,
    }
    if piece.routed is not None:
        routed = piece.routed
        head["route"] = {
            "model": routed.model,
            "certain": routed.certain,
            "rivals": list(routed.rivals),
        }
    return head


def _usage(asked: Asked, last: Piece) -> dict[str, int]:
    prompt = len(asked.ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": last.tokens,
        "total_tokens": prompt + last.tokens,
    }
