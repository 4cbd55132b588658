"""The learned predictor: features, intervals, novelty, saving; values worked by hand."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from synthetic_bank import bank

from mergeprobe.artefact import write_parquet
from mergeprobe.errors import DataError, NotForecastable
from mergeprobe.predict.conformal import (
    family_quantile,
    family_weights,
    shortest,
    weighted_quantile,
)
from mergeprobe.predict.feature_rows import feature_matrix
from mergeprobe.predict.features import COLUMNS, FEATURES, SETTING, SIGNS, columns_of
from mergeprobe.predict.learning import learning_rows, read_rows
from mergeprobe.predict.menus import CANDIDATES, MENUS, Candidate
from mergeprobe.predict.models import fit_model, fit_ridge, model_from_json
from mergeprobe.predict.novelty import fit_novelties, fit_novelty, novelty_of
from mergeprobe.predict.predictor import Predictor, fit_predictor, load_predictor
from mergeprobe.predict.ridge import METHODS, score
from mergeprobe.predict.tier import Guess, fit_tier, measured_at, simplest
from mergeprobe.predict.weighing import weights_of

FEW = {name: CANDIDATES[name] for name in ("ridge, own", "ridge, few", "trees, few", "mix, few")}


@pytest.fixture(scope="module")
def rows():
    return learning_rows(**bank(cohorts=6, families=12, seed=1).tables())


@pytest.fixture(scope="module")
def predictor(rows):
    return fit_predictor(rows, tiers=("file", "model"), candidates=FEW)


def at(matrix, name):
    return matrix[:, COLUMNS.index(name)]


# ---------------------------------------------------------------------------------- features
PAIRS = pl.DataFrame(
    {
        "i": ["a", "a", "b"],
        "j": ["b", "c", "a"],
        "step": [6, 6, 3],
        "planned_steps": [60, 60, 60],
        "frobenius_cosine": [0.1, -0.3, 0.1],
        "own_gain": [0.8, 0.8, 0.5],
        "disturbance_late": [0.5, 0.25, 2.0],
        "nonadditivity_mean_late": [0.2, 0.4, 1.0],
        "nonadditivity_sum_late": [0.5, 0.7, 1.0],
        "early_retention_mean": [0.9, 0.7, 0.4],
        "early_retention_sum": [0.6, 0.5, 0.1],
        "early_retention_ties": [0.85, None, 0.2],
    }
)


def requests(*rows):
    return pl.DataFrame(
        [{"i": i, "others": others, "method": method} for i, others, method in rows]
    )


def test_a_pairs_features_are_the_pairs_signals():
    got = feature_matrix(requests(("a", ["b"], "mean"), ("b", ["a"], "sum")), PAIRS)
    assert at(got, "disturbance_late") == pytest.approx([math.log(0.5), math.log(2.0)])
    assert at(got, "frobenius_cosine") == pytest.approx([0.1, 0.1])
    assert at(got, "own_gain") == pytest.approx([0.8, 0.5])
    assert at(got, "nonadditivity_late") == pytest.approx([math.log(0.2), 0.0])
    assert at(got, "early_retention") == pytest.approx([score(0.9), score(0.1)])
    assert at(got, "log_progress") == pytest.approx([math.log(0.1), math.log(0.05)])
    assert at(got, "log_size") == pytest.approx([math.log(2.0)] * 2)
    assert at(got, "exponent").tolist() == [1.0, 0.0]
    assert at(got, "method_sum").tolist() == [0.0, 1.0]
    assert np.isnan(at(got, "surrogate")).all()  # no such column: missing, not a guess


def test_a_sets_features_add_up_over_the_others():
    got = feature_matrix(requests(("a", ["b", "c"], "sum")), PAIRS)
    assert at(got, "disturbance_late")[0] == pytest.approx(math.log(0.75))
    assert at(got, "frobenius_cosine")[0] == pytest.approx(-0.2)
    assert at(got, "frobenius_size")[0] == pytest.approx(0.3)  # the largest in magnitude
    assert at(got, "own_gain")[0] == pytest.approx(0.8)
    # harm adds: 1 − (0.4 + 0.5)
    assert at(got, "early_retention")[0] == pytest.approx(score(0.1))


def test_methods_between_mean_and_sum():
    got = feature_matrix(
        requests(("a", ["b"], "norm_preserving_mean"), ("a", ["b"], "ties"), ("a", ["c"], "ties")),
        PAIRS,
    )
    middle = (math.log(0.2) + math.log(0.5)) / 2  # both have an exponent of one half
    assert at(got, "nonadditivity_late")[:2] == pytest.approx([middle, middle])
    between = (score(0.9) + score(0.6)) / 2
    # a column of its own where there is one, else between
    assert at(got, "early_retention")[:2] == pytest.approx([between, score(0.85)])
    assert at(got, "early_retention")[2] == pytest.approx((score(0.7) + score(0.5)) / 2)


def test_how_long_the_rule_makes_the_adapter_and_the_others():
    """By hand: ‖a‖ = 2, ‖b‖ = 6, ‖c‖ = 1, so n̄ = 4 of a and b, 3 of all."""
    pairs = pl.DataFrame(
        {"i": ["a", "a", "b"], "j": ["b", "c", "a"], "norm_ratio": [3.0, 0.5, 1 / 3]}
    )
    asked = [("a", ["b"], m) for m in ("mean", "sum", "equal_norm_mean", "svc", "ties")]
    asked += [("b", ["a"], "equal_norm_mean"), ("a", ["b", "c"], "equal_norm_mean")]
    asked += [("a", ["b", "c"], "mean"), ("b", ["a", "c"], "equal_norm_mean")]
    got = feature_matrix(requests(*asked), pairs)
    weight = [1 / 2, 1.0, 4 / (2 * 2), 1.0, 1 / math.sqrt(2), 4 / (2 * 6), 3 / (3 * 2), 1 / 3]
    assert np.exp(at(got, "own_weight"))[:-1] == pytest.approx(weight)
    assert weight[2] == pytest.approx(weights_of("equal_norm_mean", {"a": 2.0, "b": 6.0})["a"])
    length = [3.0, 3.0, 1.0, 3.0, 3.0, 1.0, 2.0, 3.5]
    assert np.exp(at(got, "others_length"))[:-1] == pytest.approx(length)
    for name in ("own_weight", "others_length"):  # no row (b, c)
        assert math.isnan(at(got, name)[-1])


def test_what_is_missing_of_one_is_missing_of_the_set():
    got = feature_matrix(requests(("b", ["a", "c"], "mean")), PAIRS)  # no pair row (b, c)
    assert np.isnan(at(got, "disturbance_late")).all()


def test_features_refuse():
    with pytest.raises(NotForecastable, match="'magic'; expected one of mean"):
        feature_matrix(requests(("a", ["b"], "magic")), PAIRS)
    with pytest.raises(NotForecastable, match=r"row of \(i, j\) twice"):
        feature_matrix(requests(("a", ["b"], "mean")), pl.concat([PAIRS, PAIRS]))
    with pytest.raises(NotForecastable, match="at least one other"):
        feature_matrix(requests(("a", [], "mean")), PAIRS)


def test_the_table_of_features():
    assert len(set(COLUMNS)) == len(COLUMNS)
    for menu in MENUS.values():
        for names in menu.values():
            assert set(names or ()) <= set(FEATURES)
    assert set(columns_of("weights")) < set(columns_of("file")) < set(columns_of("model"))
    own = columns_of("model", about=("own",))
    assert {FEATURES[n].about for n in own if n in FEATURES} == {"own"}
    assert "gradient_cosine" not in columns_of("model", without=("gradient",))
    assert {f"method_{m}" for m in METHODS if m != "linear"} < set(SETTING)


# ---------------------------------------------------------------------------- learning rows
def one_cohort(**changes):
    outcome = {
        "cohort": "c",
        "adapter": "a",
        "set": "b+a",
        "method": "mean",
        "gain_retention": 0.9,
        "own_gain": 1.0,
        "own_gain_se": 0.25,
        "loss": 0.2,
        "loss_single": 0.1,
    }
    outcomes = pl.DataFrame([outcome | change for change in changes.get("outcomes", [{}])])
    adapters = pl.DataFrame(
        [
            {"cohort": "c", "base": "x", "adapter": n, "task": n, "family": n.upper(), "rank": 4}
            for n in "abc"
        ]
    )
    pairs = PAIRS.with_columns(cohort=pl.lit("c"), point=pl.lit(0.1))
    return {"adapters": adapters, "pairs": pairs, "outcomes": outcomes}


def test_learning_rows_by_hand():
    got = learning_rows(**one_cohort(outcomes=[{}, {"adapter": "b", "gain_retention": -7.0}]))
    assert got.target.tolist() == [0.9, -1.0]  # clipped
    assert got.weight == pytest.approx([0.5, 0.5])  # gain = four standard errors
    assert got.table["excess"].to_list() == pytest.approx([math.log(2)] * 2)
    first = got.table.row(0, named=True)
    assert (first["set"], first["others"], first["families"]) == ("a+b", ["b"], ["A", "B"])
    assert at(got.values, "own_gain").tolist() == [0.8, 0.5]
    assert got.dropped == {}


def test_learning_rows_without_a_retention_are_counted():
    got = learning_rows(
        **one_cohort(
            outcomes=[
                {},
                {"own_gain_se": 0.51, "gain_retention": None},
                {"own_gain": -1.0, "gain_retention": None},
                {"gain_retention": None, "method": "sum"},
                {"set": "a", "method": "mean"},
                {"method": "joint", "set": "a+b+c"},
            ]
        )
    )
    assert len(got) == 1
    assert got.dropped == {"own gain below two standard errors": 2, "not measured": 1}


def test_learning_rows_refuse():
    tables = one_cohort(outcomes=[{"set": "a+z"}])
    with pytest.raises(DataError, match="set 'a\\+z': \\['z'\\] is not an adapter"):
        learning_rows(**tables)
    tables = one_cohort()
    with pytest.raises(DataError, match=r"outcomes.parquet lacks loss_single"):
        learning_rows(**tables | {"outcomes": tables["outcomes"].drop("loss_single")})


def test_cohorts_are_read_from_folders(tmp_path):
    made = bank(cohorts=2, families=8)
    for name, table in made.tables().items():
        for cohort in ("c0", "c1"):
            mine = table.filter(pl.col("cohort") == cohort)
            write_parquet(mine, tmp_path / cohort / f"{name}.parquet")
    whole = learning_rows(**made.tables())
    got = read_rows(tmp_path)
    assert np.array_equal(got.values, whole.values, equal_nan=True)
    assert set(read_rows(tmp_path, cohorts=["c1"]).cohort) == {"c1"}
    assert set(read_rows([tmp_path / "c0"], points=[0.05]).point) == {0.05}
    with pytest.raises(DataError, match="no cohort in"):
        read_rows(tmp_path / "c0" / "nothing")
    (tmp_path / "c1" / "pairs.parquet").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_rows(tmp_path)
    (tmp_path / "c1" / "pairs.parquet").unlink()
    with pytest.raises(DataError, match=r"has no pairs.parquet"):
        read_rows(tmp_path)


# --------------------------------------------------------------------------------- conformal
def test_weighted_quantile_by_hand():
    values = np.array([3.0, 1.0, 2.0])
    even = np.ones(3)
    assert [weighted_quantile(values, q, even) for q in (0.0, 1 / 3, 0.5, 1.0)] == [1, 1, 2, 3]
    assert weighted_quantile(values, 0.5, np.array([0.6, 0.2, 0.2])) == 3.0


def test_no_guarantee_from_few_families(rows):
    few = np.isin(rows.family, sorted(set(rows.family))[:8])
    model = fit_tier(rows.pick(few), "model", candidates={"ridge, few": CANDIDATES["ridge, few"]})
    assert model.predictive.correction is None
    guess = model.predict(rows.values, guaranteed=True)
    assert set(guess.low) == {-1.0}
    assert np.ptp(guess.high) == 0.0


def test_every_family_counts_the_same():
    groups = ["a"] * 9 + ["b"]
    weights = family_weights(groups)
    assert weights[:9].sum() == pytest.approx(0.5)
    assert weights[9] == pytest.approx(0.5)
    values = np.array([0.0] * 9 + [5.0])
    assert weighted_quantile(values, 0.5, weights) == 0.0
    assert weighted_quantile(values, 0.6, weights) == 5.0


def test_conformal_quantile_by_hand():
    values = np.array([1.0, 2.0, 3.0, 4.0])
    # four families and one at infinity: 0.6 needs 0.6 · 5/4 = 0.75 of what was seen
    assert family_quantile(values, list("abcd"), 0.6) == 3.0
    assert family_quantile(values, list("abcd"), 0.8) == 4.0
    assert family_quantile(values, list("abcd"), 0.9) == math.inf


def test_shortest_by_hand():
    values, even = np.arange(1.0, 101.0), np.ones(100)
    low, high = shortest(values**2, even, 0.9, lambda a, b: b - a)
    assert high - low == min(
        (k + 90) ** 2 - k**2 for k in range(1, 10)
    )  # squares are crowded at the low end
    # where the upper end costs nothing, all of the misses go below
    assert shortest(values, even, 0.9, lambda a, b: -a) == (10.0, 100.0)


def test_intervals_cover_new_families():
    train = learning_rows(**bank(cohorts=10, families=24, seed=5).tables())
    fresh = learning_rows(**bank(cohorts=10, families=24, seed=6).tables())
    model = fit_tier(train, "model", candidates={"ridge, few": CANDIDATES["ridge, few"]})
    guess, wider = (model.predict(fresh.values, guaranteed=g) for g in (False, True))
    inside = (guess.low <= fresh.target) & (fresh.target <= guess.high)
    assert 0.85 <= inside.mean() <= 0.95
    assert model.predictive.correction is not None
    assert (wider.low <= guess.low).all()
    assert (wider.high >= guess.high).all()
    assert ((wider.low <= fresh.target) & (fresh.target <= wider.high)).mean() > 0.9
    for method in ("mean", "sum"):
        assert inside[fresh.method == method].mean() > 0.8
    assert (guess.low <= guess.retention).all()
    assert (guess.retention <= guess.high).all()
    # the probability of ρ ≥ 0.8 is about the share of rows that are
    for low, high in ((0.0, 0.2), (0.8, 1.0)):
        part = (guess.mergeable >= low) & (guess.mergeable <= high)
        share = (fresh.target[part] >= 0.8).mean()
        assert abs(share - guess.mergeable[part].mean()) < 0.15


# ------------------------------------------------------------------------------------ models
def test_ridge_by_hand():
    values = np.full((4, len(COLUMNS)), np.nan)
    values[:, COLUMNS.index("exponent")] = 1.0
    values[:, COLUMNS.index("gradient_cosine")] = [-1.0, 1.0, -1.0, 1.0]
    goal = np.array([1.0, 3.0, 1.0, 3.0])
    # one standardised column: the slope is 1 / (1 + penalty), the intercept the mean
    got = fit_ridge(["gradient_cosine"], values, goal, np.ones(4), 0.25)
    assert got.scores(values) == pytest.approx([2 - 0.8, 2 + 0.8] * 2, abs=0.02)
    missing = values[:1].copy()
    missing[0, COLUMNS.index("gradient_cosine")] = np.nan
    assert np.isfinite(got.scores(missing)).all()


def test_ridge_keeps_signs_and_slopes_by_method():
    generator = np.random.default_rng(0)
    values = np.full((400, len(COLUMNS)), np.nan)
    exponent = np.repeat([0.0, 1.0], 200)
    seen = generator.normal(size=400)
    values[:, COLUMNS.index("exponent")] = exponent
    values[:, COLUMNS.index("disturbance_late")] = seen
    goal = np.where(exponent == 1, -0.2, -1.0) * seen
    columns = ["exponent", "disturbance_late"]
    one = fit_ridge(columns, values, goal, np.ones(400), 1e-6)
    two = fit_ridge(columns, values, goal, np.ones(400), 1e-6, by_method=True)
    assert one.under_mean[1] == one.under_sum[1] == pytest.approx(-0.6, abs=0.06)
    assert two.under_mean[1] == pytest.approx(-0.2, abs=0.06)
    assert two.under_sum[1] == pytest.approx(-1.0, abs=0.06)
    # more disturbance surely means less retention: data that say otherwise are not believed
    wrong = fit_ridge(columns, values, seen, np.ones(400), 1e-6, by_method=True)
    assert wrong.under_mean[1] == pytest.approx(0.0, abs=1e-6)
    free = fit_ridge(columns, values, seen, np.ones(400), 1e-6, signs={})
    assert free.under_mean[1] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("name", ["ridge, wide", "ridge, few, by method", "trees, few", "mix, few"])
def test_more_harm_never_raises_a_forecast(rows, name):
    goal = np.asarray(score(rows.target))
    model = fit_model(name, "model", rows.values, goal, rows.weight)
    before = model.scores(rows.values)
    signed = [n for n in model.columns if n in SIGNS]
    assert len(signed) > 3
    for feature in signed:
        worse = rows.values.copy()
        worse[:, COLUMNS.index(feature)] -= 0.3 * SIGNS[feature]
        assert (model.scores(worse) <= before + 1e-6).all(), feature


@pytest.mark.parametrize("name", ["ridge, core", "trees, few", "mix, few"])
def test_models_survive_json(rows, name):
    goal = np.asarray(score(rows.target))
    model = fit_model(name, "model", rows.values, goal, rows.weight)
    back = model_from_json(json.loads(json.dumps(model.to_json())))
    assert np.array_equal(back.scores(rows.values), model.scores(rows.values))
    assert back.columns == model.columns


def test_a_model_without_any_signal_is_a_constant(rows):
    one = rows.pick(rows.method == "sum")
    everything = [name for name in COLUMNS if name not in ("exponent", "method_sum")]
    model = fit_tier(
        one, "model", candidates=FEW | {"trees": FEW["trees, few"]}, without=everything
    )
    assert model.model.columns == ()
    guess = model.predict(one.values)
    assert np.ptp(guess.retention) == 0.0
    assert not guess.far.any()


def test_a_seed_gives_the_same_trees(rows):
    goal = np.asarray(score(rows.target))
    given = ("trees, few", "model", rows.values, goal, rows.weight)
    one, two, other = (fit_model(*given, seed=s).scores(rows.values) for s in (3, 3, 4))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_unknown_models_are_refused():
    with pytest.raises(NotForecastable, match="wants the features telepathy"):
        model_from_json({"kind": "trees", "columns": ["telepathy"], "booster": {}})
    with pytest.raises(NotForecastable, match="kind 'oracle' is unknown"):
        model_from_json({"kind": "oracle", "columns": []})


# --------------------------------------------------------------------------------- predictor
def test_the_predictor_learns(rows, predictor):
    model = predictor.tiers["model"]
    assert model.errors["ridge, own"] > 1.3 * min(model.errors.values())
    assert model.chosen == min(model.errors, key=lambda name: model.errors[name])
    guess = predictor.predict(rows.values)
    assert np.abs(guess.retention - rows.target).mean() < 0.06
    assert predictor.card["families"] == rows.holds()[0]
    assert predictor.card["rows"] == len(rows)
    json.dumps(predictor.card)


def test_choice_is_nested_and_deterministic(rows):
    pair = [fit_tier(rows, "model", candidates=FEW) for _ in range(2)]
    assert pair[0].to_json() == pair[1].to_json()
    by_retention = fit_tier(rows, "model", candidates=FEW, aim="retention")
    assert by_retention.errors != pair[0].errors


def test_saved_and_loaded_it_says_the_same(rows, predictor, tmp_path):
    predictor.save(tmp_path / "predictor")
    loaded = load_predictor(tmp_path / "predictor")
    assert sorted(file.name for file in (tmp_path / "predictor").iterdir()) == [
        "README.md",
        "card.json",
        "file.json",
        "model.json",
    ]
    before, after = predictor.predict(rows.values), loaded.predict(rows.values)
    for name in Guess.__dataclass_fields__:
        assert np.array_equal(getattr(before, name), getattr(after, name)), name
    assert loaded.card == predictor.card
    said = (tmp_path / "predictor" / "README.md").read_text()
    assert f"{len(rows)} rows of 6 cohorts (c0, c1, c2, c3, c4, c5)" in said
    assert f"| model | {predictor.tiers['model'].chosen} |" in said
    assert loaded.centre == predictor.centre


def test_damaged_predictors_are_refused(predictor, tmp_path):
    folder = tmp_path / "predictor"
    with pytest.raises(NotForecastable, match=r"card.json' does not exist"):
        load_predictor(folder)
    predictor.save(folder)
    (folder / "model.json").write_text("{}")
    with pytest.raises(NotForecastable, match=r"model.json' is no predictor"):
        load_predictor(folder)
    predictor.save(folder)
    text = (folder / "model.json").read_text()
    (folder / "model.json").write_text(text.replace('"top":', '"top":NaN,"was":', 1))
    with pytest.raises(NotForecastable, match=r"model.json' cannot be .*NaN, expected finite"):
        load_predictor(folder)
    with pytest.raises(NotForecastable, match="expected a folder that `mergeprobe fit` wrote"):
        load_predictor(folder / "model.json")
    (folder / "model.json").unlink()
    with pytest.raises(NotForecastable, match=r"model.json' does not exist"):
        load_predictor(folder)
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | {"schema_version": 1}))
    with pytest.raises(NotForecastable, match=r"has schema 1, of an earlier .* fit it again"):
        load_predictor(folder)
    (folder / "card.json").write_text(json.dumps(card | {"schema_version": 99}))
    with pytest.raises(NotForecastable, match="upgrade mergeprobe"):
        load_predictor(folder)


def test_which_bases_it_knows():
    ours, other = "smollm2-135m-instruct-q4", "gemma3-270m-q4"
    card = {"bases": [other, ours], "base_fingerprints": {ours: ["aaa", "abc"], other: ["xyy"]}}
    predictor = Predictor({}, card)
    for name, fingerprint in (
        ("anything", "abc"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", None),
        ("models/smollm2-135m-instruct-bf16/", "other"),
        ("SmolLM2-135M-Instruct-GGUF", "other"),
    ):
        assert predictor.base_like(name, fingerprint) == ours, name
    assert predictor.base_like("anything", "xyy") == other
    assert predictor.base_like("ggml-org/gemma3-270m-f16", None) == other
    for name, fingerprint in (
        (None, None),
        ("", "abd"),
        ("SmolLM2-135M", None),
        ("SmolLM2-360M-Instruct", None),
        ("meta-llama/Llama-3.2-1B", "xyz"),
    ):
        assert predictor.base_like(name, fingerprint) is None, name


def test_the_tier_is_what_a_row_supports(rows, predictor):
    values = rows.values[:4].copy()
    values[1, COLUMNS.index("disturbance_late")] = np.nan  # the budget did not reach this pair
    values[2, COLUMNS.index("gradient_cosine_base")] = np.nan
    assert predictor.supports(values) == ["model", "file", None, "model"]
    guess = predictor.predict(values)
    assert np.isnan(guess.retention).tolist() == [False, False, True, False]
    assert guess.retention[1] == predictor.predict(values[1:2], "file").retention[0]
    with pytest.raises(NotForecastable, match="lacks the signals"):
        guess.forecasts()
    forecast = predictor.predict(values[:1]).forecasts()[0]
    assert forecast.low <= forecast.retention <= forecast.high
    assert "disturbance_late" in predictor.lacking(values[1], "model")
    with pytest.raises(NotForecastable, match="no 'weights' tier; it has file, model"):
        predictor.predict(values, "weights")
    with pytest.raises(NotForecastable, match="rows of"):
        predictor.predict(values[:, :3])


def test_missing_families_of_signals_are_allowed(rows, predictor):
    values = rows.values.copy()
    for name, feature in FEATURES.items():
        if feature.family == "early merge":
            values[:, COLUMNS.index(name)] = np.nan
    guess = predictor.predict(values)
    assert np.isfinite(guess.retention).all()
    assert np.corrcoef(guess.retention, rows.target)[0, 1] > 0.8


def test_mean_and_median_of_the_distribution(rows, predictor):
    model = predictor.tiers["model"]
    median, mean = (model.predict(rows.values, centre) for centre in ("median", "mean"))
    assert np.array_equal(median.low, mean.low)
    assert not np.array_equal(median.retention, mean.retention)
    # the tail of failures pulls the mean below the median
    assert mean.retention.mean() < median.retention.mean()


def test_novelty_flags_a_far_row_and_not_the_training_rows(rows, predictor):
    assert predictor.predict(rows.values).far.mean() < 0.03
    far = rows.values[:2].copy()
    far[0, COLUMNS.index("disturbance_late")] += 6.0
    far[1, COLUMNS.index("own_gain")] = -3.0
    assert predictor.predict(far).far.all()


def test_novelty_by_hand():
    values = np.full((200, len(COLUMNS)), np.nan)
    names = ("gradient_cosine", "drift_cosine")
    grid = np.linspace(-1, 1, 200)
    for name in names:
        values[:, COLUMNS.index(name)] = grid
    found = fit_novelty(names, values, np.arange(200) % 10)
    beyond = values[[100, 100]].copy()
    beyond[1, COLUMNS.index("drift_cosine")] = 3.0
    near, away = found.score(beyond)
    assert near < 1.0 < away
    # an interquartile range of 1: scale 1/1.349; the nearest references are the last three
    scale = (np.quantile(grid, 0.75) - np.quantile(grid, 0.25)) / 1.349
    gaps = [np.hypot(grid[100] - grid[k], 3.0 - grid[k]) / scale for k in range(200)]
    closest = np.mean(np.sort(gaps)[:3]) / math.sqrt(2)
    assert away >= closest / found.edge_distance - 0.01


def test_the_simplest_that_is_as_good_is_chosen():
    even, families = np.full(4, 0.25), list("abcd")
    squared = {
        "best": np.array([1.0, 1.0, 1.0, 1.0]),
        # 0.2 worse, standard error 0.25 · √(0.08 · 4/3) = 0.08
        "small, worse": np.array([1.2, 1.0, 1.4, 1.2]),
        # 0.3 worse, standard error 0.25 · √(6.28 · 4/3) = 0.72
        "small, as good": np.array([3.0, 0.0, 2.0, 0.2]),
        "small, less good": np.array([3.0, 0.0, 2.0, 0.3]),
        "large": np.array([1.0, 1.0, 1.0, 1.1]),
    }
    sizes = {"best": 9, "small, worse": 2, "small, as good": 3, "small, less good": 3, "large": 20}
    assert simplest(squared, sizes, even, families) == "small, as good"
    # two families that agree: 0.3 worse, standard error 0.25 · √(2 · 0.4² · 2) = 0.2
    assert simplest(squared, sizes, even, ["a", "a", "b", "b"]) == "best"
    # with all weight on one row it is the best
    assert simplest(squared, sizes, np.array([0, 1.0, 0, 0]), families) == "small, as good"
    sure = {"one": np.ones(4), "two": np.ones(4) + 0.01}
    assert simplest(sure, {"one": 2, "two": 1}, even, families) == "one"


def test_each_base_has_its_own_novelty():
    values = np.full((400, len(COLUMNS)), np.nan)
    place, families = COLUMNS.index("own_relative_norm"), np.arange(400) % 10
    values[:200, place] = np.linspace(-4, 0, 200)
    values[200:, place] = np.linspace(6, 10, 200)
    bases = np.repeat(["one", "two"], 200)
    found = fit_novelties((), values, families, bases)
    asked = values[[100, 300, 0]].copy()
    asked[2, place] = 3.0  # between the two
    assert (novelty_of(found, asked, "one") > 1).tolist() == [False, True, True]
    assert (novelty_of(found, asked, "two") > 1).tolist() == [True, False, True]
    # of a base that is not told: near to either is near
    for unknown in (None, "three"):
        assert (novelty_of(found, asked, unknown) > 1).tolist() == [False, False, True]
    together = fit_novelty((), values, families)
    assert (
        together.score(asked[:2]) < 1
    ).all()  # kept together, "one" 22,000 times as long is known


def test_norms_count_though_no_model_reads_them():
    values = np.full((200, len(COLUMNS)), np.nan)
    values[:, COLUMNS.index("gradient_cosine")] = np.linspace(-1, 1, 200)
    values[:, COLUMNS.index("own_relative_norm")] = np.linspace(-4, 0, 200)
    found = fit_novelty(("gradient_cosine",), values, np.arange(200) % 10)
    assert found.columns == ("gradient_cosine", "own_relative_norm")
    longer = values[[100, 100]].copy()
    longer[1, COLUMNS.index("own_relative_norm")] = 8.0
    near, away = found.score(longer)
    assert near < 1.0
    # 8 above the largest (0.5 % off its end), in scales of the interquartile range
    grid = values[:, COLUMNS.index("own_relative_norm")]
    scale = (np.quantile(grid, 0.75) - np.quantile(grid, 0.25)) / 1.349
    assert found.edge_beyond == 1.0
    assert away >= (8.0 - np.quantile(grid, 0.995)) / scale - 0.01


def test_too_few_rows_are_refused(rows):
    with pytest.raises(NotForecastable, match="5 learning rows are too few"):
        fit_tier(rows.pick(np.arange(5)), "model", candidates=FEW)


def test_the_pairs_of_200_adapters_in_one_call(predictor, rows):
    names = [f"a{k}" for k in range(200)]
    generator = np.random.default_rng(0)
    i, j = np.divmod(np.arange(40_000), 200)
    i, j = i[i != j], j[i != j]
    signals = {
        name: generator.uniform(0.1, 1.0, len(i)).astype(np.float32)
        for name in PAIRS.columns
        if name not in ("i", "j", "step", "planned_steps")
    }
    pairs = pl.DataFrame({"i": [names[k] for k in i], "j": [names[k] for k in j], **signals})
    wanted = pairs.select("i", pl.concat_list("j").alias("others"), pl.lit("mean").alias("method"))
    values = feature_matrix(wanted, pairs)
    guess = predictor.predict(values, "model")
    assert len(guess.retention) == 39_800
    assert np.isfinite(guess.retention).all()


def test_candidates_name_what_exists():
    for candidate in CANDIDATES.values():
        assert candidate.kind in ("ridge", "trees", "mix")
        assert set(candidate.parts) <= set(CANDIDATES)
        assert candidate.kind == "mix" or candidate.menu in MENUS
    assert Candidate("ridge", "few").parts == ()


def test_no_torch_and_no_xgboost_until_they_are_needed():
    code = (
        "import sys, mergeprobe.predict.predictor, mergeprobe.predict.validate, "
        "mergeprobe.predict.baselines; "
        "print([m for m in ('torch', 'xgboost', 'scipy', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_tier_is_judged_by_the_rows_it_is_asked_about(rows):
    """Rows of one family lose all signals of the model tier: they are learned from, not judged."""
    own = [COLUMNS.index(name) for name, feature in FEATURES.items() if feature.tier == "model"]
    values = rows.values.copy()
    gone = rows.family == rows.family[0]
    values[np.ix_(gone, own)] = np.nan
    assert measured_at(values, "model").tolist() == (~gone).tolist()
    assert measured_at(values, "file").all()
    assert measured_at(values, "weights").all()
    fewer = replace(rows, values=values)
    families = len(set(rows.family.tolist()))
    assert fit_tier(rows, "model", candidates=FEW).predictive.families == families
    judged = fit_tier(fewer, "model", candidates=FEW)
    assert judged.predictive.families == families - 1
    assert fit_tier(fewer, "file", candidates=FEW).predictive.families == families
    values[:, own] = np.nan  # of nothing: then by all there is
    nothing = fit_tier(replace(rows, values=values), "model", candidates=FEW)
    assert nothing.predictive.families == families


def test_frozen_cohorts_choose_nothing(rows):
    """Errors of all cohorts are those of each alone, averaged by weight."""
    cohorts = sorted(set(rows.cohort.tolist()))
    together = fit_tier(rows, "file", candidates=FEW)
    total = dict.fromkeys(FEW, 0.0)
    for one in cohorts:
        others = [name for name in cohorts if name != one]
        alone = fit_tier(rows, "file", candidates=FEW, frozen=others)
        share = rows.weight[rows.cohort == one].sum() / rows.weight.sum()
        for name, error in alone.errors.items():
            total[name] += share * error
        assert alone.predictive.families == together.predictive.families  # calibrated on all
    assert together.errors == pytest.approx(total, abs=2e-5)
    everything = fit_tier(rows, "file", candidates=FEW, frozen=cohorts)
    assert everything.errors == together.errors
