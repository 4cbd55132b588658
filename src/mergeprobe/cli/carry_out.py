"""apply and merge: decisions carried out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergeprobe.cli.options import Adapters, Force, Json

if TYPE_CHECKING:
    from mergeprobe.plan import Plan

APPLY = (
    "mergeprobe apply plan.json --adapters adapters/ --out deployment/",
    "mergeprobe apply plan.json adapters/math adapters/code --out deployment/ --force",
)
MERGE = (
    "mergeprobe merge adapters/math adapters/code --out merged/",
    "mergeprobe merge math/ code/ --method linear --weights 1,0.5 --rank 16 --out merged/",
    "mergeprobe merge adapters/ --method ties --density 0.3 --rank 32 --out merged/",
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
    force: Force = False,
    json: Json = False,
) -> None:
    """Carry out a plan: PEFT folders that stock PEFT loads, and routing.json.

    Nothing is decided here. A plan for other adapters is refused, by name.
    """
    from mergeprobe.artefact import refuse_existing
    from mergeprobe.cli import show
    from mergeprobe.cli.sources import read_adapters
    from mergeprobe.compose import apply_plan
    from mergeprobe.plan import read_plan

    wanted = read_plan(plan)
    refuse_existing(out, force=force)
    given = [*(adapters or ()), *(folders or ())] or _paths(wanted)
    done = apply_plan(wanted, read_adapters(given), out, force=force)
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


def merge(
    adapters: Adapters,
    out: Annotated[Path, typer.Option(help="The merged PEFT folder.", show_default=False)],
    method: Annotated[
        str, typer.Option(help="mean, linear, sum, norm_preserving_mean, ties or svc.")
    ] = "mean",
    weights: Annotated[
        str | None,
        typer.Option(help="One number for each adapter: 1,0.5", show_default="uniform"),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Of what is written; truncates.", show_default="exact"),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="ties: the share of entries kept.", show_default="0.2")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="sum: multiplies the sum.", show_default="1")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="svc: its alpha.", show_default="0.1")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Merge adapters by one rule and say how exactly the result carries it out."""
    from mergeprobe.adapters.checkpoint import write_adapter
    from mergeprobe.artefact import refuse_existing
    from mergeprobe.cli import show
    from mergeprobe.cli.sources import read_adapters
    from mergeprobe.compose import merge as merged_by

    given = _numbers(weights)
    refuse_existing(out, force=force)
    parts = list(read_adapters(adapters).values())
    chosen = {"density": density, "scale": scale, "alpha": alpha}
    options = {key: value for key, value in chosen.items() if value is not None}
    made = merged_by(parts, method, weights=given, rank=rank, name=out.name, **options)
    write_adapter(made.adapter, out, card=made.adapter.card, force=force)
    certificate, largest = made.certificate, max(made.adapter.ranks)
    if json:
        show.emit(
            {
                "path": out,
                "merged_from": [part.name for part in parts],
                "method": method,
                "rank": largest,
                "parameters": made.adapter.parameters,
                "error": certificate.total,
                "worst_error": certificate.worst,
                "modules": certificate.modules,
            }
        )
        return
    names = ", ".join(f"'{part.name}'" for part in parts)
    screen = show.console()
    screen.print(f"{names} merged by {method} at rank {largest}, written to '{out}'.")
    if certificate.total == 0.0:
        screen.print("Certificate: exact, nothing was truncated.")
        return
    worst = max(certificate.modules, key=lambda module: certificate.modules[module])
    screen.print(
        f"Certificate: relative error {certificate.total:.4f} against the exact rule, at worst "
        f"{certificate.worst:.4f} in '{worst}'."
    )


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"'{text}' is no list of numbers; expected one for each adapter, such as 1,0.5",
            param_hint="--weights",
        ) from None


def _paths(plan: Plan) -> list[Path]:
    """Where the plan itself says its adapters are."""
    found = [Path(ref.path) for ref in plan.adapters if ref.path]
    if len(found) < len(plan.adapters):
        raise typer.BadParameter(
            "the plan does not say where its adapters are; give their folders",
            param_hint="--adapters",
        )
    return found
