"""merge: any rule over adapter folders, by options or a mergekit config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergeprobe.cli.asked import (
    Asked,
    folders_of,
    from_config,
    only_config,
    options_of,
    probes_of,
    weights_of,
)
from mergeprobe.cli.options import Extras, Force, Json, ReadingRank

if TYPE_CHECKING:
    from mergeprobe.compose.merge.stream import Progress, Written

MERGE = (
    "mergeprobe merge adapters/math adapters/code --out merged/",
    "mergeprobe merge math/ code/ --method linear --weights 1,0.5 --rank 16 --out merged/",
    "mergeprobe merge adapters/ --method ties --density 0.3 --space knots --out merged/",
    "mergeprobe merge adapters/ --method regmean --probes probes/ --out merged/",
    "mergeprobe merge --config mergekit.yaml --out merged/",
)
NAMED = ("density", "scale", "alpha", "epsilon", "gamma")
Number = Annotated[float | None, typer.Option(show_default=False, help="Short for --option.")]


def merge(
    adapters: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="ADAPTER",
            help="PEFT adapter folders, or folders that hold several.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The merged PEFT folder.")] = Path("merged"),
    method: Annotated[
        str | None,
        typer.Option(help="A rule; `docs/methods` has a page of each.", show_default="mean"),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="One number for each adapter, 1,0.5; again for factors on a part of the model: "
            "late=1,0 (early, middle, late, attention, mlp, other).",
            show_default="uniform",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Of what is written; truncates.", show_default="exact"),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="An option of the rule, name=number.", metavar="K=V"),
    ] = None,
    density: Number = None,
    scale: Number = None,
    alpha: Number = None,
    epsilon: Number = None,
    gamma: Number = None,
    scaling: Annotated[
        float | None, typer.Option(help="Of the merge as a whole, λ.", show_default="1")
    ] = None,
    space: Annotated[str, typer.Option(help="In which the rule runs: full, knots, core.")] = "full",
    probes: Annotated[
        list[Path] | None,
        typer.Option(help="Probes of the adapters, for rules that need data.", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model: to read DoRA and the like, to search weights, for --full-weights.",
            show_default=False,
        ),
    ] = None,
    full_weights: Annotated[
        bool, typer.Option("--full-weights", help="Write the base model with the merge added.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of what the rule draws at random.")] = 0,
    exact_svd: Annotated[
        bool, typer.Option("--exact-svd", help="Truncate by full SVDs only: slower, no closer.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(help="A mergekit YAML file in place of adapters and rule.", dir_okay=False),
    ] = None,
    read_rank: ReadingRank = None,
    extras: Extras = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Merge adapters by one rule and say how exactly the result carries it out.

    One plain LoRA is written, which stock PEFT and LoRA servers load. Memory holds one module of
    every adapter at a time.
    """
    from mergeprobe.artefact import refuse_existing
    from mergeprobe.cli import show

    named = {"density": density, "scale": scale, "alpha": alpha, "epsilon": epsilon, "gamma": gamma}
    given = {key: value for key, value in named.items() if value is not None} | options_of(option)
    refuse_existing(out, force=force)
    if config is not None:
        only_config(adapters, method, weights, given, scaling)
        asked = from_config(config)
    else:
        asked = Asked(folders_of(adapters), method or "mean", given, weights_of(weights))
        asked.scaling = 1.0 if scaling is None else scaling
    read = {"read_rank": read_rank, "extras": extras}
    if full_weights and (rank is not None or exact_svd or any(read.values())):
        raise typer.BadParameter(
            "the base's own weights have no rank and no extras: drop --rank, --exact-svd, "
            "--read-rank and --extras",
            param_hint="--full-weights",
        )
    common = {"out": out, "space": space, "seed": seed, "force": force}
    stated = _searched(asked, base, probes) if _is_search(asked) else {}
    found = probes_of(probes) if probes and not stated else None
    with _bar() as progress:
        common |= {"probes": found, "scaling": asked.scaling, "progress": progress}
        if full_weights:
            done = _into_base(asked, base, common, stated)
        else:
            done = _into_lora(asked, base, common | read, stated, rank, exact_svd)
    show.emit(_told(done, asked, stated)) if json else _say(done, asked, stated)


def _into_lora(
    asked: Asked,
    base: str | None,
    common: dict[str, Any],
    stated: dict[str, Any],
    rank: int | None,
    exact_svd: bool,
) -> Written:
    import torch

    from mergeprobe.compose.merge.stream import merge_folders

    return merge_folders(
        asked.folders,
        "linear" if stated else asked.method,
        weights=asked.weights,
        rank=rank,
        exact_svd=exact_svd,
        dtype=getattr(torch, asked.dtype),
        base=base,
        stated=stated,
        **common,
        **({} if stated else asked.options),
    )


def _into_base(
    asked: Asked, base: str | None, common: dict[str, Any], stated: dict[str, Any]
) -> Written:
    from mergeprobe.compose.merge.export import merge_into_base

    if base is None:
        raise typer.BadParameter("it needs --base, whose weights it adds to", param_hint="--base")
    return merge_into_base(
        asked.folders,
        "linear" if stated else asked.method,
        base=base,
        weights=asked.weights,
        stated=stated,
        **common,
        **({} if stated else asked.options),
    )


def _is_search(asked: Asked) -> bool:
    """MergeError for a rule or an option that is not known."""
    from mergeprobe.compose.merge import check_options

    return check_options(asked.method, asked.options).kind == "search"


def _searched(asked: Asked, base: str | None, probes: list[Path] | None) -> dict[str, Any]:
    """Searches weights, puts them into `asked`, and says for the card how they were found."""
    from mergeprobe.adapters.base import load_base
    from mergeprobe.cli import show
    from mergeprobe.cli.sources import read_adapters
    from mergeprobe.compose.merge.data import probes_for
    from mergeprobe.errors import MergeError
    from mergeprobe.evaluate.weights import search_weights
    from mergeprobe.predict.early import calibration_batch

    if base is None:
        raise MergeError(f"'{asked.method}' runs the base model: give it with --base")
    if asked.weights is not None:
        raise MergeError(f"'{asked.method}' finds the weights itself; drop --weights")
    adapters = list(read_adapters(asked.folders).values())
    names = [adapter.name for adapter in adapters]
    given = probes_for(asked.method, ("calibration",), names, probes_of(probes) if probes else None)
    batches = [calibration_batch(probe, 32) for probe in given]
    with show.working("searching weights") as progress:
        loaded = load_base(base, notify=progress)
        found = search_weights(loaded, adapters, batches, asked.method, **asked.options)
    asked.weights = found.weights
    search = found.search
    return {
        "method": asked.method,
        "options": asked.options,
        "search": {"value": search.value, "start": search.start, "evaluations": search.evaluations},
    }


@contextmanager
def _bar() -> Iterator[Progress]:
    """A progress bar over modules on a terminal's stderr; nothing elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from mergeprobe.cli import show

    screen = show.console(err=True)
    columns = (
        TextColumn("merging"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[at]}"),
    )
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", total=None, at="")
        yield lambda done, of, module: bar.update(task, completed=done, total=of, at=module)


def _told(done: Written, asked: Asked, stated: dict[str, Any]) -> dict[str, Any]:
    return {
        "path": done.path,
        "merged_from": list(done.names),
        "method": asked.method,
        "rank": done.rank,
        "exact_rank": done.exact_rank,
        "parameters": done.parameters,
        "error": done.certificate.total,
        "worst_error": done.certificate.worst,
        "modules": done.certificate.modules,
        "read_error": done.read_error,
        "notes": list(asked.notes),
        **({"weights": asked.weights, "search": stated["search"]} if stated else {}),
    }


def _say(done: Written, asked: Asked, stated: dict[str, Any]) -> None:
    from mergeprobe.cli import show

    names = ", ".join(f"'{name}'" for name in done.names)
    screen = show.console()
    what = f"at rank {done.rank}" if done.rank else "into the base model"
    screen.print(f"{names} merged by {asked.method} {what}, written to '{done.path}'.")
    if stated and asked.weights:
        screen.print(f"Weights found in {stated['search']['evaluations']} evaluations:")
        for part, weights in asked.weights.items():
            screen.print(f"  {part}: {', '.join(f'{weight:.3f}' for weight in weights)}")
    for note in asked.notes:
        screen.print(f"Note: {note}.")
    for name, lost in done.read_error.items():
        screen.print(f"'{name}' was truncated as it was read: relative error {lost:.4f}.")
    certificate = done.certificate
    if certificate.total == 0.0:
        screen.print("Certificate: exact, nothing was truncated.")
        return
    worst = max(certificate.modules, key=lambda module: certificate.modules[module])
    screen.print(
        f"Certificate: relative error {certificate.total:.4g} against the exact rule, at worst "
        f"{certificate.worst:.4g} in '{worst}'."
    )
