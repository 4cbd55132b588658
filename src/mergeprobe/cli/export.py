"""export: a deployment as files for other people's servers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergeprobe.cli.options import Force, Json
from mergeprobe.errors import ExportError

if TYPE_CHECKING:
    from mergeprobe.compose.deployment import Deployment
    from mergeprobe.export import Export

EXPORT = (
    "mergeprobe export deployment/ --to vllm --out vllm/",
    "mergeprobe export deployment/ --to llama.cpp --base base.gguf --out gguf/",
    "mergeprobe export deployment/ --to sglang --max-rank 16 --dtype bfloat16 --out sglang/",
    "mergeprobe export deployment/ --to mergekit --adapters adapters/ --out recipes/",
    "mergeprobe export adapters/ --to vllm --out vllm/",
)
DTYPES = ("float32", "bfloat16", "float16")


def export(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DEPLOYMENT",
            help="A deployment, or PEFT folders to serve as they are, each by its name.",
            show_default=False,
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to", help="peft, vllm, sglang, lorax, llama.cpp or mergekit.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder that is written.")] = Path("export"),
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model, to check shapes against and to name in the launch command; "
            "default: the deployment's. llama.cpp: best the .gguf that is served.",
            show_default=False,
        ),
    ] = None,
    max_rank: Annotated[
        int | None,
        typer.Option(min=1, help="Truncate what has a larger rank.", show_default="as it is"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    lower: Annotated[
        bool,
        typer.Option(
            "--lower",
            help="Accept that composed logits and routing by prompt are lost: each adapter is "
            "served by its name. Without it such a deployment is refused.",
        ),
    ] = False,
    every_name: Annotated[
        bool,
        typer.Option(
            "--every-name",
            help="A model for each adapter name, a copy each where several share a folder.",
        ),
    ] = False,
    adapters: Annotated[
        list[Path] | None,
        typer.Option(
            "--adapters",
            help="For mergekit: the original adapters, so that it runs the merge rule itself.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="With --base: a folder with NAME.jsonl, items of an adapter's task; measures "
            "what the export costs in loss.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a deployment for another server: adapters, launch command, validation report.

    What the server can't take is lowered, and the cost is measured on the files written: rank,
    scaling, missing modules. What would change silently is refused.
    """
    import torch

    from mergeprobe.artefact import refuse_existing
    from mergeprobe.cli import show
    from mergeprobe.export import export_deployment
    from mergeprobe.export.report import as_data

    if dtype not in DTYPES:
        raise typer.BadParameter(f"expected {', '.join(DTYPES)}", param_hint="--dtype")
    if adapters and to != "mergekit":
        raise typer.BadParameter("only mergekit runs the merge itself", param_hint="--adapters")
    if data is not None and base is None:
        raise typer.BadParameter("losses are measured with --base", param_hint="--data")
    refuse_existing(out, force=force)
    deployment = _deployment(folder, base)
    done = export_deployment(
        deployment,
        to,
        out,
        base=base,
        max_rank=max_rank,
        dtype=getattr(torch, dtype),
        lower=lower,
        every_name=every_name,
        originals=_originals(adapters),
        force=force,
        **_measured(deployment, base, data),
    )
    show.emit(as_data(done) | {"path": str(out)}) if json else _say(done)


def _deployment(folder: Path, base: str | None) -> Deployment:
    """A deployment's folder, or adapters as one that routes each by its name."""
    from mergeprobe.adapters.sources import is_adapter
    from mergeprobe.cli.sources import read_adapters
    from mergeprobe.compose import read_deployment
    from mergeprobe.compose.deployment import ROUTING
    from mergeprobe.errors import AdapterError
    from mergeprobe.export import unmerged

    if not folder.is_dir():
        raise ExportError(f"'{folder}' is not a folder; expected a deployment with {ROUTING}")
    folders = [folder, *folder.iterdir()]
    if (folder / ROUTING).exists() or not any(is_adapter(path) for path in folders):
        return read_deployment(folder)
    try:
        return unmerged(read_adapters([folder]))
    except AdapterError:
        if base is None:
            raise
        return unmerged(read_adapters([folder], base))  # DoRA and the like


def _originals(adapters: list[Path] | None) -> dict[str, Path] | None:
    from mergeprobe.adapters.sources import expand

    if not adapters:
        return None
    return {path.resolve().name: path for path in expand(adapters, probes=False)}


def _measured(deployment: Deployment, base: str | None, data: Path | None) -> dict[str, Any]:
    """The loaded base and the items that the loss is measured on."""
    if data is None or base is None:
        return {}
    from mergeprobe.adapters.base import load_base
    from mergeprobe.cli import show
    from mergeprobe.evaluate.data import read_examples
    from mergeprobe.plan import check_name

    items = {
        name: read_examples(path)
        for name in deployment.entries
        if (path := data / f"{check_name(name)}.jsonl").exists()
    }
    if not items:
        raise ExportError(f"'{data}' holds no NAME.jsonl of {', '.join(deployment.entries)}")
    with show.working("reading the base") as progress:
        return {"loaded": load_base(base, notify=progress), "examples": items}


def _say(done: Export) -> None:
    from mergeprobe.cli import show

    table = show.table("file", "lowered", "rank", "error", "worst module", left=2)
    for one in done.adapters:
        said = "; ".join(one.lowered) or show.DASH
        table.add_row(one.path, said, str(one.rank), f"{one.error:.2g}", f"{one.worst_error:.2g}")
    show.print_table(f"Export for {done.target}", table)
    if done.losses:
        losses = show.table("adapter", "loss deployed", "loss exported", "difference", "se")
        for name, loss in done.losses.items():
            numbers = asdict(loss)
            keys = ("deployed", "exported", "difference", "se")
            losses.add_row(name, *(f"{numbers[key]:.4f}" for key in keys))
        show.print_table("Cost in loss", losses)
    console = show.console()
    for line in done.lowered:
        console.print(f"Lowered: {line}.")
    untold = sorted({c.name for one in done.adapters for c in one.checks if c.ok is None})
    if untold:
        console.print(f"Not told: {', '.join(untold)}; README.md says what would tell.")
    start = next((name for name in done.launch if name.endswith((".sh", ".py"))), "README.md")
    console.print(f"Written to '{done.path}'; start with {start}, README.md has the checks.")
