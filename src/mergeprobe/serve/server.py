"""From a deployment to a running server, and to its clean end."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from mergeprobe.adapters.base import Base
from mergeprobe.compose.deployment import Deployment
from mergeprobe.errors import BaseModelError, DeploymentError
from mergeprobe.serve.app import make_app
from mergeprobe.serve.catalogue import catalogue_of
from mergeprobe.serve.engine import LIMITS, Engine, Limits
from mergeprobe.serve.gate import is_loopback

SWITCH = 5e-4
"""Seconds after which a Python thread that wants to run gets to. The engine's thread gives way at
every tensor operation, thousands a token; at Python's 5 ms each could cost it that much whenever
the other thread answers requests."""


def bound(host: str, port: int, token: str | None) -> socket.socket:
    """A socket at that address, which does not listen yet; port 0 takes a free one.

    Raises DeploymentError for an address that others can reach where there is no token, or that
    cannot be had.
    """
    if token is None and not is_loopback(host):
        raise DeploymentError(
            f"'{host}' can be reached from other machines and there is no token; give --token "
            "(or MERGEPROBE_TOKEN), or serve on 127.0.0.1"
        )
    if token is not None and (
        not token.isascii() or not token.isprintable() or token.strip() != token or not token
    ):
        raise DeploymentError("the token must be printable ASCII without spaces around it")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except (OSError, OverflowError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise DeploymentError(f"cannot serve on {host} port {port}: {reason}") from None
    return made


def make_engine(
    base: Base,
    deployment: Deployment,
    limits: Limits = LIMITS,
    *,
    pinned: Iterable[str] = (),
    root: Path | None = None,
) -> Engine:
    """The engine for a deployment. The most tokens are those that the base can take, if fewer.

    Raises AdapterMismatch for another base, DeploymentError for limits that cannot hold what is
    pinned or a composition, BaseModelError for a base that the server can't decode.
    """
    most = getattr(base.model.config, "max_position_embeddings", None)
    if most is not None and most < 2:
        raise BaseModelError(f"base model '{base.name}' takes {most} tokens; expected more")
    limits = replace(limits, tokens=min(limits.tokens, most or limits.tokens))
    catalogue = catalogue_of(base, deployment, root=root)
    made_for = deployment.router.base_fingerprint if deployment.router else None
    if made_for and made_for != base.fingerprint:
        raise BaseModelError(
            f"the deployment's router was made on base {made_for}, but the base given is "
            f"{base.fingerprint} ({base.name})"
        )
    return Engine(catalogue, limits, router=deployment.router, pinned=tuple(pinned))


def serve(
    engine: Engine,
    at: socket.socket,
    *,
    token: str | None = None,
    grace: float = 10.0,
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serves until SIGTERM or SIGINT: then nothing new is taken, what waits is told so, and what
    runs has `grace` seconds to end. ready: called with the address once requests are taken."""
    sys.setswitchinterval(SWITCH)
    app = make_app(engine, token=token)
    config = uvicorn.Config(
        app,
        log_level=logging.WARNING,
        access_log=False,
        timeout_graceful_shutdown=int(grace) + 5,
        timeout_keep_alive=30,
        backlog=2048,
        server_header=False,
    )
    server = _Server(config, engine, grace, lambda: ready(address_of(at)))
    with _ignored(signal.SIGTERM, signal.SIGINT):
        server.run(sockets=[at])


def address_of(at: socket.socket) -> str:
    host, port = at.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class _Server(uvicorn.Server):
    """Tells the engine at once that the end has come, and the caller that it has begun."""

    def __init__(
        self, config: uvicorn.Config, engine: Engine, grace: float, ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.engine, self.grace, self.ready = engine, grace, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.engine.drain(self.grace)
        super().handle_exit(sig, frame)


def _ignored(*signals: signal.Signals) -> ExitStack:
    """Within the block a signal that uvicorn sends on, once it has ended, ends nothing more."""
    stack = ExitStack()
    for each in signals:
        before: Any = signal.signal(each, lambda number, frame: None)
        stack.callback(signal.signal, each, before)
    return stack
