"""The tables of `bench report`: resampled scores, decisions worked by hand, pages from rows."""

import math

import numpy as np
import polars as pl
import pytest
from report_bank import reported, write_cohorts

from mergeprobe.artefact import write_parquet
from mergeprobe.bench.tables import report
from mergeprobe.bench.tables.audit import audit_alone
from mergeprobe.bench.tables.bank import made_bank, open_bank
from mergeprobe.bench.tables.beside import AUDIT_FILE, TUNED_FILE, read_beside
from mergeprobe.bench.tables.ceiling import repeated
from mergeprobe.bench.tables.decision_tables import decisions_page, rivals
from mergeprobe.bench.tables.decisions import (
    ORACLE,
    TUNED,
    decide,
    oracle_label,
    without_a_plan,
)
from mergeprobe.bench.tables.forecasters import (
    FILE,
    MODEL,
    WEIGHTS,
    fitted,
    forecast_by,
    not_own,
    plain,
)
from mergeprobe.bench.tables.measured import (
    best_within,
    planned,
    read_cohort,
    serving_of,
    truncated_ranks,
    truncated_retentions,
)
from mergeprobe.bench.tables.page import Needs, Table, estimate, grid, number, percent
from mergeprobe.bench.tables.picture import Mark, Panel, Series, bars, drawn
from mergeprobe.bench.tables.resample import SCORES, cluster_interval, draws, resampled, samples_of
from mergeprobe.bench.tables.skill import Options
from mergeprobe.bench.tables.transfer import cohorts_apart
from mergeprobe.errors import DataError
from mergeprobe.plan import Forecast
from mergeprobe.predict.baselines import BASELINES, learned
from mergeprobe.predict.features import FEATURES
from mergeprobe.predict.menus import CANDIDATES
from mergeprobe.predict.scores import Estimate, bootstrap, scores_of
from mergeprobe.predict.splits import leaks
from mergeprobe.predict.tier import Guess

RIDGE = {"ridge, few": CANDIDATES["ridge, few"]}


@pytest.fixture(scope="module")
def bank():
    return made_bank(reported())


@pytest.fixture(scope="module")
def found(bank):
    """Held-out pairs at 5 % of training, forecast by a ridge and by two baselines."""
    fold = bank.held_out_fold()
    ridge = {MODEL: learned("model", candidates=RIDGE), "method mean": BASELINES["method mean"]}
    models = fitted(bank.rows, fold, ridge | {"identity": BASELINES["task-additive"]})
    mask = fold.test & (bank.rows.size == 2) & (bank.rows.point == 0.05)
    return forecast_by(bank.rows, mask & (bank.rows.method != "ties"), models)


# --- scores in all bootstrap samples at once


def test_samples_are_the_scores_under_the_same_weights(found):
    weights = draws(found[MODEL].rows, 12, seed=3)
    for one in found.values():
        fast = samples_of(one, weights)
        for place, weight in enumerate(weights):
            slow = scores_of(one, weight)
            for metric in SCORES:
                assert fast[metric][place] == pytest.approx(slow[metric], abs=1e-9, nan_ok=True)


def test_intervals_are_those_of_the_plain_bootstrap(found):
    fast = resampled(found, runs=25, seed=1)
    for metric in ("MAE", "within partners", "AUC"):
        slow = bootstrap(found[MODEL], metric, runs=25, seed=1)
        assert fast[MODEL].estimate(metric) == Estimate(*(pytest.approx(v) for v in _three(slow)))
        slow = bootstrap(found[MODEL], metric, against=found["identity"], runs=25, seed=1)
        paired = fast[MODEL].estimate(metric, against=fast["identity"])
        assert _three(paired) == pytest.approx(_three(slow))


def _three(found):
    return found.value, found.low, found.high


def test_a_ratio_of_widths(found):
    fast = resampled(found, runs=9)
    ratio = fast[MODEL].ratio("width", fast["method mean"])
    widths = [float(np.mean(found[n].guess.high - found[n].guess.low)) for n in fast][:2]
    assert ratio.value == pytest.approx(widths[0] / widths[1])
    assert ratio.low <= ratio.high
    assert math.isnan(fast[MODEL].ratio("width", fast["identity"]).value)
    # what has no intervals has no ratio, whatever rows it is of
    others = resampled({"few": found["identity"].pick(found[MODEL].rows.size == 2)}, runs=8)
    assert math.isnan(others["few"].ratio("width", fast["method mean"]).value)


def test_a_constant_forecast_has_no_rank_skill(found):
    flat = resampled({"flat": found["method mean"].pick(found[MODEL].rows.method == "sum")}, runs=9)
    assert flat["flat"].value["Spearman"] == 0.0
    assert (flat["flat"].samples["Spearman"] == 0.0).all()


def test_cluster_interval_by_hand():
    assert all(math.isnan(end) for end in cluster_interval([0.5]))
    # two clusters: a sample's mean is 0, 1 or 2 with 1/4, 1/2, 1/4
    assert cluster_interval([0.0, 2.0], runs=400) == (0.0, 2.0)
    assert cluster_interval([0.3, 0.3, math.nan]) == (pytest.approx(0.3), pytest.approx(0.3))


# --- which cohorts, and what repeats


def test_held_out_cohorts_are_frozen(bank):
    assert bank.held_out == ("h1", "h1-again", "h2", "h3")
    assert bank.trained == ("t1", "t2", "t3", "t4", "t5")
    fold = bank.held_out_fold()
    assert leaks(bank.rows, fold) == set()
    assert set(bank.rows.cohort[fold.train]) <= set(bank.trained)
    assert set(bank.rows.cohort[fold.test]) == set(bank.held_out)
    other = made_bank(bank.tables, held_out=["t1"])
    assert other.held_out == ("t1",)
    # the others hold families of t1, and rows with these are not trained on
    assert leaks(other.rows, other.held_out_fold()) == set()
    with pytest.raises(DataError, match="no cohort 'h9' to hold out"):
        made_bank(bank.tables, held_out=["h9"])


def test_the_ceiling_is_the_other_seed(bank):
    frozen = bank.rows.pick(np.isin(bank.rows.cohort, bank.held_out))
    twins = repeated(frozen, bank.measured)
    assert set(twins.rows.cohort) == {"h1", "h1-again"}
    table = twins.rows.table.with_columns(
        pl.Series("kept", twins.rows.target), pl.Series("said", twins.guess.retention)
    )
    key = ["point", "i", "set", "method"]
    both = table.filter(pl.col("cohort") == "h1").join(
        table.filter(pl.col("cohort") == "h1-again"), on=key
    )
    assert both.height == len(twins.rows) // 2
    assert both["kept"].to_list() == both["said_right"].to_list()
    assert both["kept_right"].to_list() == both["said"].to_list()
    first = frozen.pick(frozen.cohort == "h1")  # the repeat need not have been probed
    alone = repeated(first, bank.measured)
    assert (
        alone.guess.retention.tolist() == twins.guess.retention[twins.rows.cohort == "h1"].tolist()
    )
    assert repeated(first, bank.measured.filter(pl.col("cohort") != "h1-again")) is None


def test_repeats_without_signals_are_measured_but_not_forecast(bank):
    tables = {
        name: table.filter(pl.col("cohort") != "h1-again") if name == "pairs" else table
        for name, table in bank.tables.items()
    }
    found = made_bank(tables)
    assert found.held_out == ("h1", "h2", "h3")
    assert "h1-again" in found.measured["cohort"]
    assert repeated(found.rows, found.measured) is not None


# --- decisions by hand

OUTCOMES = (  # set, method, rank, cost, adapter -> retention on all, even, odd items
    ("a+b", "mean", 8, 80, {"a": (0.95, 0.96, 0.94), "b": (0.92, 0.93, 0.91)}),
    ("a+c", "mean", 8, 80, {"a": (0.5, 0.5, 0.5), "c": (0.99, 0.99, 0.99)}),
    ("b+c", "mean", 8, 80, {"b": (0.97, 0.97, 0.97), "c": (0.85, 0.95, 0.75)}),
    ("a+b+c", "mean", 8, 80, {"a": 3 * (0.6,), "b": 3 * (0.7,), "c": 3 * (0.8,)}),
    ("a+b+c", "sum", 8, 80, {"a": (0.2, 0.9, 0.1), "b": 3 * (0.9,), "c": 3 * (0.95,)}),
    ("a+b+c", "joint", None, 160, {"a": 3 * (0.9,), "b": 3 * (0.9,), "c": 3 * (0.9,)}),
    ("a", "truncated", 2, 20, {"a": 3 * (0.97,)}),
    ("b", "truncated", 2, 20, {"b": 3 * (0.9,)}),
    ("b", "truncated", 4, 40, {"b": 3 * (0.98,)}),
    ("c", "truncated", 2, 20, {"c": 3 * (0.8,)}),
)


def small_world(**noise):
    """One cohort of three adapters, ranks 4, 8 and 8, ten parameters a rank: 200 in all."""
    outcomes = [
        {
            "cohort": "h1",
            "adapter": name,
            "set": group,
            "method": method,
            "rank": rank,
            "resident_parameters": cost,
            "gain_retention": kept[0],
            "gain_retention_even": kept[1],
            "gain_retention_odd": kept[2],
            "own_gain": 2.0,
            "own_gain_se": noise.get(name, 0.1),
            "loss": 1.0,
            "loss_single": 0.5,
        }
        for group, method, rank, cost, each in OUTCOMES
        for name, kept in each.items()
    ]
    named = {"cohort": "h1", "base": "x", "family": "f"}
    adapters = [{**named, "adapter": n, "rank": r} for n, r in (("a", 4), ("b", 8), ("c", 8))]
    pairs = [
        {"cohort": "h1", "point": 0.05, "i": i, "j": j} for i in "abc" for j in "abc" if i != j
    ]
    tables = {"adapters": adapters, "outcomes": outcomes, "pairs": pairs}
    return {name: pl.DataFrame(rows, infer_schema_length=None) for name, rows in tables.items()}


SAID = {("b+c", "mean"): 0.93, ("a+b", "mean"): 0.95}  # all others: 0.5


def said(name, group, method):
    kept = SAID.get(("+".join(group), method), 0.5)
    return Forecast(retention=kept, low=kept - 0.04, high=1.0)


def test_the_plan_is_the_cheapest_that_is_forecast_to_keep_the_floor():
    cohort = read_cohort(small_world(), "h1")
    assert (cohort.per_rank, cohort.full) == (10.0, 200)
    plan = planned(cohort, said, ("mean", "sum"), floor=0.9)
    serving = serving_of(plan)
    assert sorted(serving) == [(("a",), None), (("b", "c"), "mean")]
    assert cohort.cost(serving) == plan.resident_parameters == 120
    assert cohort.score(serving).mean == pytest.approx((1 + 0.97 + 0.85) / 3)
    assert cohort.score(serving).worst == 0.85
    # by the low end 0.89 does not keep the floor, 0.91 does
    careful = serving_of(planned(cohort, said, ("mean",), floor=0.9, confidence="lower"))
    assert sorted(careful) == [(("a", "b"), "mean"), (("c",), None)]


def test_truncated_routing_raises_the_lowest_rank_while_it_fits():
    cohort = read_cohort(small_world(), "h1")
    # 2, 2, 2 costs 60; a to its own 4: 80; b to 4: 100; c to its own 8 would be 160, b to 8 140
    ranks = truncated_ranks(cohort, 120)
    assert ranks == {"a": 4, "b": 4, "c": 2}
    assert truncated_retentions(cohort, ranks) == {"a": 1.0, "b": 0.98, "c": 0.8}
    assert truncated_ranks(cohort, 30) == {"a": 2, "b": 2, "c": 2}
    tables = small_world()
    without = tables["outcomes"].filter(pl.col("method") != "truncated")
    assert truncated_ranks(read_cohort(tables | {"outcomes": without}, "h1"), 120) is None


def test_what_is_chosen_on_one_half_is_scored_on_the_other():
    cohort = read_cohort(small_world(), "h1")
    on_even = best_within(cohort, ("mean", "sum"), "even", 120)
    assert sorted(on_even) == [(("a",), None), (("b", "c"), "mean")]
    assert cohort.score(on_even, "odd").worst == 0.75
    decided = decide(_one_cohort(), {MODEL: _saying, FILE: _saying})
    results = {name: decided.of(name)["h1"] for name in decided.strategies}
    # even items: sum's worst is 0.9, the mean's 0.6; odd ones: 0.1 and 0.6
    best = results["best merge method, chosen by worst case on the other half"]
    assert best.worst == pytest.approx((0.1 + 0.6) / 2)
    assert best.mean == pytest.approx((0.65 + 0.7) / 2)
    # cheapest of at least 0.9: on even items the sum of all (80), on odd ones a+b | c (160)
    assert results[ORACLE].worst == pytest.approx((0.1 + 0.93) / 2)
    assert results[ORACLE].parameters == 120
    plan, oracle = results["plan, model tier"], results[oracle_label("plan, model tier")]
    assert (plan.half_worst, oracle.worst) == (pytest.approx(0.85), pytest.approx(0.85))
    assert plan.forecast == pytest.approx(0.93)
    assert results["joint adapter"].share == pytest.approx(0.8)
    assert results["full routing by name"].worst == 1.0
    cut = results["routing truncated to the parameters of: plan, model tier"]
    assert (cut.parameters, cut.worst) == (100, 0.8)


def _one_cohort():
    tables = small_world()
    both = {n: pl.concat([t, t.with_columns(cohort=pl.lit("t1"))]) for n, t in tables.items()}
    return made_bank(both)


def _saying(rows):
    """A forecaster that says what SAID says."""
    sets = ["+".join(sorted((i, *o))) for i, o in rows.table.select("i", "others").iter_rows()]
    keys = zip(sets, rows.table["method"].to_list(), strict=True)
    kept = np.array([SAID.get(key, 0.5) for key in keys])
    nothing = np.full(len(kept), np.nan)
    return Guess(kept, kept - 0.04, np.maximum(kept, 1.0), nothing, nothing)


def test_differences_and_regret_by_hand():
    decided = decide(_one_cohort(), {MODEL: _saying, FILE: _saying})
    page = decisions_page(_one_cohort(), decided, Options("command", 50))
    tables = {part.title: part for part in page.parts if isinstance(part, Table)}
    rows = {row[0]: row[1:] for row in tables["Differences: plan, model tier"].rows}
    assert list(rows["joint adapter"]) == ["0.04", "−0.05", "−0.20", "1"]
    # against what was chosen on halves the plan is scored on halves: 0.85 − 0.35
    assert rows["best merge method, chosen by worst case on the other half"][1] == "0.50"
    regret = {row[0]: row[1:] for row in tables["Regret and savings"].rows}
    assert list(regret["plan, model tier"]) == ["0.00", "0.00", "0.40"]
    assert "plan, file tier" not in rivals(decided, "plan, model tier")
    needs = {part.title for part in page.parts if isinstance(part, Needs)}
    assert needs == {"Latency per token", TUNED}


def test_a_length_is_chosen_on_one_half_and_scored_on_the_other():
    tables = small_world()
    # of the mean of all, as in small_world: worst 0.6 on both halves
    kept = {  # length -> (even, odd) of a, b, c
        1.5: ((0.9, 0.8, 0.7), (0.5, 0.6, 0.7)),
        2.0: ((0.6, 0.65, 0.9), (0.95, 0.8, 0.9)),
    }
    rows = [
        {
            "cohort": "h1", "adapter": name, "method": "mean", "length": length,
            "own_gain": 2.0, "own_gain_se": 0.1, "gain_retention": (even + odd) / 2,
            "gain_retention_even": even, "gain_retention_odd": odd,
        }
        for length, halves in kept.items()
        for name, even, odd in zip("abc", *halves, strict=True)
    ]  # fmt: skip
    cohort = read_cohort(tables | {"tuned": pl.DataFrame(rows)}, "h1")
    needs = {}
    found = {result.strategy: result for result in without_a_plan(cohort, needs)}
    assert TUNED not in needs
    # on the even items 1.5 has the best worst case (0.7; 2 has 0.6) and keeps 0.5 of the odd ones;
    # on the odd ones 2 has (0.8; 1.5 has 0.5), and keeps 0.6 of the even ones
    tuned = found["mean of all, length tuned"]
    assert tuned.worst == pytest.approx((0.5 + 0.6) / 2)
    assert tuned.mean == pytest.approx((0.6 + 2.15 / 3) / 2)
    assert tuned.on_halves
    assert tuned.parameters == found["mean of all"].parameters
    assert found[TUNED].worst == tuned.worst


def test_merges_at_other_lengths_are_read_from_beside_the_rows(tmp_path):
    for name in ("h1", "h2"):
        (tmp_path / name).mkdir()
        pl.DataFrame({"cohort": [name], "length": [2.0]}).write_parquet(
            tmp_path / name / TUNED_FILE
        )
    assert read_beside(tmp_path, TUNED_FILE)["cohort"].to_list() == ["h1", "h2"]
    assert read_beside(tmp_path / "h2", TUNED_FILE)["cohort"].to_list() == ["h2"]
    assert read_beside(tmp_path / "h1" / "none", TUNED_FILE) is None


def test_adapters_without_a_gain_have_no_retention():
    cohort = read_cohort(small_world(c=1.5), "h1")  # 2.0 is less than two standard errors
    assert cohort.defined == {"a", "b"}
    serving = [(("b", "c"), "mean"), (("a",), None)]
    assert cohort.retentions(serving) == {"b": 0.97, "a": 1.0}


# --- forecasters and pages


def test_own_features_hold_nothing_of_the_others():
    assert {FEATURES[name].about for name in not_own()} == {"other", "pair"}


def test_an_audit_beside_the_rows_is_a_baseline(bank, tmp_path):
    # what it says is the measured retention of the pair under the sum
    pairs = bank.tables["outcomes"].filter(
        (pl.col("method") == "sum") & (pl.col("set").str.split("+").list.len() == 2)
    )
    told = [
        (row["cohort"], row["adapter"], row["set"].replace(row["adapter"], "").strip("+"))
        for row in pairs.to_dicts()
    ]
    audits = pl.DataFrame(told, schema=["cohort", "i", "j"], orient="row").with_columns(
        compatibility=pairs["gain_retention"]
    )
    write_parquet(audits, tmp_path / "t1" / "audits.parquet")
    assert read_beside(tmp_path, AUDIT_FILE).equals(audits)
    assert read_beside(tmp_path / "nowhere", AUDIT_FILE) is None
    fold = bank.held_out_fold()
    fit = {"audit": audit_alone(audits), "mean": BASELINES["method mean"]}
    models = fitted(bank.rows, fold, fit)
    mask = fold.test & (bank.rows.size == 2) & (bank.rows.method == "sum")
    both = forecast_by(bank.rows, mask, models)
    assert scores_of(both["audit"])["Spearman"] > 0.99
    none = fitted(bank.rows, fold, {"audit": audit_alone(audits.clear())})
    missing = forecast_by(bank.rows, mask, none)["audit"]
    assert missing.guess.retention.tolist() == both["mean"].guess.retention.tolist()


def test_numbers_in_cells():
    assert number(-0.004) == "0.00"
    assert number(-0.126) == "−0.13"
    assert number(math.nan) == "–"
    assert percent(0.025) == "2.5 %"
    assert estimate(Estimate(0.5, 0.25, 0.754)) == "0.50 [0.25, 0.75]"
    assert grid(("a", "b"), [("x|y", "1")]).splitlines()[2] == "| x\\|y | 1 |"


def test_pictures_are_whole_and_keep_words_apart():
    import xml.etree.ElementTree as tree

    marks = [Mark(0.2, 0.4, 0.1, 0.5, "a < b"), Mark(0.5, math.nan), Mark(9.0, 0.5)]
    series = [Series("one & two", marks, line=True), Series("three", marks[:1])]
    panel = Panel("p", "x", "y", series, (0, 1), (0, 1), [(0, "0")], [(1, "1")], diagonal=True)
    root = tree.fromstring(drawn([panel, panel, panel]))
    assert root.get("width") == "840"
    tree.fromstring(bars("b", [("predictor", 0.5, 0.4, 0.6), ("c", math.nan, math.nan, 0.0)], 0.9))


@pytest.fixture
def quick(monkeypatch):
    """A ridge stands for the predictor, in all places where it is fitted many times."""

    def forecasters(seed):
        tiers = {MODEL: "model", FILE: "file", WEIGHTS: "weights"}
        ours = {name: learned(tier, candidates=RIDGE) for name, tier in tiers.items()}
        kept = {n: f for n, f in BASELINES.items() if not n.startswith("own features")}
        own = {
            f"own features only ({tier} tier)": plain(tier, without=not_own())
            for tier in ("model", "file")
        }
        return ours | kept | own

    ridge = {"mix, all": CANDIDATES["ridge, few"]}
    monkeypatch.setattr(report, "held_out_forecasters", forecasters)
    monkeypatch.setattr("mergeprobe.bench.tables.forecasters.FIXED", ridge)
    monkeypatch.setattr("mergeprobe.bench.tables.forecasters.QUICK", RIDGE)


def test_the_report_says_all_it_must(quick, tmp_path):
    folder = write_cohorts(reported(trained=4, held=2), tmp_path / "rows")
    written = report.write_report(folder, tmp_path / "out", runs=20, shown="rows")
    names = {path.name for path in written}
    pages = {"README.md", "skill.md", "transfer.md", "ablations.md", "decisions.md"}
    assert pages < names
    text = {name: (tmp_path / "out" / name).read_text() for name in pages}
    for name in names - pages:
        assert any(f"({name})" in page for page in text.values())
    for name in pages - {"README.md"}:
        captions = [line for line in text[name].splitlines() if line.startswith("*")]
        assert captions
        assert all("SD" in caption or "SE" in caption for caption in captions), name
    for baseline in BASELINES:
        assert baseline in text["skill.md"]
    assert "ceiling: another seed's retention" in text["skill.md"]
    assert "not run" in text["skill.md"]
    assert "LEAK" not in text["transfer.md"]
    assert text["transfer.md"].count("no skill") == 3
    assert "needs rows of a second base model" in text["transfer.md"]
    assert "Another base model" in text["README.md"]
    assert "needs a cohort that is neither trained on" in text["transfer.md"]
    assert "plan, file tier" in text["decisions.md"]
    assert str(tmp_path) not in "".join(text.values())


def test_a_cohort_apart_is_forecast_by_the_others():
    """`real` is neither trained on nor held out; a cohort on another base is not among those."""
    moved = pl.col("cohort").replace({"t4": "real", "t5": "elsewhere"})
    tables = {n: t.with_columns(moved) for n, t in reported(trained=5, held=2, repeats=0).items()}
    there = pl.when(pl.col("cohort") == "elsewhere").then(pl.lit("other base"))
    tables["adapters"] = tables["adapters"].with_columns(there.otherwise("base").alias("base"))
    found = made_bank(tables)
    assert found.trained == ("t1", "t2", "t3")
    assert found.apart() == ["real"]
    pairs = found.rows.pick((found.rows.size == 2) & (found.rows.point < 0.2))
    table = cohorts_apart(found, pairs, Options("command", 20))
    assert isinstance(table, Table)
    assert "pairs of t1, t2, t3, h1, h2 that share no family" in table.caption
    labels = [row[0] for row in table.rows]
    assert {label.split(",")[0] for label in labels} == {"real"}
    for name in (MODEL, FILE, "method mean", "early merge, as measured"):
        assert sum(label.endswith(f", {name}") for label in labels) == len(labels) / 9
    ranked = next(row for row in table.rows if row[0].endswith(f"sum, {MODEL}"))
    assert float(ranked[1].split()[0]) > 0.3  # the made-up bank can be forecast


def test_a_bank_without_held_out_cohorts_says_what_is_needed(quick):
    bank = made_bank(reported(trained=4, held=1, repeats=0, everything=False))
    tables = {n: t.filter(pl.col("cohort").str.starts_with("t")) for n, t in bank.tables.items()}
    pages = report.report_pages(made_bank(tables), Options("command", 20))
    front, skill, _, ablations, decisions = pages
    assert [type(part) for part in skill.parts] == [Needs]
    assert "needs frozen cohorts (h…)" in decisions.markdown()
    assert isinstance(ablations.parts[0], Needs)
    assert any("held-out cohorts" in row[1] for row in front.parts[1].rows)


def test_rows_are_read_from_a_folder(tmp_path):
    write_cohorts(reported(trained=4, held=1, repeats=0), tmp_path)
    assert open_bank(tmp_path).held_out == ("h1",)
    with pytest.raises(DataError, match="no cohort in"):
        open_bank(tmp_path / "nowhere")
