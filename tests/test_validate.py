"""The honest evaluation: splits that really drop, scores worked by hand, the leak test."""

import math
from functools import partial

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import r2_score, roc_auc_score
from synthetic_bank import METHODS, bank

from mergeprobe.errors import NotForecastable
from mergeprobe.predict.baselines import (
    BASELINES,
    as_measured,
    classifier,
    identity,
    learned,
    method_mean,
    one_feature,
    own_only,
    training_mean,
)
from mergeprobe.predict.features import COLUMNS
from mergeprobe.predict.learning import Rows, learning_rows
from mergeprobe.predict.menus import CANDIDATES
from mergeprobe.predict.ridge import score
from mergeprobe.predict.scores import (
    METRICS,
    Tested,
    auc,
    bootstrap,
    family_draws,
    ranks,
    scores_of,
    spearman,
    within_fold,
    within_partners,
)
from mergeprobe.predict.splits import (
    REGIMES,
    Fold,
    leaks,
    one_unseen,
    unseen_all,
    unseen_bases,
    unseen_cohorts,
    unseen_families,
    unseen_groups,
    unseen_sizes,
    unseen_values,
)
from mergeprobe.predict.tier import Guess
from mergeprobe.predict.validate import (
    ablations,
    ceiling,
    difference_table,
    evaluate,
    interaction_skill,
    novelty_table,
    out_of_fold,
    score_table,
    slices,
)

RIDGE = {"ridge, few": CANDIDATES["ridge, few"]}


@pytest.fixture(scope="module")
def rows():
    return learning_rows(**bank(cohorts=8, families=16, seed=1).tables())


@pytest.fixture(scope="module")
def tested(rows):
    fitters = {
        "ours": learned("model", candidates=RIDGE),
        "method mean": method_mean,
        "identity": BASELINES["task-additive"],
        "own": own_only("model"),
    }
    return evaluate(rows, unseen_cohorts(rows), fitters)


def made(*rows, values=None):
    """Rows from (cohort, i, others, method, target); families are the upper-case names."""
    table = pl.DataFrame(
        [
            {
                "cohort": cohort,
                "base": "x",
                "point": 0.1,
                "i": i,
                "set": "+".join(sorted((i, *others))),
                "method": method,
                "size": 1 + len(others),
                "others": list(others),
                "tasks": [i, *others],
                "family_i": i.upper(),
                "families": [i.upper(), *(o.upper() for o in others)],
                "learning_rates": [1e-3] * (1 + len(others)),
                "ranks": [8] * (1 + len(others)),
                "steps": [100] * (1 + len(others)),
                "domains": ["math"] * (1 + len(others)),
            }
            for cohort, i, others, method, _ in rows
        ]
    )
    target = np.array([row[-1] for row in rows])
    if values is None:
        values = np.full((len(rows), len(COLUMNS)), np.nan)
    return Rows(table, values, target, np.ones(len(rows)))


def guessed(rows, retention, low=None, high=None, fold=None):
    retention = np.asarray(retention, dtype=float)
    nothing, novelty = np.full((2, len(retention)), np.nan)
    ends = [nothing if end is None else np.asarray(end, dtype=float) for end in (low, high)]
    fold = np.full(len(retention), "f") if fold is None else np.asarray(fold)
    return Tested(rows, Guess(retention, *ends, nothing, novelty), fold)


# ------------------------------------------------------------------------------------ splits
FOUR = made(
    ("c1", "a", "b", "mean", 0.9),
    ("c1", "b", "a", "mean", 0.8),
    ("c1", "a", "c", "mean", 0.7),
    ("c2", "c", "d", "mean", 0.6),
    ("c2", "d", "c", "mean", 0.5),
    ("c3", "e", "f", "mean", 0.4),
    ("c3", "e", ("f", "g"), "mean", 0.3),
)


def test_unseen_cohorts_drop_rows_that_share_a_family():
    folds = {fold.name: fold for fold in unseen_cohorts(FOUR)}
    # c1 holds a, b, c; c2's rows hold c, so only c3 is left to train on
    assert folds["c1"].test.nonzero()[0].tolist() == [0, 1, 2]
    assert folds["c1"].train.nonzero()[0].tolist() == [5, 6]
    # c2 holds c and d: row 2 of c1 holds c
    assert folds["c2"].train.nonzero()[0].tolist() == [0, 1, 5, 6]
    assert folds["c3"].train.nonzero()[0].tolist() == [0, 1, 2, 3, 4]
    frozen = unseen_cohorts(FOUR, [["c3"]], among=["c2"])
    assert frozen[0].train.nonzero()[0].tolist() == [3, 4]


def test_unseen_families_by_hand():
    folds = {fold.name: fold for fold in unseen_families(FOUR)}
    assert folds["A+B"].test.nonzero()[0].tolist() == [0, 1]
    assert folds["A+B"].train.nonzero()[0].tolist() == [3, 4, 5, 6]
    assert folds["A+C"].test.nonzero()[0].tolist() == [2]
    assert folds["A+C"].train.nonzero()[0].tolist() == [5, 6]
    assert "A+D" not in folds  # nothing to test
    tested = np.sum([fold.test for fold in folds.values()], axis=0)
    assert tested.tolist() == [1, 1, 1, 1, 1, 1, 0]  # the set of three lies in no two families


def test_one_unseen_by_hand():
    folds = {fold.name: fold for fold in one_unseen(FOUR)}
    # without a: c is still seen in c2, b is not seen at all, so rows 0 and 1 are not "one unseen"
    assert folds["A"].test.nonzero()[0].tolist() == [2]
    assert folds["A"].train.nonzero()[0].tolist() == [3, 4, 5, 6]
    assert folds["G"].test.nonzero()[0].tolist() == [6]
    assert folds["G"].train.nonzero()[0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("split", [unseen_cohorts, unseen_families, unseen_all, unseen_groups])
def test_no_split_leaks(rows, split):
    folds = split(rows) if split is not unseen_groups else split(rows, 4)
    for fold in folds:
        assert leaks(rows, fold) == set()
        assert not (fold.train & fold.test).any()
    mixed = Fold("bad", np.ones(len(rows), bool), np.ones(len(rows), bool))
    assert leaks(rows, mixed) == set(rows.holds()[0])


def test_unseen_learning_rates_and_ranks(rows):
    for fold in unseen_values(rows, "learning_rates"):
        table = rows.table.with_row_index()
        rate = float(fold.name.split()[-1])
        train = table.filter(pl.Series(fold.train))["learning_rates"].to_list()
        test = table.filter(pl.Series(fold.test))["learning_rates"].to_list()
        assert all(rate not in each for each in train)
        assert {each[0] for each in test} == {rate}
    for fold in unseen_values(rows, "ranks", families_too=True):
        assert set(rows.family[fold.test]).isdisjoint(
            {f for each in rows.table.filter(pl.Series(fold.train))["families"] for f in each}
        )


def test_unseen_domains_and_sizes(rows):
    for fold in unseen_values(rows, "domains"):
        table = rows.table.filter(pl.Series(fold.train))
        assert fold.name.split()[-1] not in {d for each in table["domains"] for d in each}
    folds = unseen_sizes(rows)
    for fold in folds:
        assert set(rows.size[fold.train]) == {2}
        assert set(rows.size[fold.test]) == {3}
        assert leaks(rows, fold) == set()
    got = out_of_fold(rows, folds, learned("model", candidates=RIDGE))
    assert scores_of(got)["Spearman"] > 0.8  # what one partner does adds up


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_keeps_apart_what_it_names(rows, regime):
    if regime == "unseen base":
        return  # these rows are of one base
    for fold in REGIMES[regime](rows):
        assert not (fold.train & fold.test).any()
        assert fold.train.any()
        assert fold.test.any()


def test_unseen_bases():
    table = FOUR.table.with_columns(base=pl.Series(["x", "x", "x", "y", "y", "y", "y"]))
    rows = Rows(table, FOUR.values, FOUR.target, FOUR.weight)
    folds = {fold.name: fold for fold in unseen_bases(rows)}
    assert folds["y"].train.nonzero()[0].tolist() == [0, 1]  # row 2 shares c
    loose = {fold.name: fold for fold in unseen_bases(rows, families_too=False)}
    assert loose["y"].train.nonzero()[0].tolist() == [0, 1, 2]
    with pytest.raises(NotForecastable, match="all rows are of one base"):
        unseen_bases(FOUR)


def test_the_inner_split_falls_back_on_families():
    few = FOUR.pick(FOUR.cohort != "c3")
    assert {fold.name for fold in unseen_all(few)} <= {"A+B", "A+C", "B+C", "C+D", "A+D", "B+D"}
    with pytest.raises(NotForecastable, match="leaving 2 families out needs more than 2"):
        unseen_all(FOUR.pick(np.arange(2)))


# ------------------------------------------------------------------------------------ scores
def test_ranks_and_spearman():
    assert ranks(np.array([5.0, 1.0, 5.0])).tolist() == [2.0, 0.5, 2.0]
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=50).round(1), generator.normal(size=50).round(1)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b)[0])
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])) == pytest.approx(0.5)
    assert spearman(np.ones(3), np.arange(3.0)) == 0.0
    assert math.isnan(spearman(np.arange(3.0), np.ones(3)))


def test_auc():
    value = np.array([0.9, 0.5, 0.5, 0.1])
    positive = np.array([True, True, False, False])
    assert auc(value, positive) == pytest.approx(3.5 / 4)  # one tie counts half
    generator = np.random.default_rng(0)
    value, positive = generator.normal(size=60).round(1), generator.random(60) < 0.4
    weight = generator.integers(0, 4, 60).astype(float)
    expected = roc_auc_score(positive, value, sample_weight=weight)
    assert auc(value, positive, weight) == pytest.approx(expected)
    assert math.isnan(auc(value, np.ones(60, bool)))


def test_scores_by_hand():
    rows = made(
        ("c", "a", "b", "mean", 1.0), ("c", "b", "a", "mean", 0.5), ("c", "a", "c", "mean", 0.0)
    )
    tested = guessed(rows, [0.9, 0.7, 0.3], low=[0.8, 0.6, -0.2], high=[1.1, 0.9, 0.4])
    got = scores_of(tested)
    assert got["MAE"] == pytest.approx(0.2)
    assert got["R2"] == pytest.approx(1 - (0.01 + 0.04 + 0.09) / 0.5)
    assert got["R2"] == pytest.approx(r2_score(rows.target, tested.guess.retention))
    assert got["Spearman"] == pytest.approx(1.0)
    assert got["coverage"] == pytest.approx(2 / 3)
    assert got["width"] == pytest.approx((0.3 + 0.3 + 0.6) / 3)
    # the second interval misses by 0.1, which costs 20 times that
    assert got["interval score"] == pytest.approx((0.3 + 0.3 + 20 * 0.1 + 0.6) / 3)
    assert got["AUC"] == 1.0
    assert math.isnan(scores_of(guessed(rows, [0.9, 0.7, 0.3]))["coverage"])


def test_within_partners_by_hand():
    rows = made(
        ("c", "a", "b", "mean", 0.9),
        ("c", "a", "c", "mean", 0.8),
        ("c", "a", "d", "mean", 0.7),
        ("c", "b", "a", "mean", 0.3),
        ("c", "b", "c", "mean", 0.2),
        ("c", "b", "d", "mean", 0.1),
        ("c", "c", "a", "mean", 0.1),  # two partners are too few
        ("c", "c", "b", "mean", 0.2),
        ("c", "a", "bcd", "mean", 0.5),  # a larger set is no partner
    )
    # knows which task is easy, and nothing else: perfect pooled, nothing within
    easy = guessed(rows, [0.8] * 3 + [0.2] * 3 + [0.15] * 2 + [0.5])
    ones = np.ones(len(rows))
    assert scores_of(easy)["Spearman"] > 0.85
    assert within_partners(easy, ones) == 0.0
    # a's partners in order (1), b's in the order 1, 3, 2 (0.5)
    told = guessed(rows, [3, 2, 1, 3, 1, 2, 9, 9, 9])
    assert within_partners(told, ones) == pytest.approx(0.75)
    # a group weighs as its rows do
    weight = np.array([3.0] * 3 + [1.0] * 3 + [1.0] * 3)
    assert within_partners(told, weight) == pytest.approx((3 * 1 + 0.5) / 4)


def test_within_fold_ignores_the_folds_level():
    rows = made(*[("c", "a", "b", "mean", value) for value in (1, 2, 3, 4, 5, 11, 12, 13, 14, 15)])
    level = guessed(rows, [0] * 5 + [9] * 5, fold=["f"] * 5 + ["g"] * 5)
    assert within_fold(level, np.ones(10)) == 0.0
    wrong = guessed(rows, [5, 4, 3, 2, 1, 15, 14, 13, 12, 11], fold=["f"] * 5 + ["g"] * 5)
    assert within_fold(wrong, np.ones(10)) == pytest.approx(-1.0)
    assert scores_of(wrong)["Spearman"] > 0.0


@pytest.mark.parametrize("metric", METRICS)
def test_a_weight_is_a_repetition(tested, metric):
    ours = tested["ours"].pick(tested["ours"].rows.method == "sum")
    weight = np.random.default_rng(0).integers(0, 3, len(ours.rows)).astype(float)
    repeated = np.repeat(np.arange(len(weight)), weight.astype(int))
    if metric == "within partners" or metric == "within fold":
        weight = np.full(len(weight), 2.0)  # groups have a least number of different rows
        repeated = np.repeat(np.arange(len(weight)), 2)
    again = ours.pick(repeated)
    assert METRICS[metric](ours, weight) == pytest.approx(
        METRICS[metric](again, np.ones(len(repeated)))
    )


# --------------------------------------------------------------------------------- bootstrap
def test_family_draws_by_hand():
    rows = made(
        ("c", "a", "b", "mean", 1.0), ("c", "b", "c", "mean", 1.0), ("c", "a", "bc", "mean", 1.0)
    )
    twins = Rows(
        rows.table.with_columns(families=pl.Series([["A", "B"], ["B", "B"], ["A", "B", "C"]])),
        rows.values,
        rows.target,
        rows.weight,
    )
    generator = np.random.default_rng(7)
    for weight in family_draws(twins, 20, seed=7):
        a, b, c = np.bincount(generator.integers(3, size=3), minlength=3)
        # a pair weighs the product, twins of one family count once, a set the others' mean
        assert weight.tolist() == pytest.approx([a * b, b, a * (b + c) / 2])


def test_bootstrap_is_deterministic_and_paired(tested):
    ours, mean = tested["ours"], tested["method mean"]
    one, two = (bootstrap(ours, "MAE", runs=50, seed=3) for _ in range(2))
    assert one == two
    assert one.low < one.value < one.high
    assert bootstrap(ours, "MAE", runs=50, seed=4) != one
    same = bootstrap(ours, "MAE", against=ours, runs=20)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    better = bootstrap(ours, "MAE", against=mean, runs=50)
    assert better.high < 0.0  # smaller errors than the mean's in every draw


def test_difference_table(tested):
    got = difference_table(tested, "ours", by=("method",), metrics=("MAE", "Spearman"), runs=20)
    assert set(got["against"]) == set(tested) - {"ours"}
    row = got.filter(
        (pl.col("against") == "own") & (pl.col("metric") == "MAE") & (pl.col("method") == "sum")
    ).row(0, named=True)
    mask = tested["own"].rows.method == "sum"
    ours, own = (scores_of(tested[n].pick(mask))["MAE"] for n in ("ours", "own"))
    assert row["difference"] == pytest.approx(ours - own)
    assert row["low"] <= row["difference"] <= row["high"]


# ---------------------------------------------------------------------------------- skill
def test_forecasts_are_made_without_the_test_families(rows):
    seen = []

    def spy(train):
        def guess(test):
            shared = {f for each in train.table["families"] for f in each} & {
                f for each in test.table["families"] for f in each
            }
            seen.append(shared)
            return method_mean(train)(test)

        return guess

    got = out_of_fold(rows, unseen_cohorts(rows), spy)
    assert seen == [set()] * 8
    assert len(got.rows) == len(rows)
    assert set(got.fold) == set(rows.cohort)


def test_ours_beats_the_baselines(tested):
    table = score_table(tested, by=("method",))
    assert set(table["method"]) == set(METHODS)
    by = {(r["forecaster"], r["method"]): r for r in table.iter_rows(named=True)}
    for method in METHODS:
        ours, own = by["ours", method], by["own", method]
        assert ours["Spearman"] > 0.85
        assert ours["R2"] > 0.7
        assert ours["within partners"] > 0.6
        assert abs(own["within partners"]) < 0.35  # no cross term, nothing to tell partners by
        assert ours["relative width"] < 0.8
        assert ours["interval score"] < 0.6 * by["method mean", method]["interval score"]
        assert ours["coverage"] > 0.85
        assert by["method mean", method]["relative width"] == 1.0
    assert interaction_skill(tested["ours"]) > 0.7


def test_leak_test(tested):
    """A model that only knows whose tasks these are shows no skill where all are unseen, and a
    great deal where one was seen: it would catch a leak."""
    mask = tested["identity"].rows.size == 2
    blind = scores_of(tested["identity"].pick(mask))
    assert blind["within fold"] == 0.0
    assert blind["within partners"] == 0.0
    assert interaction_skill(tested["identity"]) == 0.0


def test_identity_is_caught_when_families_leak(rows):
    everything = np.ones(len(rows), bool)
    leaking = out_of_fold(rows, [Fold("leak", everything, everything)], BASELINES["task-additive"])
    assert scores_of(leaking)["within fold"] > 0.6
    known = out_of_fold(rows, one_unseen(rows), partial(identity, ("own", "partner")))
    assert scores_of(known)["Spearman"] > 0.3


def test_no_skill_without_signals():
    """Retention depends on the families, the signals say nothing: skill would be a leak."""
    blank = learning_rows(**bank(cohorts=6, families=12, told=False, seed=3).tables())
    got = out_of_fold(blank, unseen_cohorts(blank), learned("model", candidates=RIDGE))
    mask = (got.rows.size == 2) & (got.rows.method == "sum")
    found = scores_of(got.pick(mask))
    assert abs(found["within partners"]) < 0.25
    assert abs(found["within fold"]) < 0.25
    assert found["R2"] < 0.1


def test_a_row_in_several_folds_gets_the_mean():
    rows = made(*[("c", "a", "b", "mean", v) for v in (0.0, 1.0, 0.4, 0.6)])
    first, second = np.array([True, False, False, False]), np.array([False, True, False, False])
    test = np.array([False, False, True, True])
    got = out_of_fold(rows, [Fold("f", first, test), Fold("g", second, test)], training_mean)
    assert got.guess.retention == pytest.approx([0.5, 0.5])
    assert got.rows.target.tolist() == [0.4, 0.6]
    with pytest.raises(NotForecastable, match="no fold tests any row"):
        out_of_fold(rows, [], training_mean)


# ------------------------------------------------------------------------------- baselines
def test_means_by_hand():
    rows = made(
        ("c", "a", "b", "mean", 1.0), ("c", "b", "a", "mean", 0.8), ("c", "a", "b", "sum", 0.0)
    )
    assert training_mean(rows)(rows).retention == pytest.approx([0.6] * 3)
    got = method_mean(rows)(rows)
    assert got.retention == pytest.approx([0.9, 0.9, 0.0])
    assert (got.low[0], got.high[0]) == (0.8, 1.0)
    unknown = made(("c", "a", "b", "ties", 0.5))
    assert method_mean(rows)(unknown).retention == pytest.approx([0.6])


def test_signals_alone(rows):
    got = as_measured("early_retention", rows)(rows)
    at = COLUMNS.index("early_retention")
    saturated = np.minimum(1.0, 1.05 - np.exp(-rows.values[:, at]))
    assert got.retention == pytest.approx(np.clip(saturated, -1.0, 1.2))
    line = one_feature("early_retention")(rows)(rows)
    goal = score(rows.target)
    mine = rows.method == "sum"
    seen = rows.values[mine, at]
    slope, intercept = np.polyfit(seen, goal[mine], 1)
    by_hand = 1.05 - np.exp(-(intercept + slope * seen))
    inner = (seen > np.quantile(seen, 0.02)) & (seen < np.quantile(seen, 0.98))  # the rest is cut
    assert line.retention[mine][inner] == pytest.approx(by_hand[inner], abs=0.05)
    missing = rows.values.copy()
    missing[:, at] = np.nan
    blank = Rows(rows.table, missing, rows.target, rows.weight)
    assert one_feature("early_retention")(rows)(blank).retention == pytest.approx(
        method_mean(rows)(blank).retention
    )


def test_the_distribution_classifies_as_well_as_a_classifier(rows, tested):
    direct = out_of_fold(rows, unseen_cohorts(rows), classifier("model"))
    ours, theirs = (scores_of(each)["AUC"] for each in (tested["ours"], direct))
    assert theirs > 0.9
    assert ours > theirs - 0.02
    always = rows.pick(rows.target >= 0.8)  # one class: nothing to tell apart
    assert np.ptp(classifier("model")(always)(rows).retention) == 0.0


def test_task_additive_by_hand():
    effects = {"a": 0.0, "b": -0.6, "c": -0.3}
    rows = made(
        *[
            ("c", i, j, "mean", 1.05 - math.exp(-(2.0 + effects[i] + effects[j])))
            for i in "abc"
            for j in "abc"
            if i != j
        ]
    )
    got = partial(identity, ("own", "partner"))(rows)(rows)
    assert got.retention == pytest.approx(rows.target, abs=0.05)
    alone = partial(identity, ("partner",))(rows)(rows).retention
    same_partner = [k for k, row in enumerate(rows.table["others"].to_list()) if row == ["b"]]
    assert np.ptp(alone[same_partner]) == pytest.approx(0.0)


# ---------------------------------------------------------------------- ceiling, ablations
def test_ceiling_by_hand():
    first = [
        ("c1", "a", "b", "mean", 0.9),
        ("c1", "b", "a", "mean", 0.5),
        ("c1", "a", "c", "mean", 0.7),
    ]
    again = [
        ("c2", i, j, m, v + d) for (_, i, j, m, v), d in zip(first, (-0.1, 0.1, 0.0), strict=True)
    ]
    alone = [("c3", "x", "y", "mean", 0.1)]
    got = ceiling(made(*first, *again, *alone))
    assert got.pairs == 3
    assert got.mae == pytest.approx(0.2 / 3)
    one, two = [0.9, 0.5, 0.7, 0.8, 0.6, 0.7], [0.8, 0.6, 0.7, 0.9, 0.5, 0.7]
    assert got.spearman == pytest.approx(spearmanr(one, two)[0])
    assert got.pearson == pytest.approx(np.corrcoef(one, two)[0, 1])
    nothing = ceiling(made(*first))
    assert nothing.pairs == 0
    assert math.isnan(nothing.spearman)


def test_ceiling_rises_as_noise_falls():
    found = [
        ceiling(learning_rows(**bank(cohorts=4, repeats=2, noise=n).tables()), "mean", 2).spearman
        for n in (0.2, 0.01)
    ]
    assert found[0] < 0.9 < found[1]


def test_ablations_name_the_family_that_matters(rows):
    pairs = rows.pick((rows.size == 2) & (rows.point > 0.06))
    folds = unseen_cohorts(pairs)
    got = ablations(
        pairs, folds, "model", families=("update", "disturbance"), candidates=RIDGE, by=("method",)
    )
    by = {(r["forecaster"], r["method"]): r["within partners"] for r in got.iter_rows(named=True)}
    assert by["disturbance alone", "sum"] > 0.6
    assert by["update alone", "sum"] < 0.3
    assert by["all signals", "sum"] > 0.8


def test_novelty_table():
    rows = made(*[("c", "a", "b", "mean", v) for v in (1.0, 0.8, 0.2)])
    tested = guessed(rows, [0.9, 0.8, 0.7], low=[0, 0, 0.6], high=[1, 1, 1])
    tested.guess.novelty[:] = [0.1, 0.6, 1.5]
    got = novelty_table(tested)
    assert got["novelty from"].to_list() == [0.0, 0.5, 1.0]
    assert got["MAE"].to_list() == pytest.approx([0.1, 0.0, 0.5])
    assert got["coverage"].to_list() == [1.0, 1.0, 0.0]


def test_slices(rows):
    found = slices(rows, ("method", "point"))
    assert len(found) == 6
    assert np.sum([mask for _, mask in found], axis=0).tolist() == [1] * len(rows)
    label, mask = found[0]
    assert set(rows.method[mask]) == {label["method"]}
    assert slices(rows, ())[0][1].all()
