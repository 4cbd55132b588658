"""The learned predictor inside a forecaster: what it is shown, and what happens when it passes."""

import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from mergeprobe.compose import merge
from mergeprobe.errors import NotForecastable
from mergeprobe.predict import ridge
from mergeprobe.predict.early import open_tier
from mergeprobe.predict.features import COLUMNS
from mergeprobe.predict.forecast import forecast_probes
from mergeprobe.predict.ridge import score
from mergeprobe.predict.tier import Guess
from tests.test_early import base, probes  # noqa: F401, the fixtures

NAMES = ("more", "sums", "words")


class Fixed:
    """Speaks a retention of 1 − 0.02 · others; calls sets `far`, or nothing. reads: what it says
    to read of a row, by default everything. unknown: a method that it has not seen."""

    def __init__(self, far=(), reads=lambda name: True, unknown=None):
        self.far, self.reads, self.seen, self.calls = far, reads, [], 0
        self.unknown = unknown

    def base_like(self, name, fingerprint):
        return "tiny"

    def knows_method(self, method):
        return method != self.unknown

    def in_words(self):
        return "forecast by a test"

    def predict(self, values, **how):
        self.calls += 1
        found = []
        for value in values:
            row = dict(zip(COLUMNS, value, strict=True))
            self.seen.append(row)
            others = round(math.exp(row["log_size"])) - 1
            kept = 1 - 0.02 * others
            found.append((kept, kept - 0.1, kept + 0.05, 0.9, 2.0 if others in self.far else 0.5))
        return Guess(*np.array(found).T)


def test_it_is_asked_for_every_forecast_and_sees_both_tiers(base, probes):  # noqa: F811
    tier = open_tier(base, probes)
    speaks = Fixed()
    forecaster = forecast_probes(probes, model=tier, predictor=speaks)
    found = forecaster.forecast("sums", ("sums", "words"), "mean")
    assert (found.retention, found.low) == (pytest.approx(0.98), pytest.approx(0.88))
    row = speaks.seen[-1]
    assert row["exponent"] == 1.0
    assert row["log_progress"] == pytest.approx(math.log(10 / 100))
    # signals of what `words` does to `sums`, from either tier, under the rule that is asked for
    pair = {(r["a"], r["b"]): r for r in forecaster.tables["pairs"].to_dicts()}["words", "sums"]
    early = tier.set_features("sums", ("sums", "words"), "mean")
    assert row["frobenius_cosine"] == pytest.approx(pair["frobenius_cosine"])
    assert row["disturbance_late"] == pytest.approx(math.log(early["disturbance_late"]))
    extrapolated = tier.extrapolated_merge("sums", {"sums": 0.5, "words": 0.5})
    assert row["extrapolated_merge"] == pytest.approx(-math.log(max(0, 1 - extrapolated) + 0.05))
    both = forecaster.forecast("sums", NAMES, "sum")
    own = min(1.2, max(-1.0, tier.extrapolated_merge("sums", dict.fromkeys(NAMES, 1.0))))
    assert both.retention == pytest.approx((0.96 + own) / 2)
    assert both.low <= min(own, 0.86) + 1e-6  # their disagreement is inside
    assert "early merge" in forecaster.source("sums", ("more", "words"), "sum")
    alone = forecast_probes(probes, predictor=speaks)  # no model to run the set with
    assert alone.forecast("sums", NAMES, "sum").retention == pytest.approx(0.96)
    assert speaks.seen[-1]["exponent"] == 0.0
    by_pair = {(r["a"], r["b"]): r["amplification"] for r in forecaster.tables["pairs"].to_dicts()}
    largest = max(by_pair[other, "sums"] for other in ("more", "words"))
    assert speaks.seen[-1]["amplification"] == pytest.approx(largest)
    assert math.isfinite(row["joint_gradient_cosine"])
    assert forecaster.source("sums", ("words",), "mean") == "the learned predictor"
    shown = forecaster.evidence["sums", ("words",), "mean"]
    assert shown["extrapolated_merge"] == pytest.approx(extrapolated)
    assert shown["own_gain"] == pytest.approx(early["own_gain"])
    assert alone.calibrated
    assert not forecaster.calibrated
    plan = alone.plan(min_retention=0.9)
    assert plan.calibrated
    assert len(plan.groups) == 1
    assert "forecast by a test" in plan.reasons


def test_what_it_calls_far_is_forecast_as_without_it(base, probes):  # noqa: F811
    tier = open_tier(base, probes)
    plain = forecast_probes(probes, model=tier, predictor="none")
    forecaster = forecast_probes(probes, model=tier, predictor=Fixed(far=(1,)))
    for name, other in (("sums", "words"), ("words", "sums")):
        ours = forecaster.forecast(name, (name, other), "mean")
        assert ours == plain.forecast(name, (name, other), "mean")
    assert not forecaster.calibrated
    plan = forecast_probes(probes, predictor=Fixed(far=(1,))).plan(min_retention=0.0)
    assert plan.calibrated  # all in one group, of which it speaks
    assert len(plan.groups) == 1
    assert not forecaster.plan(min_retention=0.0).calibrated  # averaged with the set's own merge
    forecaster = forecast_probes(probes, predictor=Fixed(far=(2,)))
    assert not forecaster.plan(min_retention=0.0).calibrated
    forecaster = forecast_probes(probes, model=tier, predictor=Fixed(far=(1,)))
    forecaster.forecast("sums", NAMES, "mean")
    plan = forecaster.plan(min_retention=0.0)
    assert any("lie outside of what the learned predictor has seen" in r for r in plan.reasons)
    assert forecaster.source("sums", ("words",), "mean") == "the surrogate and the early merge"
    assert forecaster.source("sums", ("more", "words"), "mean").startswith("the learned predictor")
    rows = {
        (r["adapter"], r["others"], r["method"]): r for r in forecaster.forecast_rows().to_dicts()
    }
    assert rows["sums", "words", "mean"]["source"] == "the surrogate and the early merge"


def test_without_a_model_the_rows_have_no_early_signals(probes):  # noqa: F811
    speaks = Fixed()
    forecaster = forecast_probes(probes, predictor=speaks)
    assert forecaster.forecast("sums", ("sums", "words"), "mean").retention == pytest.approx(0.98)
    assert math.isnan(speaks.seen[-1]["disturbance_late"])
    assert math.isfinite(speaks.seen[-1]["frobenius_cosine"])


def test_what_it_does_not_read_is_not_measured(base, probes):  # noqa: F811
    everything, little = open_tier(base, probes), open_tier(base, probes)
    for tier, speaks in ((everything, Fixed()), (little, Fixed(reads=lambda name: False))):
        forecaster = forecast_probes(probes, model=tier, predictor=speaks, floor=0.5)
        for one, other in permutations(NAMES, 2):
            found = forecaster.forecast(one, (one, other), "mean")
            assert found.retention == pytest.approx(0.98)
    assert everything.spent == little.spent + 3 * 6  # the gradients' cosines of three pairs
    row = speaks.seen[-1]
    assert math.isnan(row["joint_gradient_cosine"])


def test_a_rule_that_is_more_than_weights_is_merged_and_run(base, probes):  # noqa: F811
    tier, speaks = open_tier(base, probes), Fixed()
    forecaster = forecast_probes(probes, model=tier, predictor=speaks)
    found = forecaster.forecast("sums", ("sums", "words"), "svc")
    assert found.retention == pytest.approx(0.98)
    both = [tier.snapshots[name].update for name in ("sums", "words")]
    kept = tier.early_retention("sums", merge(both, "svc", rank=forecaster.rank(NAMES)).adapter)
    assert speaks.seen[-1]["early_retention"] == pytest.approx(score(kept), rel=1e-4)
    assert speaks.seen[-1]["method_svc"] == 1.0


def test_a_method_without_rows_is_not_forecast(probes):  # noqa: F811
    forecaster = forecast_probes(probes, predictor=Fixed(unknown="iso_c"))
    with pytest.raises(NotForecastable, match="no forecast for the merge method 'iso_c'"):
        forecaster.forecast("sums", ("sums", "words"), "iso_c")
    forecaster = forecast_probes(probes, predictor=Fixed(unknown="mean"))  # one that needs no rows
    plain = forecast_probes(probes, predictor="none").forecast("sums", ("sums", "words"), "mean")
    assert forecaster.forecast("sums", ("sums", "words"), "mean") == plain


def test_a_plan_asks_for_all_pairs_at_once(probes):  # noqa: F811
    speaks = Fixed()
    forecaster = forecast_probes(probes, predictor=speaks)
    forecaster.ask_pairs(["mean", "sum"])
    assert speaks.calls == 1
    assert len(speaks.seen) == 2 * 6
    forecaster.ask_pairs(["mean"])
    assert speaks.calls == 1
    assert forecaster.forecast("sums", ("sums", "more"), "sum").retention == pytest.approx(0.98)


def test_among_many_sets_are_combined_from_pairs(probes, monkeypatch):  # noqa: F811
    monkeypatch.setattr("mergeprobe.predict.forecaster.EXACT_UP_TO", 2)
    speaks = Fixed()
    forecaster = forecast_probes(probes, predictor=speaks)
    both = forecaster.forecast("sums", NAMES, "sum")
    assert {round(math.exp(row["log_size"])) for row in speaks.seen} == {2}
    pairs = [forecaster.forecast("sums", ("sums", other), "sum") for other in ("more", "words")]
    assert both == ridge.combine(pairs, 3, "sum")
    assert not forecaster.calibrated
    plan = forecaster.plan(min_retention=0.5)
    assert not plan.calibrated
    assert any("sets are combined from them" in reason for reason in plan.reasons)


def test_a_folder_without_a_training_record_counts_as_finished(probes):  # noqa: F811
    bare = [
        replace(probe, meta=probe.meta | {"step": None, "planned_steps": None}) for probe in probes
    ]
    speaks = Fixed()
    forecast_probes(bare, predictor=speaks).forecast("sums", ("sums", "words"), "mean")
    assert speaks.seen[-1]["log_progress"] == 0.0
