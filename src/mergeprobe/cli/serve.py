"""serve: a deployment behind the OpenAI API."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

SERVE = (
    "mergeprobe serve deployment/",
    "mergeprobe serve deployment/ --base ./base --port 8080 --pin math --max-adapters 4",
    "mergeprobe serve deployment/ --host 0.0.0.0 --token secret",
)


def serve(
    deployment: Annotated[
        Path, typer.Argument(help="A folder that `mergeprobe apply` wrote.", show_default=False)
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model: a hub id, a folder, a .gguf file or an alias.",
            show_default="the one that the deployment names",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address; others than loopback need a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="MERGEPROBE_TOKEN",
            help="What clients send as API key. The variable keeps it out of process lists.",
            show_default=False,
        ),
    ] = None,
    max_adapters: Annotated[
        int, typer.Option(min=1, help="Adapters on the device at once; the others wait on disk.")
    ] = 8,
    pin: Annotated[
        list[str] | None,
        typer.Option(help="An adapter that never leaves the device; may be repeated."),
    ] = None,
    max_batch: Annotated[
        int,
        typer.Option(min=1, help="Rows decoded at once: one a request, more for a composition."),
    ] = 16,
    max_queue: Annotated[
        int, typer.Option(min=0, help="Requests that may wait; more are told to try again (429).")
    ] = 256,
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens of a prompt and its answer together.")
    ] = 2048,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 1 << 20,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take.")] = 300,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds that running answers have to end at shutdown.")
    ] = 10,
    adapters_root: Annotated[
        Path | None,
        typer.Option(
            help="The folder that adapters may be loaded from while it runs.",
            show_default="the one the deployment lies in",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Try a deployment: an OpenAI-compatible server for its adapters, all in one batch.

    `model` is an adapter's name, a group's, `base`, or `auto` where the deployment has a router.
    It is a reference to try things with, not a replacement for vLLM.
    """
    from mergeprobe.adapters.base import load_base
    from mergeprobe.cli import show
    from mergeprobe.compose import read_deployment
    from mergeprobe.errors import DeploymentError

    try:
        from mergeprobe.serve.engine import Limits
        from mergeprobe.serve.server import bound, make_engine
        from mergeprobe.serve.server import serve as run
    except ModuleNotFoundError as problem:
        raise DeploymentError(
            f"serving needs {problem.name}: pip install 'mergeprobe[serve]'"
        ) from None
    with bound(host, port, token or None) as at:
        found = read_deployment(deployment)
        if not (base or found.base):
            raise DeploymentError(f"'{deployment}' names no base model; give it with --base")
        with show.working("loading") as progress:
            loaded = load_base(base or found.base, device=device, notify=progress)
        limits = Limits(max_adapters, max_batch, max_queue, max_tokens, timeout, max_body)
        engine = make_engine(loaded, found, limits, pinned=pin or (), root=adapters_root)

        def ready(url: str) -> None:
            names = ", ".join(engine.catalogue.targets)
            auto = ", and 'auto' by prompt" if engine.router else ""
            show.console().print(f"Serving {names}{auto} on {url}/v1", soft_wrap=True)
            sys.stdout.flush()

        run(engine, at, token=token or None, grace=grace, ready=ready)
