"""The learned predictor inside a forecaster: what it is shown, and what happens when it passes."""

import math

import numpy as np
import pytest

from mergeprobe.predict.early import open_tier
from mergeprobe.predict.features import COLUMNS
from mergeprobe.predict.forecast import forecast_probes
from mergeprobe.predict.tier import Guess
from tests.test_early import base, probes  # noqa: F401, the fixtures

NAMES = ("more", "sums", "words")


class Fixed:
    """Speaks a retention of 1 − 0.02 · others; calls sets `far`, or nothing."""

    def __init__(self, far=()):
        self.far, self.seen = far, []

    def predict(self, values):
        row = dict(zip(COLUMNS, values[0], strict=True))
        self.seen.append(row)
        others = round(math.exp(row["log_size"])) - 1
        kept = 1 - 0.02 * others
        novelty = 2.0 if others in self.far else 0.5
        return Guess(*(np.array([v]) for v in (kept, kept - 0.1, kept + 0.05, 0.9, novelty)))


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
    assert both.retention == pytest.approx(0.96)
    assert speaks.seen[-1]["exponent"] == 0.0
    assert math.isfinite(speaks.seen[-1]["amplification"])  # of the set itself
    assert forecaster.calibrated
    plan = forecaster.plan(min_retention=0.9)
    assert plan.calibrated
    assert len(plan.groups) == 1


def test_what_it_calls_far_is_forecast_as_without_it(base, probes):  # noqa: F811
    tier = open_tier(base, probes)
    plain = forecast_probes(probes, model=tier)
    forecaster = forecast_probes(probes, model=tier, predictor=Fixed(far=(1,)))
    for name, other in (("sums", "words"), ("words", "sums")):
        ours = forecaster.forecast(name, (name, other), "mean")
        assert ours == plain.forecast(name, (name, other), "mean")
    assert forecaster.forecast("sums", NAMES, "mean").retention == pytest.approx(0.96)
    assert not forecaster.calibrated
    plan = forecaster.plan(min_retention=0.0)
    assert not plan.calibrated
    assert any("lie outside of what the learned predictor has seen" in r for r in plan.reasons)


def test_without_a_model_the_rows_have_no_early_signals(probes):  # noqa: F811
    speaks = Fixed()
    forecaster = forecast_probes(probes, predictor=speaks)
    assert forecaster.forecast("sums", ("sums", "words"), "mean").retention == pytest.approx(0.98)
    assert math.isnan(speaks.seen[-1]["disturbance_late"])
    assert math.isfinite(speaks.seen[-1]["frobenius_cosine"])
