"""What must hold of the signals of any adapters: properties over drawn ranks, sizes and dtypes."""

from functools import cache

import polars as pl
import pytest
import torch
from builders import regauged, renamed, reordered, rescaled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergeprobe.capture.probe import Probe
from mergeprobe.lowrank import LowRank
from mergeprobe.signals import SIGNALS, Effort, pair_rows
from mergeprobe.signals.table import columns, of_kind

FAMILIES = ("gram", "sign", "spectral")
SHAPES = {
    "model.layers.0.self_attn.q_proj": (20, 24),
    "model.layers.1.mlp.up_proj": (40, 12),
    "model.layers.2.mlp.down_proj": (9, 30),
}
MEASURED = [
    column
    for name, signal in of_kind("pair").items()
    if signal.needs == ("updates",)
    for column, _ in columns(name)
]
EXACT = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)

ranks = st.integers(1, 64)
seeds = st.integers(0, 2**31)
sizes = st.sampled_from([1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e6])


def probe(seed: int, rank: int, name: str, dtype: torch.dtype = torch.float32) -> Probe:
    draw = torch.Generator().manual_seed(seed)
    updates = {}
    for module, (out, into) in SHAPES.items():
        b, a = torch.randn(out, rank, generator=draw), torch.randn(rank, into, generator=draw)
        updates[module] = LowRank(b.to(dtype), a.to(dtype), 2.0)
    return Probe(name, updates)


def measured(probes, **effort) -> dict[tuple[str, str], dict]:
    found = pair_rows(probes, effort=Effort(FAMILIES, **effort))
    return {(row["a"], row["b"]): row for row in found.select("a", "b", *MEASURED).to_dicts()}


def assert_same(one: dict, two: dict, tolerance: float = 1e-6, besides: tuple = ()) -> None:
    for column in MEASURED:
        if column.startswith(besides) and besides:
            continue
        x, y = one[column], two[column]
        assert (x is None) == (y is None), column
        assert x is None or abs(x - y) <= tolerance * max(1.0, abs(x)), (column, x, y)


# regauged factors are float64, but the update they stand for was stored in float32, where the
# directions beyond min(out, in) are rounding: ranks up to that of the smallest module
fitting = st.integers(1, 9)


@EXACT
@given(seeds, fitting, ranks)
@pytest.mark.parametrize("change", [regauged, reordered])
def test_no_signal_depends_on_gauge_or_component_order(change, seed, rank, other):
    one, two = probe(seed, rank, "a"), probe(seed + 1, other, "b")
    before, after = measured([one, two]), measured([change(one), two])
    for pair in before:
        assert_same(before[pair], after[pair], 1e-5)


@EXACT
@given(seeds, st.lists(ranks, min_size=3, max_size=5), st.randoms(use_true_random=False))
def test_the_order_of_the_adapters_does_not_matter(seed, many, random):
    probes = [probe(seed + i, rank, f"p{i}") for i, rank in enumerate(many)]
    shuffled = list(probes)
    random.shuffle(shuffled)
    before, after = measured(probes), measured(shuffled)
    assert before.keys() == after.keys()
    for pair in before:
        assert_same(before[pair], after[pair], 1e-8)


@EXACT
@given(seeds, ranks, ranks, sizes)
def test_only_sizes_follow_the_size_of_an_adapter(seed, rank, other, size):
    one, two = probe(seed, rank, "a"), probe(seed + 1, other, "b")
    before, after = (measured([x, two])["a", "b"] for x in (one, rescaled(one, size)))
    bound_to_size = ("norm_ratio", "amplification", "spectral_amplification")
    weighted = ("output_overlap", "input_overlap", "principal", "union", "sign_conflict")
    assert_same(before, after, 1e-6, bound_to_size)
    assert weighted
    for column, _ in columns("norm_ratio"):
        assert after[column] == pytest.approx(size * before[column], rel=1e-6)


@EXACT
@given(seeds, ranks, ranks, st.sampled_from(["double", "single"]))
def test_symmetric_signals_are_equal_both_ways_and_all_keep_their_bounds(
    seed, rank, other, precision
):
    rows = measured([probe(seed, rank, "a"), probe(seed + 1, other, "b")], precision=precision)
    for name, signal in of_kind("pair").items():
        if signal.needs != ("updates",):
            continue
        low, high = signal.range
        for column, _ in columns(name):
            there, back = rows["a", "b"][column], rows["b", "a"][column]
            assert (there == back) or not signal.symmetric, column
            for value in (there, back):
                assert value is not None
                assert low is None or value >= low - 1e-9, (column, value)
                assert high is None or value <= high + 1e-6, (column, value)


@EXACT
@given(seeds, ranks, ranks)
def test_a_zero_adapter_conflicts_with_nothing(seed, rank, other):
    zero = renamed(rescaled(probe(seed, rank, "z"), 0.0), "zero")
    unborn = Probe(
        "unborn",
        {
            m: LowRank(torch.zeros_like(u.B), u.A, 2.0)
            for m, u in probe(seed, rank, "u").updates.items()
        },
    )
    rows = measured([zero, unborn, probe(seed + 1, other, "b")])
    for name in ("zero", "unborn"):
        row = rows[name, "b"]
        for column in ("frobenius_cosine", "output_overlap", "principal_cosine", "norm_ratio"):
            assert row[column] == 0.0, column
        assert row["amplification"] == pytest.approx(1.0)
        assert row["spectral_amplification"] == pytest.approx(1.0)
        assert row["sign_conflict"] is None
    assert rows["zero", "unborn"]["frobenius_cosine"] == 0.0


@EXACT
@given(seeds, ranks, st.sampled_from(["double", "single"]))
def test_a_duplicate_is_recognised(seed, rank, precision):
    one = probe(seed, rank, "a")
    row = measured([one, renamed(one, "copy")], precision=precision)["a", "copy"]
    ones = "frobenius_cosine", "output_overlap", "input_overlap", "principal_cosine", "norm_ratio"
    for column in (*ones, "principal_cosine_mean"):
        assert row[column] == pytest.approx(1.0, abs=1e-5), column
    for column in ("amplification", "spectral_amplification"):
        assert row[column] == pytest.approx(2.0, abs=1e-5), column
    assert row["union_rank"] == pytest.approx(0.5, abs=1e-5)
    assert row["sign_conflict"] == pytest.approx(0.0, abs=1e-5)


@EXACT
@given(
    seeds, ranks, ranks,
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_the_dtype_of_the_factors_is_only_their_rounding(seed, rank, other, dtype):
    stored = [probe(seed, rank, "a", dtype), probe(seed + 1, other, "b", dtype)]
    wide = [
        Probe(
            p.name,
            {m: LowRank(u.B.double(), u.A.double(), u.scaling) for m, u in p.updates.items()},
        )
        for p in stored
    ]
    exact, found = measured(wide), measured(stored)
    single = measured(stored, precision="single")
    for pair in exact:
        assert_same(exact[pair], found[pair], 1e-9)
        assert_same(exact[pair], single[pair], 1e-4)


@cache
def drawn_pair(rank: int) -> pl.DataFrame:
    return pair_rows([probe(5, rank, "a"), probe(6, rank, "b")], effort=Effort(FAMILIES))


@pytest.mark.parametrize("rank", [1, 2, 7, 8, 9, 31, 64])
def test_the_cosine_is_the_dense_one_at_every_rank(rank):
    one, two = probe(5, rank, "a"), probe(6, rank, "b")
    dense = [
        torch.cat([u.to(torch.float64).dense().flatten() for u in p.updates.values()])
        for p in (one, two)
    ]
    want = float(torch.nn.functional.cosine_similarity(*dense, dim=0))
    assert drawn_pair(rank)["frobenius_cosine"][0] == pytest.approx(want, abs=1e-9)
    assert SIGNALS["frobenius_cosine"].symmetric
