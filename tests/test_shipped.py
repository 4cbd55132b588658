"""The predictor that comes with the package: readable, honest, silent where it is far."""

import itertools

import numpy as np
import pytest

from mergeprobe.bench.folder import Config
from mergeprobe.bench.tasks import BANK_TASKS, DEMO_TASKS
from mergeprobe.errors import NotForecastable
from mergeprobe.predict.early import open_tier
from mergeprobe.predict.features import COLUMNS, TIERS
from mergeprobe.predict.forecast import forecast_probes
from mergeprobe.predict.learning import read_rows
from mergeprobe.predict.model_card import model_card
from mergeprobe.predict.predictor import SHIPPED, opened, shipped_predictor
from mergeprobe.predict.refit import OURS
from tests.test_early import base, probes  # noqa: F401, the fixtures


def test_which_predictor_is_asked(tmp_path):
    assert opened(None) is shipped_predictor()
    assert opened("none") is None
    assert opened(SHIPPED).card == shipped_predictor().card
    with pytest.raises(NotForecastable, match="does not exist"):
        opened(tmp_path / "nowhere")


def test_its_card_says_what_it_was_fitted_on():
    predictor = shipped_predictor()
    rows = read_rows(OURS)
    assert tuple(predictor.tiers) == TIERS
    assert predictor.card["rows"] == len(rows), "fit it again: the bank has other rows"
    assert predictor.card["families"] == rows.holds()[0]
    assert (SHIPPED / "README.md").read_text() == model_card(predictor.card)
    assert f"{len(rows)} rows" in predictor.in_words()


def test_no_family_of_the_demo_is_in_its_rows():
    known = set(shipped_predictor().card["families"])
    assert known & {task.family for task in BANK_TASKS.values()}
    assert not known & {DEMO_TASKS[name].family for name in Config().tasks}


def test_it_knows_its_own_rows():
    rows = read_rows(OURS)
    bases = rows.table["base"].to_numpy()
    for tier, model in itertools.product(TIERS, sorted(set(bases))):
        values = rows.values[bases == model]
        guess = shipped_predictor().predict(values, tier, base=model)
        assert guess.far.mean() < 0.1
        assert np.isfinite(guess.retention[~guess.far]).all()
        # updates a hundred times as long
        longer = values.copy()
        longer[:, COLUMNS.index("own_relative_norm")] += np.log(100)
        assert shipped_predictor().predict(longer, tier, base=model).far.mean() > 0.8


def test_of_another_model_it_says_nothing(base, probes):  # noqa: F811
    model = open_tier(base, probes)
    forecaster = forecast_probes(probes, model=model)
    plain = forecast_probes(probes, model=model, predictor="none")
    assert forecaster.learned is None
    for one, other in (("sums", "words"), ("words", "sums")):
        for method in ("mean", "sum"):
            ours = forecaster.forecast(one, (one, other), method)
            assert ours == plain.forecast(one, (one, other), method)
    (warning,) = forecaster.warnings()
    assert "knows no adapters of base 'tiny'" in warning
    assert "fitted so far: smollm2-135m-instruct-q4" in forecaster.missing[-1]
    plan = forecaster.plan(min_retention=0.0)
    assert warning in plan.reasons
    assert not plan.calibrated
    assert plain.warnings() == ()
