"""Deployments that decide at decode time: composed logits, and adapters chosen by the prompt."""

from __future__ import annotations

import json
import random

import pytest
import torch
from tiny_base import write_tiny_base

from mergeprobe.adapters.attach import attached
from mergeprobe.adapters.base import load_base
from mergeprobe.adapters.checkpoint import Adapter
from mergeprobe.compose import Executor, apply_plan, read_deployment
from mergeprobe.compose.logits import compose
from mergeprobe.compose.router_file import make_router
from mergeprobe.errors import DeploymentError, PlanError
from mergeprobe.evaluate.data import Example
from mergeprobe.evaluate.deployed import deployed_retention
from mergeprobe.evaluate.score import batch_of, score, score_deployed
from mergeprobe.lowrank import LowRank
from mergeprobe.plan import AdapterRef, Group, Plan, Route

PROMPTS = {"sums": "{}+{}=", "words": "say {} and {} !"}
IDS = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(str(write_tiny_base(tmp_path_factory.mktemp("b") / "base")), dtype="float32")


@pytest.fixture(scope="module")
def adapters(base):
    return {name: drawn(base, name, seed) for seed, name in enumerate("ab")}


def drawn(base, name, seed):
    """A random adapter on the attention of the model, strong enough to be heard."""
    draw = torch.Generator().manual_seed(seed)
    updates = {}
    for module, layer in base.model.named_modules():
        if module.endswith(("q_proj", "v_proj", "o_proj")):
            out, into = layer.weight.shape
            shapes = (torch.randn(out, 4, generator=draw), torch.randn(4, into, generator=draw))
            updates[module] = LowRank(0.3 * shapes[0], shapes[1] / into**0.5, 1.0)
    return Adapter(name, updates, fingerprint=base.fingerprint)


def prompts(kind, count=32, seed=0):
    draw = random.Random(seed)
    return [PROMPTS[kind].format(draw.randint(10, 99), draw.randint(10, 99)) for _ in range(count)]


@pytest.fixture(scope="module")
def router(base):
    return make_router(base, {"a": prompts("sums"), "b": prompts("words")})


def plan_of(route="name", **kwargs):
    group = {"name": "both", "adapters": ("a", "b"), "action": "logits"} | kwargs
    refs = tuple(AdapterRef(name=name) for name in "ab")
    return Plan(adapters=refs, groups=(Group(**group),), route=Route(by=route))


def logits_of(base, adapter):
    with torch.no_grad(), attached(base.model, adapter.modules if adapter else {}):
        return base.model(input_ids=IDS).logits


def test_a_deployed_composition_is_the_formula(base, adapters, tmp_path):
    plan = plan_of(method="mixture", weights={"a": 0.75, "b": 0.25})
    done = apply_plan(plan, adapters, tmp_path / "d")
    assert sorted(p.name for p in done.path.iterdir()) == ["README.md", "a", "b", "routing.json"]
    assert done.resident_parameters == sum(a.parameters for a in adapters.values())
    alone = torch.stack([logits_of(base, adapters[name]) for name in "ab"])
    expected = compose(logits_of(base, None), alone, torch.tensor([0.75, 0.25]), "mixture")
    executor = Executor(base.model, base.tokenizer, done)
    for name in ("a", "b", "both"):
        assert torch.allclose(executor.logits(name, IDS), expected, atol=1e-5)
    assert (
        "composes the logits of a, b (mixture, weights 0.75, 0.25)"
        in (done.path / "README.md").read_text()
    )


def test_one_adapter_of_weight_one_is_the_adapter(base, adapters, tmp_path):
    plan = Plan(
        adapters=(AdapterRef(name="a"),),
        groups=(Group(name="g", adapters=("a",), action="logits", method="sum"),),
    )
    done = apply_plan(plan, adapters, tmp_path / "d")
    found = Executor(base.model, base.tokenizer, done).logits("a", IDS)
    assert torch.allclose(found, logits_of(base, adapters["a"]), atol=1e-4)


def test_retention_under_composed_logits(base, adapters, tmp_path):
    items = [Example(prompt, " 7\n") for prompt in prompts("sums", 9)]
    batch = batch_of(base, items)
    done = apply_plan(plan_of(method="mixture"), adapters, tmp_path / "d")
    found = score_deployed(base, done, "a", batch).loss
    # a mixture of two loses at most log 2 a token on either
    alone = [score(base, adapters[name], batch).loss for name in "ab"]
    assert bool((found <= torch.minimum(*alone) + 0.6932).all())
    kept = deployed_retention(base, done, adapters, {"a": items, "b": items})
    losses = [score(base, what, batch).loss.mean() for what in (None, adapters["a"])]
    expected = float((losses[0] - found.mean()) / (losses[0] - losses[1]))
    assert kept["a"].gain is None or kept["a"].gain == pytest.approx(expected, abs=1e-6)


def test_gates_see_prompts_only(base, adapters, router, tmp_path):
    plan = plan_of(method="mixture", options={"gated": 1})
    done = apply_plan(plan, adapters, tmp_path / "d", router=router)
    assert (done.path / "router.safetensors").is_file()
    for kind, name in (("sums", "a"), ("words", "b")):
        batch = batch_of(
            base, [Example(p, " nothing like it 1+1=\n") for p in prompts(kind, 40, seed=1)]
        )
        # the router is sure of such prompts, whatever the completion looks like
        found, alone = score_deployed(base, done, "a", batch), score(base, adapters[name], batch)
        assert torch.allclose(found.loss, alone.loss, atol=1e-3)
    text = prompts("words", 3, seed=2)
    executor = Executor(base.model, base.tokenizer, done)
    ours = executor.generate("both", text, max_new_tokens=5, do_sample=False)
    routed = apply_plan(plan_of(action="route"), adapters, tmp_path / "r")
    expert = Executor(base.model, base.tokenizer, routed)
    assert ours == expert.generate("b", text, max_new_tokens=5, do_sample=False)


def test_prompts_are_routed(base, adapters, router, tmp_path):
    done = apply_plan(plan_of("prompt", action="route"), adapters, tmp_path / "d", router=router)
    executor = Executor(base.model, base.tokenizer, done)
    mixed = [*prompts("sums", 2, 3), *prompts("words", 2, 3), *prompts("sums", 1, 4)]
    choices = [choice.name for choice in executor.route(mixed)]
    assert choices == ["a", "a", "b", "b", "a"]
    greedy = {"max_new_tokens": 4, "do_sample": False}
    found = executor.generate("auto", mixed, **greedy)
    for prompt, name, text in zip(mixed, choices, found, strict=True):
        assert executor.generate(name, [prompt], **greedy) == [text]
    unknown = ["ZZZZQQQQXXXXKKKK"]
    assert executor.route(unknown)[0].name is None
    assert executor.generate("auto", unknown, **greedy) == executor.generate(
        None, unknown, **greedy
    )


def test_what_a_router_is_needed_for(base, adapters, router, tmp_path):
    plan = plan_of("prompt", action="route")
    with pytest.raises(PlanError, match="no router was given"):
        apply_plan(plan, adapters, tmp_path / "d")
    other = make_router(base, {"a": prompts("sums"), "c": prompts("words")})
    with pytest.raises(PlanError, match=r"the router does not know \['b'\]"):
        apply_plan(plan, adapters, tmp_path / "d", router=other)
    done = apply_plan(plan_of(action="route"), adapters, tmp_path / "n", router=router)
    assert done.router is None  # the plan routes by name
    executor = Executor(base.model, base.tokenizer, done)
    with pytest.raises(DeploymentError, match="has no router"):
        executor.generate("auto", ["1+1="])
    with pytest.raises(DeploymentError, match="no adapter 'x'; known are a, b"):
        executor.generate("x", ["1+1="])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapters": ["a", "z"]}, "'both' composes ['z'], which it does not serve"),
        ({"weights": [1.0]}, "1 weights for 2 adapters"),
        ({"mode": "slurp"}, "unknown mode 'slurp'"),
        ({"weights": [2.0, 1.0]}, "needs weights of at least 0 that sum to 1"),
        ({"gated": True}, "expected a router"),
    ],
)
def test_damaged_compositions(adapters, tmp_path, change, words):
    done = apply_plan(plan_of(method="mixture"), adapters, tmp_path / "d")
    file = done.path / "routing.json"
    routing = json.loads(file.read_text())
    routing["compositions"]["both"] |= change
    file.write_text(json.dumps(routing))
    with pytest.raises(DeploymentError) as caught:
        read_deployment(done.path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
