"""probe and signals: what is measured before anything is decided."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergeprobe.cli.options import Force, Json, NeededBase, ReadingBase, Sources

if TYPE_CHECKING:
    import polars as pl

PROBE = (
    "mergeprobe probe math/checkpoint-40 --base smollm2-135m-instruct-q4 --data math.jsonl "
    "--out probes/math.safetensors",
    "mergeprobe probe math/ --base ./base --data math.jsonl --out math.safetensors --no-text",
)
SIGNALS = (
    "mergeprobe signals probes/",
    "mergeprobe signals probes/*.safetensors --out signals.parquet",
    "mergeprobe signals adapters/* --json",
)

# what the table shows of the pair signals; the file and --json hold all of them
PAIR_COLUMNS = {
    "frobenius_cosine": "cosine",
    "output_overlap": "output overlap",
    "gradient_cosine_base": "gradient cosine",
    "interference_ratio": "interference",
    "drift_cosine": "drift cosine",
    "shared_init": "shared init",
}
ADAPTER_COLUMNS = {
    "update_norm": "norm",
    "relative_norm": "relative norm",
    "effective_rank": "effective rank",
    "own_gain": "own gain",
    "loss_slope": "loss slope",
}


def probe(
    adapter: Annotated[
        Path,
        typer.Argument(help="A PEFT folder: an early checkpoint of a run.", show_default=False),
    ],
    base: NeededBase,
    data: Annotated[
        Path,
        typer.Option(
            help="JSON lines with prompt and completion, items of the task itself; 32 are used.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The probe, NAME.safetensors.", show_default=False)],
    step: Annotated[
        int | None, typer.Option(min=1, help="The optimizer step; default: what the folder says.")
    ] = None,
    planned: Annotated[
        int | None, typer.Option(min=1, help="Steps that the run plans; default as for --step.")
    ] = None,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Keep the items' token ids out of the file.")
    ] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Measure one early checkpoint.

    In a training script the callback does it by itself:
    callbacks=(MergeProbeCallback("probes/math.safetensors"),)
    """
    from mergeprobe.adapters.base import load_base
    from mergeprobe.adapters.checkpoint import read_adapter
    from mergeprobe.artefact import refuse_existing
    from mergeprobe.capture.checkpoint import probe_checkpoint
    from mergeprobe.capture.probe import write_probe
    from mergeprobe.cli import show
    from mergeprobe.evaluate.data import read_examples
    from mergeprobe.plan import check_name

    refuse_existing(out, force=force)
    name = check_name(out.stem)
    examples = read_examples(data)
    read_adapter(adapter)  # a folder that cannot be read is found before the model is loaded
    with show.working("probing") as progress:
        loaded = load_base(base, notify=progress)
        progress(f"{name} on {min(32, len(examples))} items")
        taken = probe_checkpoint(
            adapter,
            loaded,
            [(item.prompt, item.completion) for item in examples],
            name=name,
            step=step,
            planned_steps=planned,
            store_text=not no_text,
        )
        write_probe(taken, out, force=force)
    assert taken.calibration is not None
    gain = float((taken.calibration.base_loss - taken.calibration.loss).mean())
    facts: dict[str, Any] = {
        "name": name,
        "path": str(out),
        "modules": len(taken.updates),
        "step": taken.meta.get("step"),
        "planned_steps": taken.meta.get("planned_steps"),
        "base_fingerprint": taken.meta["base_fingerprint"],
        "items": len(taken.calibration.loss),
        "own_gain": gain,
    }
    if json:
        show.emit(facts)
        return
    at = f" at step {facts['step']}" if facts["step"] else ""
    show.console().print(
        f"'{name}'{at}: {facts['modules']} modules, own gain {gain:.3f} nats a token on "
        f"{facts['items']} items; written to '{out}'"
    )


def signals(
    sources: Sources,
    base: ReadingBase = None,
    out: Annotated[
        Path | None,
        typer.Option(help="All pair rows as Parquet, one for each ordered pair.", show_default="-"),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Compare probes or finished adapters: every signal that needs no model.

    A row (a, b) says what a's update does to b. A dash is a signal that needs a part the file
    does not have: a finished adapter holds its update only.
    """
    from mergeprobe.artefact import refuse_existing, write_parquet
    from mergeprobe.cli import show
    from mergeprobe.cli.sources import read_sources
    from mergeprobe.signals import tables

    if out is not None:
        refuse_existing(out, force=force)
    found = tables(read_sources(sources, base))
    if out is not None:
        write_parquet(found["pairs"], out, force=force)
    if json:
        show.emit({name: found[name].to_dicts() for name in ("pairs", "adapters")})
        return
    _print("Adapters", found["adapters"], ("a",), ADAPTER_COLUMNS)
    if len(found["pairs"]):
        _print("Pairs: what a's update does to b", found["pairs"], ("a", "b"), PAIR_COLUMNS)
    if out is not None:
        rows, columns = found["pairs"].shape
        show.console().print(f"{rows} rows, {columns} columns written to '{out}'")


def _print(title: str, rows: pl.DataFrame, keys: tuple[str, ...], columns: dict[str, str]) -> None:
    from mergeprobe.cli import show

    heads = ("adapter",) if keys == ("a",) else keys
    table = show.table(*heads, *columns.values(), left=len(keys))
    for row in rows.iter_rows(named=True):
        cells = [show.number(row[column], 3) for column in columns]
        table.add_row(*(row[key] for key in keys), *cells)
    show.print_table(title, table)
