"""Probes -> tables: one row per ordered pair, per adapter, per (adapter, set), per layer, and the
coefficients of the second-order surrogate. Columns and their order are those of SIGNALS, always;
what was not measured is null."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import polars as pl
import torch
from torch import Tensor

from mergeprobe.adapters.regions import kind_of, layer_of
from mergeprobe.capture.probe import Probe
from mergeprobe.signals import curvature, gradient, subspace, update
from mergeprobe.signals.panel import Panel, check_in_common, measure
from mergeprobe.signals.table import SIGNALS, columns, of_kind

SET_PRODUCTS = (subspace.set_products, curvature.set_products)
LAYER_SIGNALS = ("frobenius_cosine", "output_overlap", "interference")


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread meanwhile: thousands of small products, which a second thread only slows
    (2.4 s against 9 to 20 s for five adapters of 210 modules on two busy cores)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def pair_rows(probes: Sequence[Probe], *, sign_rows: int | None = update.SIGN_ROWS) -> pl.DataFrame:
    """One row per ordered pair: a, b, then the pair signals: what a's update does to b.

    Rows in input order; empty for one probe. sign_rows: rows of each module sampled for
    `sign_conflict`; None takes all (exact).
    Raises AdapterMismatch for other bases, other shapes or a pair with no module in common,
    ProbeError for two probes of one name.
    """
    return _pairs(measure(probes, _products(sign_rows)))


@one_thread()
def adapter_rows(probes: Sequence[Probe]) -> pl.DataFrame:
    """One row per adapter: a, then the adapter signals. Raises as pair_rows does."""
    return _adapters(measure(probes, (update.products, subspace.products, *_MEASURED)))


@one_thread()
def set_rows(
    probes: Sequence[Probe],
    sets: Sequence[Sequence[str]],
    *,
    sign_rows: int | None = update.SIGN_ROWS,
) -> pl.DataFrame:
    """One row per set and member: a, set, the exact stacked signals, then sum, largest and
    smallest of each pair signal over the other members (what they do to a).

    set: the members' names in input order. Linear in the number of sets.
    Raises ProbeError for a set with an unknown adapter, one twice, or fewer than two.
    """
    panel = measure(probes, _products(sign_rows), sets=sets, set_products=SET_PRODUCTS)
    return _sets(panel)


@one_thread()
def layer_rows(probes: Sequence[Probe]) -> pl.DataFrame:
    """One row per ordered pair, layer and kind: a, b, layer (null outside the layers), kind
    (attention | mlp | other), then LAYER_SIGNALS over those modules."""
    return _layers(measure(probes, (update.products, subspace.products, curvature.products)))


@one_thread()
def quadratic(probes: Sequence[Probe]) -> pl.DataFrame:
    """⟨ΔW_a, F_i ΔW_b⟩ summed over modules, nats a token; columns i, a, b, value.

    All triples for up to 20 probes; with more only a = b, and a = i or b = i. Null where i has no
    moments. A module that i does not adapt counts 0, whatever a and b do there.
    """
    full = len(probes) <= curvature.FULL_TRIPLES
    products = curvature.triple_products if full else curvature.products
    return _quadratic(measure(probes, (products,)))


@one_thread()
def linear(probes: Sequence[Probe]) -> pl.DataFrame:
    """⟨G_i, ΔW_a⟩ through sketches, nats a token; columns i, a, at_snapshot, at_base.

    G_i is the gradient of i's mean token loss at its snapshot and at the base point.
    """
    return _linear(measure(probes, (gradient.products,)))


@one_thread()
def tables(
    probes: Sequence[Probe],
    sets: Sequence[Sequence[str]] = (),
    *,
    sign_rows: int | None = update.SIGN_ROWS,
) -> dict[str, pl.DataFrame]:
    """All of them from one pass over the modules: pairs, adapters, sets, layers, quadratic,
    linear. The same rows as the functions of those names give."""
    products = _products(sign_rows)
    if len(probes) <= curvature.FULL_TRIPLES:
        products += (curvature.triple_products,)
    panel = measure(probes, products, sets=sets, set_products=SET_PRODUCTS)
    made: dict[str, Callable[[Panel], pl.DataFrame]] = {
        "pairs": _pairs,
        "adapters": _adapters,
        "sets": _sets,
        "layers": _layers,
        "quadratic": _quadratic,
        "linear": _linear,
    }
    return {name: make(panel) for name, make in made.items()}


_MEASURED = (gradient.products, curvature.products)


def _products(sign_rows: int | None) -> tuple:
    signs = partial(update.sign_products, rows=sign_rows)
    return update.products, signs, subspace.products, *_MEASURED


def _pairs(panel: Panel) -> pl.DataFrame:
    check_in_common(panel.probes)
    first, second = _ordered(panel.n)
    data = _named(panel, {"a": first, "b": second})
    for name, signal in of_kind("pair").items():
        for column, region in columns(name):
            data.append(_column(column, signal.values(panel, region)[first, second]))
    return pl.DataFrame(data)


def _adapters(panel: Panel) -> pl.DataFrame:
    data = [pl.Series("a", panel.names, dtype=pl.String)]
    for name, signal in of_kind("adapter").items():
        for column, region in columns(name):
            data.append(_column(column, signal.values(panel, region)))
    return pl.DataFrame(data)


def _sets(panel: Panel) -> pl.DataFrame:
    check_in_common(panel.probes)
    rows = [(row, i) for row, members in enumerate(panel.sets) for i in members]
    which = torch.tensor([row for row, _ in rows], dtype=torch.long)
    member = torch.tensor([i for _, i in rows], dtype=torch.long)
    names = [[panel.names[j] for j in panel.sets[row]] for row, _ in rows]
    data = [*_named(panel, {"a": member}), pl.Series("set", names, dtype=pl.List(pl.String))]
    for name, signal in of_kind("set").items():
        for column, region in columns(name):
            data.append(_column(column, signal.values(panel, region)[which, member]))
    for name, signal in of_kind("pair").items():
        if signal.diagnostic:
            continue
        values = signal.values(panel, "all")
        on = [values[[j for j in panel.sets[row] if j != i], i] for row, i in rows]
        data.append(_column(f"{name}_sum", [v.sum() for v in on]))
        data.append(_column(f"{name}_most", [v.max() for v in on]))
        data.append(_column(f"{name}_least", [v.min() for v in on]))
    return pl.DataFrame(data)


def _layers(panel: Panel) -> pl.DataFrame:
    check_in_common(panel.probes)
    places = list(dict.fromkeys((layer_of(m), kind_of(m)) for m in panel.modules))
    masks = {
        f"{layer} {kind}": torch.tensor(
            [(layer_of(m), kind_of(m)) == (layer, kind) for m in panel.modules]
        )
        for layer, kind in places
    }
    panel = replace(panel, regions=panel.regions | masks)
    first, second = _ordered(panel.n)
    pairs, count = len(first), len(places)
    data = _named(panel, {"a": first.repeat(count), "b": second.repeat(count)})
    layers = [layer for layer, _ in places for _ in range(pairs)]
    kinds = [kind for _, kind in places for _ in range(pairs)]
    data += [pl.Series("layer", layers, dtype=pl.Int64), pl.Series("kind", kinds, dtype=pl.String)]
    for name in LAYER_SIGNALS:
        signal = SIGNALS[name]
        values = [signal.values(panel, region)[first, second] for region in masks]
        data.append(_column(name, torch.cat(values)))
    return pl.DataFrame(data)


def _quadratic(panel: Panel) -> pl.DataFrame:
    n = panel.n
    if "triples" in panel.products:
        i, a, b = torch.cartesian_prod(*[torch.arange(n)] * 3).T
        values = panel.total("triples", "all")[i, a, b]
    else:
        i, a = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T
        form, own = panel.total("disturbance", "all")[i, a], panel.total("own", "all")[i, a]
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
    snapshot, base = (panel.total(f"linear_{at}", "all")[i, a] for at in ("snapshot", "base"))
    return pl.DataFrame(
        [
            *_named(panel, {"i": i, "a": a}),
            _column("at_snapshot", snapshot),
            _column("at_base", base),
        ]
    )


def _ordered(n: int) -> tuple[Tensor, Tensor]:
    """Indices of all ordered pairs a ≠ b, in input order."""
    first, second = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T
    return first[first != second], second[first != second]


def _named(panel: Panel, columns: dict[str, Tensor]) -> list[pl.Series]:
    names = panel.names
    return [
        pl.Series(column, [names[i] for i in where.tolist()], dtype=pl.String)
        for column, where in columns.items()
    ]


def _column(name: str, values: Tensor | list[Tensor]) -> pl.Series:
    """Float64, with null for everything that is not a finite number."""
    numbers = values.tolist() if isinstance(values, Tensor) else [float(v) for v in values]
    return pl.Series(name, [v if math.isfinite(v) else None for v in numbers], dtype=pl.Float64)
