"""Every signal, in every region, against a dense float64 computation of its definition."""

from itertools import permutations

import pytest
import signal_oracle as oracle
from builders import tiny_probe, tiny_shapes

from mergeprobe.signals import SIGNALS, adapter_rows, linear, pair_rows, quadratic, set_rows
from mergeprobe.signals.table import columns, of_kind

MODULES = list(tiny_shapes())
REGIONS = {
    "all": MODULES,
    "early": [m for m in MODULES if ".0." in m],
    "middle": [m for m in MODULES if ".1." in m],
    "late": [m for m in MODULES if ".2." in m],
    "attention": [m for m in MODULES if "self_attn" in m],
    "mlp": [m for m in MODULES if "mlp" in m],
}
THIRDS = {"all": None, "early": 0, "middle": 1, "late": 2}


def complete(seed, **more):
    return tiny_probe(seed, top=24, vocabulary=24, **more)


# three ranks; the last adapts attention only, so some modules and a whole kind are not shared
PROBES = [complete(0), complete(1, rank=2), complete(3, rank=6, modules=["self_attn"])]


def close(got, want):
    if want is None or got is None:
        return got is None and want is None
    return abs(got - want) <= 1e-5 * max(1.0, abs(want))


@pytest.fixture(scope="module")
def pairs():
    return pair_rows(PROBES)


def test_the_oracle_covers_the_table():
    assert oracle.PAIRS.keys() | oracle.DRIFT_PAIRS.keys() == of_kind("pair").keys()
    assert oracle.ADAPTERS.keys() | {"drift_norm"} == of_kind("adapter").keys()
    assert oracle.SETS.keys() == of_kind("set").keys()


@pytest.mark.parametrize("name", of_kind("pair"))
def test_pair_signals(name, pairs):
    for row, (a, b) in zip(pairs.iter_rows(named=True), permutations(PROBES, 2), strict=True):
        assert (row["a"], row["b"]) == (a.name, b.name)
        for column, region in columns(name):
            if name in oracle.DRIFT_PAIRS:
                want = oracle.DRIFT_PAIRS[name](a, b, THIRDS[region])
            elif region == "max":
                shared = [m for m in MODULES if m in a.updates and m in b.updates]
                want = max(oracle.PAIRS[name](a, b, [m]) for m in shared)
            else:
                want = oracle.PAIRS[name](a, b, REGIONS[region])
            assert close(row[column], want), (column, a.name, b.name, row[column], want)


def test_adapter_signals():
    rows = adapter_rows(PROBES)
    for row, probe in zip(rows.iter_rows(named=True), PROBES, strict=True):
        for name in of_kind("adapter"):
            for column, region in columns(name):
                if name == "drift_norm":
                    want = oracle.rms(probe, THIRDS[region])
                elif region == "max":
                    want = max(oracle.ADAPTERS[name](probe, [m]) for m in probe.updates)
                else:
                    mine = oracle.here(probe, REGIONS[region])
                    want = oracle.ADAPTERS[name](probe, REGIONS[region]) if mine else None
                assert close(row[column], want), (column, probe.name, row[column], want)


def test_set_signals(pairs):
    sets = [["a0", "a1"], ["a3", "a0", "a1"]]
    rows = set_rows(PROBES, sets).to_dicts()
    by_name = {probe.name: probe for probe in PROBES}
    values = {(row["a"], row["b"]): row for row in pairs.to_dicts()}
    assert [row["a"] for row in rows] == ["a0", "a1", "a0", "a1", "a3"]
    assert rows[-1]["set"] == ["a0", "a1", "a3"]
    for row in rows:
        i, members = by_name[row["a"]], [by_name[name] for name in row["set"]]
        modules = [m for m in MODULES if any(m in p.updates for p in members)]
        for name in of_kind("set"):
            want = oracle.SETS[name](i, members, modules)
            assert close(row[name], want), (name, row["a"], row[name], want)
        others = [values[j.name, i.name] for j in members if j is not i]
        for name, signal in of_kind("pair").items():
            if not signal.diagnostic:
                on = [other[name] for other in others]
                assert row[f"{name}_sum"] == pytest.approx(sum(on))
                assert row[f"{name}_most"] == max(on)
                assert row[f"{name}_least"] == min(on)


def test_the_surrogates_coefficients():
    by_name = {probe.name: probe for probe in PROBES}
    for row in quadratic(PROBES).iter_rows(named=True):
        i, a, b = (by_name[row[key]] for key in "iab")
        assert close(row["value"], oracle.form(i, a, b, MODULES))
    found = {(row["i"], row["a"]): row for row in linear(PROBES).to_dicts()}
    for (i, a), row in found.items():
        shared = [m for m in MODULES if m in by_name[i].updates and m in by_name[a].updates]
        for column, part in (("at_snapshot", "gradient"), ("at_base", "gradient_base")):
            sketches = getattr(by_name[i], part)
            want = sum(
                float((sketches[m].double() * oracle.sketched(by_name[a], m, 8)).sum())
                for m in shared
            )
            assert close(row[column], want)
    assert len(found) == 9


def test_many_adapters_keep_the_part_of_the_triples_that_a_merge_needs():
    few = {(r["i"], r["a"], r["b"]): r["value"] for r in quadratic(PROBES).to_dicts()}
    crowd = [*PROBES, *(complete(10 + s, rank=1, modules=["v_proj"]) for s in range(18))]
    many = {(r["i"], r["a"], r["b"]): r["value"] for r in quadratic(crowd).to_dicts()}
    assert all(a == b or i in (a, b) for i, a, b in many)
    assert len(many) == 21 * 21 + 2 * 21 * 20
    for key in set(few) & set(many):
        assert many[key] == pytest.approx(few[key], rel=1e-9)


def test_ranges_hold(pairs):
    for name in of_kind("pair"):
        low, high = SIGNALS[name].range
        for column, _ in columns(name):
            for value in pairs[column].drop_nulls():
                assert low is None or value >= low - 1e-9, (column, value)
                assert high is None or value <= high + 1e-9, (column, value)
