"""Rules that need data: Fisher, RegMean, OSRM, LoraHub, AdaMerging; against dense float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import tiny_probe
from compose_samples import peft_model, tiny_llama, tokens

from mergeprobe.adapters.inits import input_overlap
from mergeprobe.capture.probe import Moment
from mergeprobe.compose.merge.data import ModuleData
from mergeprobe.compose.merge.fisher import fisher
from mergeprobe.compose.merge.osrm import osrm
from mergeprobe.compose.merge.regmean import init_ridge, regmean
from mergeprobe.compose.merge.search import adamerging, lorahub
from mergeprobe.compose.osrm import osrm_init, start_from
from mergeprobe.errors import AdapterMismatch, MergeError, ProbeError
from mergeprobe.lowrank import LowRank

OUT, INTO = 9, 40


def update(seed, r=3, scaling=2.0):
    draw = torch.Generator().manual_seed(seed)
    B, A = torch.randn(OUT, r, generator=draw), torch.randn(r, INTO, generator=draw)
    return LowRank(B, A, scaling)


def moment(seed, dim, q=4, tail=0.3):
    draw = torch.Generator().manual_seed(1000 + seed)
    return Moment(torch.randn(dim, q, generator=draw), tail)


def data(*seeds, tail=0.3):
    return [ModuleData(moment(s, INTO, tail=tail), moment(50 + s, OUT)) for s in seeds]


def dense(one):
    return (one.scaling * one.B.double() @ one.A.double()).numpy()


def stack(updates):
    return torch.stack([one.dense() for one in updates])


def close(found, expected, tolerance=1e-5):
    found = found if isinstance(found, np.ndarray) else found.double().numpy()
    return np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


# ---- Fisher


def fisher_oracle(updates, weights, parts, floor=1e-6, normalise=True):
    """Entry by entry from dense moments."""
    importance = []
    for part in parts:
        whole = np.outer(np.diag(part.outputs.dense()), np.diag(part.inputs.dense()))
        importance.append(whole / whole.mean() if normalise else whole)
    least = floor * np.mean([whole.mean() for whole in importance])
    importance = [np.maximum(whole, least) for whole in importance]
    up = sum(w * f * dense(u) for w, f, u in zip(weights, importance, updates, strict=True))
    return up / sum(w * f for w, f in zip(weights, importance, strict=True))


@pytest.mark.parametrize("normalise", [1, 0])
def test_fisher_is_the_dense_rule(normalise):
    updates, parts, weights = [update(1), update(2, 1), update(3)], data(1, 2, 3), [1.0, 0.5, 2.0]
    found = fisher(stack(updates), torch.tensor(weights), data=parts, normalise=normalise)
    expected = fisher_oracle(updates, weights, parts, normalise=bool(normalise))
    assert close(found, expected)
    assert not close(found, np.average([dense(u) for u in updates], 0, weights), 0.05)


def diagonal_data(inputs, outputs):
    def one(values):
        return Moment(torch.diag(torch.tensor(values).sqrt()), 0.0)

    return ModuleData(one(inputs), one(outputs))


def test_fisher_by_hand():
    # importance d sᵀ: [[3, 1], [3, 1]] against [[1, 1], [3, 3]], raw; with a floor far below
    parts = [diagonal_data([3.0, 1.0], [1.0, 1.0]), diagonal_data([1.0, 1.0], [1.0, 3.0])]
    updates = torch.tensor([[[4.0, 4.0], [4.0, 4.0]], [[0.0, 0.0], [8.0, 8.0]]])
    found = fisher(updates, torch.ones(2), data=parts, normalise=0)
    # 3·4/4, 1·4/2 | (3·4 + 3·8)/6, (1·4 + 3·8)/4
    assert found.tolist() == [[3.0, 2.0], [6.0, 7.0]]
    # each over its mean, 2 and 2, changes nothing; ten times the first's gradients does, if raw
    assert torch.allclose(fisher(updates, torch.ones(2), data=parts), found)
    loud = [diagonal_data([3.0, 1.0], [10.0, 10.0]), parts[1]]
    assert torch.allclose(fisher(updates, torch.ones(2), data=loud), found)
    raw = fisher(updates, torch.ones(2), data=loud, normalise=0)
    assert raw[0, 0] == pytest.approx(30 * 4 / 31)


def test_fisher_of_equal_fisher_is_the_mean():
    updates, parts = [update(1), update(2), update(3)], data(1) * 3
    found = fisher(stack(updates), torch.ones(3), data=parts)
    assert close(found, np.mean([dense(u) for u in updates], 0))


def test_fisher_floor_decides_where_no_input_reaches():
    # column 1 sees no input in either: both at the floor, so the mean
    parts = [diagonal_data([3.0, 0.0], [1.0, 1.0]), diagonal_data([1.0, 0.0], [1.0, 1.0])]
    updates = torch.tensor([[[4.0, 4.0]] * 2, [[0.0, 2.0]] * 2])
    found = fisher(updates, torch.ones(2), data=parts, normalise=0)
    assert torch.allclose(found, torch.tensor([[3.0, 3.0]] * 2))
    silent = [ModuleData(Moment(torch.zeros(2, 1), 0.0), Moment(torch.zeros(2, 1), 0.0))] * 2
    found = fisher(updates, torch.ones(2), data=silent)
    assert torch.allclose(found, updates.mean(0))


def test_an_adapter_without_the_module_weighs_as_in_the_mean():
    updates = [update(1), update(2), LowRank(torch.zeros(OUT, 0), torch.zeros(0, INTO))]
    parts = [*data(1) * 2, ModuleData()]
    mean = sum(dense(u) for u in updates[:2]) / 3
    assert close(fisher(stack(updates), torch.ones(3), data=parts), mean)
    assert close(regmean(updates, [1.0] * 3, data=parts).dense(), mean)


# ---- RegMean


def regmean_oracle(updates, weights, parts, ridge=0.01, shrink=0.9):
    """Dense, with the shrinkage and the ridge written out."""
    portions = np.array(weights) / sum(weights)
    moments = [part.inputs.dense().numpy() for part in parts]
    penalty = ridge * sum(p * np.trace(s) for p, s in zip(portions, moments, strict=True)) / INTO
    moments = [
        shrink * s + (1 - shrink) * np.diag(np.diag(s)) + penalty * np.eye(INTO) for s in moments
    ]
    up = sum(p * dense(u) @ s for p, u, s in zip(portions, updates, moments, strict=True))
    return up @ np.linalg.inv(sum(p * s for p, s in zip(portions, moments, strict=True)))


@pytest.mark.parametrize("tail", [0.3, 0.0])
@pytest.mark.parametrize("shrink", [0.9, 1.0, 0.0])
def test_regmean_is_the_dense_rule_and_keeps_the_exact_rank(tail, shrink):
    updates, weights = [update(1), update(2, 1), update(3)], [1.0, 0.5, 2.0]
    parts = data(1, 2, 3, tail=tail)
    found = regmean(updates, weights, data=parts, shrink=shrink)
    assert found.r == 7
    expected = regmean_oracle(updates, weights, parts, shrink=shrink)
    assert close(found.dense(), expected)
    assert not close(found.dense(), np.average([dense(u) for u in updates], 0, weights), 0.05)


def test_regmean_by_hand():
    # S = diag(3, 1) and diag(1, 3), λ = 1: (S + λ) = diag(4, 2), diag(2, 4), their mean diag(3, 3)
    parts = [diagonal_data([3.0, 1.0], [1.0]), diagonal_data([1.0, 3.0], [1.0])]
    one = LowRank(torch.ones(1, 1), torch.tensor([[6.0, 6.0]]))
    other = LowRank(torch.ones(1, 1), torch.tensor([[0.0, 3.0]]))
    # 6·4/2/3 = 4 in the first column, (6·2 + 3·4)/2/3 = 4 in the second; mean tr S / in is 2
    found = regmean([one, other], [1.0, 1.0], data=parts, ridge=0.5, shared_ridge=0.5)
    assert found.dense().tolist() == [[4.0, 4.0]]


def test_regmean_of_equal_moments_is_the_mean():
    updates = [update(1), update(2), update(3)]
    found = regmean(updates, [1.0] * 3, data=data(1) * 3)
    assert close(found.dense(), np.mean([dense(u) for u in updates], 0))


def test_a_direction_that_no_input_covers_gets_the_mean():
    updates, parts = [update(1), update(2)], data(1, 2, tail=0.0)
    found = regmean(updates, [1.0, 1.0], data=parts, shrink=1.0).dense().double().numpy()
    seen = np.concatenate([part.inputs.factor.numpy() for part in parts], 1)
    unseen = np.linalg.svd(seen)[0][:, seen.shape[1] :]
    mean = np.mean([dense(u) for u in updates], 0)
    assert close(found @ unseen, mean @ unseen)
    silent = [ModuleData(Moment(torch.zeros(INTO, 2), 0.0))] * 2
    assert close(regmean(updates, [1.0, 1.0], data=silent).dense(), mean)


def test_regmean_minimises_what_it_says():
    """No small change lowers Σ E‖(ΔW − ΔWᵢ) x‖² + λ Σ ‖ΔW − ΔWᵢ‖²."""
    updates, parts = [update(1), update(2)], data(1, 2)
    found = torch.from_numpy(
        regmean(updates, [1, 1], data=parts, shrink=1.0).dense().double().numpy()
    ).requires_grad_()
    penalty = 0.01 * sum(part.inputs.trace for part in parts) / 2 / INTO
    cost = 0.0
    for one, part in zip(updates, parts, strict=True):
        off = found - torch.from_numpy(dense(one))
        cost = cost + torch.trace(off @ part.inputs.dense() @ off.T) + penalty * (off**2).sum()
    (slope,) = torch.autograd.grad(cost, found)
    assert slope.norm() < 1e-4 * cost.detach()


def test_the_ridge_grows_where_the_inits_are_shared():
    start = torch.randn(3, INTO, generator=torch.Generator().manual_seed(7))
    drawn = [torch.randn(3, INTO, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    B = torch.ones(OUT, 3)
    moved = [LowRank(B, start + 0.2 * d) for d in drawn]
    apart = [LowRank(B, d) for d in drawn]
    assert input_overlap(moved[0].A, moved[1].A) > 0.8
    assert init_ridge(moved, 0.01, 0.1) == 0.1
    assert init_ridge(apart, 0.01, 0.1) == 0.01
    assert init_ridge(apart[:1], 0.01, 0.1) == 0.01
    # an untrained adapter (B = 0) says nothing of the others' init
    assert init_ridge([moved[0], LowRank(0 * B, start)], 0.01, 0.1) == 0.01
    parts = data(1, 2)
    expected = regmean_oracle(moved, [1.0, 1.0], parts, ridge=0.1)
    assert close(regmean(moved, [1.0, 1.0], data=parts).dense(), expected)


@pytest.mark.parametrize("rule", ["fisher", "regmean"])
@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"weights": [1.0, -0.5]}, "is -0.5; it weighs data"),
        ({"weights": [0.0, 0.0]}, "are 0; raise one"),
        ({"data": [*data(1), ModuleData()]}, "adapter 1 .counted from 0. has none"),
        ({"data": data(1)}, "the data of 1 adapters for 2"),
        ({"data": [ModuleData(moment(1, 5), moment(1, 5))] * 2}, "is 5 wide"),
    ],
)
def test_what_data_rules_refuse(rule, change, line):
    given = {"weights": [1.0, 1.0], "data": data(1, 2)} | change
    updates = [update(1), update(2)]
    weights = given["weights"]
    run = {
        "fisher": lambda: fisher(stack(updates), torch.tensor(weights), data=given["data"]),
        "regmean": lambda: regmean(updates, weights, data=given["data"]),
    }
    with pytest.raises(MergeError, match=line):
        run[rule]()


@pytest.mark.parametrize(
    ("option", "line"),
    [({"ridge": 0}, "ridge is 0"), ({"shared_ridge": math.nan}, "nan"), ({"shrink": 2}, "is 2")],
)
def test_options_that_regmean_refuses(option, line):
    with pytest.raises(MergeError, match=line):
        regmean([update(1)], [1.0], data=data(1), **option)


@pytest.mark.parametrize("option", [{"floor": 0}, {"floor": math.inf}, {"normalise": 0.5}])
def test_options_that_fisher_refuses(option):
    with pytest.raises(MergeError, match="expected"):
        fisher(stack([update(1)]), torch.ones(1), data=data(1), **option)


# ---- LoraHub and AdaMerging


def test_lorahub_finds_planted_weights_on_a_quadratic():
    planted = np.array([0.7, -0.4, 1.1, 0.2, -1.0])
    calls = []

    def loss(weights):
        calls.append(tuple(weights))
        return float(np.square(np.array(weights) - planted).sum())

    found = lorahub(loss, [0.0] * 5, penalty=0.0)
    assert np.allclose(found.weights, planted, atol=1e-4)
    assert len(calls) == found.evaluations <= 40
    assert calls[0] == (0.0,) * 5
    assert found.start == pytest.approx(np.square(planted).sum())
    assert lorahub(loss, [0.0] * 5, penalty=0.0) == found


def test_lorahub_stays_in_its_bounds_and_its_budget():
    calls = []

    def loss(weights):
        calls.append(tuple(weights))
        return -sum(weights)

    assert lorahub(loss, [0.0] * 3, penalty=0.0).weights == pytest.approx((1.5,) * 3)
    assert max(abs(weight) for call in calls for weight in call) <= 1.5
    for budget in (1, 2, 4, 9):
        calls.clear()
        assert lorahub(loss, [0.0] * 3, budget=budget).evaluations == len(calls) <= budget


def test_lorahub_pays_for_weights_and_never_ends_above_its_start():
    # slope 0.01 down, penalty 0.05 up: nothing is worth a weight
    found = lorahub(lambda w: -0.01 * w[0], [0.0])
    assert found.weights == pytest.approx((0.0,), abs=1e-5)
    assert found.value <= 0.0
    # |w − 1|² + 0.05 |w| is least at 1 − 0.025
    assert lorahub(lambda w: (w[0] - 1) ** 2, [0.0]).weights == pytest.approx((0.975,), abs=1e-3)
    diverging = lorahub(lambda w: math.nan if any(w) else 2.0, [0.0, 0.0], budget=10)
    assert diverging.weights == (0.0, 0.0)
    assert diverging.value == 2.0
    assert lorahub(lambda w: w[0] ** 2, [0.3], budget=1, penalty=0.0).weights == (0.3,)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"budget": 0}, "budget is 0"),
        ({"bound": 0}, "bound is 0"),
        ({"penalty": -1}, "penalty -1"),
        ({"bound": 0.1}, "starts at 0.3, outside"),
    ],
)
def test_what_lorahub_refuses(options, line):
    with pytest.raises(MergeError, match=line):
        lorahub(lambda w: 0.0, [0.3], **options)


def test_adamerging_goes_down_the_entropy():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]], dtype=torch.float64)

    def entropy(weights):
        chances = (weights[:, 0] @ logits).softmax(-1)
        return -(chances * chances.log()).sum()

    start = torch.full((2, 1), 0.3, dtype=torch.float64)
    found = adamerging(entropy, start, steps=50, rate=0.05)
    assert found.start == pytest.approx(float(entropy(start)))
    assert found.value < 0.8 * found.start
    assert found.value == pytest.approx(
        float(entropy(torch.tensor(found.weights, dtype=torch.float64)[:, None]))
    )
    assert found.evaluations == 51


def test_adamerging_takes_adams_first_step_and_groups_apart():
    # Adam's first step is rate · sign of the slope; a group without influence stays
    found = adamerging(lambda w: (3 * w[0, 0] - w[1, 1]) + 5, torch.zeros(2, 2), steps=1, rate=0.1)
    assert found.weights == pytest.approx((-0.1, 0.0, 0.0, 0.1), abs=1e-6)
    with pytest.raises(MergeError, match="the entropy is nan at step 0"):
        adamerging(lambda w: w.sum() * math.nan, torch.zeros(1, 1))
    with pytest.raises(MergeError, match="steps is 0"):
        adamerging(lambda w: w.sum(), torch.zeros(1, 1), steps=0)


# ---- OSRM


def osrm_oracle(updates, weights, parts, directions):
    merged = np.zeros((OUT, INTO))
    for place, (one, weight) in enumerate(zip(updates, weights, strict=True)):
        others = [part.inputs for k, part in enumerate(parts) if k != place]
        values, vectors = np.linalg.eigh(sum(m.dense().numpy() for m in others))
        assert values[INTO - directions] > values[0] * (1 + 1e-9)
        A = vectors[:, : INTO - directions].T  # the least used
        merged += weight * dense(one) @ np.linalg.pinv(A) @ A
    return merged


@pytest.mark.parametrize("directions", [1, 3, 8])
def test_osrm_is_the_dense_rule(directions):
    updates, parts, weights = [update(1), update(2, 1), update(3)], data(1, 2, 3), [1.0, 0.5, 2.0]
    found = osrm(updates, weights, data=parts, directions=directions)
    assert found.r == 7
    assert close(found.dense(), osrm_oracle(updates, weights, parts, directions))


def test_osrm_by_hand():
    # the others' inputs lie along the first axis for one, along the second for the other
    parts = [diagonal_data([0.0, 4.0], [1.0]), diagonal_data([4.0, 0.0], [1.0])]
    updates = [LowRank(torch.ones(1, 1), torch.tensor([[3.0, 5.0]])) for _ in range(2)]
    assert osrm(updates, [1.0, 1.0], data=parts, directions=1).dense().tolist() == [[3.0, 5.0]]
    assert osrm(updates, [1.0, 0.0], data=parts, directions=1).dense().tolist() == [[0.0, 5.0]]
    assert osrm(updates, [1.0, 1.0], data=parts, directions=0).dense().tolist() == [[6.0, 10.0]]
    alone = osrm(updates[:1], [1.0], data=parts[:1])
    assert alone.dense().tolist() == [[3.0, 5.0]]
    with pytest.raises(MergeError, match="directions is"):
        osrm(updates, [1.0, 1.0], data=parts, directions=1.5)


def test_an_osrm_init_is_where_the_others_inputs_are_not():
    others = [tiny_probe(seed) for seed in (1, 2)]
    init = osrm_init(others, 4)
    assert init.keys() == others[0].inputs.keys()
    for module, A in init.items():
        assert torch.allclose(A @ A.T, torch.eye(4), atol=1e-5)
        for probe in others:
            # only the tail is left there: A S Aᵀ = tail · I
            through = A.double() @ probe.inputs[module].dense() @ A.T.double()
            assert torch.allclose(through, 0.3 * torch.eye(4).double(), atol=1e-5)
    again, other = osrm_init(others, 4), osrm_init(others, 4, seed=1)
    module = next(iter(init))
    assert torch.equal(init[module], again[module])
    assert not torch.allclose(init[module], other[module])


def test_an_osrm_init_takes_the_least_used_when_the_rest_is_too_small():
    S = Moment(torch.diag(torch.tensor([2.0, 3.0, 1.0, 0.0])), 0.0)
    probe = replace(tiny_probe(1), inputs={"m": S})
    A = osrm_init([probe], 2)["m"].abs()
    assert torch.allclose(A, torch.tensor([[0, 0, 0, 1.0], [0, 0, 1.0, 0]]), atol=1e-5)
    with pytest.raises(ProbeError, match="rank is 5; 'm' takes 1 to 4"):
        osrm_init([probe], 5)
    with pytest.raises(ProbeError, match="got none"):
        osrm_init([], 2)
    with pytest.raises(ProbeError, match="has no input moments"):
        osrm_init([replace(probe, inputs={})], 2)


def test_peft_starts_from_an_osrm_init_and_answers_as_the_base():
    model = peft_model(0, r=3)
    names = [n.removeprefix("base_model.model.") for n, m in model.named_modules()
             if hasattr(m, "lora_A")]  # fmt: skip
    shapes = {n: model.get_submodule(f"base_model.model.{n}").in_features for n in names}
    init = {n: torch.linalg.qr(torch.randn(width, 3)).Q.T for n, width in shapes.items()}
    with pytest.raises(AdapterMismatch, match="is trained already"):
        start_from(model, init)
    layers = {n: model.get_submodule(f"base_model.model.{n}") for n in names}
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B["default"].weight.zero_()
    for bad, line in [
        ({k: v for k, v in init.items() if k != names[1]}, f"no init for '{names[1]}'"),
        (init | {names[0]: init[names[0]][:2]}, "use one rank"),
    ]:
        with pytest.raises(AdapterMismatch, match=line):
            start_from(model, bad)
        assert not torch.equal(layers[names[2]].lora_A["default"].weight, init[names[2]])
    start_from(model, init)
    for name, layer in layers.items():
        assert torch.equal(layer.lora_A["default"].weight, init[name])
    with torch.no_grad():
        assert torch.allclose(model(tokens()).logits, tiny_llama()(tokens()).logits, atol=1e-6)
    with pytest.raises(AdapterMismatch, match="no LoRA modules of an adapter 'other'"):
        start_from(model, init, "other")
