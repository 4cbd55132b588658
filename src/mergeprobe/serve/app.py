"""The HTTP side: OpenAI's paths, adapters loaded and unloaded, health and metrics."""

from __future__ import annotations

import copy
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from mergeprobe.errors import DataError, DeploymentError, MergeProbeError
from mergeprobe.serve.answers import (
    CHAT,
    TEXT,
    Refused,
    answered,
    asked_for,
    error_response,
    too_long,
)
from mergeprobe.serve.catalogue import AUTO, BASE, Target, check_free
from mergeprobe.serve.engine import Engine
from mergeprobe.serve.gate import Gate, error_body
from mergeprobe.serve.prompts import chat_ids, routed_text, text_ids
from mergeprobe.serve.schema import (
    ChatAnswer,
    ChatRequest,
    CompletionRequest,
    Done,
    ErrorBody,
    Health,
    LoadRequest,
    Model,
    Models,
    TextAnswer,
    UnloadRequest,
    described,
)
from mergeprobe.version import __version__

log = logging.getLogger("mergeprobe.serve")


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in statuses}


EVENT = {
    "type": "object",
    "description": "Each event: a chunk of the answer as JSON, an error, or [DONE].",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
DECODING = errors(400, 401, 403, 404, 408, 413, 422, 429, 500, 503, 504) | {
    200: {"content": {"text/event-stream": {"schema": EVENT}}}
}
PLAIN = errors(401, 403, 408, 413)


def make_app(engine: Engine, *, token: str | None = None) -> FastAPI:
    """The application over an engine, which starts and closes with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await run_in_threadpool(engine.close)

    # the interactive pages would load their code from elsewhere
    app = FastAPI(
        title="mergeprobe serve",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=PLAIN,
    )
    app.add_middleware(Gate, token=token, body=engine.limits.body, full=engine.refusal)
    _decoding(app, engine)
    _models(app, engine)
    _adapters(app, engine)
    _watching(app, engine)
    _failures(app)
    app.openapi = lambda: _schema(app, engine, token)  # type: ignore[method-assign]
    return app


def _decoding(app: FastAPI, engine: Engine) -> None:
    tokenizer = engine.base.tokenizer

    @app.post("/v1/chat/completions", response_model=ChatAnswer, responses=DECODING)
    async def chat(body: ChatRequest, request: Request) -> Any:
        ids = await run_in_threadpool(chat_ids, tokenizer, body.messages)
        by = text_ids(tokenizer, routed_text(body.messages)) if engine.router else []
        given = [most for most in (body.max_tokens, body.max_completion_tokens) if most is not None]
        if max(given, default=0) >= engine.limits.tokens:
            raise too_long(engine, len(ids), max(given))
        asked = asked_for(engine, body, ids, by, min(given, default=None), None)
        return await answered(engine, asked, body, request, CHAT)

    @app.post("/v1/completions", response_model=TextAnswer, responses=DECODING)
    async def completions(body: CompletionRequest, request: Request) -> Any:
        prompt = body.prompt
        if isinstance(prompt, str):
            ids = await run_in_threadpool(text_ids, tokenizer, prompt)
        else:
            ids = _known(engine, prompt)
        asked = asked_for(engine, body, ids, ids, body.max_tokens, 16)
        return await answered(engine, asked, body, request, TEXT)


def _known(engine: Engine, ids: list[int]) -> list[int]:
    if (size := vocabulary(engine)) <= max(ids) or min(ids) < 0:
        raise Refused(400, f"prompt: token ids are 0 … {size - 1} in this model", "prompt")
    return ids


def vocabulary(engine: Engine) -> int:
    """Tokens that the model knows."""
    return int(engine.base.model.get_input_embeddings().weight.shape[0])


def _models(app: FastAPI, engine: Engine) -> None:
    @app.get("/v1/models", response_model=Models)
    async def models() -> Any:
        found = [_shown(engine, target) for target in [*engine.catalogue.targets.values()]]
        if engine.router is not None:
            found.append(_shown(engine, Target(AUTO, created=found[0].created)))
        return Models(data=found)

    @app.get("/v1/models/{model}", response_model=Model, responses=errors(404, 422))
    async def model(model: str) -> Any:
        if model == AUTO and engine.router is not None:
            return _shown(engine, Target(AUTO))
        return _shown(engine, _served(engine, model))


def _shown(engine: Engine, target: Target) -> Model:
    held = engine.resident.held
    return Model(
        id=target.name,
        created=target.created,
        root=engine.base.name if target.name in (BASE, AUTO) else target.name,
        parent=None if target.name in (BASE, AUTO) else BASE,
        adapters=[source.name for source in target.sources],
        resident=all(source in held for source in target.sources),
    )


def _served(engine: Engine, name: str) -> Target:
    try:
        return engine.catalogue.find(name)
    except DeploymentError as problem:
        raise Refused(404, str(problem), "model", "model_not_found") from None


def _adapters(app: FastAPI, engine: Engine) -> None:
    @app.post("/v1/load_lora_adapter", response_model=Done, responses=errors(400, 404, 409, 422))
    def load(body: LoadRequest) -> Any:
        catalogue, name = engine.catalogue, body.lora_name
        try:
            check_free(name, catalogue.targets)
        except DeploymentError as problem:
            raise Refused(409, str(problem), "lora_name") from None
        try:
            folder = catalogue.inside(body.lora_path)
        except DeploymentError as problem:
            raise Refused(404, str(problem), "lora_path") from None
        try:
            engine.load(name, folder)
        except (MergeProbeError, OSError) as problem:
            shown = str(problem).replace(f"{catalogue.root}/", "")
            raise Refused(400, shown, "lora_path") from None
        return Done(message=f"'{name}' is served")

    @app.post("/v1/unload_lora_adapter", response_model=Done, responses=errors(404, 409, 422))
    async def unload(body: UnloadRequest) -> Any:
        _served(engine, body.lora_name)
        try:
            engine.unload(body.lora_name)
        except DeploymentError as problem:
            raise Refused(409, str(problem), "lora_name") from None
        return Done(message=f"'{body.lora_name}' is served no more")


def _watching(app: FastAPI, engine: Engine) -> None:
    @app.get("/health", response_model=Health, responses=errors(503))
    async def health() -> Any:
        if not engine.alive:
            raise Refused(503, "the server is shutting down")
        return Health(status="ok")

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Any:
        return Response(engine.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _failures(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(request: Request, problem: Refused) -> JSONResponse:
        return error_response(problem)

    @app.exception_handler(DataError)
    async def bad_data(request: Request, problem: DataError) -> JSONResponse:
        return error_response(Refused(400, str(problem)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, problem: RequestValidationError) -> JSONResponse:
        message, field = described(dict(problem.errors()[0]))
        return error_response(Refused(422, message, field))

    @app.exception_handler(HTTPException)
    async def http(request: Request, problem: HTTPException) -> JSONResponse:
        if problem.status_code == 400:  # FastAPI's own, for bytes that are no text
            return error_response(Refused(422, "the body is not JSON: malformed text"))
        body = error_body(problem.status_code, str(problem.detail))
        return JSONResponse(body, problem.status_code, headers=problem.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, problem: Exception) -> JSONResponse:
        log.error("a request failed", exc_info=problem)
        return error_response(Refused(500, "the server failed on this request"))


def _schema(app: FastAPI, engine: Engine, token: str | None) -> dict[str, Any]:
    """The OpenAPI description, with what this server takes now and what the gate asks for."""
    if app.openapi_schema is None:
        app.openapi_schema = FastAPI.openapi(app)
    found = copy.deepcopy(app.openapi_schema)
    known = found["components"]["schemas"]
    names = [*engine.catalogue.targets, *((AUTO,) if engine.router else ())]
    for name in ("ChatRequest", "CompletionRequest"):
        fields = known[name]["properties"]
        fields["model"] = {"type": "string", "title": "Model", "enum": names}
        for field in {"max_tokens", "max_completion_tokens"} & {*fields}:
            for kind in fields[field]["anyOf"]:
                if kind["type"] == "integer":
                    kind["maximum"] = engine.limits.tokens - 1
    for kind in known["CompletionRequest"]["properties"]["prompt"]["anyOf"]:
        if kind["type"] == "array":
            kind["items"] |= {"minimum": 0, "maximum": vocabulary(engine) - 1}
    if token is not None:
        found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"token": []}]
        found["paths"]["/health"]["get"]["security"] = []
    return found
