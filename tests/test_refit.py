"""`mergeprobe fit`: the user's rows with ours, tiers that rows allow, the card, the command."""

import json

import numpy as np
import polars as pl
import pytest
from report_bank import write_cohorts
from synthetic_bank import bank

from mergeprobe.cli import main
from mergeprobe.errors import DataError
from mergeprobe.predict import refit
from mergeprobe.predict.learning import learning_rows, read_rows
from mergeprobe.predict.menus import CANDIDATES
from mergeprobe.predict.predictor import load_predictor
from mergeprobe.predict.scores import mae

RIDGE = {"ridge, few": CANDIDATES["ridge, few"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(mine, ours): both have cohorts c0 and c1, of other families."""
    root = tmp_path_factory.mktemp("rows")
    ours = bank(cohorts=5, families=16, seed=0).tables()
    mine = bank(cohorts=2, families=8, seed=1).tables()
    named = (pl.lit("my_") + pl.col("family")).alias("family")
    mine["adapters"] = mine["adapters"].with_columns(named)
    return write_cohorts(mine, root / "mine"), write_cohorts(ours, root / "ours")


def test_the_users_rows_come_on_top_of_ours(folders):
    mine, ours = folders
    rows, named = refit.gathered(mine, ours)
    assert named == ("c0 (yours)", "c1 (yours)")
    assert len(rows) == len(read_rows(mine)) + len(read_rows(ours))
    both = rows.pick(rows.cohort == "c0 (yours)")
    alone = read_rows(mine, cohorts=["c0"])
    assert both.target.tolist() == alone.target.tolist()
    assert np.array_equal(both.values, alone.values, equal_nan=True)
    assert all(f.startswith("my_") for f in both.holds()[0])
    only, named = refit.gathered(mine, None)
    assert (len(only), named) == (len(read_rows(mine)), ("c0", "c1"))


def test_no_rows_of_ours_is_one_line(folders, tmp_path):
    with pytest.raises(DataError, match="holds no rows of ours; fit on yours alone"):
        refit.gathered(folders[0], tmp_path)


def test_only_tiers_that_the_rows_have_signals_for():
    tables = bank(cohorts=3, families=8).tables()
    assert refit.supported(learning_rows(**tables)) == ["weights", "file", "model"]
    tables["pairs"] = tables["pairs"].drop("disturbance_late")
    assert refit.supported(learning_rows(**tables)) == ["weights", "file"]
    tables["pairs"] = tables["pairs"].drop("gradient_cosine_base", "frobenius_cosine")
    assert refit.supported(learning_rows(**tables)) == ["weights"]  # something has to answer


def test_the_card_scores_what_was_left_out(folders, tmp_path):
    mine, ours = folders
    found = refit.refit(mine, ours=ours, candidates=RIDGE)
    found.save(tmp_path / "predictor")
    card = load_predictor(tmp_path / "predictor").card
    assert card["yours"] == ["c0 (yours)", "c1 (yours)"]
    assert list(card["models"]) == ["weights", "file", "model"]
    rows = refit.gathered(mine, ours)[0]
    tested = refit.unseen_scores(rows, "model", "ridge, few", RIDGE, 0)
    mask = np.isin(tested.rows.cohort, card["yours"])
    mask &= (tested.rows.size == 2) & (tested.rows.method == "sum")
    part = tested.pick(mask)
    (row,) = (
        row
        for row in card["scores"]
        if (row["tier"], row["cohorts"], row["of"], row["method"])
        == ("model", "yours", "pairs", "sum")
    )
    assert row["rows"] == mask.sum()
    assert row["MAE"] == pytest.approx(mae(part, np.ones(len(part.rows))), abs=1e-4)
    # what the made-up signals tell is learnt
    everyone = [r for r in card["scores"] if (r["tier"], r["cohorts"]) == ("model", "all")]
    assert all(r["Spearman"] > 0.8 for r in everyone if r["method"] == "sum")


def test_the_command(folders, tmp_path, capsys, monkeypatch):
    mine, ours = folders
    defaults = refit.refit.__kwdefaults__ | {"candidates": RIDGE}
    monkeypatch.setattr("mergeprobe.cli.show.QUIET_SECONDS", 1e9)
    monkeypatch.setattr(refit, "OURS", ours)
    monkeypatch.setattr(refit.refit, "__kwdefaults__", defaults)
    out = tmp_path / "predictor"

    def fit(*arguments):
        status = main(["fit", *map(str, arguments)])
        return (status, *capsys.readouterr())

    status, printed, _ = fit("--rows", mine, "--out", out)
    assert status == 0
    assert "7 cohorts" in printed
    assert "Scores, all tasks unseen" in printed
    assert set(load_predictor(out).tiers) == {"weights", "file", "model"}
    status, printed, problem = fit("--rows", mine, "--out", out)
    assert (status, printed) == (1, "")
    assert "already exists" in problem
    status, printed, _ = fit("--rows", mine, "--only-mine", "--force", "--json", "--out", out)
    assert status == 0
    assert json.loads(printed)["cohorts"] == ["c0", "c1"]
    assert json.loads(printed)["frozen"] == []
    status, _, _ = fit("--rows", mine, "--frozen", "c1", "--only-mine", "--force", "--out", out)
    assert status == 0
    assert "Models were chosen without c1." in (out / "README.md").read_text()
    status, _, problem = fit("--rows", mine, "--frozen", "h1", "--out", tmp_path / "x")
    assert status == 1
    assert "no cohort 'h1' to freeze; there are c0" in problem
    status, _, problem = fit("--rows", tmp_path / "nowhere", "--out", tmp_path / "x")
    assert status == 1
    assert "no cohort in" in problem
