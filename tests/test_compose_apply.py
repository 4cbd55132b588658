"""Pruning, carrying out plans, the folders they make, and running them."""

import json

import pytest
import torch
from compose_samples import peft_folder, peft_model, tiny_llama, tokens
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel

from mergeprobe.adapters.attach import attached
from mergeprobe.adapters.checkpoint import WEIGHTS, Adapter, read_adapter
from mergeprobe.artefact import sha256
from mergeprobe.capture.probe import Moment, Probe
from mergeprobe.compose import Executor, apply_plan, deployed, merge, prune, read_deployment
from mergeprobe.errors import (
    AdapterError,
    AdapterMismatch,
    DataError,
    DeploymentError,
    MergeProbeError,
    OutputExists,
    PlanError,
)
from mergeprobe.lowrank import LowRank
from mergeprobe.plan import AdapterRef, Group, Plan, Pruned, Route


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Four stock PEFT adapters of unequal ranks and scalings."""
    root = tmp_path_factory.mktemp("peft")
    kinds = [{}, {"r": 2, "alpha": 8}, {"use_rslora": True}, {"targets": ("q_proj", "v_proj")}]
    return {n: peft_folder(root / n, k, **kinds[k])[1] for k, n in enumerate("abcd")}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def plan_of(*groups, names="abcd", **kwargs):
    return Plan(adapters=tuple(AdapterRef(name=n) for n in names), groups=groups, **kwargs)


FULL = plan_of(
    Group(name="pair", adapters=("a", "b"), action="merge", method="mean", rank=4),
    Group(name="alone", adapters=("c", "d"), action="route"),
)


# ---- attached


@torch.no_grad()
def test_attached_gives_the_logits_of_stock_peft(model):
    stock = peft_model(5, r=4, alpha=16)
    updates = {
        m: LowRank(
            layer.lora_B["default"].weight, layer.lora_A["default"].weight, layer.scaling["default"]
        )
        for m in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
        for layer in [stock.base_model.model.get_submodule(m)]
    }
    for name, layer in stock.base_model.model.named_modules():
        if hasattr(layer, "lora_B") and name not in updates:
            layer.lora_B["default"].weight.zero_()
    before = model(tokens()).logits
    with attached(model, updates):
        ours = model(tokens()).logits
    assert (ours - stock(tokens()).logits).abs().max() < 1e-5
    assert (ours - before).abs().max() > 1e-2
    assert torch.equal(model(tokens()).logits, before)


@torch.no_grad()
def test_nested_attachments_add_up_and_go_on_an_exception(model, adapters):
    one, two = adapters["a"].modules, adapters["c"].modules
    both = merge([adapters["a"], adapters["c"]], "sum").adapter.modules
    before = model(tokens()).logits
    with attached(model, both):
        expected = model(tokens()).logits
    with attached(model, one), attached(model, two):
        assert (model(tokens()).logits - expected).abs().max() < 1e-4
    with pytest.raises(IndexError), attached(model, one), attached(model, two):
        model(tokens() + 1000)
    assert torch.equal(model(tokens()).logits, before)


def test_gradients_reach_the_factors():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2))
    B, A = torch.randn(2, 1, requires_grad=True), torch.randn(1, 3, requires_grad=True)
    x = torch.randn(5, 3)
    with attached(layer, {"0": LowRank(B, A, 2.0)}):
        layer(x).sum().backward()
    # d/dB of Σ (x · 2BA)ᵀ is 2 Σ_t A x_t in each row; d/dA is 2 (Σ B) Σ_t x_t
    assert torch.allclose(B.grad, (2 * (A @ x.sum(0))).expand(2, 1).detach(), atol=1e-5)
    assert torch.allclose(A.grad, (2 * B.sum() * x.sum(0))[None].detach(), atol=1e-5)


@torch.no_grad()
def test_conv1d_modules_take_updates_too():
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50)).eval()
    update = LowRank(torch.randn(48, 2), torch.randn(2, 16), 0.5)
    with attached(gpt, {"transformer.h.0.attn.c_attn": update}):
        hooked = gpt(tokens() % 50).logits
    gpt.transformer.h[0].attn.c_attn.weight += update.dense().T
    assert torch.allclose(hooked, gpt(tokens() % 50).logits, atol=1e-5)


@torch.no_grad()
def test_a_half_precision_model_keeps_its_dtype(adapters):
    half = tiny_llama().to(torch.bfloat16)
    with attached(half, adapters["a"].modules):
        assert half(tokens()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("module", "shape", "line"),
    [
        ("layers.0.self_attn.q_proj", (64, 64), "it has 'model.layers.0.self_attn.q_proj'"),
        ("model.layers.0.self_attn.v_proj", (64, 64), "is (32, 64) in the model but (64, 64)"),
        ("model.embed_tokens", (128, 64), "is a Embedding; updates go on Linear"),
    ],
)
def test_updates_that_do_not_fit_are_refused_and_leave_no_hook(model, module, shape, line):
    good = LowRank(torch.ones(64, 1), torch.ones(1, 64))
    updates = {
        "model.layers.0.self_attn.q_proj": good,
        module: LowRank(torch.ones(shape[0], 1), torch.ones(1, shape[1])),
    }
    with pytest.raises(AdapterMismatch) as caught, attached(model, updates):
        pass
    assert line in str(caught.value)
    assert not any(m._forward_hooks for m in model.modules())


# ---- prune


def diagonal(values, name="a"):
    B = torch.diag(torch.tensor(values))
    one = LowRank(B, torch.eye(len(values)))
    return Adapter(name, {"q": one, "v": one}, config={"target_modules": ["q", "v"]})


def test_prune_drops_components_by_size_and_modules_whole():
    # unordered on the diagonal: component 0 is the 5, 1 the 3, 2 the 1
    pruned = prune(diagonal([3.0, 5.0, 1.0]), Pruned(modules=("v",), components={"q": (0, 2)}))
    assert list(pruned.modules) == ["q"]
    assert pruned.modules["q"].r == 1
    expected = torch.diag(torch.tensor([3.0, 0, 0]))
    assert torch.allclose(pruned.modules["q"].dense(), expected, atol=1e-6)
    assert "target_modules" not in pruned.config


def test_prune_drops_a_module_that_loses_every_component_and_keeps_the_others_untouched():
    adapter = diagonal([2.0, 1.0])
    pruned = prune(adapter, Pruned(components={"q": (0, 1)}))
    assert pruned.modules == {"v": adapter.modules["v"]}


@pytest.mark.parametrize(
    ("pruned", "line"),
    [
        (Pruned(modules=("k",)), "prunes 'k' from 'a', which does not adapt it"),
        (Pruned(components={"k": (0,)}), "prunes 'k' from 'a'"),
        (Pruned(components={"q": (2,)}), "component 2 of 'q' of 'a', which has 2: 0 to 1"),
        (Pruned(components={"q": (-1,)}), "component -1"),
        (Pruned(modules=("q", "v")), "prunes everything of 'a'"),
        (Pruned(modules=("q",), components={"q": (0,)}), "both whole and by component"),
    ],
)
def test_prune_refuses_what_the_adapter_does_not_have(pruned, line):
    with pytest.raises(PlanError, match=line):
        prune(diagonal([2.0, 1.0]), pruned)


# ---- apply_plan, on disk


@torch.no_grad()
def test_every_folder_loads_in_stock_peft_and_answers_as_the_executor(tmp_path, adapters):
    plan = plan_of(
        Group(name="pair", adapters=("a", "b"), action="merge", method="ties", rank=8),
        Group(name="kept", adapters=("c",), action="route", rank=2),
        Group(
            name="less", adapters=("d",), action="prune", method="sum",
            pruned={"d": Pruned(modules=("model.layers.0.self_attn.q_proj",))},
        ),
    )  # fmt: skip
    deployment = apply_plan(plan, adapters, tmp_path / "out")
    executor = Executor(tiny_llama(), None, deployment)
    folders = {"a": "pair", "b": "pair", "c": "c", "d": "less"}
    assert {name: e.folder for name, e in deployment.entries.items()} == folders
    for name, folder in folders.items():
        stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out" / folder).eval()
        ours = executor.logits(name, tokens())
        assert (ours - stock(tokens()).logits).abs().max() < 1e-4, name


def test_the_folder_says_what_serves_what_and_at_what_cost(tmp_path, adapters):
    deployment = apply_plan(FULL, adapters, tmp_path / "out")
    routing = json.loads((tmp_path / "out" / "routing.json").read_text())
    assert routing["route"] == {"by": "name"}
    assert routing["entries"]["b"] == {
        "group": "pair", "folder": "pair", "action": "merge", "method": "mean",
        "error": deployment.entries["a"].error, "worst_error": deployment.entries["a"].worst_error,
    }  # fmt: skip
    assert 0 < deployment.entries["a"].error <= deployment.entries["a"].worst_error < 1
    assert deployment.entries["c"].error == 0.0
    assert deployment.serving["a"] is deployment.serving["b"]
    # (out + in) of q, v, up, down: 128 + 96 + 160 + 160, two layers, rank 4; d: q and v only
    assert deployment.resident_parameters == 2 * 544 * 4 + 2 * 544 * 4 + 2 * 224 * 4
    written = sum(
        value.numel()
        for folder in ("pair", "c", "d")
        for update in read_adapter(tmp_path / "out" / folder).modules.values()
        for value in (update.B, update.A)
    )
    assert written == deployment.resident_parameters == routing["resident_parameters"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| b | `pair` | merge | mean |" in card
    assert f"{written:,}" in card


def test_in_memory_and_on_disk_are_the_same_deployment(tmp_path, adapters):
    memory, disk = deployed(FULL, adapters), apply_plan(FULL, adapters, tmp_path / "out")
    assert memory.path is None
    assert disk.path == tmp_path / "out"
    assert memory.entries == disk.entries
    assert memory.resident_parameters == disk.resident_parameters
    for name, adapter in memory.serving.items():
        for module, update in adapter.modules.items():
            again = disk.serving[name].modules[module].dense()
            assert torch.allclose(update.dense(), again, atol=1e-6)


def test_reweight_uses_the_weights_by_name(adapters):
    group = Group(
        name="g", adapters=("b", "a"), action="reweight", method="linear",
        weights={"a": 0.25, "b": 2.0},
    )  # fmt: skip
    served = deployed(plan_of(group, names="ab"), adapters).serving["a"]
    for module, update in served.modules.items():
        a, b = (adapters[n].modules[module].dense() for n in "ab")
        assert torch.allclose(update.dense(), 0.25 * a + 2 * b, atol=1e-5)


def test_reweight_by_parts_of_the_model(adapters):
    # two layers of a model of two: thirds by layer · 3 // 2, so early and middle
    group = Group(
        name="g", adapters=("b", "a"), action="reweight", method="linear",
        weights={"a": 0.5, "b": 1.0},
        part_weights={"middle": {"a": 3.0, "b": 0.0}, "attention": {"b": -1.0, "a": 1.0}},
    )  # fmt: skip
    served = deployed(plan_of(group, names="ab"), adapters).serving["a"]
    for module, update in served.modules.items():
        a, b = (adapters[n].modules[module].dense() for n in "ab")
        middle, attention = "layers.1." in module, "self_attn" in module
        of_a, of_b = 0.5 * (3.0 if middle else 1.0), 0.0 if middle else 1.0
        expected = of_a * a + of_b * (-1.0 if attention else 1.0) * b
        assert torch.allclose(update.dense(), expected, atol=1e-5), module
    assert served.card["weights"] == {
        "all": [1.0, 0.5], "middle": [0.0, 3.0], "attention": [-1.0, 1.0],
    }  # fmt: skip


def test_prune_drops_the_components_and_modules_that_the_plan_names(adapters):
    first, second = list(adapters["a"].modules)[:2]
    group = Group(
        name="g", adapters=("a", "b"), action="prune", method="linear",
        weights={"a": 0.5, "b": 2.0},
        pruned={"a": Pruned(modules=(first,), components={second: (0, 2)})},
    )  # fmt: skip
    served = deployed(plan_of(group, names="ab"), adapters).serving["b"]
    for module, update in served.modules.items():
        a, b = (adapters[n].modules[module].dense().double() for n in "ab")
        u, s, vh = torch.linalg.svd(a)
        if module == second:
            a = a - s[0] * torch.outer(u[:, 0], vh[0]) - s[2] * torch.outer(u[:, 2], vh[2])
        expected = (0 if module == first else 0.5) * a + 2 * b
        assert torch.allclose(update.dense().double(), expected, atol=1e-5), module
    assert served.card["pruned"]["a"] == {"modules": [first], "components": {second: [0, 2]}}


def planted(name, place, value):
    """Ones, and one entry that stands out."""
    dense = torch.ones(4, 5)
    dense[place] = value
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    return Adapter(name, {"q": LowRank(u * s, vh)})


@pytest.mark.parametrize(("core", "kept"), [(0.05, 1), (0.1, 2)])
def test_isolate_keeps_the_share_of_entries_that_the_plan_names(core, kept):
    # of 20 entries 5 % is one: 9 in a, -7 in b, verbatim whatever the other has there
    one, other = planted("a", (0, 1), 9.0), planted("b", (2, 3), -7.0)
    extra = torch.zeros(4, 5)
    extra[3, 0], extra[1, 1] = 4.0, 3.0
    for adapter, place in ((one, (3, 0)), (other, (1, 1))):  # each adapter's second largest
        dense = adapter.modules["q"].dense()
        dense[place] = extra[place]
        u, s, vh = torch.linalg.svd(dense, full_matrices=False)
        adapter.modules["q"] = LowRank(u * s, vh)
    group = Group(
        name="g", adapters=("a", "b"), action="isolate", method="core_isolation",
        options={"core": core, "threshold": 0.1},
    )  # fmt: skip
    deployment = deployed(plan_of(group, names="ab"), {"a": one, "b": other})
    found = deployment.serving["a"].modules["q"].dense()
    assert found[0, 1] == pytest.approx(9.0, abs=1e-4)
    assert found[2, 3] == pytest.approx(-7.0, abs=1e-4)
    assert (abs(found[3, 0] - 4.0) < 1e-4) == (kept == 2)
    assert (abs(found[1, 1] - 3.0) < 1e-4) == (kept == 2)
    assert deployment.entries["a"].action == "isolate"
    assert deployment.serving["a"].card["options"]["core"] == core


def test_isolate_is_the_rule_with_the_plans_options_and_rank(tmp_path, adapters):
    group = Group(
        name="g", adapters=("a", "b"), action="isolate", method="core_isolation_lowrank",
        options={"components": 2}, weights={"b": 2.0, "a": 1.0}, rank=5,
    )  # fmt: skip
    served = apply_plan(plan_of(group, names="ab"), adapters, tmp_path / "d").serving["b"]
    pair = [adapters["a"], adapters["b"]]
    rule = merge(pair, "core_isolation_lowrank", weights=[1.0, 2.0], rank=5, components=2)
    default = merge(pair, "core_isolation_lowrank", rank=5)
    for module, update in served.modules.items():
        assert update.r == 5
        assert torch.allclose(update.dense(), rule.adapter.modules[module].dense(), atol=1e-6)
    assert any(
        not torch.allclose(update.dense(), default.adapter.modules[module].dense(), atol=1e-3)
        for module, update in served.modules.items()
    )


def test_a_rule_that_needs_data_takes_the_probes_by_name(adapters):
    def probe(name, seed):
        draw = torch.Generator().manual_seed(seed)
        inputs = {
            module: Moment(torch.randn(update.shape[1], 4, generator=draw), 0.1)
            for module, update in adapters[name].modules.items()
        }
        return Probe(f"run-{seed}", adapters[name].modules, inputs=inputs)

    group = Group(name="g", adapters=("b", "a"), action="merge", method="regmean")
    plan, probes = plan_of(group, names="ab"), {"a": probe("a", 1), "b": probe("b", 2)}
    served = deployed(plan, adapters, probes=probes).serving["a"]
    rule = merge([adapters["b"], adapters["a"]], "regmean", probes=[probes["b"], probes["a"]])
    for module, update in served.modules.items():
        assert torch.allclose(update.dense(), rule.adapter.modules[module].dense(), atol=1e-6)
    for given in (None, {"b": probes["b"]}):
        with pytest.raises(PlanError, match=r"needs the inputs of each adapter's probe; '[ab]'"):
            deployed(plan, adapters, probes=given)


def test_the_space_and_the_seed_are_the_plans(adapters):
    def served(**kwargs):
        group = {"name": "g", "adapters": ("a", "b"), "action": "merge", "method": "dare_linear"}
        return deployed(plan_of(Group(**group, **kwargs), names="ab"), adapters).serving["a"]

    one, again, other = served(seed=1), served(seed=1), served(seed=2)
    knots = served(seed=1, space="knots")
    module = next(iter(one.modules))
    first = one.modules[module].dense()
    assert torch.equal(first, again.modules[module].dense())
    assert not torch.allclose(first, other.modules[module].dense(), atol=1e-2)
    assert not torch.allclose(first, knots.modules[module].dense(), atol=1e-2)
    assert knots.card["space"] == "knots"
    assert other.card["seed"] == 2


def test_routing_keeps_the_adapters_as_they_are(adapters):
    plan = plan_of(Group(name="all", adapters=tuple("abcd"), action="route"))
    deployment = deployed(plan, adapters)
    for name, adapter in deployment.serving.items():
        for module, update in adapters[name].modules.items():
            assert torch.allclose(adapter.modules[module].dense(), update.dense(), atol=1e-6)
    assert deployment.resident_parameters == sum(a.parameters for a in adapters.values())


def test_an_existing_folder_is_kept_unless_forced(tmp_path, adapters):
    apply_plan(FULL, adapters, tmp_path / "out")
    with pytest.raises(OutputExists):
        apply_plan(FULL, adapters, tmp_path / "out")
    apply_plan(FULL, adapters, tmp_path / "out", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_plan_leaves_nothing(tmp_path, adapters):
    zero = {m: LowRank(0 * u.B, u.A) for m, u in adapters["a"].modules.items()}
    untrained = {**adapters, "c": Adapter("c", zero)}
    with pytest.raises(AdapterError):
        apply_plan(FULL, untrained, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_tied_to_the_weights_it_was_made_for(adapters):
    right = sha256(adapters["a"].path / WEIGHTS)
    group = Group(name="g", adapters=("a",), action="route")
    for digest, given, line in [
        ("0" * 64, adapters, "the plan is for other weights of 'a'"),
        (right, {"a": Adapter("a", adapters["a"].modules)}, "has no adapter_model.safetensors"),
    ]:
        tied = Plan(adapters=(AdapterRef(name="a", weights_sha256=digest),), groups=(group,))
        with pytest.raises(PlanError, match=line):
            deployed(tied, given)
    tied = Plan(adapters=(AdapterRef(name="a", weights_sha256=right),), groups=(group,))
    assert list(deployed(tied, adapters).serving) == ["a"]


def pair(**kwargs):
    group = {"name": "g", "adapters": ("a", "b"), "action": "merge", "method": "mean"} | kwargs
    return plan_of(Group(**group), names=group["adapters"])


@pytest.mark.parametrize(
    ("plan", "line"),
    [
        (pair(action="isolate"), "isolates, but 'mean' keeps no cores; use one of core_isolation"),
        (pair(action="logits"), "group 'g': unknown mode 'mean'; known are sum, geometric, mix"),
        (pair(action="logits", method="sum", space="core"), "no parts of the model and no space"),
        (pair(action="logits", method="sum", options={"alpha": 1}), "take no option ['alpha']"),
        (
            pair(action="logits", method="mixture", weights={"a": 0.9, "b": 0.3}),
            "group 'g': mode 'mixture' needs weights of at least 0 that sum to 1",
        ),
        (
            pair(action="logits", method="mixture", options={"gated": 1}),
            "gates logits, but no router was given",
        ),
        (pair(action="logits", method="sum", name="a"), "'a', which is taken already"),
        (pair(action="prune"), "group 'g' prunes nothing"),
        (pair(space="time"), "group 'g': unknown space 'time'"),
        (
            pair(method="linear", part_weights={"deep": {"a": 1, "b": 1}}),
            "group 'g': no part 'deep' to weight",
        ),
        (pair(adapters=("a", "x")), "['x'] are missing"),
        (pair(method="slurp"), "group 'g': unknown merge method 'slurp'"),
        (pair(options={"rank": 3}), "group 'g': 'mean' has no option 'rank'"),
        (pair(method="ties", options={"density": 7}), "group 'g': density is 7"),
        (pair(pruned={"a": Pruned(modules=("q",))}), "use action 'prune'"),
        (pair(action="route"), "routes, so nothing is merged"),
        (pair(name="README.md"), "'README.md', which is taken already"),
        (
            plan_of(
                Group(name="B", adapters=("a",), action="merge", method="mean"),
                Group(name="g", adapters=("b",), action="route"),
                names="ab",
            ),
            "group 'g' would be written to 'b', which is taken already",
        ),
        (
            plan_of(*FULL.groups, route=Route(by="prompt")),
            "the plan routes by prompt or gates logits, but no router was given",
        ),
    ],
)
def test_plans_that_cannot_be_carried_out(adapters, plan, line):
    with pytest.raises(PlanError) as caught:
        deployed(plan, adapters)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plan_for_another_base_is_refused(adapters):
    known = {"a": Adapter("a", adapters["a"].modules, fingerprint="f00")}
    group = Group(name="g", adapters=("a",), action="route")
    with pytest.raises(PlanError, match=r"for base bad but 'a' was trained on f00"):
        deployed(plan_of(group, names="a", base_fingerprint="bad"), known)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda r: r.update(schema=9), "upgrade mergeprobe"),
        (lambda r: r.pop("entries"), "is malformed: 'entries'"),
        (lambda r: r.update(entries={}), "serves no adapter"),
        (lambda r: r["entries"]["a"].update(folder="../a"), "cannot name a group"),
        (lambda r: r["entries"]["a"].update(action="fly"), "'fly' is not a valid Action"),
        (lambda r: r["entries"]["a"].update(folder="gone"), "is not a folder"),
    ],
)
def test_a_damaged_deployment_is_refused(tmp_path, adapters, change, line):
    apply_plan(FULL, adapters, tmp_path / "out")
    file = tmp_path / "out" / "routing.json"
    routing = json.loads(file.read_text())
    change(routing)
    file.write_text(json.dumps(routing))
    with pytest.raises(MergeProbeError) as caught:
        read_deployment(tmp_path / "out")
    assert line in str(caught.value)


# ---- Executor


class Letters:
    """The least of a tokenizer: one token for each character."""

    pad_token_id, eos_token_id = None, 2

    def __call__(self, text):
        return {"input_ids": [ord(c) % 128 for c in text]}

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(chr(i) for i in row if i > 2) for row in rows.tolist()]


@torch.no_grad()
def test_score_is_the_mean_completion_loss_of_each_item(model, adapters):
    executor = Executor(model, Letters(), deployed(FULL, adapters))
    ids = tokens()
    counts = torch.zeros_like(ids)
    counts[0, 4:7], counts[1, :3], counts[2, 8] = 1, 1, 1
    loss = executor.score("a", ids, counts)
    log = executor.logits("a", ids).log_softmax(-1)
    by_hand = [
        -sum(log[item, t - 1, ids[item, t]] for t in places).item() / len(places)
        for item, places in enumerate([(4, 5, 6), (1, 2), (8,)])  # token 0 has no prediction
    ]
    assert loss.tolist() == pytest.approx(by_hand, rel=1e-5)


@torch.no_grad()
def test_generate_answers_as_each_adapter_whatever_the_batch(model, adapters):
    executor = Executor(model, Letters(), deployed(FULL, adapters))
    settings = {"max_new_tokens": 6, "do_sample": False}
    prompts = ["short", "a longer prompt"]
    together = executor.generate("a", prompts, **settings)
    assert together == [executor.generate("a", [p], **settings)[0] for p in prompts]
    assert together == executor.generate("b", prompts, **settings)  # the same merged adapter
    assert together != executor.generate("c", prompts, **settings)
    with executor.serving("a"):
        row = torch.tensor([[ord(c) for c in "short"]])
        for _ in range(6):
            row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
    assert together[0] == Letters().batch_decode(row[:, 5:], True)[0]
    assert executor.generate("a", []) == []


def test_the_executor_refuses_strangers(model, adapters):
    executor = Executor(model, Letters(), deployed(FULL, adapters))
    with pytest.raises(DeploymentError, match="no adapter 'z'; known are a, b, c, d"):
        executor.logits("z", tokens())
    with pytest.raises(DataError, match="item 0 has no completion token"):
        executor.score("a", tokens(), torch.zeros_like(tokens()))
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        executor.generate("a", ["x", ""])
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50))
    with pytest.raises(AdapterMismatch, match="'pair': the model has no module"):
        Executor(other, Letters(), deployed(FULL, adapters))
