"""The signals verb on folders of finished adapters: families, files, sets, additions, screening."""

import json

import polars as pl
import pytest
from builders import tiny_adapter

from mergeprobe.adapters.checkpoint import read_adapter, write_adapter
from mergeprobe.capture.probe import Probe
from mergeprobe.cli import main
from mergeprobe.signals import pair_rows, set_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    for seed in range(4):
        write_adapter(tiny_adapter(seed, rank=1 + seed), path / f"a{seed}")
    return path


def run(capsys, *arguments, status=0):
    found = main(["signals", *map(str, arguments)])
    printed = capsys.readouterr()
    assert found == status, printed.err
    return printed.out if status == 0 else printed.err


def probes(folder, count=4):
    return [Probe.from_adapter(read_adapter(folder / f"a{seed}")) for seed in range(count)]


def test_one_family_to_a_file(capsys, folder, tmp_path):
    out = tmp_path / "pairs.parquet"
    text = run(capsys, folder, "--only", "gram", "--out", out)
    assert "12 rows, 135 columns written" in text
    rows, want = pl.read_parquet(out), pair_rows(probes(folder))
    assert (rows["frobenius_cosine"] - want["frobenius_cosine"]).abs().max() < 1e-9
    assert rows["output_overlap"].null_count() == 12


def test_rows_of_sets(capsys, folder, tmp_path):
    out = tmp_path / "pairs.parquet"
    text = run(capsys, folder, "--set", "a0+a1+a3", "--out", out)
    assert "a0+a1+a3" in text
    want = set_rows(probes(folder), [["a0", "a1", "a3"]])
    found = pl.read_parquet(tmp_path / "pairs.sets.parquet")
    assert found["a"].to_list() == ["a0", "a1", "a3"]
    assert (found["cosine_to_rest"] - want["cosine_to_rest"]).abs().max() < 1e-9
    shown = json.loads(run(capsys, folder, "--set", "a0+a1+a3", "--json"))
    assert shown["sets"] == found.to_dicts()


def test_adding_adapters_to_a_file(capsys, folder, tmp_path):
    out = tmp_path / "pairs.parquet"
    run(capsys, *(folder / f"a{seed}" for seed in (0, 1, 3)), "--out", out)
    text = run(capsys, folder, "--add-to", out, "--out", out, "--force")
    assert "1 of 4 adapters were new; 12 rows" in text
    want, rows = pair_rows(probes(folder)), pl.read_parquet(out)
    assert rows["b"].to_list() == want["b"].to_list()
    assert (rows["union_rank"] - want["union_rank"]).abs().max() < 1e-9
    other = run(capsys, folder, "--add-to", out, "--out", out, "--force", "--exact-signs", status=1)
    assert "measured with sign_rows 32, now asked for is None" in other
    assert "give --out" in run(capsys, folder, "--add-to", out, status=1)


def test_screening(capsys, folder, tmp_path):
    out = tmp_path / "close.parquet"
    text = run(capsys, folder, "--screen", tmp_path / "sketches", "--error", "0.1", "--out", out)
    assert "6 rows written" in text
    found = pl.read_parquet(out)
    both = found.join(pair_rows(probes(folder)), on=["a", "b"], suffix="_exact")
    off = (both["frobenius_cosine"] - both["frobenius_cosine_exact"]).abs()
    assert (off <= both["bound"]).all()
    assert len(list((tmp_path / "sketches").iterdir())) == 4


def test_what_cannot_be_asked_is_refused_by_name(capsys, folder, tmp_path):
    assert "no family of signals 'colour'" in run(capsys, folder, "--only", "colour", status=1)
    assert "precision is 'half'" in run(capsys, folder, "--precision", "half", status=1)
    out = tmp_path / "there.parquet"
    out.write_bytes(b"")
    assert "already exists" in run(capsys, folder, "--out", out, status=1)
