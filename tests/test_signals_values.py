"""Values worked by hand, one family at a time, and the trap of independent inits."""

import math
from dataclasses import replace

import pytest
import torch

from mergeprobe.adapters.regions import kind_of, layer_of
from mergeprobe.capture.probe import Calibration, Drift, Moment, Probe, provenance
from mergeprobe.capture.sketch import projection, sketch_update
from mergeprobe.lowrank import LowRank
from mergeprobe.signals import adapter_rows, linear, pair_rows, quadratic, set_rows
from mergeprobe.signals.curvature import n_max
from mergeprobe.signals.representation import aligned, entropy, kl

M = "model.layers.0.mlp.up_proj"


def probe(name, matrix, **parts):
    matrix = torch.tensor(matrix, dtype=torch.float32)
    return Probe(name, {M: LowRank(matrix, torch.eye(matrix.shape[1]))}, **parts)


def pair(a, b):
    return pair_rows([a, b]).row(0, named=True)


def test_update_by_hand():
    row = pair(probe("a", [[1.0, -2.0], [3.0, 0.0]]), probe("b", [[2.0, 2.0], [-1.0, 5.0]]))
    # entry by entry: 2, -4, -3, 0
    assert row["sign_conflict"] == pytest.approx(7 / 9)
    assert row["frobenius_cosine"] == pytest.approx(-5 / math.sqrt(14 * 34))
    assert row["amplification"] == pytest.approx(1 - 10 / 48)
    assert row["norm_ratio"] == pytest.approx(math.sqrt(14 / 34))
    row = pair(probe("a", [[2.0, 0.0], [0.0, 0.0]]), probe("b", [[1.0, 0.0], [0.0, 1.0]]))
    assert row["spectral_amplification"] == pytest.approx(3 / 2)
    alone = adapter_rows([probe("a", [[2.0, 0.0], [0.0, 1.0]], weight_norms={M: 10.0})])
    assert alone["stable_rank"][0] == pytest.approx(5 / 4)
    assert alone["relative_norm"][0] == pytest.approx(math.sqrt(5) / 10)


def test_subspace_by_hand():
    # one output direction, two input directions
    row = pair(probe("a", [[1.0, 0.0], [0.0, 0.0]]), probe("b", [[0.0, 3.0], [0.0, 0.0]]))
    assert row["output_overlap"] == pytest.approx(1.0)
    assert row["input_overlap"] == pytest.approx(0.0)
    assert row["principal_cosine"] == pytest.approx(1.0)
    assert row["union_rank"] == pytest.approx(0.5)
    # outputs at 60 degrees: overlap cos², principal cosine cos
    turned = [[0.5, 0.0], [math.sqrt(3) / 2, 0.0]]
    row = pair(probe("a", [[1.0, 0.0], [0.0, 0.0]]), probe("b", turned))
    assert row["output_overlap"] == pytest.approx(0.25, abs=1e-6)
    assert row["principal_cosine"] == pytest.approx(0.5, abs=1e-6)
    # energies of the union (1 ± cos)/2 = 3/4, 1/4; each alone has effective rank 1
    union = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert row["union_rank"] == pytest.approx(union / 2, abs=1e-6)
    both = adapter_rows([probe("a", [[5.0, 0.0], [0.0, 5.0]])])
    assert both["effective_rank"][0] == pytest.approx(2.0)


def test_gradient_by_hand():
    a = probe("a", [[1.0, 0.0], [0.0, 2.0]])
    sketched = sketch_update(M, a.updates[M], 2)
    a = replace(a, gradient={M: torch.tensor([[1.0, 0.0], [0.0, 0.0]])})
    loss = torch.tensor([4.0, 2.0])
    ids = torch.ones(2, 1, dtype=torch.long)
    b = probe(
        "b",
        [[1.0, 1.0], [0.0, 2.0]],
        gradient={M: torch.tensor([[1.0, 1.0], [0.0, 0.0]])},
        gradient_base={M: -0.5 * sketched},
        calibration=Calibration(ids, ids, ids, loss, loss),
    )
    row = pair(a, b)
    assert row["gradient_cosine"] == pytest.approx(1 / math.sqrt(2))
    assert row["gradient_cosine_base"] is None
    # the gradient of b is −½ ΔW_a, its mean loss 3
    square = float(sketched.square().sum())
    assert row["first_order_transfer"] == pytest.approx(0.5 * square / 3)
    table = linear([a, b])
    assert table["at_base"].to_list()[:2] == [None, None]
    assert table["at_base"][2] == pytest.approx(-0.5 * square)


def test_curvature_by_hand():
    a = probe("a", [[1.0, 0.0], [0.0, 0.0]])
    b = probe(
        "b",
        [[0.0, 0.0], [0.0, 2.0]],
        outputs={M: Moment(torch.tensor([[2.0], [0.0]]), 0.5)},  # D = diag(4.5, 0.5)
        inputs={M: Moment(torch.tensor([[1.0], [0.0]]), 1.0)},  # S = diag(2, 1)
    )
    row = pair(a, b)
    assert row["interference"] == pytest.approx(4.5 * 1 * 2)
    assert row["interference_ratio"] == pytest.approx(9 / (0.5 * 4 * 1))
    assert row["data_weighted"] == pytest.approx(2 / 4)
    assert row["fisher_cosine"] == pytest.approx(0.0)
    own = adapter_rows([b])
    assert own["selectivity"][0] == pytest.approx((4 / 4) / (3 / 2))
    assert own["capacity"][0] == pytest.approx(1 + 0.5 * 2 / 3)
    assert float(n_max(torch.tensor(3.0), 2.0)) == 7.0
    triples = {(r["i"], r["a"], r["b"]): r["value"] for r in quadratic([a, b]).to_dicts()}
    assert triples["b", "a", "a"] == pytest.approx(9.0)
    assert triples["b", "b", "b"] == pytest.approx(2.0)
    assert triples["a", "a", "a"] is None
    # two others that cancel do no harm together, whatever each does alone
    row = set_rows([a, b, probe("c", [[-1.0, 0.0], [0.0, 0.0]])], [["a", "b", "c"]])
    assert row["joint_interference"][1] == pytest.approx(0.0)
    assert row["interference_sum"][1] == pytest.approx(18.0)
    assert row["capacity_load"][1] == pytest.approx(1.0)
    assert row["set_amplification"][1] == pytest.approx(4 / 6)


def listed(probabilities, ids, tail):
    values = torch.tensor([probabilities], dtype=torch.float64)
    return values, torch.tensor([ids]), torch.tensor([tail], dtype=torch.float64)


def test_comparing_two_lists_by_hand():
    a, b = listed([0.5, 0.3], [0, 1], 0.2), listed([0.6, 0.2], [0, 2], 0.2)
    p, q = aligned(a, b)
    # a's tail is shared by token 2 and the rest, b's by token 1 and the rest
    assert p[0].tolist() == pytest.approx([0.5, 0.3, 0.0, 0.1, 0.1])
    assert q[0].tolist() == pytest.approx([0.6, 0.1, 0.0, 0.2, 0.1])
    want = 0.5 * math.log(0.5 / 0.6) + 0.3 * math.log(3) + 0.1 * math.log(0.5)
    assert float(kl(p, q)) == pytest.approx(want)
    # a token that is not listed is no likelier than the least listed one
    p, _ = aligned(listed([0.15, 0.05], [0, 1], 0.8), b)
    assert p[0].tolist() == pytest.approx([0.15, 0.05, 0.0, 0.05, 0.75])
    assert float(entropy(listed([0.5, 0.25], [0, 1], 0.25))) == pytest.approx(1.5 * math.log(2))


def test_comparing_lists_never_overstates():
    """Against full distributions: the lists' KL stays below the truth, and near it."""
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 50, 300, generator=draw, dtype=torch.float64)
    logits[1] = logits[0] + logits[1] / 6
    full = logits.softmax(-1)
    lists = []
    for side in full:
        top = side.topk(64)
        ids, order = top.indices.sort(-1)
        lists.append((top.values.gather(-1, order), ids, 1 - top.values.sum(-1)))
    true = (full[0] * (full[0] / full[1]).log()).sum(-1)
    found = kl(*aligned(*lists))
    assert bool((found <= true + 1e-9).all())
    assert float(found.mean() / true.mean()) > 0.8


def drift(hidden, logprob):
    hidden = torch.tensor(hidden)
    top = torch.tensor([logprob]).log()
    base = torch.tensor([[0.5, 0.5]]).log()
    ids, tail = torch.tensor([[0, 1]]), torch.tensor([math.log(1e-12)])
    return Drift(hidden, top, ids, tail, base, ids, tail)


def test_representation_by_hand():
    # (embedding, one layer) × 2 sequences × 2 directions
    still, moving = [[3.0, 4.0], [3.0, 4.0]], [[4.0, 3.0], [0.0, 5.0]]
    a = replace(probe("a", [[1.0]]), drift=drift([[[9.0, 9.0]] * 2, still], [0.5, 0.5]))
    b = replace(probe("b", [[1.0]]), drift=drift([[[9.0, 9.0]] * 2, moving], [0.8, 0.2]))
    row = pair(a, b)
    assert row["drift_cosine"] == pytest.approx((24 + 20) / 50)  # the embedding is left out
    assert row["drift_cka"] == 0.0  # a does the same to every text
    moved = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    rows = adapter_rows([a, b])
    assert rows["drift_norm"].to_list() == pytest.approx([5.0, 5.0])
    assert rows["kl_to_base"].to_list() == pytest.approx([0.0, moved], abs=1e-7)
    assert row["js_to_kl"] is None  # a's predictions have not moved, so nothing is redundant
    entropies = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    assert rows["entropy_change"][1] == pytest.approx(entropies - math.log(2), abs=1e-6)


def test_guards_by_hand():
    matrix = [[1.0, 0.0], [0.0, 2.0]]
    ids = torch.ones(2, 1, dtype=torch.long)
    calibration = Calibration(ids, ids, ids, torch.tensor([3.0, 5.0]), torch.tensor([2.0, 4.0]))
    meta = provenance(step=9, halfway_step=3, losses=[[0, 99.0], [1, 8.0], [2, 4.0], [8, 1.0]])
    run = probe("a", matrix, calibration=calibration, meta=meta)
    run = replace(run, halfway={M: sketch_update(M, run.updates[M], 4) / 3})
    row = adapter_rows([run]).row(0, named=True)
    assert row["own_gain"] == pytest.approx(1.0)
    assert row["own_gain_relative"] == pytest.approx(0.25)
    assert row["loss_slope"] == pytest.approx(-1.0)
    assert row["norm_growth"] == pytest.approx(1.0)  # three times the norm in three times the steps


@pytest.mark.parametrize(
    ("module", "layer", "kind"),
    [
        ("model.layers.12.self_attn.q_proj", 12, "attention"),
        ("model.layers.3.mlp.down_proj", 3, "mlp"),
        ("transformer.h.7.attn.c_attn", 7, "attention"),
        ("bert.encoder.layer.0.attention.self.query", 0, "attention"),
        ("lm_head", None, "other"),
    ],
)
def test_layer_and_kind_of_a_module(module, layer, kind):
    assert (layer_of(module), kind_of(module)) == (layer, kind)


def lora_run(name, targets, init_seed, data_seed, *, rank=4, steps=8):
    """Really trains a LoRA by linear regression on each module; the frozen weight is 0.

    Returns the probe at the end, with the full-weight gradient at the base point, sketched.
    """
    inits, data = (torch.Generator().manual_seed(s) for s in (init_seed, data_seed))
    updates, gradients = {}, {}
    for module, target in targets.items():
        out, into = target.shape
        x = torch.randn(2000, into, generator=data)
        y = x @ target.T + 0.1 * torch.randn(2000, out, generator=data)
        a = (torch.randn(rank, into, generator=inits) / into**0.5).requires_grad_()
        b = torch.zeros(out, rank, requires_grad=True)
        optimizer = torch.optim.Adam([a, b], lr=5e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            (x @ (b @ a).T - y).square().mean().backward()
            optimizer.step()
        updates[module] = LowRank(b.detach(), a.detach())
        full = -2 * y.T @ x / y.numel()
        left, right = projection(module, "out", out), projection(module, "in", into)
        gradients[module] = left.T @ full @ right
    return Probe(name, updates, gradient_base=gradients, meta=provenance(init_hash=str(init_seed)))


def test_independent_inits_confound_the_weights_but_not_the_sketched_gradients():
    draw = torch.Generator().manual_seed(0)
    shapes = {f"model.layers.{layer}.mlp.up_proj": (40, 200) for layer in range(4)}
    tasks = [{m: torch.randn(s, generator=draw) / 10 for m, s in shapes.items()} for _ in range(2)]
    one = lora_run("one", tasks[0], init_seed=1, data_seed=1)
    again = lora_run("again", tasks[0], init_seed=2, data_seed=2)  # same task, another A
    other = lora_run("other", tasks[1], init_seed=1, data_seed=3)  # another task, the same A
    rows = {(r["a"], r["b"]): r for r in pair_rows([one, again, other]).to_dicts()}
    same, unrelated = rows["one", "again"], rows["one", "other"]
    assert abs(same["frobenius_cosine"]) < 0.1
    assert same["gradient_cosine_base"] > 0.85
    assert abs(unrelated["gradient_cosine_base"]) < 0.2
    # the input side tells who shared an init, not who shared a task
    assert unrelated["input_overlap"] > 0.5 > 0.1 > same["input_overlap"]
    assert (same["shared_init"], unrelated["shared_init"]) == (0.0, 1.0)
