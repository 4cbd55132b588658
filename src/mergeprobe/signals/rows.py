"""Probes -> tables: one row per ordered pair, per adapter, per (adapter, set), per layer, and the
coefficients of the second-order surrogate. Columns and their order are those of SIGNALS, always;
what was not measured is null."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import polars as pl
import torch
from torch import Tensor

from mergeprobe.capture.probe import Probe
from mergeprobe.signals.checks import check_in_common
from mergeprobe.signals.curvature import FULL_TRIPLES
from mergeprobe.signals.families import Effort
from mergeprobe.signals.panel import Panel, Place
from mergeprobe.signals.sums import measure
from mergeprobe.signals.table import SIGNALS, columns, of_kind
from mergeprobe.signals.update import SIGN_ROWS

LAYER_SIGNALS = ("frobenius_cosine", "output_overlap", "interference")
AT_ONCE = 64  # adapters a whose rows are made in one go


def pair_rows(
    probes: Sequence[Probe], *, sign_rows: int | None = SIGN_ROWS, effort: Effort | None = None
) -> pl.DataFrame:
    """One row per ordered pair: a, b, then the pair signals: what a's update does to b.

    Rows in input order; empty for one probe. sign_rows: rows of each module sampled for
    `sign_conflict`; None takes all (exact). effort: everything that can be chosen, instead.
    Raises AdapterMismatch for other bases, other shapes or a pair with no module in common,
    ProbeError for two probes of one name.
    """
    check_in_common(probes)
    return joined(pair_blocks(measure(probes, _effort(effort, sign_rows), largest=LARGEST)))


def adapter_rows(probes: Sequence[Probe], *, effort: Effort | None = None) -> pl.DataFrame:
    """One row per adapter: a, then the adapter signals. Raises as pair_rows does."""
    return adapter_table(measure(probes, effort, pairs=False))


def set_rows(
    probes: Sequence[Probe],
    sets: Sequence[Sequence[str]],
    *,
    sign_rows: int | None = SIGN_ROWS,
    effort: Effort | None = None,
) -> pl.DataFrame:
    """One row per set and member: a, set, the exact stacked signals, then sum, largest and
    smallest of each pair signal over the other members (what they do to a).

    set: the members' names in input order. Linear in the number of sets.
    Raises ProbeError for a set with an unknown adapter, one twice, or fewer than two.
    """
    check_in_common(probes)
    return set_table(measure(probes, _effort(effort, sign_rows), sets=sets))


def layer_rows(probes: Sequence[Probe]) -> pl.DataFrame:
    """One row per ordered pair, layer and kind: a, b, layer (null outside the layers), kind
    (attention | mlp | other), then LAYER_SIGNALS over those modules."""
    check_in_common(probes)
    families = ("gram", "spectral", "curvature")
    return _layers(measure(probes, Effort(families), layers=True))


def quadratic(probes: Sequence[Probe]) -> pl.DataFrame:
    """⟨ΔW_a, F_i ΔW_b⟩ summed over modules, nats a token; columns i, a, b, value.

    All triples for up to 20 probes; with more only a = b, and a = i or b = i. Null where i has no
    moments. A module that i does not adapt counts 0, whatever a and b do there.
    """
    few = len(probes) <= FULL_TRIPLES
    return _quadratic(measure(probes, Effort(("curvature",)), pairs=not few, triples=few))


def linear(probes: Sequence[Probe]) -> pl.DataFrame:
    """⟨G_i, ΔW_a⟩ through sketches, nats a token; columns i, a, at_snapshot, at_base.

    G_i is the gradient of i's mean token loss at its snapshot and at the base point.
    """
    return _linear(measure(probes, Effort(("gradient",))))


def tables(
    probes: Sequence[Probe],
    sets: Sequence[Sequence[str]] = (),
    *,
    sign_rows: int | None = SIGN_ROWS,
    only: Collection[str] | None = None,
    triples: bool = True,
) -> dict[str, pl.DataFrame]:
    """All of them from one pass over the modules: pairs, adapters, sets, layers, quadratic,
    linear. The same rows as the functions of those names give.

    Holds the sums of every layer: for tens of adapters. only: columns of `pairs`; no others are
    made, no table of sets or layers, and no sums by layer are held.
    triples: False leaves `quadratic` what it is of more than 20 probes: pairs, not sets.
    """
    check_in_common(probes)
    wanted = [each for each in pair_columns() if only is None or each[0] in only]
    asked = {name for _, name, _ in wanted}
    panel = measure(
        probes,
        Effort(sign_rows=sign_rows, signals=asked),
        sets=sets,
        layers=only is None,
        triples=triples and len(probes) <= FULL_TRIPLES,
        largest={name: LARGEST[name] for _, name, region in wanted if region == "max"},
    )
    made: dict[str, Callable[[Panel], pl.DataFrame]] = {
        "pairs": lambda panel: joined(pair_blocks(panel, wanted)),
        "adapters": adapter_table,
        "sets": set_table,
        "layers": _layers,
        "quadratic": _quadratic,
        "linear": _linear,
    }
    if only is not None:
        del made["sets"], made["layers"]
    return {name: make(panel) for name, make in made.items()}


LARGEST = {
    name: signal.function for name, signal in of_kind("pair").items() if "max" in signal.regions
}


def _effort(effort: Effort | None, sign_rows: int | None) -> Effort:
    return effort or Effort(sign_rows=sign_rows)


def joined(blocks: Iterator[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(blocks, rechunk=True)


def pair_blocks(
    panel: Panel, wanted: Sequence[tuple[str, str, str]] | None = None
) -> Iterator[pl.DataFrame]:
    """The table of pairs, some adapters' rows at a time, so that it need not be held whole.

    wanted: some of pair_columns(); by default all. The first block has every column even where
    there are no rows.
    """
    wanted = pair_columns() if wanted is None else wanted
    for start in range(0, max(1, len(panel.rows)), AT_ONCE):
        part = panel.part(start, start + AT_ONCE)
        first, second, own = _ordered(part)
        data = _named(panel, {"a": first, "b": second})
        for column, name, region in wanted:
            values = SIGNALS[name].values(part, region)
            data.append(_column(column, values[own]))
        yield pl.DataFrame(data)


def pair_columns() -> list[tuple[str, str, str]]:
    """(column, signal, region) of every column of numbers in a table of pairs, in order."""
    return [(c, name, region) for name in of_kind("pair") for c, region in columns(name)]


def adapter_table(panel: Panel) -> pl.DataFrame:
    data = [pl.Series("a", panel.names, dtype=pl.String)]
    for name, signal in of_kind("adapter").items():
        for column, region in columns(name):
            data.append(_column(column, signal.values(panel, region)))
    return pl.DataFrame(data)


def set_table(panel: Panel) -> pl.DataFrame:
    members = panel.set_rows
    names = [[panel.names[j] for j in panel.sets[row]] for row, _ in members]
    mine = torch.tensor([i for _, i in members], dtype=torch.long)
    data = [*_named(panel, {"a": mine}), pl.Series("set", names, dtype=pl.List(pl.String))]
    for name, signal in of_kind("set").items():
        for column, region in columns(name):
            data.append(_column(column, signal.values(panel, region)))
    others = [[j for j in panel.sets[row] if j != i] for row, i in members]
    for name, signal in of_kind("pair").items():
        if signal.diagnostic:
            continue
        values = signal.values(panel, "all")
        on = [values[rest, i] for rest, (_, i) in zip(others, members, strict=True)]
        for label, reduce in (("sum", Tensor.sum), ("most", Tensor.max), ("least", Tensor.min)):
            found = [float(reduce(v)) for v in on]
            data.append(_column(f"{name}_{label}", torch.tensor(found, dtype=torch.float64)))
    return pl.DataFrame(data)


def _layers(panel: Panel) -> pl.DataFrame:
    spots = list(dict.fromkeys((place.layer, place.kind) for place in panel.at))
    first, second, own = _ordered(panel)
    pairs, count = len(first), len(spots)
    data = _named(panel, {"a": first.repeat(count), "b": second.repeat(count)})
    layers = [layer for layer, _ in spots for _ in range(pairs)]
    kinds = [kind for _, kind in spots for _ in range(pairs)]
    data += [pl.Series("layer", layers, dtype=pl.Int64), pl.Series("kind", kinds, dtype=pl.String)]
    found: dict[str, list[Tensor]] = {name: [] for name in LAYER_SIGNALS}
    for layer, kind in spots:
        within = _only(panel, lambda p, layer=layer, kind=kind: (p.layer, p.kind) == (layer, kind))
        for name in LAYER_SIGNALS:
            found[name].append(SIGNALS[name].values(within, "all")[own])
    return pl.DataFrame(data + [_column(name, torch.cat(values)) for name, values in found.items()])


def _only(panel: Panel, wanted: Callable[[Place], bool]) -> Panel:
    """The panel of some places' modules."""
    here = [i for i, place in enumerate(panel.places) if wanted(place)]
    modules = [i for i, place in enumerate(panel.at) if wanted(place)]
    return replace(
        panel,
        modules=tuple(panel.modules[i] for i in modules),
        at=tuple(panel.at[i] for i in modules),
        sets=(),
        set_each={},
        each={name: values[modules] for name, values in panel.each.items()},
        places=tuple(panel.places[i] for i in here),
        pair={name: values[here] for name, values in panel.pair.items()},
        weighted={name: (a[here], b[here]) for name, (a, b) in panel.weighted.items()},
    )


def _quadratic(panel: Panel) -> pl.DataFrame:
    n = panel.n
    if panel.triples is not None:
        i, a, b = torch.cartesian_prod(*[torch.arange(n)] * 3).T
        values = panel.triples[i, a, b]
    else:
        i, a = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T
        form, own = panel.total("disturbance", "all")[a, i], panel.total("cross", "all")[a, i]
        cross = i != a
        values = torch.cat([form, own[cross], own[cross]])
        i, a, b = (
            torch.cat([i, i[cross], i[cross]]),
            torch.cat([a, i[cross], a[cross]]),
            torch.cat([a, a[cross], i[cross]]),
        )
    return pl.DataFrame([*_named(panel, {"i": i, "a": a, "b": b}), _column("value", values)])


def _linear(panel: Panel) -> pl.DataFrame:
    i, a = torch.cartesian_prod(torch.arange(panel.n), torch.arange(panel.n)).T
    found = {f"at_{at}": panel.total(f"linear_{at}", "all")[a, i] for at in ("snapshot", "base")}
    data = _named(panel, {"i": i, "a": a})
    return pl.DataFrame(data + [_column(name, values) for name, values in found.items()])


def _ordered(panel: Panel) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Probe indices a and b of all ordered pairs a ≠ b, in input order, and their places in the
    panel's (rows, columns)."""
    rows, columns = torch.tensor(panel.rows), torch.tensor(panel.columns)
    row, column = (rows[:, None] != columns[None, :]).nonzero(as_tuple=True)
    return rows[row], columns[column], (row, column)


def _named(panel: Panel, columns: dict[str, Tensor]) -> list[pl.Series]:
    names = pl.Series(panel.names, dtype=pl.String)
    return [names.gather(where.numpy()).alias(column) for column, where in columns.items()]


def _column(name: str, values: Tensor) -> pl.Series:
    """Float64, with null for everything that is not a finite number."""
    numbers = torch.where(values.isfinite(), values, torch.nan).double().numpy()
    return pl.Series(name, numbers, dtype=pl.Float64, nan_to_null=True)
