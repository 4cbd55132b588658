"""Rules that weigh whole updates: weights by hand, and forecasts made with them."""

import pytest
import torch

from mergeprobe.adapters.checkpoint import Adapter
from mergeprobe.compose import merge
from mergeprobe.errors import NotForecastable
from mergeprobe.lowrank import LowRank
from mergeprobe.predict.early import open_tier
from mergeprobe.predict.forecast import forecast_probes
from mergeprobe.predict.signal_rows import early_row
from mergeprobe.predict.weighing import WEIGHTED, weights_of, worth_asking
from tests.test_early import base, probes, tier  # noqa: F401


def test_weights_by_hand():
    norms = {"short": 1.0, "long": 3.0}
    assert weights_of("mean", norms) == {"short": 0.5, "long": 0.5}
    assert weights_of("sum", norms) == {"short": 1.0, "long": 1.0}
    # mean norm 2: each half of an update of length 2
    assert weights_of("equal_norm_mean", norms) == pytest.approx({"short": 1.0, "long": 1 / 3})
    # who has no update keeps its share of the mean and says nothing of the length
    found = weights_of("equal_norm_mean", {"none": 0.0, "some": 4.0})
    assert found == {"none": 0.0, "some": 0.5}
    assert weights_of("equal_norm_mean", {"none": 0.0}) == {"none": 0.0}
    with pytest.raises(NotForecastable, match="'ties' does not weigh whole updates; mean, sum"):
        weights_of("ties", norms)


@pytest.mark.parametrize("method", WEIGHTED)
def test_they_are_what_the_rule_does_to_one_module(method):
    draw = torch.Generator().manual_seed(0)
    updates = {
        name: LowRank(torch.randn(5, 2, generator=draw), size * torch.randn(2, 4, generator=draw))
        for name, size in (("a", 1.0), ("b", 3.0), ("c", 0.3))
    }
    weights = weights_of(method, {n: float(u.dense().norm()) for n, u in updates.items()})
    by_hand = torch.stack([weights[n] * u.dense() for n, u in updates.items()]).sum(0)
    adapters = [Adapter(name, {"m": update}) for name, update in updates.items()]
    merged = merge(adapters, method).adapter.modules["m"].dense()
    assert torch.allclose(merged, by_hand, atol=1e-5)


def test_equal_norms_are_asked_for_where_norms_differ():
    assert worth_asking({"a": 1.0, "b": 1.2}) == ("mean", "sum")
    assert worth_asking({"a": 1.0, "b": 1.3}) == WEIGHTED
    assert worth_asking({"a": 0.0, "b": 1.0}) == WEIGHTED


def test_forecasts_of_unlike_lengths_weigh_by_the_expected_norms(base, probes):  # noqa: F811
    short = probes[0]
    stretched = {name: update * 5.0 for name, update in probes[1].updates.items()}
    long = type(short)(
        "words", stretched, calibration=probes[1].calibration, meta=dict(probes[1].meta)
    )
    tier = open_tier(base, [short, long])  # noqa: F811
    a, b = (
        tier.snapshots[p.name].length
        * tier.snapshots[p.name].reach
        * sum(float(u.dense().norm()) ** 2 for u in p.updates.values()) ** 0.5
        for p in (short, long)
    )
    assert tier.final_norms(["sums", "words"]) == pytest.approx({"sums": a, "words": b}, rel=1e-5)
    weights = {"sums": (a + b) / 4 / a, "words": (a + b) / 4 / b}
    expected = tier.extrapolated_merge("sums", weights)
    row = early_row(tier, "sums", ("sums", "words"))
    assert row["extrapolated_equal_norm_mean"] == pytest.approx(expected, abs=1e-5)
    assert row["extrapolated_equal_norm_mean"] != pytest.approx(row["extrapolated_mean"], abs=1e-3)
    forecaster = forecast_probes([short, long], model=tier, predictor="none")
    assert forecaster.methods(("sums", "words")) == WEIGHTED
    plan = forecaster.plan(min_retention=0.0)
    methods = set(forecaster.forecast_rows()["method"])
    assert methods == set(WEIGHTED)
    assert plan.groups[0].method in WEIGHTED
