"""Every sketched number against its stated bound, over draws of the sketch."""

import json
import math

import polars as pl
import pytest
import torch
from builders import renamed, rescaled, tiny_adapter, tiny_probe, tiny_shapes
from safetensors import safe_open

from mergeprobe.capture.probe import Probe
from mergeprobe.capture.sketch import projection
from mergeprobe.errors import AdapterMismatch, ProbeError
from mergeprobe.lowrank import LowRank
from mergeprobe.signals import pair_rows
from mergeprobe.signals.bounds import (
    SURE,
    UNEVEN,
    cosine_error,
    gradient_size,
    product_error,
    screening_error,
    screening_size,
)
from mergeprobe.signals.screen import (
    kept_sketches,
    read_sketch,
    screen,
    signs,
    sketches,
    write_sketch,
)

OUT, INTO, K, DRAWS = 24, 18, 16, 600


def rank_one(seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.outer(torch.randn(OUT, generator=draw), torch.randn(INTO, generator=draw))


def spread(seed):
    return torch.randn(OUT, INTO, generator=torch.Generator().manual_seed(seed))


def unit(matrix):
    return matrix.double() / matrix.double().norm()


# the worst case for a product (copies of one rank-one matrix), and others
PAIRS = {
    "copies of rank one": (rank_one(0), rank_one(0)),
    "one side shared": (
        torch.outer(spread(1)[:, 0], spread(2)[0]),
        torch.outer(spread(1)[:, 0], spread(3)[0]),
    ),
    "rank one, near": (rank_one(4), rank_one(4) + 0.5 * rank_one(5)),
    "full rank": (spread(6), spread(7)),
    "full rank, near": (spread(6), spread(6) + spread(7)),
}


def exact_variance(m, n, k):
    """Of the two-sided Gaussian sketch's inner product, as in the docstring of bounds."""
    y, z = m.T @ n, m @ n.T
    norms = float(m.square().sum() * n.square().sum())
    inner = float((m * n).sum())
    first = y.square().sum() + z.square().sum() + (y @ y).trace() + (z @ z).trace()
    second = norms + inner**2 + y.square().sum() + z.square().sum()
    return float(first) / k + float(second) / k**2


def two_sided(matrix, draw):
    left, right = (projection(f"m{draw}", s, n, K).double() for s, n in (("o", OUT), ("i", INTO)))
    return left.T @ matrix @ right


def probed(matrix, draw):
    left, right = (signs(f"m{draw}", s, n, K).double() for s, n in (("o", OUT), ("i", INTO)))
    return ((left.T @ matrix) * right.T).sum(1) / math.sqrt(K)


@pytest.mark.parametrize("pair", PAIRS)
def test_inner_products_of_two_sided_sketches(pair):
    m, n = map(unit, PAIRS[pair])
    exact = float((m * n).sum())
    errors = torch.tensor(
        [float((two_sided(m, d) * two_sided(n, d)).sum()) - exact for d in range(DRAWS)]
    )
    mean_square = float(errors.square().mean())
    scatter = float(errors.square().std()) / math.sqrt(DRAWS)
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / math.sqrt(DRAWS), "unbiased"
    assert abs(mean_square - exact_variance(m, n, K)) < 5 * scatter, "the formula is exact"
    assert exact_variance(m, n, K) <= product_error(K) ** 2 * (1 + 1e-9)


def test_copies_of_one_rank_one_matrix_reach_the_bound():
    m = unit(rank_one(0))
    assert math.sqrt(exact_variance(m, m, K)) == pytest.approx(product_error(K))


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    ("sketch", "bound"),
    [(two_sided, cosine_error), (probed, screening_error)],
    ids=lambda f: f.__name__,
)
def test_cosines_stay_within_their_first_order_bound(pair, sketch, bound):
    # 8 modules of equal energy: the error falls as 1/√8
    m, n = map(unit, PAIRS[pair])
    exact, modules = float((m * n).sum()), 8
    errors = []
    for draw in range(DRAWS // modules):
        sums = torch.zeros(3, dtype=torch.float64)
        for module in range(modules):
            x, y = (sketch(v, 10_000 + draw * modules + module) for v in (m, n))
            sums += torch.stack([(x * y).sum(), (x * x).sum(), (y * y).sum()])
        errors.append(float(sums[0] / (sums[1] * sums[2]).sqrt()) - exact)
    measured = float(torch.tensor(errors).square().mean().sqrt())
    # the root mean square of 75 draws is itself uncertain by 8 %
    assert measured <= 1.25 * bound(K, 1 / modules, exact) + 1e-7
    if abs(exact) > 0.999:
        assert measured < 1e-7, "copies are exact"


def test_one_sided_projections_of_drifts():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, generator=draw, dtype=torch.float64)
    y = 0.5 * x + torch.randn(40, generator=draw, dtype=torch.float64)
    x, y = x / x.norm(), y / y.norm()
    errors = torch.tensor(
        [
            float((x @ (p := projection(f"d{d}", "s", 40, K).double())) @ (y @ p)) - float(x @ y)
            for d in range(DRAWS)
        ]
    )
    assert float(errors.square().mean()) <= 2 / K
    assert float(errors.square().mean()) == pytest.approx((1 + float(x @ y) ** 2) / K, rel=0.25)


def test_sizes_come_from_the_target_error():
    for error, modules in ((0.02, 210), (0.05, 12), (0.1, 1)):
        k = screening_size(error, modules)
        assert SURE * screening_error(k, UNEVEN / modules) <= error
        assert SURE * screening_error(k - 16, UNEVEN / modules) > error
        g = gradient_size(error, modules)
        assert cosine_error(g, 1 / modules) <= error < cosine_error(g - 1, 1 / modules)


# --- screening


def crowd(count=14):
    probes = [Probe.from_adapter(tiny_adapter(seed, rank=1 + seed % 5)) for seed in range(count)]
    # near-copies, opposites, other scales: cosines from -1 to 1
    mixed = {m: blend(u, probes[1].updates[m]) for m, u in probes[0].updates.items()}
    return [
        *probes,
        Probe("near", mixed),
        renamed(rescaled(probes[2], -1.0), "undo"),
        renamed(rescaled(probes[3], 100.0), "loud"),
    ]


def blend(one, two):
    return LowRank(torch.cat([one.B, 0.3 * two.B], 1), torch.cat([one.A, two.A]), one.scaling)


def test_screening_stays_within_its_stated_bound():
    probes = crowd()
    exact = pair_rows(probes).select("a", "b", c="frobenius_cosine", n="norm_ratio")
    found = screen(sketches(probes, error=0.1))
    assert found.height == len(probes) * (len(probes) - 1) // 2
    both = found.join(exact, on=["a", "b"])
    off = (both["frobenius_cosine"] - both["c"]).abs()
    assert (off <= both["bound"] + 1e-3).all()  # 1e-3: of copies, from float16
    assert both["bound"].max() <= 0.1
    assert (off / both["bound"]).quantile(0.5) > 0.02, "the bound is no fantasy either"
    assert ((both["norm_ratio"] - both["n"]).abs() / both["n"]).max() < 1e-6
    ends = {(r["a"], r["b"]): r for r in both.to_dicts()}
    assert ends["a2", "undo"]["frobenius_cosine"] == pytest.approx(-1.0, abs=1e-3)
    assert ends["a3", "loud"]["frobenius_cosine"] == pytest.approx(1.0, abs=1e-3)
    assert ends["a2", "undo"]["amplification"] == pytest.approx(0.0, abs=1e-3)


def test_one_loud_module_widens_the_bound():
    shapes = list(tiny_shapes())
    even, loud = [], []
    for seed in range(2):
        adapter = tiny_adapter(seed)
        even.append(Probe.from_adapter(adapter))
        updates = {m: u * (1000.0 if m == shapes[0] else 1.0) for m, u in adapter.modules.items()}
        loud.append(Probe(f"a{seed}", updates))
    bounds = [screen(sketches(probes, error=0.1))["bound"][0] for probes in (even, loud)]
    # all energy in one of 12 modules: √12 times the error of an even spread
    assert bounds[1] == pytest.approx(
        SURE * screening_error(screening_size(0.1, 12), 1.0), rel=0.05
    )
    assert bounds[1] > 2 * bounds[0]


def test_a_module_that_only_one_adapts():
    whole, part = tiny_adapter(0), tiny_adapter(0, name="part", modules=["self_attn"])
    probes = [Probe.from_adapter(whole), Probe.from_adapter(part)]
    exact = pair_rows(probes)["frobenius_cosine"][0]
    row = screen(sketches(probes, error=0.05)).row(0, named=True)
    assert abs(row["frobenius_cosine"] - exact) <= row["bound"]


def test_a_zero_adapter_screens_as_zero():
    zero = renamed(rescaled(Probe.from_adapter(tiny_adapter(1)), 0.0), "zero")
    row = screen(sketches([Probe.from_adapter(tiny_adapter(0)), zero])).row(0, named=True)
    assert (row["frobenius_cosine"], row["norm_ratio"]) == (0.0, None)


def test_sketches_in_a_folder_are_made_once(tmp_path):
    from mergeprobe.adapters.checkpoint import read_adapter, write_adapter

    def read(seeds):
        return [Probe.from_adapter(read_adapter(tmp_path / f"a{seed}")) for seed in seeds]

    for seed in range(3):
        write_adapter(tiny_adapter(seed), tmp_path / f"a{seed}")
    folder = tmp_path / "sketches"
    first = kept_sketches(read(range(2)), folder, error=0.1)
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = kept_sketches(read(range(3)), folder, error=0.1)
    assert all(path.stat().st_mtime_ns == before for path, before in files.items())
    assert len(list(folder.iterdir())) == 3
    for one, two in zip(first, again, strict=False):
        assert torch.equal(one.values, two.values)
    # an adapter that was trained on is sketched again
    write_adapter(tiny_adapter(9, name="a0"), tmp_path / "a0", force=True)
    changed = kept_sketches(read(range(3)), folder, error=0.1)
    assert not torch.equal(changed[0].values, again[0].values)
    assert torch.equal(changed[1].values, again[1].values)
    with safe_open(folder / "a0.sketch.safetensors", framework="pt") as file:
        said = json.loads(file.metadata()["mergeprobe_sketch"])
    assert (said["size"], said["error"]) == (screening_size(0.1, 12), 0.1)


def test_sketches_that_do_not_belong_together_are_refused_by_name(tmp_path):
    probes = [tiny_probe(0), tiny_probe(1)]
    one, two = sketches(probes, error=0.1)
    other = sketches([tiny_probe(2)], error=0.05)[0]
    with pytest.raises(ProbeError, match=r"sketch of 'a2' has \d+ numbers a module, that of 'a0'"):
        screen([one, other])
    with pytest.raises(ProbeError, match="two sketches are named 'a0'"):
        screen([one, one])
    stranger = sketches([tiny_probe(3, fingerprint="e" * 16)], error=0.1)[0]
    with pytest.raises(AdapterMismatch, match=r"'a0' was trained on base f+ but 'a3' on e+"):
        screen([one, two, stranger])
    path = write_sketch(one, tmp_path / "a0.sketch.safetensors")
    assert torch.equal(read_sketch(path).values, one.values)
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ProbeError, match="damaged"):
        read_sketch(path)
    (tmp_path / "short").write_bytes(bytes(damaged)[:100])
    with pytest.raises(ProbeError, match="truncated or damaged"):
        read_sketch(tmp_path / "short")


def test_the_order_of_a_screening_is_that_of_its_sketches():
    found = sketches([tiny_probe(seed) for seed in range(4)], error=0.2)
    there, back = screen(found), screen(found[::-1])
    assert there["a"].to_list() == ["a0", "a0", "a0", "a1", "a1", "a2"]
    turned = back.rename({"a": "b", "b": "a"}).select("a", "b", c="frobenius_cosine")
    both = there.join(turned, on=["a", "b"])
    assert both.height == 6
    assert (both["frobenius_cosine"] - both["c"]).abs().max() < 1e-6
    assert there.schema["frobenius_cosine"] == pl.Float64
