"""What must hold for all signals: gauge, missing parts, shared modules, degenerate adapters."""

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch
from builders import (
    regauged,
    renamed,
    reordered,
    rescaled,
    tiny_adapter,
    tiny_probe,
)

from mergeprobe.capture.probe import Probe, read_probe, write_probe
from mergeprobe.errors import AdapterMismatch, ProbeError
from mergeprobe.lowrank import LowRank
from mergeprobe.signals import (
    SIGNALS,
    adapter_rows,
    layer_rows,
    linear,
    markdown,
    pair_rows,
    quadratic,
    set_rows,
    tables,
)
from mergeprobe.signals.table import columns, of_kind

PROBES = [tiny_probe(0), tiny_probe(1, rank=2), tiny_probe(2)]
SETS = [["a0", "a1", "a2"], ["a0", "a2"]]


def assert_same(one: pl.DataFrame, two: pl.DataFrame, tolerance: float = 1e-5) -> None:
    assert one.columns == two.columns
    for column in one.columns:
        for x, y in zip(one[column], two[column], strict=True):
            if isinstance(x, float) and isinstance(y, float):
                assert abs(x - y) <= tolerance * max(1.0, abs(x)), (column, x, y)
            elif isinstance(x, pl.Series):
                assert x.to_list() == y.to_list()
            else:
                assert x == y, (column, x, y)


@pytest.mark.parametrize("change", [regauged, reordered])
def test_no_signal_depends_on_the_gauge(change):
    before = tables(PROBES, SETS)
    after = tables([change(probe) for probe in PROBES], SETS)
    for name in before:
        assert_same(before[name], after[name])


def test_one_pass_gives_the_rows_of_the_single_functions():
    together = tables(PROBES, SETS)
    apart = {
        "pairs": pair_rows(PROBES),
        "adapters": adapter_rows(PROBES),
        "sets": set_rows(PROBES, SETS),
        "layers": layer_rows(PROBES),
        "quadratic": quadratic(PROBES),
        "linear": linear(PROBES),
    }
    assert together.keys() == apart.keys()
    for name in apart:
        assert together[name].equals(apart[name]), name


def test_a_pairs_row_does_not_depend_on_who_else_is_measured():
    alone = pair_rows([PROBES[0], PROBES[2]])
    among = pair_rows(PROBES)
    assert_same(alone[:1], among[1:2], 1e-9)


def test_symmetric_signals_are_equal_both_ways():
    rows = {(row["a"], row["b"]): row for row in pair_rows(PROBES).to_dicts()}
    for name, signal in of_kind("pair").items():
        for column, _ in columns(name):
            one, two = rows["a0", "a1"][column], rows["a1", "a0"][column]
            assert (one == two) == signal.symmetric, column


def without(probe: Probe, part: str) -> Probe:
    if part.startswith("meta."):
        key = part.removeprefix("meta.")
        return replace(probe, meta={k: v for k, v in probe.meta.items() if k != key})
    return replace(probe, **{part: None if part in ("drift", "calibration") else {}})


@pytest.mark.parametrize(
    "part", sorted({p for s in SIGNALS.values() for p in s.needs} - {"updates"})
)
def test_a_missing_part_makes_exactly_its_signals_null(part):
    probes = [without(probe, part) for probe in PROBES]
    found = tables(probes, SETS)
    for kind, table in (("pair", "pairs"), ("adapter", "adapters"), ("set", "sets")):
        for name, signal in of_kind(kind).items():
            for column, _ in columns(name):
                nulls = found[table][column].null_count()
                expected = found[table].height if part in signal.needs else 0
                assert nulls == expected, (column, part)


def test_finished_adapters_have_the_signals_of_their_weights():
    probes = [Probe.from_adapter(tiny_adapter(seed)) for seed in range(2)]
    rows = pair_rows(probes)
    for name, signal in of_kind("pair").items():
        null = rows[name].null_count() > 0
        assert null == (signal.needs != ("updates",)), name
    assert quadratic(probes)["value"].null_count() == 8
    assert linear(probes)["at_base"].null_count() == 4


def test_one_probe_without_gradients_leaves_the_others_measured():
    rows = pair_rows([PROBES[0], without(PROBES[1], "gradient"), PROBES[2]])
    known = {(r["a"], r["b"]): r["gradient_cosine"] is not None for r in rows.to_dicts()}
    assert [pair for pair, there in known.items() if there] == [("a0", "a2"), ("a2", "a0")]
    # transfer needs the gradient of b only
    transfer = {(r["a"], r["b"]): r["first_order_transfer_snapshot"] for r in rows.to_dicts()}
    assert transfer["a1", "a0"] is not None
    assert transfer["a0", "a1"] is None


def test_a_module_that_only_one_adapts_counts_in_its_norm():
    both, half = PROBES[0], renamed(tiny_probe(0, modules=["self_attn"]), "half")
    row = pair_rows([both, half]).row(0, named=True)
    # the attention updates are equal, so the cosine is what is left of the longer norm
    norms = {name: adapter_rows([p])["update_norm"][0] for name, p in (("b", both), ("h", half))}
    assert row["frobenius_cosine"] == pytest.approx(norms["h"] / norms["b"])
    assert row["frobenius_cosine_attention"] == pytest.approx(1.0)
    assert row["frobenius_cosine_mlp"] is None


def test_copies():
    row = pair_rows([PROBES[0], renamed(PROBES[0], "copy")]).row(0, named=True)
    ones = (
        "frobenius_cosine norm_ratio output_overlap input_overlap principal_cosine fisher_cosine "
        "principal_cosine_mean gradient_cosine gradient_cosine_base velocity_cosine drift_cosine "
        "drift_ratio drift_cka interference_ratio data_weighted"
    )
    for name in ones.split():
        assert row[name] == pytest.approx(1.0, abs=1e-6), name
    assert row["amplification"] == pytest.approx(2.0)
    assert row["spectral_amplification"] == pytest.approx(2.0)
    assert row["union_rank"] == pytest.approx(0.5)
    assert row["sign_conflict"] == pytest.approx(0.0, abs=1e-6)
    assert row["js_divergence"] == pytest.approx(0.0, abs=1e-9)


def test_opposites():
    row = pair_rows([PROBES[0], renamed(rescaled(PROBES[0], -1.0), "undo")]).row(0, named=True)
    assert row["frobenius_cosine"] == pytest.approx(-1.0)
    assert row["sign_conflict"] == pytest.approx(1.0, abs=1e-6)
    assert row["amplification"] == pytest.approx(0.0, abs=1e-9)
    assert row["spectral_amplification"] == pytest.approx(0.0, abs=1e-5)


def test_a_zero_update_conflicts_with_nothing():
    zero = renamed(rescaled(PROBES[1], 0.0), "zero")
    rows = {(r["a"], r["b"]): r for r in pair_rows([PROBES[0], zero]).to_dicts()}
    there, back = rows["zero", "a0"], rows["a0", "zero"]
    zeros = "frobenius_cosine output_overlap principal_cosine interference norm_ratio fisher_cosine"
    for name in zeros.split():
        assert there[name] == 0.0, name
    assert there["amplification"] == pytest.approx(1.0)
    assert there["spectral_amplification"] == pytest.approx(1.0)
    assert there["sign_conflict"] is None  # no entry of both to disagree
    for name in ("norm_ratio", "interference_ratio", "data_weighted"):
        assert back[name] is None  # nothing of its own to compare with
    assert adapter_rows([zero])["stable_rank"][0] is None


def test_scale_free_signals_do_not_see_the_learning_rate():
    loud = [PROBES[0], rescaled(PROBES[1], 30.0)]
    before, after = (pair_rows(p).row(0, named=True) for p in (PROBES[:2], loud))
    same = "frobenius_cosine sign_conflict output_overlap principal_cosine union_rank fisher_cosine"
    for name in same.split():
        assert after[name] == pytest.approx(before[name], abs=1e-6), name
    assert after["norm_ratio"] == pytest.approx(before["norm_ratio"] / 30.0)


def test_sampled_signs_are_as_close_to_the_exact_ones_as_they_say():
    draw = torch.Generator().manual_seed(0)
    shapes = {f"model.layers.{i}.mlp.up_proj": (400, 30) for i in range(6)}
    probes = []
    for name in ("a", "b"):
        updates = {
            m: LowRank(torch.randn(out, 3, generator=draw), torch.randn(3, into, generator=draw))
            for m, (out, into) in shapes.items()
        }
        probes.append(Probe(name, updates))
    exact = pair_rows(probes, sign_rows=None).row(0, named=True)
    sampled = pair_rows(probes).row(0, named=True)
    assert exact["sign_conflict_error"] == 0.0
    error = sampled["sign_conflict_error"]
    assert 0.0 < error < 0.03
    assert 0.0 < abs(sampled["sign_conflict"] - exact["sign_conflict"]) < 3 * error


def test_layers_and_kinds():
    rows = layer_rows(PROBES[:2])
    assert rows.columns[:4] == ["a", "b", "layer", "kind"]
    assert rows.height == 2 * 3 * 2
    assert set(rows["layer"]) == {0, 1, 2}
    assert set(rows["kind"]) == {"attention", "mlp"}
    # the layers' interference adds up to the whole
    whole = pair_rows(PROBES[:2])["interference"]
    parts = rows.group_by("a", maintain_order=True).agg(pl.col("interference").sum())
    assert parts["interference"].to_list() == pytest.approx(whole.to_list())


def test_columns_and_order_are_always_the_same():
    full = pair_rows(PROBES)
    assert pair_rows(PROBES[::-1])["a"].to_list() == ["a2", "a2", "a1", "a1", "a0", "a0"]
    finished = pair_rows([Probe.from_adapter(tiny_adapter(seed)) for seed in range(2)])
    assert finished.columns == full.columns
    assert finished.dtypes == full.dtypes
    assert pair_rows(PROBES[:1]).columns == full.columns
    assert pair_rows(PROBES[:1]).height == 0


def test_probes_that_do_not_belong_together_are_refused_by_name():
    with pytest.raises(ProbeError, match="two probes are named 'a0'"):
        pair_rows([PROBES[0], PROBES[0]])
    other = tiny_probe(5, fingerprint="e" * 16)
    with pytest.raises(AdapterMismatch, match=r"'a0' was trained on base f+ .* 'a5' on e+"):
        pair_rows([PROBES[0], other])
    apart = tiny_probe(6, modules=["self_attn"]), tiny_probe(7, modules=["mlp"])
    with pytest.raises(AdapterMismatch, match="'a6' and 'a7' adapt no module in common"):
        pair_rows(apart)
    with pytest.raises(ProbeError, match="names 'who'"):
        set_rows(PROBES, [["a0", "who"]])
    with pytest.raises(ProbeError, match="at least two adapters, each once"):
        set_rows(PROBES, [["a0"]])
    with pytest.raises(ProbeError, match=r"sketches of .* are \(8, 8\) in 'a0' and \(6, 6\)"):
        pair_rows([PROBES[0], tiny_probe(8, k=6)])
    with pytest.raises(ProbeError, match="probe sets differ"):
        pair_rows([PROBES[0], tiny_probe(9, top=5)])
    with pytest.raises(ProbeError, match="no probes"):
        adapter_rows([])


def test_signals_survive_the_file(tmp_path):
    files = [write_probe(probe, tmp_path / f"{probe.name}.safetensors") for probe in PROBES]
    # moments are stored in bf16, everything else exactly
    assert_same(pair_rows(PROBES), pair_rows([read_probe(file) for file in files]), 2e-2)


def test_the_documented_table_is_the_table():
    page = Path(__file__).parents[1] / "docs" / "signals.md"
    assert page.read_text("utf-8") == markdown()
