"""The ridge on early signals: values worked by hand from its table of coefficients."""

import math
import re
import subprocess
import sys

import pytest

from mergeprobe.errors import NotForecastable
from mergeprobe.plan import Forecast
from mergeprobe.predict.ridge import (
    METHODS,
    MODELS,
    TRANSFORMS,
    WEIGHT_MODELS,
    combine,
    forecast_pair,
    forecast_pair_weights,
    lacking,
    score,
    transform,
    unscore,
)


def average(target="mean", models=MODELS):
    """Signals that transform to the pilot's means, so that the score is the intercept."""
    undo = {"linear": float, "magnitude": float, "log": math.exp, "damage": unscore}
    return {
        term.signal: undo[TRANSFORMS[term.signal].kind](term.mean)
        for term in models[target][0].terms
    }


def at(retention, low=None, high=None):
    low, high = (retention if end is None else end for end in (low, high))
    return Forecast(retention=retention, low=low, high=high)


def test_score_by_hand():
    assert score(0.95) == pytest.approx(-math.log(0.10))
    assert score(0.0) == pytest.approx(-math.log(1.05))
    assert score(1.1) == score(1.0) == pytest.approx(-math.log(0.05))  # no credit above 1
    assert score(-7.0) == score(-1.0)
    assert unscore(float(score(0.3))) == pytest.approx(0.3)


def test_transforms_by_hand():
    assert transform("disturbance_late", 2.0) == pytest.approx(math.log(2.0))
    assert transform("disturbance_late", 1e9) == pytest.approx(math.log(8.0))
    assert transform("early_retention_sum", 0.95) == pytest.approx(-math.log(0.10))
    assert transform("frobenius_cosine", -0.2) == pytest.approx(0.2)
    assert transform("own_gain", -3.0) == 0.0


@pytest.mark.parametrize("target", ["mean", "sum"])
def test_forecast_at_the_pilots_average(target):
    model = MODELS[target][0]
    got = forecast_pair(average(target), target)
    # score = intercept, retention = 1 + 0.05 − exp(−score)
    assert got.retention == pytest.approx(1.05 - math.exp(-model.intercept), abs=1e-4)
    (x0, low0, high0), (x1, low1, high1) = model.spread
    share = (model.intercept - x0) / (x1 - x0)
    assert 0 < share < 1
    low = model.intercept + low0 + share * (low1 - low0)
    high = model.intercept + high0 + share * (high1 - high0)
    assert got.low == pytest.approx(1.05 - math.exp(-low), abs=1e-4)
    assert got.high == pytest.approx(min(1.02, 1.05 - math.exp(-high)), abs=1e-4)


def test_one_term_by_hand():
    features = average()
    term = next(t for t in MODELS["mean"][0].terms if t.signal == "own_gain")
    features["own_gain"] = 0.9
    expected = MODELS["mean"][0].intercept + term.coefficient * (0.9 - term.mean) / term.scale
    got = forecast_pair(features, "mean").retention
    assert got == pytest.approx(1.05 - math.exp(-expected), abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_more_harm_never_raises_a_forecast(method):
    features = average() | average("sum")
    before = forecast_pair(features, method)
    assert before.low <= before.retention <= before.high
    for signal, value in features.items():
        worse = dict(features)
        worse[signal] = value - 0.2 * TRANSFORMS[signal].sign * max(abs(value), 0.1)
        assert forecast_pair(worse, method).retention <= before.retention + 1e-12, signal


def test_untested_methods_lie_between_and_are_wider():
    features = average() | average("sum")
    mean, total = (forecast_pair(features, m) for m in ("mean", "sum"))
    between = forecast_pair(features, "norm_preserving_mean")
    assert min(mean.retention, total.retention) < between.retention
    assert between.retention < max(mean.retention, total.retention)
    assert forecast_pair(features, "svc").retention == total.retention
    assert forecast_pair(features, "svc").low < total.low
    assert forecast_pair(features, "linear").retention == mean.retention
    assert forecast_pair(features, "linear").low < mean.low


def test_missing_signals_fall_back_then_refuse():
    features = average()
    assert lacking(features, "mean") == ()
    del features["gradient_cosine_base"]
    features["early_retention_mean"] = math.nan
    assert lacking(features, "mean") == ("early_retention_mean", "gradient_cosine_base")
    smallest = MODELS["mean"][-1]
    got = forecast_pair(features, "mean").retention
    assert got == pytest.approx(1.05 - math.exp(-smallest.intercept), abs=1e-4)
    del features["disturbance_late"]
    with pytest.raises(NotForecastable, match="without disturbance_late; needed: own_gain"):
        forecast_pair(features, "mean")
    with pytest.raises(NotForecastable, match="'magic'; expected one of mean, sum"):
        forecast_pair(features, "magic")


def test_weights_only_says_little():
    features = average(models=WEIGHT_MODELS)
    got = forecast_pair_weights(features, "sum")
    assert got.high - got.low > 0.3
    opposite = features | {"frobenius_cosine": -features["frobenius_cosine"]}
    assert forecast_pair_weights(opposite, "sum") == got
    with pytest.raises(NotForecastable, match="norm_ratio"):
        forecast_pair_weights({"frobenius_cosine": 0.1}, "mean")


def test_combine_by_hand():
    pairs = [at(0.9), at(0.8)]
    # mean of 3: 4 (2/3)² · 0.1 + (0.2 − 0.1) = 0.1778 + 0.1
    assert combine(pairs, 3, "mean").retention == pytest.approx(1 - 0.2778, abs=1e-4)
    # sum of 3: 1.5^¾ · 0.3
    assert combine(pairs, 3, "sum").retention == pytest.approx(1 - 1.5**0.75 * 0.3)
    assert combine([], 1, "mean") == at(1.0)
    for method in METHODS:  # a pair is its own set
        assert combine([at(0.7, 0.5, 0.9)], 2, method).retention == pytest.approx(0.7)
        assert combine([at(0.7, 0.5, 0.9)], 2, method).low == pytest.approx(0.5)
    with pytest.raises(NotForecastable, match="set of 5 needs 4 pair forecasts, got 2"):
        combine(pairs, 5)


def test_combine_is_exact_for_dilution_alone():
    own = 0.24  # a quadratic loss in i's own weight, partners that do nothing
    pairs = [at(1 - own / 4)] * 4
    assert combine(pairs, 5, "mean").retention == pytest.approx(1 - own * (4 / 5) ** 2)


def test_sets_are_less_certain_than_pairs():
    pair = at(0.9, 0.7, 0.98)
    widths = []
    for n in (2, 3, 5):
        got = combine([pair] * (n - 1), n, "sum")
        assert got.low <= got.retention <= got.high
        widths.append(got.high - got.low)
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_every_signal_of_the_models_is_in_the_table():
    for model in [m for table in (MODELS, WEIGHT_MODELS) for ms in table.values() for m in ms]:
        for term in model.terms:
            assert term.coefficient * TRANSFORMS[term.signal].sign >= 0
            assert term.scale > 0


def test_needs_no_torch():
    code = "import sys, mergeprobe.predict.ridge; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"False\s*", out.stdout)
