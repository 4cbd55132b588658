"""evaluate, report and doctor: what came out, and what is wrong."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mergeprobe.cli.options import Adapters, Json, ReadingBase
from mergeprobe.errors import DataError, DeploymentError

EVALUATE = (
    "mergeprobe evaluate runs/demo",
    "mergeprobe evaluate runs/demo --json",
    "mergeprobe evaluate deployment/ --adapters adapters/ --base ./base --data held_out/",
)
REPORT = ("mergeprobe report runs/demo", "mergeprobe report runs/demo --out page.html")
DOCTOR = (
    "mergeprobe doctor adapters/*",
    "mergeprobe doctor adapters/ --json",
    "mergeprobe doctor dora/ --base ./base",
)


def evaluate(
    folder: Annotated[
        Path, typer.Argument(help="A run's folder or a deployment.", show_default=False)
    ],
    adapters: Annotated[
        list[Path] | None,
        typer.Option(
            "--adapters",
            help="For a deployment: the adapters that went in.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="For a deployment: the base model.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="For a deployment: a folder with NAME.jsonl, held-out items of each adapter.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=2, help="Use the first items of each file.", show_default="all"),
    ] = None,
    json: Json = False,
) -> None:
    """Measured retention, with standard errors: of a demo run, or of a deployment on your data.

    Gain retention: the share of the adapter's own gain (in loss) that is left. Ratio retention:
    its token probability deployed over that alone.
    """
    from mergeprobe.cli import show
    from mergeprobe.cli.tables import show_deployed, show_results

    if (folder / "run.json").exists():
        from mergeprobe.bench.folder import RunFolder
        from mergeprobe.bench.summary import summary

        found = summary(RunFolder(folder))
        shown = show_results
    elif (folder / "routing.json").exists():
        if not adapters or base is None or data is None:
            raise typer.BadParameter(
                "a deployment is measured with --adapters, --base and --data", param_hint="FOLDER"
            )
        found = _measure(folder, adapters, base, data, limit)
        shown = show_deployed
    else:
        raise DataError(f"'{folder}' is neither a run (run.json) nor a deployment (routing.json)")
    if json:
        show.emit(found)
    else:
        shown(found)


def _measure(
    folder: Path, adapters: list[Path], base: str, data: Path, limit: int | None
) -> dict[str, Any]:
    from mergeprobe.adapters.base import load_base
    from mergeprobe.cli import show
    from mergeprobe.cli.sources import read_adapters
    from mergeprobe.compose import read_deployment
    from mergeprobe.evaluate.data import read_examples
    from mergeprobe.evaluate.deployed import deployed_retention
    from mergeprobe.evaluate.retention import set_retention
    from mergeprobe.plan import check_name

    deployment = read_deployment(folder)
    with show.working("reading") as progress:
        loaded = load_base(base, notify=progress)
    given = read_adapters(adapters, loaded)
    if lacking := [name for name in deployment.entries if name not in given]:
        raise DeploymentError(
            f"the deployment serves {lacking}, not among the adapters given: {sorted(given)}"
        )
    items = {
        name: read_examples(data / f"{check_name(name)}.jsonl")[:limit]
        for name in deployment.entries
    }
    with show.working("measuring") as progress:
        found = deployed_retention(loaded, deployment, given, items, progress=progress)
    known = any(part.gain is not None for part in found.values())
    total = set_retention(found) if known else None
    return {
        "deployment": str(folder),
        "resident_parameters": deployment.resident_parameters,
        "mean_retention": total.mean if total else None,
        "mean_se": total.mean_se if total else None,
        "worst_retention": total.worst if total else None,
        "worst_se": total.worst_se if total else None,
        "worst_adapter": total.worst_adapter if total else None,
        "adapters": [
            {
                "name": name,
                "served_by": deployment.entries[name].folder,
                "measured": part.gain,
                "measured_se": part.gain_se,
                "ratio_retention": part.ratio,
                "ratio_retention_se": part.ratio_se,
                "own_gain": part.own_gain,
                "own_gain_se": part.own_gain_se,
                "items": part.items,
                "note": part.note,
            }
            for name, part in found.items()
        ],
    }


def report(
    folder: Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="The page.", show_default="report.html in the folder")
    ] = None,
) -> None:
    """Write a run's page again from its files: one HTML file that opens offline."""
    from mergeprobe.bench.folder import RunFolder
    from mergeprobe.bench.results import write_page
    from mergeprobe.cli import show

    run = RunFolder(folder)
    run.config()
    if not run.outcomes.exists():
        raise DataError(f"'{folder}' is not measured yet; let its `mergeprobe demo` end first")
    show.console().print(f"Written to '{write_page(run, out)}'.")


def doctor(adapters: Adapters, base: ReadingBase = None, json: Json = False) -> None:
    """Examine adapters: what they are, what is wrong, what will merge and what won't.

    Adapters whose update depends on the base model need --base: the others do without.

    Status 0 if all of them can be merged with each other, else 1. Whether a merge that is
    possible is also good is a forecast: see `mergeprobe plan`.
    """
    from mergeprobe.adapters.doctor import examine
    from mergeprobe.cli import say, show
    from mergeprobe.cli.sources import expand, opened
    from mergeprobe.cli.tables import show_examination

    paths = expand(adapters, probes=False)
    with show.working("examining"):
        found = examine(paths, opened(base))
    if json:
        show.emit(asdict(found))
    else:
        show_examination(found)
    bad = [finding.name for finding in found.findings if not finding.mergeable]
    if bad:
        names = ", ".join(f"'{name}'" for name in bad)
        say(f"{len(bad)} of {len(found.findings)} adapters cannot be merged: {names}")
    elif len(found.groups) > 1:
        say(f"the adapters fall into {len(found.groups)} groups that do not merge with each other")
    if bad or len(found.groups) > 1:
        raise typer.Exit(1)
