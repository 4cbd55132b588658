"""The table of pairs as a Parquet file: written some rows at a time, and added to.

The file's own metadata ("mergeprobe") says what made it, with which effort, and the norm of every
adapter; so that rows for further adapters can be added without measuring the old pairs again, and
not to rows of other adapters by accident.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
from polars.io.plugins import register_io_source

from mergeprobe.artefact import MADE_BY, atomic_file, check_schema
from mergeprobe.capture.probe import Probe
from mergeprobe.errors import ProbeError
from mergeprobe.signals.bounds import stated
from mergeprobe.signals.checks import check_in_common
from mergeprobe.signals.families import Effort
from mergeprobe.signals.gradient import sketch_size
from mergeprobe.signals.panel import Panel
from mergeprobe.signals.rows import AT_ONCE, LARGEST, joined, pair_blocks, pair_columns
from mergeprobe.signals.sums import measure_blocks

SCHEMA = 1
KEY = "mergeprobe"
SAME_NORM = 1e-5  # relative; single precision is closer


def write_pairs(panel: Panel, path: str | Path, effort: Effort, *, force: bool = True) -> None:
    """All pairs of a panel; never the whole table in memory. Atomic; OSError for a full disk."""
    blocks = _lazy(lambda: pair_blocks(panel))
    _sink(blocks, path, facts(panel, effort), force=force)


def facts(panel: Panel, effort: Effort) -> dict[str, Any]:
    """What the file says of itself."""
    asked = asdict(effort)
    return {
        "schema": SCHEMA,
        "made_by": MADE_BY,
        "families": list(effort.families) if effort.families is not None else None,
        "sign_rows": asked["sign_rows"],
        "precision": asked["precision"],
        "signals": _listed(effort.signals),
        "adapters": dict(zip(panel.names, panel.own("energy", "all").sqrt().tolist(), strict=True)),
        "errors": stated(sketch_size(panel.probes), len(panel.modules), effort.sign_rows),
    }


def read_facts(path: str | Path) -> dict[str, Any]:
    """ProbeError for a file that is no table of pairs of ours, or says nothing of itself."""
    path = Path(path)
    try:
        text = pl.read_parquet_metadata(path).get(KEY)
    except (pl.exceptions.PolarsError, OSError) as problem:
        raise ProbeError(f"'{path}' is no table of pairs: {problem}") from None
    if text is None:
        raise ProbeError(
            f"'{path}' does not say what it was measured with; write it again with `signals --out`"
        )
    try:
        found = json.loads(text)
    except ValueError as problem:
        raise ProbeError(f"'{path}' is damaged: {problem}") from None
    check_schema(found.get("schema"), SCHEMA, f"'{path}'", ProbeError)
    return found


def add_pairs(
    known: str | Path,
    probes: Sequence[Probe],
    out: str | Path,
    effort: Effort | None = None,
    *,
    force: bool = True,
    progress: Callable[[str], None] | None = None,
) -> int:
    """The table of all `probes`, of which the file `known` already has some; how many were new.

    The old rows are taken over as they are, in the order of `probes`: one new adapter costs N
    pairs. effort: by default the file's own. Raises ProbeError where it was measured otherwise,
    has an adapter that is not among `probes`, or one that has another norm now.
    """
    said = read_facts(known)
    effort = effort or Effort(
        said["families"], said["sign_rows"], said["precision"], signals=said.get("signals")
    )
    check_in_common(probes)
    place = {probe.name: i for i, probe in enumerate(probes)}
    old = said["adapters"]
    _comparable(known, said, effort, place)
    fresh = [i for name, i in place.items() if name not in old]
    there = [i for name, i in place.items() if name in old]
    blocks = [(fresh, None)] + ([(there, fresh)] if there and fresh else [])
    panels = measure_blocks(probes, effort, blocks, largest=LARGEST, progress=progress)
    across = panels[0]
    norms = across.own("energy", "all").sqrt().tolist()
    for name, norm in old.items():
        if abs(norms[place[name]] - norm) > SAME_NORM * max(norm, norms[place[name]]):
            raise ProbeError(
                f"'{name}' has norm {norms[place[name]]:.6g} now and {norm:.6g} in '{known}': it "
                "changed since; measure all pairs again"
            )
    new = pl.concat([joined(pair_blocks(panel)) for panel in panels])
    rows = _lazy(lambda: _merged(known, list(old), new, list(place)))
    _sink(rows, out, facts(across, effort), force=force)
    return len(fresh)


def _merged(
    known: str | Path, before: list[str], new: pl.DataFrame, names: list[str]
) -> Iterator[pl.DataFrame]:
    """Old and new rows in the order of `names`, some adapters' at a time. before: the adapters of
    the old table, in its order; each has one row with every other one."""
    old = pl.scan_parquet(known).select("a", "b", *_names())
    order, each = pl.Enum(names), len(before) - 1
    place = {name: row for row, name in enumerate(before)}
    for start in range(0, len(names), AT_ONCE):
        some = names[start : start + AT_ONCE]
        rows = sorted(place[name] for name in some if name in place)
        runs = [
            old.slice(first * each, count * each).collect() for first, count in _consecutive(rows)
        ]
        both = pl.concat([*runs, new.filter(pl.col("a").is_in(some))])
        yield both.sort(pl.col("a").cast(order), pl.col("b").cast(order))


def _consecutive(rows: list[int]) -> Iterator[tuple[int, int]]:
    """(first, how many) of every run in ascending whole numbers."""
    first = 0
    for place, row in enumerate(rows):
        if place + 1 == len(rows) or rows[place + 1] != row + 1:
            yield rows[first], place + 1 - first
            first = place + 1


def _comparable(
    known: str | Path, said: dict[str, Any], effort: Effort, place: dict[str, int]
) -> None:
    for name in said["adapters"]:
        if name not in place:
            raise ProbeError(
                f"'{known}' has pairs of '{name}', which is not among those given; add it or "
                "measure all pairs again"
            )
    for key, asked in (
        ("families", list(effort.families) if effort.families is not None else None),
        ("sign_rows", effort.sign_rows),
        ("precision", effort.precision),
        ("signals", _listed(effort.signals)),
    ):
        if said.get(key) != asked:
            raise ProbeError(
                f"'{known}' was measured with {key} {said.get(key)}, now asked for is {asked}; "
                "use the same or measure all pairs again"
            )


def _listed(signals: Collection[str] | None) -> list[str] | None:
    return sorted(signals) if signals is not None else None


def _names() -> list[str]:
    return [column for column, _, _ in pair_columns()]


def _lazy(blocks: Callable[[], Iterator[pl.DataFrame]]) -> pl.LazyFrame:
    schema = {"a": pl.String, "b": pl.String} | dict.fromkeys(_names(), pl.Float64)

    def source(columns, predicate, count, size) -> Iterator[pl.DataFrame]:
        for block in blocks():
            block = block if columns is None else block.select(columns)
            block = block if predicate is None else block.filter(predicate)
            if count is not None:
                block, count = block.head(count), count - min(count, len(block))
            yield block

    return register_io_source(source, schema=schema)


def _sink(frame: pl.LazyFrame, path: str | Path, said: dict[str, Any], *, force: bool) -> None:
    metadata = {KEY: json.dumps(said, ensure_ascii=False)}
    with atomic_file(path, force=force) as temporary:
        try:
            frame.sink_parquet(temporary, metadata=metadata)
        except (pl.exceptions.PolarsError, OSError) as problem:
            # polars gives an OSError of its own, without a number
            number = getattr(problem, "errno", None) or errno.EIO
            raise OSError(number, f"cannot be written: {problem}", str(path)) from None
