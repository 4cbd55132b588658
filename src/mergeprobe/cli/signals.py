"""signals: every measurement that needs no model, for two adapters or a thousand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergeprobe.cli.options import Force, Json, ReadingBase, Sources
from mergeprobe.errors import MergeProbeError

if TYPE_CHECKING:
    import polars as pl

    from mergeprobe.capture.probe import Probe
    from mergeprobe.signals import Effort

SIGNALS = (
    "mergeprobe signals probes/",
    "mergeprobe signals adapters/* --json",
    "mergeprobe signals adapters/ --only gram --out pairs.parquet",
    "mergeprobe signals adapters/ --add-to pairs.parquet --out pairs.parquet --force",
    "mergeprobe signals probes/ --set math+code+sql --out pairs.parquet",
    "mergeprobe signals adapters/ --screen sketches/ --out close.parquet",
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
SET_COLUMNS = {
    "set_amplification": "amplification",
    "cosine_to_rest": "cosine to rest",
    "set_union_rank": "union rank",
    "joint_interference_ratio": "interference",
    "capacity_load": "load",
}
SCREEN_COLUMNS = {
    "frobenius_cosine": "cosine",
    "bound": "± at most",
    "norm_ratio": "norm ratio",
    "amplification": "amplification",
}
HELD = 64  # adapters whose table of pairs is kept in memory, and whose products are double
SHOWN = 60  # rows of a table on the screen


def signals(
    sources: Sources,
    base: ReadingBase = None,
    out: Annotated[
        Path | None,
        typer.Option(help="All pair rows as Parquet, one for each ordered pair.", show_default="-"),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this family: gram, sign, spectral, gradient, curvature. May be repeated. "
            "The columns of the others stay empty.",
            show_default="all",
        ),
    ] = None,
    add_to: Annotated[
        Path | None,
        typer.Option(
            help="A file that --out wrote: its rows are taken over, only pairs with further "
            "adapters are measured, with what it was measured with.",
            show_default="-",
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="A+B+C",
            help="Also the rows of this set. May be repeated; to OUT.sets.parquet.",
            show_default="-",
        ),
    ] = None,
    sign_rows: Annotated[
        int | None,
        typer.Option(min=2, help="Rows of each module sampled for sign_conflict; default 32."),
    ] = None,
    exact_signs: Annotated[
        bool, typer.Option("--exact-signs", help="All rows, for sign_conflict without an error.")
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of the factors' products: double or single.",
            show_default="double up to 64 adapters, else single",
        ),
    ] = None,
    screen: Annotated[
        Path | None,
        typer.Option(
            help="Screen instead: cosines of all pairs from sketches in this folder, which are "
            "made where they are missing.",
            show_default="-",
        ),
    ] = None,
    error: Annotated[
        float, typer.Option(min=0.001, max=0.5, help="With --screen: of a cosine, at most.")
    ] = 0.02,
    force: Force = False,
    json: Json = False,
) -> None:
    """Compare probes or finished adapters: every signal that needs no model.

    A row (a, b) says what a's update does to b. A dash is a signal that needs a part the file
    does not have: a finished adapter holds its update only. Files are read a module at a time, so
    a thousand adapters fit; above 64 the pairs go to --out.
    """
    from mergeprobe.artefact import refuse_existing

    if out is not None:
        refuse_existing(out, force=force)
        if sets:
            refuse_existing(_beside(out), force=force)
    probes = _read(sources, base)
    if screen is not None:
        _screen(probes, screen, error, out, force=force, json=json)
    elif add_to is not None:
        asked = _asked(len(probes), only, sign_rows, exact_signs, precision)
        changed = bool(only or sign_rows or exact_signs or precision)
        _add(probes, add_to, out, asked if changed else None, force=force)
    else:
        effort = _asked(len(probes), only, sign_rows, exact_signs, precision)
        _measure(probes, effort, [s.split("+") for s in sets or ()], out, force=force, json=json)


def _read(sources: Sequence[Path], base: str | None) -> list[Probe]:
    """Every probe checked as a whole, then left on disk."""
    from mergeprobe.adapters.sources import expand
    from mergeprobe.adapters.weights import BaseWeights
    from mergeprobe.capture.probe import read_source
    from mergeprobe.cli import show
    from mergeprobe.signals import on_disk

    known = None if base is None else BaseWeights.of(base)
    paths, probes = expand(sources), []
    with show.working("reading") as progress:
        for path in paths:
            progress(f"{len(probes) + 1} of {len(paths)}")
            probes.append(on_disk(read_source(path, known)))
    return probes


def _asked(
    count: int,
    only: list[str] | None,
    sign_rows: int | None,
    exact_signs: bool,
    precision: str | None,
) -> Effort:
    from mergeprobe.signals import Effort
    from mergeprobe.signals.update import SIGN_ROWS

    return Effort(
        families=only or None,
        sign_rows=None if exact_signs else sign_rows or SIGN_ROWS,
        precision=precision or ("double" if count <= HELD else "single"),
    )


def _measure(
    probes: list[Probe],
    effort: Effort,
    sets: list[list[str]],
    out: Path | None,
    *,
    force: bool,
    json: bool,
) -> None:
    from mergeprobe.artefact import write_parquet
    from mergeprobe.cli import show
    from mergeprobe.signals import measure
    from mergeprobe.signals.checks import check_in_common
    from mergeprobe.signals.pair_file import write_pairs
    from mergeprobe.signals.rows import LARGEST, adapter_table, joined, pair_blocks, set_table

    if out is None and len(probes) > HELD:
        raise MergeProbeError(
            f"{len(probes)} adapters have {len(probes) * (len(probes) - 1)} pairs; give --out, or "
            "--screen for a first look"
        )
    check_in_common(probes)
    with show.working("measuring") as progress:
        panel = measure(probes, effort, sets=sets, largest=LARGEST, progress=progress)
    adapters = adapter_table(panel)
    found = set_table(panel) if sets else None
    if out is not None:
        write_pairs(panel, out, effort, force=force)
        if found is not None:
            write_parquet(found, _beside(out), force=force)
    if json:
        tables = {"pairs": joined(pair_blocks(panel)), "adapters": adapters}
        tables |= {} if found is None else {"sets": found}
        show.emit({name: table.to_dicts() for name, table in tables.items()})
        return
    _print("Adapters", adapters, ("a",), ADAPTER_COLUMNS)
    pairs = _strongest(out) if out is not None else joined(pair_blocks(panel))
    count = len(probes) * (len(probes) - 1)
    if count:
        _print_pairs(pairs, count)
    if found is not None:
        named = found.with_columns(found["set"].list.join("+"))
        _print("Sets: what the others do to a", named, ("a", "set"), SET_COLUMNS)
    if out is not None:
        show.console().print(f"{count} rows, {_width()} columns written to '{out}'")


def _add(
    probes: list[Probe], known: Path, out: Path | None, effort: Effort | None, *, force: bool
) -> None:
    from mergeprobe.cli import show
    from mergeprobe.signals.pair_file import add_pairs

    if out is None:
        raise MergeProbeError(f"rows added to those of '{known}' need a file: give --out")
    with show.working("measuring") as progress:
        new = add_pairs(known, probes, out, effort, force=force, progress=progress)
    count = len(probes) * (len(probes) - 1)
    show.console().print(
        f"{new} of {len(probes)} adapters were new; {count} rows, {_width()} columns written to "
        f"'{out}'"
    )


def _screen(
    probes: list[Probe], folder: Path, error: float, out: Path | None, *, force: bool, json: bool
) -> None:
    from mergeprobe.artefact import write_parquet
    from mergeprobe.cli import show
    from mergeprobe.signals.screen import kept_sketches, screen

    with show.working("sketching"):
        found = screen(kept_sketches(probes, folder, error=error))
    if out is not None:
        write_parquet(found, out, force=force)
    if json:
        show.emit({"pairs": found.to_dicts()})
        return
    title = "Pairs by the size of their cosine, from sketches"
    _print(title, _by_cosine(found), ("a", "b"), SCREEN_COLUMNS)
    if len(found) > SHOWN:
        show.console().print(f"{SHOWN} of {len(found)} pairs")
    if out is not None:
        show.console().print(f"{len(found)} rows written to '{out}'")


def _beside(out: Path) -> Path:
    return out.with_suffix(f".sets{out.suffix}")


def _width() -> int:
    from mergeprobe.signals.rows import pair_columns

    return 2 + len(pair_columns())


def _strongest(path: Path) -> pl.DataFrame:
    """The rows of a file that are shown: all in order, or those of the largest cosines."""
    import polars as pl

    rows = pl.scan_parquet(path).select("a", "b", *PAIR_COLUMNS)
    if rows.select(pl.len()).collect().item() <= SHOWN:
        return rows.collect()
    size = pl.col("frobenius_cosine").abs()
    return rows.sort(size, descending=True, nulls_last=True).head(SHOWN).collect()


def _by_cosine(pairs: pl.DataFrame) -> pl.DataFrame:
    import polars as pl

    size = pl.col("frobenius_cosine").abs()
    return pairs.sort(size, descending=True, nulls_last=True).head(SHOWN)


def _print_pairs(pairs: pl.DataFrame, count: int) -> None:
    from mergeprobe.cli import show

    few = _by_cosine(pairs) if count > SHOWN else pairs
    _print("Pairs: what a's update does to b", few, ("a", "b"), PAIR_COLUMNS)
    if count > SHOWN:
        show.console().print(f"{SHOWN} of {count} pairs, by the size of their cosine")


def _print(title: str, rows: pl.DataFrame, keys: tuple[str, ...], columns: dict[str, str]) -> None:
    from mergeprobe.cli import show

    heads = ("adapter",) if keys == ("a",) else keys
    table = show.table(*heads, *columns.values(), left=len(keys))
    for row in rows.head(SHOWN).iter_rows(named=True):
        cells: list[Any] = [show.number(row[column], 3) for column in columns]
        table.add_row(*(row[key] for key in keys), *cells)
    show.print_table(title, table)
