"""Many adapters: tiles, disk, precision and additions give the numbers of the plain functions."""

import json
import math
from pathlib import Path

import polars as pl
import pytest
import torch
from builders import MODULES, regauged, renamed, tiny_adapter, tiny_probe, tiny_shapes

from mergeprobe.adapters.checkpoint import read_adapter, write_adapter
from mergeprobe.capture.probe import Probe, read_probe, write_probe
from mergeprobe.errors import ProbeError
from mergeprobe.lowrank import LowRank, inner, norm
from mergeprobe.signals import (
    Effort,
    adapter_rows,
    in_memory,
    measure,
    on_disk,
    pair_rows,
    set_rows,
    sums,
    tables,
)
from mergeprobe.signals.files import OnDisk
from mergeprobe.signals.pair_file import add_pairs, read_facts, write_pairs
from mergeprobe.signals.rows import LARGEST, joined, pair_blocks
from mergeprobe.signals.table import columns, of_kind

# ranks 1 to 5, two of them with attention modules only
PROBES = [
    tiny_probe(seed, rank=1 + seed % 5, modules=["self_attn"] if seed % 4 == 3 else None)
    for seed in range(8)
]
SETS = [["a0", "a1", "a2"], ["a0", "a3", "a6", "a7"]]
TILED = Effort(components=12)  # two or three adapters a tile


def assert_close(one: pl.DataFrame, two: pl.DataFrame, tolerance: float = 1e-9) -> None:
    """The same columns, rows and nulls, and numbers within the tolerance."""
    assert one.schema == two.schema
    assert one.height == two.height
    for column in one.columns:
        if one[column].dtype != pl.Float64:
            assert one[column].to_list() == two[column].to_list(), column
            continue
        for x, y in zip(one[column], two[column], strict=True):
            assert (x is None) == (y is None), (column, x, y)
            assert x is None or abs(x - y) <= tolerance * max(1.0, abs(x)), (column, x, y)


@pytest.fixture(scope="module")
def whole():
    return tables(PROBES, SETS)


def test_tiles_give_the_table_of_one_piece(whole):
    assert_close(whole["pairs"], pair_rows(PROBES, effort=TILED))
    assert_close(whole["adapters"], adapter_rows(PROBES, effort=TILED))
    assert_close(whole["sets"], set_rows(PROBES, SETS, effort=TILED))


def test_modules_measured_together_give_what_each_gives_alone(whole, monkeypatch):
    sizes = []
    plain = sums._Work.read

    def counting(self, batch):
        sizes.append(len(batch))
        return plain(self, batch)

    monkeypatch.setattr(sums._Work, "read", counting)
    together = tables(PROBES, SETS)
    # 12 modules of three shapes; half of them are adapted by all eight probes
    assert sum(sizes) == 12
    assert max(sizes) > 1
    sizes.clear()
    monkeypatch.setattr(sums, "BATCH", 1)
    alone = tables(PROBES, SETS)
    assert sizes == [1] * 12
    for name in ("pairs", "adapters", "sets", "layers", "quadratic", "linear"):
        assert_close(together[name], alone[name])
        assert_close(together[name], whole[name])


def test_only_the_columns_asked_for_are_made(whole):
    some = ["frobenius_cosine_late", "interference_max", "js_to_kl"]
    found = tables(PROBES, SETS, only=set(some), triples=False)
    assert set(found) == {"pairs", "adapters", "quadratic", "linear"}
    assert set(found["pairs"].columns) == {"a", "b", *some}
    for name in some:
        assert_close(found["pairs"].select("a", "b", name), whole["pairs"].select("a", "b", name))
    assert_close(found["adapters"], whole["adapters"])
    # triples of (i, a, a) and (i, i, a) alone, as of more than 20 probes
    kept = found["quadratic"].join(whole["quadratic"], on=["i", "a", "b"], suffix="_whole")
    assert kept.height == found["quadratic"].height == 8 * 8 + 2 * 8 * 7
    for value, wanted in kept.select("value", "value_whole").iter_rows():
        assert value == (wanted if wanted is None else pytest.approx(wanted, rel=1e-9, abs=1e-15))


def test_the_gram_family_is_that_of_the_plain_functions():
    found = pair_rows(PROBES, effort=Effort(("gram",), precision="single", components=12))
    by_name = {probe.name: probe for probe in PROBES}
    for row in found.iter_rows(named=True):
        a, b = by_name[row["a"]], by_name[row["b"]]
        shared = a.updates.keys() & b.updates.keys()
        dot = sum(inner(a.updates[m], b.updates[m]) for m in shared)
        norms = [math.hypot(*(norm(u) for u in p.updates.values())) for p in (a, b)]
        assert row["frobenius_cosine"] == pytest.approx(dot / norms[0] / norms[1], abs=1e-6)
        assert row["norm_ratio"] == pytest.approx(norms[0] / norms[1], rel=1e-6)
        together = norms[0] ** 2 + norms[1] ** 2
        assert row["amplification"] == pytest.approx(1 + 2 * dot / together, abs=1e-6)
    rest = [c for c in found.columns if c.startswith(("output_overlap", "sign", "interference"))]
    assert rest
    assert all(found[column].null_count() == found.height for column in rest)


def test_single_precision_is_close_to_double(whole):
    single = pair_rows(PROBES, effort=Effort(precision="single", components=12))
    assert_close(whole["pairs"], single, 2e-5)


def test_single_precision_survives_a_bad_gauge(whole):
    # B and A of size 1e4 that cancel to an update of size 1
    bad = []
    for probe in PROBES[:3]:
        updates = {}
        for module, update in probe.updates.items():
            r = update.r
            mix = torch.eye(r, dtype=torch.float64)
            mix[0] += 1e4 * torch.linspace(0.5, 1.0, r, dtype=torch.float64)
            mix[0, 0] += 1.0
            b = torch.linalg.solve(mix.T, update.B.double().T).T
            updates[module] = LowRank(b, mix @ update.A.double(), update.scaling)
        bad.append(Probe(probe.name, updates, meta=probe.meta))
    good = [Probe(p.name, p.updates, meta=p.meta) for p in PROBES[:3]]
    found = pair_rows(bad, effort=Effort(("gram", "spectral"), precision="single"))
    assert_close(pair_rows(good, effort=Effort(("gram", "spectral"))), found, 1e-2)


def test_the_same_call_gives_the_same_bits():
    one, two = (pair_rows(PROBES, effort=Effort(precision="single")) for _ in range(2))
    assert one.equals(two)


def test_some_rows_or_columns_are_those_of_the_whole(whole):
    everyone, some = list(range(8)), [2, 5]
    for rows, across in ((some, everyone), (everyone, some), (some, some)):
        panel = measure(PROBES, TILED, rows=rows, columns=across, largest=LARGEST)
        wanted = whole["pairs"].filter(
            pl.col("a").is_in([f"a{i}" for i in rows])
            & pl.col("b").is_in([f"a{i}" for i in across])
        )
        assert_close(wanted, joined(pair_blocks(panel)))


# --- on disk


def test_probes_on_disk_are_read_by_module_and_give_the_same(tmp_path):
    files = [write_probe(probe, tmp_path / f"{probe.name}.safetensors") for probe in PROBES]
    light = [on_disk(read_probe(file)) for file in files]
    parts = ("updates", "gradient", "gradient_base", "halfway", "inputs", "outputs")
    assert all(isinstance(getattr(probe, part), OnDisk) for probe in light for part in parts)
    tiled, sets = pair_rows(light, effort=TILED), set_rows(light, SETS)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path) not in maps.read_text(), "no file stays mapped"
    heavy = [read_probe(file) for file in files]
    assert_close(pair_rows(heavy), tiled)
    assert_close(set_rows(heavy, SETS), sets)
    sizes = sum(file.stat().st_size for file in files)
    assert in_memory(light, 1000) == light, "too large together: left on disk"
    held = in_memory(light, sizes)
    assert all(type(getattr(probe, part)) is dict for probe in held for part in parts)
    assert_close(pair_rows(held, effort=TILED), tiled)
    assert in_memory(heavy, sizes) == heavy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finished_adapters_of_any_dtype(tmp_path, dtype):
    probes = []
    for seed in range(3):
        write_adapter(tiny_adapter(seed, rank=2 + seed), tmp_path / f"a{seed}", dtype=dtype)
        probes.append(on_disk(Probe.from_adapter(read_adapter(tmp_path / f"a{seed}"))))
    module = next(iter(tiny_shapes()))
    assert isinstance(probes[0].updates, OnDisk)
    assert probes[0].updates[module].B.dtype == dtype
    dense = [
        torch.cat([p.updates[m].to(torch.float64).dense().flatten() for m in tiny_shapes()])
        for p in probes
    ]
    rows = pair_rows(probes, effort=Effort(precision="single"))
    for row in rows.iter_rows(named=True):
        a, b = (dense[int(row[side][1])] for side in "ab")
        want = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
        assert row["frobenius_cosine"] == pytest.approx(want, abs=1e-6)


def test_what_was_computed_on_reading_stays_in_memory(tmp_path):
    write_adapter(tiny_adapter(0), tmp_path / "a0")
    read = Probe.from_adapter(read_adapter(tmp_path / "a0"))
    other = Probe(
        read.name, {m: u * 1.0 for m, u in regauged(read).updates.items()}, path=read.path
    )
    assert not isinstance(on_disk(other).updates, OnDisk)
    assert not isinstance(on_disk(tiny_probe(0)).updates, OnDisk)


def test_a_file_that_changes_meanwhile_is_named(tmp_path):
    write_adapter(tiny_adapter(0), tmp_path / "a0")
    probe = on_disk(Probe.from_adapter(read_adapter(tmp_path / "a0")))
    write_adapter(tiny_adapter(1, rank=6), tmp_path / "a0", force=True)
    with pytest.raises(ProbeError, match=r"'.*adapter_model.safetensors' changed while"):
        pair_rows([probe, tiny_probe(3)])
    with pytest.raises(ProbeError, match=r"'.*adapter_model.safetensors' changed while"):
        in_memory([probe], 10**9)


def test_signs_are_measured_where_they_are_asked_for():
    some = {"frobenius_cosine", "norm_ratio"}
    without, signed = (
        tables(PROBES, only=only)["pairs"] for only in (some, some | {"sign_conflict"})
    )
    assert "sign_conflict" not in without.columns
    assert signed.drop("sign_conflict").equals(without)
    assert signed["sign_conflict"].equals(tables(PROBES)["pairs"]["sign_conflict"])


def test_entries_that_are_not_finite_are_named():
    bad = tiny_adapter(0)
    module = next(iter(bad.modules))
    bad.modules[module].B[0, 0] = math.nan
    with pytest.raises(ProbeError, match=r"'a0' has NaN or infinite entries in its update of"):
        pair_rows([Probe.from_adapter(bad), tiny_probe(1)])


# --- the file of pairs


def test_a_written_table_is_the_table_and_says_how_it_was_measured(tmp_path):
    panel = measure(PROBES, TILED, largest=LARGEST)
    write_pairs(panel, tmp_path / "pairs.parquet", TILED)
    assert pl.read_parquet(tmp_path / "pairs.parquet").equals(pair_rows(PROBES, effort=TILED))
    said = read_facts(tmp_path / "pairs.parquet")
    assert list(said["adapters"]) == [probe.name for probe in PROBES]
    assert said["adapters"]["a1"] == pytest.approx(adapter_rows(PROBES)["update_norm"][1])
    assert said["errors"]["sign_conflict"]["rows"] == 32
    gradients = said["errors"]["gradient_cosine, gradient_cosine_base, velocity_cosine"]
    # 12 modules, k = 8: √((4/8 + 4/64)/12)
    assert gradients["sketch_size"] == 8
    assert gradients["standard_error_at_most"] == pytest.approx(0.2165, abs=1e-4)


def test_adding_adapters_measures_their_pairs_only(tmp_path, whole, monkeypatch):
    few = [PROBES[i] for i in (1, 2, 4, 6)]
    write_pairs(measure(few, TILED, largest=LARGEST), tmp_path / "few.parquet", TILED)
    visited = []
    plain = sums._Work._tile

    def counting(self, batch, site):
        visited.append(len(batch) * len(site.rows.span) * len(site.columns.span))
        plain(self, batch, site)

    monkeypatch.setattr(sums._Work, "_tile", counting)
    out = tmp_path / "all.parquet"
    assert add_pairs(tmp_path / "few.parquet", PROBES[:7], out) == 3
    wanted = whole["pairs"].filter(pl.col("a") != "a7", pl.col("b") != "a7")
    assert_close(wanted, pl.read_parquet(out))
    # 3 new against 7, and the 4 old against them, in each of 12 modules
    assert sum(visited) == 12 * (3 * 7 + 4 * 3)
    assert add_pairs(out, PROBES, out) == 1
    assert_close(whole["pairs"], pl.read_parquet(out))


def test_rows_are_not_added_to_those_of_others(tmp_path):
    path = tmp_path / "pairs.parquet"
    write_pairs(measure(PROBES[:3], TILED, largest=LARGEST), path, TILED)
    with pytest.raises(ProbeError, match="has pairs of 'a0', which is not among those given"):
        add_pairs(path, PROBES[1:], path)
    changed = renamed(tiny_probe(77), "a1")
    with pytest.raises(ProbeError, match=r"'a1' has norm .* now and .*: it changed since"):
        add_pairs(path, [PROBES[0], changed, *PROBES[2:4]], path)
    with pytest.raises(ProbeError, match="measured with precision double, now asked for is single"):
        add_pairs(path, PROBES[:4], path, Effort(precision="single"))
    asked = Effort(signals=("output_overlap",))
    write_pairs(measure(PROBES[:3], asked, largest=LARGEST), path, asked)
    with pytest.raises(ProbeError, match="measured with signals"):
        add_pairs(path, PROBES[:4], path, Effort())
    assert add_pairs(path, PROBES[:4], path) == 1
    added = pl.read_parquet(path)
    assert added["sign_conflict"].null_count() == added.height == 12
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "other.parquet")
    with pytest.raises(ProbeError, match="does not say what it was measured with"):
        add_pairs(tmp_path / "other.parquet", PROBES, path)
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(ProbeError, match="is no table of pairs"):
        read_facts(tmp_path / "text.parquet")


def test_efforts_that_do_not_exist_are_refused_by_name():
    with pytest.raises(ProbeError, match="no family of signals 'colour'"):
        Effort(("gram", "colour"))
    with pytest.raises(ProbeError, match="precision is 'half'"):
        Effort(precision="half")


# --- what single families leave out


@pytest.mark.parametrize(
    ("family", "names"),
    {
        "gram": ("frobenius_cosine", "amplification"),
        "sign": ("sign_conflict", "sign_conflict_error"),
        "spectral": ("output_overlap", "union_rank", "spectral_amplification"),
        "gradient": ("gradient_cosine", "first_order_transfer", "velocity_cosine"),
        "curvature": ("interference", "fisher_cosine", "data_weighted"),
    }.items(),
)
def test_one_family_fills_its_columns_as_all_do(family, names, whole):
    alone = pair_rows(PROBES, effort=Effort((family,)))
    assert alone.columns == whole["pairs"].columns
    for name in names:
        for column, _ in columns(name):
            assert alone[column].null_count() < alone.height, column
            assert_close(whole["pairs"].select(column), alone.select(column))
    others = {"gram", "sign", "spectral"} - {family}
    if "spectral" in others:
        assert alone["principal_cosine"].null_count() == alone.height


def test_products_of_signals_that_nobody_asks_for_are_not_taken(whole):
    found = pair_rows(PROBES, effort=Effort(signals=("output_overlap", "frobenius_cosine")))
    for name in ("sign_conflict", "sign_conflict_error", "spectral_amplification"):
        assert all(found[c].null_count() == found.height for c, _ in columns(name))
        asked = pair_rows(PROBES, effort=Effort(signals=(name,)))
        for column, _ in columns(name):
            assert_close(whole["pairs"].select(column), asked.select(column))
    for name in ("output_overlap", "union_rank", "frobenius_cosine", "interference"):
        for column, _ in columns(name):
            assert_close(whole["pairs"].select(column), found.select(column))


def test_the_exact_sign_conflict_is_that_of_the_dense_updates():
    two = PROBES[:2]
    found = pair_rows(two, effort=Effort(("sign",), sign_rows=None))
    total = conflict = 0.0
    for module in two[0].updates:
        x, y = (probe.updates[module].to(torch.float64).dense() for probe in two)
        product = x * y
        total += float(product.abs().sum())
        conflict += float(product.abs()[product < 0].sum())
    assert found["sign_conflict"][0] == pytest.approx(conflict / total, rel=1e-9)
    assert found["sign_conflict_error"][0] == 0.0


def test_the_sampled_sign_conflict_errs_as_much_as_it_says():
    """40 pairs of adapters: the errors over their standard errors have a spread of about 1."""
    draw = torch.Generator().manual_seed(0)
    shapes = {f"model.layers.{i}.mlp.up_proj": (300, 24) for i in range(5)}
    probes = [
        Probe(
            f"p{i}",
            {
                m: LowRank(
                    torch.randn(o, 2, generator=draw) * torch.rand(o, 1, generator=draw) ** 2,
                    torch.randn(2, n, generator=draw),
                )
                for m, (o, n) in shapes.items()
            },
        )
        for i in range(10)
    ]
    sampled = pair_rows(probes, effort=Effort(("sign",)))
    exact = pair_rows(probes, effort=Effort(("sign",), sign_rows=None))
    upper = sampled["a"] < sampled["b"]
    off = (sampled["sign_conflict"] - exact["sign_conflict"]) / sampled["sign_conflict_error"]
    spread = off.filter(upper).std()
    assert 0.6 < spread < 1.5
    assert off.abs().max() < 5


def test_the_table_of_signals_has_a_family_for_all_products():
    assert {name for name, s in of_kind("pair").items() if "max" in s.regions} == set(LARGEST)
    assert json.dumps(sorted(MODULES))
