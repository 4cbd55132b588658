"""Composing logits: the algebra by hand, and one mixed batch against one model at a time."""

import math

import pytest
import torch
from tiny_base import tiny_model, tiny_tokenizer
from torch import nn

from mergeprobe.adapters.attach import attached
from mergeprobe.adapters.rows import NONE, attached_rows
from mergeprobe.compose.logits import Composition, compose, composed, proxied, proxy
from mergeprobe.errors import AdapterMismatch, DataError, MergeError
from mergeprobe.lowrank import LowRank

IDS = torch.tensor([[5, 6, 7, 8], [9, 3, 4, 2], [11, 12, 13, 14]])


def logs(*shares):
    return torch.tensor(shares).log()


# ---- algebra


def test_offsets_add_up():
    base = torch.tensor([1.0, 0.0, -1.0])
    experts = torch.tensor([[3.0, 0.0, -1.0], [1.0, 4.0, -2.0]])
    found = compose(base, experts, torch.tensor([0.5, 1.0]))
    assert found.tolist() == [2.0, 4.0, -2.0]  # 1 + .5·2 + 0; 0 + 0 + 4; −1 + 0 − 1


def test_product_of_experts():
    experts = torch.stack([logs(0.8, 0.1, 0.1), logs(0.2, 0.2, 0.6)])
    found = compose(torch.zeros(3), experts, torch.tensor([0.5, 0.5]), "geometric").exp()
    roots = [math.sqrt(x) for x in (0.16, 0.02, 0.06)]
    assert found.tolist() == pytest.approx([r / sum(roots) for r in roots], abs=1e-6)


def test_mixture_sums_to_one():
    experts = torch.stack([logs(0.8, 0.1, 0.1), logs(0.2, 0.2, 0.6)])
    found = compose(torch.zeros(3), experts, torch.tensor([0.25, 0.75]), "mixture").exp()
    assert found.tolist() == pytest.approx([0.35, 0.175, 0.475], abs=1e-6)
    none = compose(torch.zeros(3), experts, torch.tensor([1.0, 0.0]), "mixture").exp()
    assert none.tolist() == pytest.approx([0.8, 0.1, 0.1], abs=1e-6)


@pytest.mark.parametrize("mode", ["sum", "geometric", "mixture"])
def test_one_expert_of_weight_one_is_itself(mode):
    torch.manual_seed(0)
    base, expert = torch.randn(2, 7), torch.randn(1, 2, 7)
    found = compose(base, expert, torch.tensor([1.0]), mode)
    assert torch.allclose(found.softmax(-1), expert[0].softmax(-1), atol=1e-6)


def test_weights_for_each_row():
    base, experts = torch.zeros(2, 3), torch.stack([torch.ones(2, 3), 2 * torch.ones(2, 3)])
    found = compose(base, experts, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert found.tolist() == [[1.0] * 3, [2.0] * 3]


def test_only_what_an_expert_finds_plausible():
    experts = torch.stack([logs(0.9, 0.08, 0.02), logs(0.1, 0.1, 0.8)])
    weights = torch.tensor([0.5, 0.5])
    found = compose(torch.zeros(3), experts, weights, "mixture", plausibility=0.5)
    assert found.isfinite().tolist() == [True, False, True]
    alone = compose(torch.zeros(3), experts, torch.tensor([1.0, 0.0]), "mixture", 0.05)
    assert alone.isfinite().tolist() == [True, True, False]  # 0.08 ≥ 0.045 > 0.02
    with pytest.raises(MergeError, match=r"plausibility is 0; expected a share in \(0, 1\]"):
        compose(torch.zeros(3), experts, weights, "mixture", plausibility=0)


def test_proxy_tuning():
    large, tuned, untuned = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 1.0]), torch.ones(2)
    assert proxy(large, tuned, untuned).tolist() == [5.0, 2.0]
    assert proxy(large, tuned, untuned, alpha=0.5).tolist() == [3.0, 2.0]
    assert proxy(large, tuned, untuned, alpha=0.0).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("weights", [(0.5, 0.4), (1.5, -0.5)])
def test_mixtures_refuse_weights_that_are_none(weights):
    with pytest.raises(MergeError, match="at least 0 that sum to 1"):
        Composition(weights, "mixture")


def test_unknown_mode_and_weights():
    with pytest.raises(MergeError, match="unknown mode 'average'; known are sum, geometric"):
        Composition((1.0,), "average")
    with pytest.raises(MergeError, match="expected one finite number each"):
        Composition((math.nan,))


# ---- rows of one batch


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def updates(model):
    draw = torch.Generator().manual_seed(1)
    found = []
    for rank in (2, 3):
        modules = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                out, into = module.weight.shape
                B, A = (torch.randn(*size, generator=draw) for size in ((out, rank), (rank, into)))
                modules[name] = LowRank(0.1 * B, A / into**0.5, 2.0)
        found.append(modules)
    return found


def alone(model, update, ids):
    with torch.no_grad(), attached(model, update):
        return model(input_ids=ids).logits


def test_each_row_runs_with_its_own_adapter(model, updates):
    partial = dict(list(updates[1].items())[:2])  # another rank, and only two modules
    with torch.no_grad(), attached_rows(model, [updates[0], partial]) as rows:
        rows.choose([1, NONE, 0])
        found = model(input_ids=IDS).logits
    expected = [
        alone(model, partial, IDS[:1]),
        alone(model, {}, IDS[1:2]),
        alone(model, updates[0], IDS[2:]),
    ]
    assert torch.allclose(found, torch.cat(expected), atol=1e-5)
    assert torch.equal(alone(model, {}, IDS), model(input_ids=IDS).logits)


def test_rows_must_be_chosen(model, updates):
    with attached_rows(model, updates) as rows:
        with pytest.raises(AdapterMismatch, match="no row has chosen its update"):
            model(input_ids=IDS)
        rows.choose([0, 1])
        with pytest.raises(AdapterMismatch, match=r"expected \(2 rows"):
            model(input_ids=IDS)
        with pytest.raises(AdapterMismatch, match="there are 2"):
            rows.choose([0, 2])


# ---- the composition as a model


def test_one_adapter_is_exactly_itself(model, updates):
    with torch.no_grad(), composed(model, updates[:1], Composition((1.0,))):
        found = model(input_ids=IDS).logits
    assert torch.allclose(found, alone(model, updates[0], IDS), atol=1e-4)


@pytest.mark.parametrize("mode", ["sum", "geometric", "mixture"])
def test_generate_agrees_with_the_composition_without_a_cache(model, updates, mode):
    how = Composition((0.4, 0.6), mode, plausibility=0.1)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    mask[1, :2] = 0  # left padding
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with composed(model, updates, how):
        found = model.generate(input_ids=ids, attention_mask=mask, **options)
    for row in range(3):
        sofar = ids[row : row + 1, mask[row].bool()]
        for _ in range(8):
            parts = [alone(model, update, sofar)[:, -1] for update in ({}, *updates)]
            scores = compose(parts[0], torch.stack(parts[1:]), torch.tensor((0.4, 0.6)), mode, 0.1)
            scores[:, 0] = -math.inf  # min_new_tokens forbids the end
            sofar = torch.cat([sofar, scores.argmax(-1, keepdim=True)], 1)
        assert sofar[0, -8:].tolist() == found[row, -8:].tolist()


def test_sampling_follows_the_composition(model, updates):
    ids, count = IDS[:1].repeat(4000, 1), 4000
    with composed(model, updates, Composition((0.5, 0.5), "mixture")):
        torch.manual_seed(0)
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": 1}
        drawn = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        with torch.no_grad():
            share = model(input_ids=IDS[:1]).logits[0, -1].softmax(-1)
    seen = torch.bincount(drawn[:, -1], minlength=len(share)) / count
    assert (seen - share).abs().max() < 4 * math.sqrt(0.25 / count)


def test_a_gate_chooses_by_prompt(model, updates):
    gates = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])
    how = Composition((0.5, 0.5), "mixture", gate=lambda ids, mask: gates)
    with torch.no_grad(), composed(model, updates, how):
        found = model(input_ids=IDS).logits.exp()
    first, second = (alone(model, update, IDS).softmax(-1) for update in updates)
    expected = torch.stack([first[0], second[1], (first[2] + second[2]) / 2])
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(found.sum(-1), torch.ones(3, 4), atol=1e-5)
    wrong = Composition((0.5, 0.5), gate=lambda ids, mask: gates[:1])
    with composed(model, updates, wrong), pytest.raises(MergeError, match=r"\(2 adapters, 3 pro"):
        model(input_ids=IDS)


def test_beams_are_refused(model, updates):
    with (
        composed(model, updates, Composition((0.5, 0.5))),
        pytest.raises(DataError, match="greedily or samples, without beams"),
    ):
        model.generate(
            input_ids=IDS, attention_mask=torch.ones_like(IDS), num_beams=2, max_new_tokens=4
        )


def test_the_model_is_itself_again(model, updates):
    before = model(input_ids=IDS).logits
    with pytest.raises(ZeroDivisionError), composed(model, updates, Composition((0.5, 0.5))):
        1 / 0  # noqa: B018
    assert "forward" not in model.__dict__
    assert torch.equal(before, model(input_ids=IDS).logits)
    with pytest.raises(MergeError, match="1 weights for 2 adapters"):
        composed(model, updates, Composition((1.0,))).__enter__()


def test_a_small_pair_steers_a_large_model(model, updates):
    large, untuned, tuned = tiny_model(seed=7), tiny_model(), tiny_model()
    with torch.no_grad(), attached(tuned, updates[0]):
        ids, mask = IDS.clone(), torch.ones_like(IDS)
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        with proxied(large, tuned, untuned, alpha=1.5):
            found = large.generate(input_ids=ids, attention_mask=mask, **options)
        for _ in range(6):
            parts = [each(input_ids=ids).logits[:, -1] for each in (large, tuned, untuned)]
            scores = parts[0] + 1.5 * (parts[1] - parts[2])
            scores[:, 0] = -math.inf
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)


def test_one_vocabulary_is_needed(model):
    other = tiny_model()
    other.resize_token_embeddings(len(tiny_tokenizer()) + 3)
    with pytest.raises(MergeError, match="vocabularies differ"):
        proxied(model, other, other).__enter__()
