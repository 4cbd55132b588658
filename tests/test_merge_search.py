"""Weights searched by running a model: what is minimised, what it costs, what comes out."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from compose_samples import peft_folder, tiny_llama, tokens

from mergeprobe.adapters.attach import attached
from mergeprobe.adapters.checkpoint import Adapter
from mergeprobe.capture.batch import Batch, completion_logits, item_scores
from mergeprobe.compose import deployed, merge
from mergeprobe.errors import DataError, MergeError
from mergeprobe.evaluate.weights import (
    Mixture,
    entropy_of,
    loss_of,
    reweighted,
    search_weights,
    unlabelled,
)
from mergeprobe.lowrank import LowRank
from mergeprobe.plan import AdapterRef, Group, Plan


@pytest.fixture(scope="module")
def base():
    model = tiny_llama().requires_grad_(False)
    model.lm_head.weight.mul_(20)  # so that it is sure of something

    def letters(text):
        return {"input_ids": [3 + ord(c) % 120 for c in text]}

    return SimpleNamespace(
        model=model, tokenizer=letters, name="tiny", fingerprint="f", device=torch.device("cpu")
    )


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two of the same modules and one of fewer; large enough to matter to a tiny model."""
    root, found = tmp_path_factory.mktemp("peft"), []
    for k, name in enumerate("abc"):
        kinds = {"targets": ("q_proj", "v_proj")} if name == "c" else {"r": 2 + k, "alpha": 8}
        found.append(peft_folder(root / name, k, **kinds)[1])
    return found


@torch.no_grad()
def answers(base, adapter, seed):
    """Items whose completions are the adapter's own first choices, so that it gains on them."""
    ids = tokens(seed, items=6, length=12)
    with attached(base.model, adapter.modules):
        for place in range(5, 12):
            ids[:, place] = base.model(ids[:, :place]).logits[:, -1].argmax(-1)
    counted = torch.zeros_like(ids)
    counted[:, 5:] = 1
    return Batch(ids, torch.ones_like(ids), counted)


@pytest.fixture(scope="module")
def batches(base, adapters):
    return [answers(base, adapter, seed) for seed, adapter in enumerate(adapters)]


def losses(base, batches, weights, adapters):
    merged = merge(adapters, "linear", weights=weights).adapter
    with attached(base.model, merged.modules):
        return [float(item_scores(base.model, batch).loss.mean()) for batch in batches]


@pytest.mark.parametrize("by", ["adapter", "third"])
def test_a_mixture_is_the_merge_with_those_weights(adapters, by):
    mixture = Mixture.of(adapters, by)
    weights = torch.tensor([[0.5, 2.0, -1.0], [1.0, 0.25, 3.0], [0.1, 0.2, 0.3]])
    weights = weights[:, : len(mixture.parts)]
    updates = mixture.updates(weights)
    merged = merge(adapters, "linear", weights=mixture.named(weights)).adapter
    assert updates.keys() == merged.modules.keys()
    for module, update in updates.items():
        assert torch.allclose(update.dense(), merged.modules[module].dense(), atol=1e-5)


def test_the_search_lowers_the_mean_loss_that_merge_then_has(base, adapters, batches):
    found = search_weights(base, adapters, batches, penalty=0.0)
    start = losses(base, batches, [0.0] * 3, adapters)
    end = losses(base, batches, found.weights, adapters)
    assert found.search.start == pytest.approx(sum(start) / 3, rel=1e-5)
    assert found.search.value == pytest.approx(sum(end) / 3, rel=1e-4)
    assert found.search.value < min(
        sum(losses(base, batches, [w] * 3, adapters)) / 3 for w in (0.0, 1 / 3)
    )
    assert found.search.evaluations <= 40


def test_worst_is_one_less_the_smallest_retention(base, adapters, batches):
    cost = loss_of(base, Mixture.of(adapters, "adapter"), adapters, batches, "worst")
    weights = [0.6, 0.3, 0.8]
    without = losses(base, batches, [0.0] * 3, adapters)
    merged = losses(base, batches, weights, adapters)
    kept = []
    for k, batch in enumerate(batches):
        alone = losses(base, [batch], [float(k == j) for j in range(3)], adapters)[0]
        kept.append((without[k] - merged[k]) / (without[k] - alone))
    assert cost(weights) == pytest.approx(1 - min(kept), abs=1e-4)
    assert cost([0.0] * 3) == pytest.approx(1.0, abs=1e-6)
    silent = replace(adapters[0], modules={m: u * 0.0 for m, u in adapters[0].modules.items()})
    with pytest.raises(DataError, match="'a' gains nothing on its batch"):
        loss_of(base, Mixture.of([silent], "adapter"), [silent], batches[:1], "worst")


def entropy_by_hand(base, batches, updates):
    found = []
    with torch.no_grad(), attached(base.model, updates):
        for batch in batches:
            chances = completion_logits(base.model, batch)[0].double().softmax(-1)
            found.append(float(-(chances * chances.log()).sum(-1).mean()))
    return sum(found) / len(found)


def test_entropy_and_its_slope(base, adapters, batches):
    mixture = Mixture.of(adapters, "third")
    entropy = entropy_of(base, mixture, batches, batch_size=4)
    weights = torch.full((3, 3), 0.3, dtype=torch.float64).requires_grad_()
    value = entropy(weights)
    assert float(value.detach()) == pytest.approx(
        entropy_by_hand(base, batches, mixture.updates(weights.detach())), rel=1e-5
    )
    (slope,) = torch.autograd.grad(value, weights)
    for place in ((0, 0), (1, 1), (2, 0)):
        moved = []
        for step in (0.005, -0.005):
            other = weights.detach().clone()
            other[place] += step
            moved.append(float(entropy(other).detach()))
        assert float(slope[place]) == pytest.approx((moved[0] - moved[1]) / 0.01, rel=0.01)
    assert float(slope[:, 2].abs().max()) == 0.0  # two layers: none is in the last third
    assert all(p.grad is None for p in base.model.parameters())


def test_adamerging_lowers_the_entropy_of_the_merge(base, adapters, batches):
    found = search_weights(base, adapters, batches, "adamerging", by="third", steps=8, rate=0.05)
    assert found.weights["all"] == [1.0, 1.0, 1.0]
    merged = merge(adapters, "linear", weights=found.weights).adapter.modules
    assert found.search.value == pytest.approx(entropy_by_hand(base, batches, merged), rel=1e-4)
    start = merge(adapters, "linear", weights=[0.3] * 3).adapter.modules
    assert found.search.start == pytest.approx(entropy_by_hand(base, batches, start), rel=1e-4)
    assert found.search.value < found.search.start - 0.01


def test_unlabelled_text_counts_from_its_second_token(base):
    batch = unlabelled(base, ["abc", "abcde"])
    assert batch.ids[0, 3:].tolist() == [0, 0]
    assert batch.completion_mask.tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 1, 1]]
    with pytest.raises(DataError, match="at least two tokens"):
        unlabelled(base, ["a"])


def test_a_group_is_reweighted_and_carried_out(base, adapters, batches):
    named = {adapter.name: adapter for adapter in adapters}
    given = dict(zip(named, batches, strict=True))
    group = Group(name="g", adapters=("a", "b"), action="merge", method="mean", rank=4)
    found = reweighted(group, base, named, given, budget=20)
    assert found.action == "reweight"
    assert found.rank == 4
    assert found.weights != {"a": 0.5, "b": 0.5}
    cost = loss_of(base, Mixture.of(adapters[:2], "adapter"), adapters[:2], batches[:2], "worst")
    assert cost(list(found.weights.values())) < cost([0.5, 0.5])
    plan = Plan(adapters=tuple(AdapterRef(name=n) for n in "ab"), groups=(found,))
    served = deployed(plan, named).serving["a"]
    rule = merge(adapters[:2], "linear", weights=list(found.weights.values()), rank=4).adapter
    for module, update in served.modules.items():
        assert torch.allclose(update.dense(), rule.modules[module].dense(), atol=1e-6)
    by_third = reweighted(found, base, named, given, by="third", objective="mean", budget=8)
    assert by_third.part_weights.keys() == {"early", "middle", "late"}
    assert Group.model_validate(by_third.model_dump()) == by_third
    with pytest.raises(MergeError, match="is no plain linear merge"):
        reweighted(by_third, base, named, given)
    with pytest.raises(DataError, match="no calibration batch for 'b'"):
        reweighted(group, base, named, {"a": batches[0]})


def outside(adapters):
    whole = LowRank(torch.zeros(128, 1), torch.zeros(1, 64))
    return [Adapter("x", {**adapters[0].modules, "lm_head": whole})]


@pytest.mark.parametrize(
    ("kwargs", "line"),
    [
        ({"method": "ties"}, "'ties' is no search for weights; known are lorahub, adamerging"),
        ({"steps": 3}, "'lorahub' has no option 'steps'"),
        ({"by": "layer"}, "no weights by 'layer'"),
        ({"objective": "best"}, "no objective 'best'"),
        ({"method": "adamerging", "objective": "worst"}, "takes no objective"),
        ({"start": [1.0]}, "1 weights to start from for 3"),
    ],
)
def test_what_a_search_refuses(base, adapters, batches, kwargs, line):
    with pytest.raises(MergeError, match=line):
        search_weights(base, adapters, batches, **kwargs)
    with pytest.raises(DataError, match="2 batches for 3 adapters"):
        search_weights(base, adapters, batches[:2])
    with pytest.raises(MergeError, match="'lm_head' lies in no depth third"):
        Mixture.of(outside(adapters), "third")
