"""The model tier on a tiny base, against states and losses worked with dense weights."""

import copy
import math
from pathlib import Path

import pytest
import torch

from mergeprobe.adapters.base import Base, fingerprint
from mergeprobe.capture.batch import encode, item_scores
from mergeprobe.capture.probe import Calibration, Probe, provenance
from mergeprobe.errors import BaseModelError, NotForecastable
from mergeprobe.lowrank import LowRank
from mergeprobe.predict.early import open_tier, reach
from mergeprobe.predict.early_signals import EARLY_SIGNALS, markdown
from mergeprobe.predict.forecast import forecast_probes
from mergeprobe.predict.pruning import harmful_modules
from tests.tiny_base import tiny_model, tiny_tokenizer

ITEMS = {
    "sums": [("What is 2 + 3?", " 5."), ("What is 4 + 3?", " 7.")],
    "words": [("Say red.", " RED."), ("Say blue.", " BLUE.")],
    "more": [("How far?", " Far."), ("How long?", " Long.")],
}


@pytest.fixture(scope="module")
def base():
    model = tiny_model().requires_grad_(False)
    return Base("tiny", model, tiny_tokenizer(), fingerprint(model))


def learnt(base, name, seed, *, steps=12, step=10, planned=100):
    """A probe whose update really lowers the loss on its items: rank-2 factors by plain Adam."""
    model = copy.deepcopy(base.model)
    batch = encode(base.tokenizer, ITEMS[name])
    torch.manual_seed(seed)
    modules = [f"model.layers.{i}.mlp.{kind}_proj" for i in range(3) for kind in ("up", "down")]
    factors = {}
    for module in modules:
        out, into = model.get_submodule(module).weight.shape
        a, b = torch.randn(2, into) / into**0.5, torch.zeros(out, 2)
        factors[module] = (b.requires_grad_(), a.requires_grad_())
    optimizer = torch.optim.Adam([f for pair in factors.values() for f in pair], lr=0.02)
    hooks = [
        model.get_submodule(m).register_forward_hook(
            lambda mod, args, out, m=m: out + args[0] @ factors[m][1].T @ factors[m][0].T
        )
        for m in modules
    ]
    for _ in range(steps):
        out = model(input_ids=batch.ids, attention_mask=batch.attention_mask).logits[:, :-1]
        wanted = batch.completion_mask[:, 1:].bool()
        loss = torch.nn.functional.cross_entropy(out[wanted], batch.ids[:, 1:][wanted])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for hook in hooks:
        hook.remove()
    kept = Calibration(
        batch.ids.int(),
        batch.attention_mask.to(torch.uint8),
        batch.completion_mask.to(torch.uint8),
        item_scores(base.model, batch).loss.float(),
        torch.zeros(len(batch)),
    )
    updates = {m: LowRank(b.detach(), a.detach()) for m, (b, a) in factors.items()}
    meta = provenance(
        base="tiny", fingerprint=base.fingerprint, step=step, planned_steps=planned, layers=3
    )
    return Probe(name, updates, calibration=kept, meta=meta)


@pytest.fixture(scope="module")
def probes(base):
    return [learnt(base, name, seed) for seed, name in enumerate(ITEMS)]


@pytest.fixture(scope="module")
def tier(base, probes):
    return open_tier(base, probes)


def dense(base, *scaled):
    """The base with Σ c ΔW added to its weights."""
    model = copy.deepcopy(base.model)
    for updates, scale in scaled:
        for module, update in updates.items():
            model.get_submodule(module).weight.data += scale * update.dense()
    return model


def mean_loss(model, base, name):
    return float(item_scores(model, encode(base.tokenizer, ITEMS[name])).loss.mean())


def test_best_length_is_the_best_of_the_grid(base, probes, tier):
    for probe in probes:
        losses = {
            c: mean_loss(dense(base, (probe.updates, c)), base, probe.name)
            for c in (1, 2, 4, 8, 16, 32)
        }
        found = tier.snapshots[probe.name]
        assert float(found.own_loss.mean()) == pytest.approx(losses[found.length], rel=1e-4)
        # near convex along the ray: the first minimum of the grid
        rising = [c for c in (2, 4, 8, 16, 32) if losses[c] > losses[c // 2]]
        assert found.length == (rising[0] // 2 if rising else 32)
        zero = mean_loss(base.model, base, probe.name)
        assert found.own_gain == pytest.approx(1 - losses[found.length] / zero, rel=1e-4)


def test_pair_features_against_dense_weights(base, probes, tier):
    one, two = probes[:2]
    lengths = [tier.snapshots[p.name].length for p in (one, two)]
    names = (one.name, two.name)
    got = tier.set_features(one.name, names, "mean") | tier.set_features(one.name, names, "sum")
    assert set(got) <= {
        key.replace("<method>", m) for key in EARLY_SIGNALS for m in ("mean", "sum")
    }
    zero = mean_loss(base.model, base, one.name)
    alone = mean_loss(dense(base, (one.updates, lengths[0])), base, one.name)
    other = mean_loss(dense(base, (two.updates, lengths[1])), base, one.name)
    for method, weight in (("mean", 0.5), ("sum", 1.0)):
        parts = [(one.updates, weight * lengths[0]), (two.updates, weight * lengths[1])]
        merged = mean_loss(dense(base, *parts), base, one.name)
        expected = (zero - merged) / (zero - alone)
        assert got[f"early_retention_{method}"] == pytest.approx(expected, abs=1e-4)
    assert got["early_transfer"] == pytest.approx((other - zero) / (zero - alone), abs=1e-4)
    assert got["log_c_ratio"] == pytest.approx(math.log(lengths[1] / lengths[0]))
    batch = encode(base.tokenizer, ITEMS[one.name])
    where = batch.completion_mask[:, 1:].bool()

    def last(model):
        with torch.no_grad():
            out = model(
                input_ids=batch.ids,
                attention_mask=batch.attention_mask,
                output_hidden_states=True,
            )
        return out.hidden_states[-1][:, :-1][where], out.logits[:, :-1][where].log_softmax(-1)

    h0, p0 = last(base.model)
    h1, p1 = last(dense(base, (one.updates, lengths[0])))
    h2, p2 = last(dense(base, (two.updates, lengths[1])))
    expected = float((h2 - h0).norm() / (h1 - h0).norm())
    assert got["disturbance_final"] == pytest.approx(expected, rel=1e-3)
    assert got["kl_base_other"] == pytest.approx(
        float((p0.exp() * (p0 - p2)).sum(-1).mean()), rel=1e-3
    )
    assert got["kl_own_other"] == pytest.approx(
        float((p1.exp() * (p1 - p2)).sum(-1).mean()), rel=1e-3
    )
    assert 0 <= got["js_own_other"] <= math.log(2)


def test_an_adapter_beside_its_own_copy_is_not_disturbed_by_the_mean(base, probes):
    twin = Probe("twin", probes[0].updates, calibration=probes[0].calibration, meta=probes[0].meta)
    tier = open_tier(base, [probes[0], twin])
    got = tier.set_features("sums", ("sums", "twin"), "mean")
    assert got["early_retention_mean"] == pytest.approx(1.0, abs=1e-4)
    assert got["nonadditivity_mean_final"] == pytest.approx(0.0, abs=1e-3)
    assert got["disturbance_late"] == pytest.approx(1.0, abs=1e-3)
    assert got["kl_merge_mean"] == pytest.approx(0.0, abs=1e-5)
    # a copy helps wholly, so the two together are kept at their best length: nothing is lost
    assert tier.extrapolated_merge("sums", {"sums": 1.0, "twin": 1.0}) == pytest.approx(1, abs=1e-4)
    assert tier.joint_gradient_cosine("sums", "twin") == pytest.approx(1.0, abs=1e-4)


def test_extrapolated_merge_by_hand(base, probes, tier):
    one, two = probes[:2]
    a, b = (tier.snapshots[p.name] for p in (one, two))
    assert b.reach == pytest.approx(max(1.0, 10**0.25 / b.length))  # step 10 of 100
    zero = mean_loss(base.model, base, "sums")
    alone = mean_loss(dense(base, (one.updates, a.length)), base, "sums")
    half = mean_loss(dense(base, (one.updates, a.length / 2)), base, "sums")
    other = mean_loss(dense(base, (two.updates, b.length)), base, "sums")
    helped = min(1.0, max(0.0, (zero - other) / (zero - alone)))
    shrink = 1 / max(1.0, 0.5 + 0.5 * b.reach * helped)
    parts = [
        (one.updates, shrink * a.length / 2),
        (two.updates, shrink * b.reach * b.length / 2),
    ]
    merged = mean_loss(dense(base, *parts), base, "sums")

    def kept(weight):
        loss = mean_loss(dense(base, (one.updates, a.length * weight)), base, "sums")
        return min(1.0, (zero - loss) / (zero - alone))

    assert kept(0.5) == pytest.approx(min(1.0, (zero - half) / (zero - alone)))
    still = kept(0.5 * a.reach) / max(0.25, kept(0.5))
    expected = (zero - merged) / (zero - alone) * max(1.0, still)
    got = tier.extrapolated_merge("sums", {"sums": 0.5, "words": 0.5})
    assert got == pytest.approx(expected, abs=1e-4)


def test_reach_of_a_finished_run_is_one(probes):
    meta = provenance(step=100, planned_steps=100)
    assert reach(Probe("x", probes[0].updates, meta=meta), 1.0) == 1.0
    assert reach(Probe("x", probes[0].updates, meta=provenance(finished=True)), 1.0) == 1.0


def test_reach_makes_up_what_the_best_length_lacks(probes):
    probe = Probe("x", probes[0].updates, meta=provenance(step=6, planned_steps=96))
    assert reach(probe, 1.0) == 2.0  # 16^¼
    assert reach(probe, 1.6) == 1.25
    assert reach(probe, 4.0) == 1.0  # c* is already longer


def test_the_budget_is_kept(base, probes):
    with pytest.raises(NotForecastable, match="budget of 3 forward passes"):
        open_tier(base, probes, budget=3)
    tier = open_tier(base, probes, budget=40)
    plan = forecast_probes(probes, model=tier, predictor="none").plan(min_retention=0.9)
    assert tier.spent <= 40
    assert len(plan.groups) >= 1


def test_another_base_or_no_items_is_refused_by_name(base, probes):
    meta = {**probes[0].meta, "base_fingerprint": "feedfacefeedface", "base": "other"}
    alien = Probe("alien", probes[0].updates, calibration=probes[0].calibration, meta=meta)
    with pytest.raises(BaseModelError, match=r"'alien' was taken on base feedface"):
        open_tier(base, [alien])
    with pytest.raises(NotForecastable, match="'bare' holds no calibration items"):
        open_tier(base, [Probe("bare", probes[0].updates, meta=probes[0].meta)])


def test_plan_from_the_model_tier(base, probes, tier):
    forecaster = forecast_probes(probes, model=tier, predictor="none")
    plan = forecaster.plan(min_retention=0.5)
    assert plan.tier == "model"
    assert not plan.calibrated
    assert plan.base_fingerprint == base.fingerprint
    assert sorted(name for group in plan.groups for name in group.adapters) == sorted(ITEMS)
    rows = forecaster.forecast_rows()
    pairs = rows.filter(~rows["others"].str.contains("+", literal=True))
    assert len(pairs) == 12  # six ordered pairs under mean and sum
    for row in pairs.iter_rows(named=True):
        assert row["low"] <= row["retention"] <= row["high"]
        assert row["extrapolated_merge"] is not None
    assert len(forecaster.signal_rows()) == 6
    strict = forecaster.plan(min_retention=1.0)
    assert len(strict.groups) == 3, "at a floor of 1 only routing keeps everything"


def test_weights_only_is_wide_and_says_what_is_missing(probes):
    bare = [Probe(p.name, p.updates, meta=provenance(finished=True)) for p in probes]
    forecaster = forecast_probes(bare, predictor="none")
    assert forecaster.tier == "weights"
    forecast = forecaster.forecast("sums", ("sums", "words"), "mean")
    assert forecast.high - forecast.low > 0.2
    plan = forecaster.plan()
    assert any("MergeProbeCallback" in text for text in plan.missing)
    assert any("base unverified" in text for text in plan.missing)
    with pytest.raises(NotForecastable, match="at least two"):
        forecast_probes(bare[:1])


def test_harmful_modules_by_hand():
    """One module whose update lowers its own loss and raises the other's, one that is harmless."""
    from mergeprobe.capture.probe import Moment
    from mergeprobe.capture.sketch import sketch_update

    update = LowRank(torch.eye(4, 1), torch.eye(1, 4))
    silent = Moment(torch.zeros(4, 1), 0.0)
    full = {"bad": silent, "good": silent}
    toward = {m: sketch_update(m, update) for m in full}
    none = {m: torch.zeros(32, 32) for m in full}
    # ⟨G, ΔW⟩ is about ‖sketch‖²: own gain 0.1 of it in both, harm 1 of it in "bad" only
    mine = Probe(
        "mine",
        dict.fromkeys(full, update),
        gradient_base={m: -0.1 * v for m, v in toward.items()},
        gradient=none,
        inputs=full,
        outputs=full,
    )
    other = Probe(
        "other",
        dict.fromkeys(full, update),
        gradient={"bad": toward["bad"], "good": none["good"]},
        gradient_base=none,
        inputs=full,
        outputs=full,
    )
    assert harmful_modules(mine, [other]).modules == ("bad",)
    assert harmful_modules(mine, []).modules == ()
    assert harmful_modules(Probe("x", {"bad": update}), [other]).modules == ()


def test_the_page_of_early_signals_is_in_step():
    page = Path(__file__).parent.parent / "docs" / "early-signals.md"
    assert page.read_text("utf-8") == markdown()
