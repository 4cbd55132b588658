"""The router: distances by hand, what it refuses to promise, and prompts through a tiny model."""

import json
import random

import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from tiny_base import tiny_model, write_tiny_base

from mergeprobe.adapters.base import load_base
from mergeprobe.compose.classifier import fit_classifier
from mergeprobe.compose.router import (
    SHRINKAGE,
    SLACK,
    Whitening,
    fit_router,
    prompt_states,
    router_layer,
)
from mergeprobe.compose.router_file import make_router, read_router, route, write_router
from mergeprobe.errors import BaseModelError, DataError, DeploymentError


def clouds(*centres, count=32, dim=20, width=1.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shift = torch.zeros(len(centres), dim)
    shift[:, 0] = torch.tensor(centres)
    return [c + width * torch.randn(count, dim, generator=draw) for c in shift]


def fitted(*centres, **options):
    names = [f"t{k}" for k in range(len(centres))]
    return fit_router(dict(zip(names, clouds(*centres, **options), strict=True)), layer=2)


def test_whitening_is_the_shrunk_inverse_root():
    draw = torch.Generator().manual_seed(3)
    rows = torch.randn(40, 6, generator=draw, dtype=torch.float64)
    rows[:, 1] += 2 * rows[:, 0]
    found = fit_router({"a": rows[:20], "b": rows[20:]}, layer=1)
    inside = torch.cat([rows[:20] - rows[:20].mean(0), rows[20:] - rows[20:].mean(0)])
    covariance = inside.T @ inside / 38
    root = covariance.diagonal().sqrt()
    correlation = covariance / root[:, None] / root[None]
    shrunk = (1 - SHRINKAGE) * correlation + SHRINKAGE * torch.eye(6, dtype=torch.float64)
    x = torch.randn(5, 6, generator=draw, dtype=torch.float64)
    scaled = (x - rows[:20].mean(0)) / root
    expected = (scaled @ torch.linalg.inv(shrunk) * scaled).sum(1)
    assert torch.allclose(found.distances(x)[:, 0] * found.thresholds[0], expected)


def test_directions_without_spread_inside_tasks_count_too():
    whitening = Whitening(torch.ones(3), torch.tensor([[1.0, 0, 0]]).double(), torch.ones(1))
    found = whitening(torch.tensor([[2.0, 1.0, 0.0]]))
    assert found[0].tolist() == pytest.approx([2.0, SHRINKAGE**-0.5, 0.0], abs=1e-6)


def test_far_tasks_are_told_apart_and_strangers_go_to_the_base():
    router = fitted(0.0, 40.0, -40.0)
    fresh = clouds(0.0, 40.0, -40.0, 120.0, seed=9)
    names = [[choice.name for choice in router.choose(rows)] for rows in fresh]
    for k in range(3):
        assert names[k].count(f"t{k}") >= 31
        assert set(names[k]) <= {f"t{k}", None}
    assert names[3] == [None] * 32
    assert all(choice.certain for rows in fresh for choice in router.choose(rows))
    assert router.separation.min() == 1.0


def test_a_threshold_is_the_largest_cross_fitted_distance_with_slack():
    router = fitted(0.0, 40.0)
    own = clouds(0.0, 40.0)[0]
    # fitted on them, a task's own prompts are nearer than when they were left out
    assert router.distances(own)[:, 0].max() < 1 / SLACK


def test_same_prompts_are_not_promised():
    router = fitted(0.0, 0.0, 40.0)
    assert router.rivals("t0") == ("t1",)
    assert router.rivals("t2") == ()
    found = router.choose(clouds(0.0, seed=5)[0])
    assert not any(choice.certain for choice in found if choice.name)
    assert {choice.rivals for choice in found if choice.name} <= {("t0",), ("t1",)}
    assert 0.3 < float(router.separation[0, 1]) < 0.7


def test_the_classifier_is_logistic_regression():
    parts = [rows.double() for rows in clouds(0.0, 2.0, 4.0)]
    found = fit_classifier(parts)
    labels = [k for k, rows in enumerate(parts) for _ in rows]
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=5000)
    theirs.fit(torch.cat(parts).numpy(), labels)
    points = torch.cat(clouds(0.0, 2.0, 4.0, seed=9)).double()
    expected = torch.tensor(theirs.predict_proba(points.numpy()))
    assert torch.allclose(found(points).softmax(1), expected, atol=1e-4)


def test_a_trained_router_chooses_by_its_classifier_and_abstains_by_distance(tmp_path):
    states = dict(zip(("a", "b", "c"), clouds(0.0, 6.0, 40.0), strict=True))
    router = fit_router(states, layer=2, trained=True)
    write_router(router, tmp_path / "r.safetensors")
    router = read_router(tmp_path / "r.safetensors")
    rows = torch.cat(clouds(0.0, 6.0, 40.0, seed=5))
    scores = router.classifier(router.whitening(rows))
    found = router.choose(rows)
    for choice, likely in zip(found, scores.argmax(1).tolist(), strict=True):
        assert choice.name in (None, router.names[likely])
    assert [choice.name for choice in found].count(None) < 10
    assert torch.allclose(router.gates(rows), scores.softmax(1).T)
    far = router.choose(torch.cat(clouds(200.0)))
    assert all(choice.name is None for choice in far)
    # the same prompts are not told apart by training either
    alike = fit_router(dict(zip("ab", clouds(0.0, 0.0), strict=True)), layer=2, trained=True)
    assert alike.rivals("a") == ("b",)


def test_gates_are_a_mixture():
    router = fitted(0.0, 3.0, 40.0)
    rows = torch.cat(clouds(0.0, 3.0, 40.0, seed=4))
    gates = router.gates(rows)
    assert gates.shape == (3, 96)
    assert torch.allclose(gates.sum(0), torch.ones(96).double())
    assert gates[:, :32].mean(1).argmax() == 0
    assert gates[:, 64:].mean(1)[2] > 0.999
    assert router.gates(rows, top=2).count_nonzero(0).max() == 2


def test_too_few_prompts():
    with pytest.raises(DataError, match="'a' has 7 example prompts; a router needs at least 8"):
        fit_router({"a": torch.randn(7, 3), "b": torch.randn(9, 3)}, layer=1)
    with pytest.raises(DataError, match="no tasks to route between"):
        fit_router({}, layer=1)


def test_states_are_the_layer_s_own_mean_without_the_first_token():
    model = tiny_model()
    ids, mask = torch.randint(2, 60, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask[1, 4:] = 0  # padding on the right, on the left, and a prompt of one token
    mask[2, :5] = 0
    found = prompt_states(model, ids, mask, layer=2, batch_size=2)
    hidden = model(input_ids=ids[:2], attention_mask=mask[:2], output_hidden_states=True)
    layer = hidden.hidden_states[2].double()
    assert torch.allclose(found[0], layer[0, 1:].mean(0), atol=1e-6)
    assert torch.allclose(found[1], layer[1, 1:4].mean(0), atol=1e-6)
    alone = model(input_ids=ids[2:, 5:], output_hidden_states=True).hidden_states[2]
    assert torch.allclose(found[2], alone[0, 0].double(), atol=1e-5)
    assert router_layer(model) == 2  # of three
    assert model(input_ids=ids).logits.shape == (3, 6, 81)  # the hook is gone


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(str(write_tiny_base(tmp_path_factory.mktemp("b") / "base")), dtype="float32")


def prompts(kind, *, seed=0, count=32):
    draw = random.Random(seed)
    if kind == "digits":
        return [f"{draw.randint(100, 999)} + {draw.randint(10, 99)} =" for _ in range(count)]
    return [f"spell the word {''.join(draw.choices('abcdefgh', k=4))}:" for _ in range(count)]


def test_prompts_to_adapters_and_back_from_a_file(base, tmp_path):
    router = make_router(base, {name: prompts(name) for name in ("digits", "words")})
    write_router(router, tmp_path / "router.safetensors")
    again = read_router(tmp_path / "router.safetensors")
    asked = [*prompts("digits", seed=1), *prompts("words", seed=1)]
    found, same = route(router, base, asked), route(again, base, asked)
    assert [choice.name for choice in found] == [choice.name for choice in same]
    assert sum(choice.name == "digits" for choice in found[:32]) >= 28
    assert sum(choice.name == "words" for choice in found[32:]) >= 28
    near = list(found[0].distances)
    assert near == sorted(near, key=found[0].distances.get)
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        route(router, base, ["hi", ""])


def test_another_base_and_damaged_files_are_refused(base, tmp_path):
    router = make_router(base, {name: prompts(name) for name in ("digits", "words")})
    other = load_base(str(write_tiny_base(tmp_path / "other", seed=5)), dtype="float32")
    with pytest.raises(BaseModelError, match="the router was made on base"):
        route(router, other, ["hi"])
    path = tmp_path / "router.safetensors"
    with pytest.raises(DeploymentError, match="is no file; expected a router"):
        read_router(path)
    path.write_bytes(b"no")
    with pytest.raises(DeploymentError, match="is no sound router"):
        read_router(path)
    write_router(router, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(DeploymentError, match="is no sound router"):
        read_router(path)
    header = {"schema": 1, "names": ["a"], "layer": 1}
    tensors = {name: torch.zeros(2) for name in ("spread", "within", "thresholds")}
    tensors |= {name: torch.zeros(2, 2) for name in ("basis", "centroids", "separation")}
    save_file(tensors, str(path), metadata={"router": json.dumps(header)})
    with pytest.raises(DeploymentError, match=r"'centroids' is \(2, 2\), expected \(1, 2\)"):
        read_router(path)
