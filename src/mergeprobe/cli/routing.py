"""route: which adapter a prompt is for, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergeprobe.cli.options import Json
from mergeprobe.errors import DataError, DeploymentError

if TYPE_CHECKING:
    from mergeprobe.adapters.base import Base
    from mergeprobe.compose.router import Choice, Router

ROUTE = (
    'mergeprobe route "What is 12 times 7?" --deployment deployment/',
    'mergeprobe route "SELECT the oldest" --probes probes/ --base smollm2-135m-instruct-q4',
    "mergeprobe route --deployment deployment/ --json < prompts.txt",
)
RouterProbes = Annotated[
    list[Path] | None,
    typer.Option(
        "--probes",
        help="Probes of the adapters: for rules that need data, and for a router, which is made "
        "from their calibration prompts.",
        show_default=False,
    ),
]
RouterPrompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="For a router: a folder with NAME.jsonl or NAME.txt, example prompts of each adapter.",
        show_default=False,
    ),
]

Trained = Annotated[
    bool,
    typer.Option(
        "--trained-router",
        help="For a router: choose by a classifier trained on the prompts' states, not by the "
        "nearest centroid.",
    ),
]


def route(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="Prompts; default: the lines of standard input."),
    ] = None,
    deployment: Annotated[
        Path | None,
        typer.Option(help="A deployment whose plan routes by prompt.", show_default=False),
    ] = None,
    probes: RouterProbes = None,
    examples: RouterPrompts = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Base model.", show_default="the deployment's"),
    ] = None,
    trained: Trained = False,
    json: Json = False,
) -> None:
    """Say which adapter a prompt is for, and how sure that is.

    The base model reads the prompt; its states are compared with those of each adapter's example
    prompts. What is farther than those lie from each other goes to the base model. Where two
    adapters' prompts look alike, that is said, and nothing is promised.
    """
    from mergeprobe.adapters.base import load_base
    from mergeprobe.cli import show
    from mergeprobe.compose.router_file import route as routed

    texts = _texts(prompts)
    if sum(given is not None for given in (deployment, probes, examples)) != 1:
        raise typer.BadParameter(
            "give one of --deployment, --probes and --prompts: what to route between"
        )
    with show.working("reading") as progress:
        if deployment is not None:
            router, name = _deployed(deployment)
            loaded = load_base(_needed(base or name), notify=progress)
        else:
            loaded = load_base(_needed(base), notify=progress)
            router = router_of(loaded, probes, examples, trained=trained)
            assert router is not None
        choices = routed(router, loaded, texts)
    if json:
        show.emit([_told(text, one) for text, one in zip(texts, choices, strict=True)])
        return
    for text, choice in zip(texts, choices, strict=True):
        _say(text, choice)


def _texts(prompts: Sequence[str] | None) -> list[str]:
    import sys

    if prompts:
        return list(prompts)
    if sys.stdin.isatty():
        raise typer.BadParameter("give a prompt, or prompts on standard input", param_hint="PROMPT")
    found = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not found:
        raise DataError("standard input held no prompt; expected one a line")
    return found


def _needed(base: str | None) -> str:
    if not base:
        raise typer.BadParameter("a router reads prompts with the base model", param_hint="--base")
    return base


def _deployed(folder: Path) -> tuple[Router, str]:
    from mergeprobe.compose import read_deployment

    found = read_deployment(folder)
    if found.router is None:
        raise DeploymentError(
            f"'{folder}' routes by name only: it has no router; plan with --route-by prompt"
        )
    return found.router, found.base


def router_of(
    base: Base | None,
    probes: Sequence[Path] | None,
    prompts: Path | None,
    *,
    trained: bool = False,
) -> Router | None:
    """A router from whichever is given, None if neither or no base model is."""
    from mergeprobe.cli.asked import probes_of
    from mergeprobe.compose.router_file import make_router, router_from_probes
    from mergeprobe.evaluate.data import read_prompts

    if base is None or (probes is None and prompts is None):
        return None
    if prompts is None:
        return router_from_probes(base, list(probes_of(probes or ()).values()), trained=trained)
    files = sorted(p for p in prompts.glob("*") if p.suffix in (".jsonl", ".txt"))
    if not files:
        raise DataError(f"'{prompts}' holds no NAME.jsonl or NAME.txt with example prompts")
    return make_router(base, {path.stem: read_prompts(path) for path in files}, trained=trained)


def _told(text: str, choice: Choice) -> dict[str, Any]:
    return {
        "prompt": text,
        "adapter": choice.name,
        "certain": choice.certain,
        "rivals": list(choice.rivals),
        "distances": choice.distances,
    }


def _say(text: str, choice: Choice) -> None:
    from mergeprobe.cli import show

    table = show.table("adapter", "distance", "", left=1)
    for name, distance in choice.distances.items():
        mark = "chosen" if name == choice.name else "" if distance <= 1 else "too far"
        table.add_row(name, show.number(distance), mark)
    show.print_table(_shortened(text), table)
    show.console().print(_why(choice))


def _why(choice: Choice) -> str:
    nearest, distance = next(iter(choice.distances.items()))
    if choice.name is None:
        return (
            f"To the base model: the nearest task, '{nearest}', is {distance:.2f} times as far as "
            "its own farthest example prompt may be."
        )
    said = f"To '{choice.name}', whose prompts are nearest; 1 is as far as its own may be."
    if choice.certain:
        return said
    rivals = " and ".join(f"'{rival}'" for rival in choice.rivals)
    return (
        f"{said} Not certain: prompts of '{choice.name}' look like those of {rivals}, so a prompt "
        "alone can't tell which is meant; name the adapter."
    )


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 70 else line[:69] + "…"
