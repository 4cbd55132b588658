"""apply: a plan carried out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergeprobe.cli.options import Force, Json, ReadingBase, ReadingRank
from mergeprobe.cli.routing import RouterProbes, RouterPrompts, Trained, router_of
from mergeprobe.errors import PlanError

if TYPE_CHECKING:
    from mergeprobe.compose.router import Router
    from mergeprobe.plan import Plan

APPLY = (
    "mergeprobe apply plan.json --adapters adapters/ --out deployment/",
    "mergeprobe apply plan.json adapters/math adapters/code --out deployment/ --force",
    "mergeprobe apply plan.json --adapters adapters/ --probes probes/ --base ./base",
)


def apply(
    plan: Annotated[Path, typer.Argument(help="A plan.json.", show_default=False)],
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="ADAPTER",
            help="PEFT folders, matched to the plan by folder name; the same as --adapters.",
            show_default=False,
        ),
    ] = None,
    adapters: Annotated[
        list[Path] | None,
        typer.Option(
            "--adapters",
            help="A PEFT folder, or one that holds several; default: the paths in the plan.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The deployment folder.")] = Path("deployment"),
    base: ReadingBase = None,
    probes: RouterProbes = None,
    prompts: RouterPrompts = None,
    trained_router: Trained = False,
    read_rank: ReadingRank = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Carry out a plan: PEFT folders that stock PEFT loads, and routing.json.

    Nothing is decided here. A plan for other adapters is refused, by name.
    """
    from mergeprobe.artefact import refuse_existing
    from mergeprobe.cli import show
    from mergeprobe.cli.asked import probes_of
    from mergeprobe.cli.sources import read_adapters
    from mergeprobe.compose import apply_plan
    from mergeprobe.plan import read_plan

    wanted = read_plan(plan)
    refuse_existing(out, force=force)
    given = [*(adapters or ()), *(folders or ())] or _paths(wanted)
    done = apply_plan(
        wanted,
        read_adapters(given, base, rank=read_rank),
        out,
        probes=probes_of(probes) if probes else None,
        router=_router(wanted, base, probes, prompts, trained_router),
        force=force,
    )
    if json:
        entries = {name: asdict(entry) for name, entry in done.entries.items()}
        show.emit(
            {
                "path": out,
                "resident_parameters": done.resident_parameters,
                "full_routing_parameters": wanted.full_routing_parameters,
                "entries": entries,
            }
        )
        return
    table = show.table("adapter", "served by", "action", "method", "error", left=4)
    for name, entry in done.entries.items():
        row = (name, entry.folder, entry.action.value, entry.method or show.DASH)
        table.add_row(*row, f"{entry.error:.3g}")
    show.print_table("Deployment", table)
    show.console().print(
        f"{done.resident_parameters:,} resident parameters, written to '{out}'. The error is that "
        "of truncation against the exact rule, not of retention: `mergeprobe evaluate` measures it."
    )


def _router(
    plan: Plan,
    base: str | None,
    probes: list[Path] | None,
    prompts: Path | None,
    trained: bool,
) -> Router | None:
    """The router that the plan needs, None if it needs none."""
    from mergeprobe.adapters.base import load_base
    from mergeprobe.cli import show
    from mergeprobe.compose.apply import needs_router

    if not needs_router(plan):
        return None
    if base is None or (probes is None and prompts is None):
        raise PlanError(
            "the plan routes by prompt, so a router has to be made: give --base, and --probes or "
            "--prompts"
        )
    with show.working("reading prompts") as progress:
        return router_of(load_base(base, notify=progress), probes, prompts, trained=trained)


def _paths(plan: Plan) -> list[Path]:
    """Where the plan itself says its adapters are."""
    found = [Path(ref.path) for ref in plan.adapters if ref.path]
    if len(found) < len(plan.adapters):
        raise typer.BadParameter(
            "the plan does not say where its adapters are; give their folders",
            param_hint="--adapters",
        )
    return found
