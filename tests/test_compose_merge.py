"""Merge rules by hand, against stock PEFT where that is right, and what is refused."""

import math

import pytest
import torch
from compose_samples import TARGETS, fill, peft_folder, peft_model
from peft import LoraConfig

from mergeprobe.adapters.checkpoint import Adapter, read_adapter, write_adapter
from mergeprobe.compose import METHODS, merge
from mergeprobe.compose.merge.linear import equal_norm_mean, linear, norm_preserving_mean, total
from mergeprobe.compose.merge.sign import keep_largest, ties
from mergeprobe.compose.merge.spectral import svc
from mergeprobe.errors import AdapterMismatch, MergeError
from mergeprobe.lowrank import LowRank, factor


def rank_one(column, row, scaling=1.0):
    return LowRank(torch.tensor([column]).T, torch.tensor([row]), scaling)


def one_module(name, update, module="q", **kwargs):
    return Adapter(name, {module: update}, base="tiny", **kwargs)


EAST = rank_one([1.0, 0.0], [3.0, 0.0])  # [[3, 0], [0, 0]]
NORTH = rank_one([0.0, 2.0], [0.0, 2.0], 0.5)  # [[0, 0], [0, 2]]


# ---- values worked by hand


def test_linear_by_hand():
    assert linear([EAST, NORTH], [0.5, -1.0]).dense().tolist() == [[1.5, 0.0], [0.0, -2.0]]


def test_sum_by_hand():
    merged = total([EAST, NORTH], [1.0, 1.0], scale=0.3)
    assert torch.allclose(merged.dense(), torch.tensor([[0.9, 0.0], [0.0, 0.6]]))


def test_norm_preserving_mean_by_hand():
    # mean = diag(1.5, 1), norm √3.25; mean norm of the parts (3 + 2)/2
    merged = norm_preserving_mean([EAST, NORTH], [0.5, 0.5]).dense()
    assert torch.allclose(merged, torch.diag(torch.tensor([1.5, 1.0])) * 2.5 / math.sqrt(3.25))


def test_norm_preserving_mean_of_updates_that_cancel_is_zero():
    merged = norm_preserving_mean([EAST, EAST * -1.0], [0.5, 0.5])
    assert not merged.dense().any()


def test_equal_norm_mean_by_hand():
    # norms 3 and 2, their mean 2.5: (2.5/3 · 3 + 0)/2 and (0 + 2.5/2 · 2)/2
    merged = equal_norm_mean([EAST, NORTH], [0.5, 0.5]).dense()
    assert torch.allclose(merged, torch.diag(torch.tensor([1.25, 1.25])))
    # weights 3 : 1: n̄ = (3·3 + 2)/4 = 2.75, shares ¾ and ¼
    merged = equal_norm_mean([EAST, NORTH], [3.0, 1.0]).dense()
    assert torch.allclose(merged, torch.diag(torch.tensor([2.0625, 0.6875])))
    # who lacks the module keeps its share, as in the mean, and says nothing of the length
    merged = equal_norm_mean([EAST, EAST * 0.0], [0.5, 0.5]).dense()
    assert torch.allclose(merged, torch.diag(torch.tensor([1.5, 0.0])))
    assert not equal_norm_mean([EAST * 0.0, NORTH * 0.0], [0.5, 0.5]).dense().any()


def test_ties_by_hand():
    updates = torch.tensor([[[3.0, 3.0, 0.0, 2.0]], [[1.0, -1.0, -1.0, -2.0]]])
    merged = ties(updates, torch.ones(2), density=1.0)
    # agree -> mean; conflict -> heavier sign; one silent -> the other; tie -> nothing
    assert merged.tolist() == [[2.0, 3.0, -1.0, 0.0]]


def test_weighted_ties_by_hand():
    updates = torch.tensor([[[3.0, 1.0]], [[1.0, -2.0]]])
    merged = ties(updates, torch.tensor([3.0, 1.0]), density=1.0)
    # (3·3 + 1·1)/4; 3·1 outweighs 1·2, and agrees alone
    assert merged.tolist() == [[2.5, 1.0]]


def test_ties_trims_each_update_first():
    updates = torch.tensor([[[5.0, 1.0, -4.0, 0.5]], [[0.1, -3.0, -2.0, 0.2]]])
    merged = ties(updates, torch.ones(2), density=0.5)
    # kept: 5, -4 and -3, -2
    assert merged.tolist() == [[5.0, -3.0, -3.0, 0.0]]


def test_keep_largest_keeps_ties_and_at_least_one_entry():
    assert keep_largest(torch.tensor([[2.0, -2.0, 1.0, 0.0]]), 0.25).tolist() == [[2, -2, 0, 0]]
    assert keep_largest(torch.tensor([[1.0, -3.0]]), 1e-6).tolist() == [[0, -3]]


def test_svc_halves_what_a_pair_shares_and_lifts_what_one_has_alone():
    shared, alone = rank_one([1.0, 0.0], [4.0, 0.0]), rank_one([0.0, 1.0], [0.0, 2.0])
    first = LowRank(torch.cat([shared.B, alone.B], 1), torch.cat([shared.A, alone.A], 0))
    merged = svc([first, shared], [1.0, 1.0], alpha=0.1).dense()
    # shared: σ 8, s = 2 and 2 -> 8 · 2/4; alone: σ 2, s = 1 and none -> 2 · 2/(1 + 0.1)
    assert torch.allclose(merged, torch.diag(torch.tensor([4.0, 4 / 1.1])))


def test_svc_of_an_identical_pair_is_the_adapter():
    draw = torch.Generator().manual_seed(0)
    one = LowRank(torch.randn(9, 3, generator=draw), torch.randn(3, 7, generator=draw), 2.0)
    assert torch.allclose(svc([one, one], [1.0, 1.0]).dense(), one.dense(), atol=1e-5)


def test_svc_takes_rounding_for_no_response():
    # the second update responds along the first's direction only by rounding
    noise = LowRank(torch.tensor([[1e-9], [1.0]]), torch.tensor([[1.0, 1.0]]))
    merged = svc([EAST, noise], [1.0, 1.0]).dense()
    assert torch.linalg.svdvals(merged).min() > 1.0


# ---- merge itself


def test_weights_mean_what_the_table_says():
    pair = [one_module("a", EAST), one_module("b", NORTH)]

    def dense(method, weights):
        return merge(pair, method, weights=weights, rank=2).adapter.modules["q"].dense()

    assert torch.allclose(dense("linear", None), dense("mean", None))
    assert torch.allclose(dense("linear", [2, 2]), 2 * dense("linear", [1, 1]))
    for method in ("norm_preserving_mean", "equal_norm_mean", "ties"):
        assert torch.allclose(dense(method, [2, 2]), dense(method, None), atol=1e-6)


def test_a_written_exact_merge_never_exceeds_full_rank():
    draw = torch.Generator().manual_seed(0)
    parts = [
        one_module(
            f"a{k}", LowRank(torch.randn(6, 4, generator=draw), torch.randn(4, 5, generator=draw))
        )
        for k in range(3)
    ]
    merged = merge(parts, "sum").adapter.modules["q"]
    assert merged.r == 5
    assert torch.allclose(merged.dense(), sum(a.modules["q"].dense() for a in parts), atol=1e-5)


def test_a_larger_rank_pads_and_a_zero_merge_is_certified():
    pair = [one_module("a", EAST), one_module("b", EAST * -1.0)]
    merged = merge(pair, "sum", rank=8)
    assert merged.adapter.ranks == [8]
    assert not merged.adapter.modules["q"].dense().any()
    assert merge(pair, "sum", rank=1).certificate.total == 0.0


def test_provenance_goes_into_the_card():
    pair = [
        one_module("a", EAST, fingerprint="f00"),
        one_module("b", NORTH, fingerprint="f00"),
    ]
    merged = merge(pair, "sum", scale=0.5, rank=1, name="both")
    assert (merged.adapter.name, merged.adapter.base, merged.adapter.fingerprint) == (
        "both", "tiny", "f00",
    )  # fmt: skip
    card = merged.adapter.card
    assert card["merged_from"] == ["a", "b"]
    assert (card["method"], card["options"], card["weights"]) == ("sum", {"scale": 0.5}, [1.0, 1.0])
    assert card["certificate"]["total"] == pytest.approx(2 / math.sqrt(13))


@pytest.mark.parametrize("shape", [(40, 50), (400, 300)])  # exact and sampled
def test_factor_is_close_to_the_best_and_says_how_close(shape):
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape[0], 6, generator=draw) @ torch.randn(6, shape[1], generator=draw)
    matrix = matrix + 0.3 * torch.randn(shape, generator=draw)
    found, error = factor(matrix, 6)
    s = torch.linalg.svdvals(matrix.double())
    best = float(s[6:].square().sum().sqrt() / s.square().sum().sqrt())
    true = float((matrix.double() - found.dense().double()).norm() / matrix.double().norm())
    assert error == pytest.approx(true, rel=1e-4)
    assert best * 0.9999 <= error < best * 1.01


# ---- stock PEFT, where it is right


@pytest.mark.parametrize(
    ("combination", "method", "options"),
    [("cat", "linear", {}), ("svd", "linear", {}), ("ties_svd", "ties", {"density": 0.5})],
)
def test_agrees_with_stock_peft(tmp_path, combination, method, options):
    model = peft_model(1, name="a")
    model.add_adapter("b", LoraConfig(r=4, lora_alpha=4, target_modules=list(TARGETS)))
    fill(model, "b", 2)
    model.save_pretrained(tmp_path)
    weights = [0.7, 0.6] if method == "linear" else [1.0, 1.0]
    # at weight 1 PEFT's TIES is ours; PEFT cannot load a rank above a module's own, here 32
    rank = {} if combination == "cat" else {"svd_rank": 8 if method == "linear" else 32}
    model.add_weighted_adapter(
        ["a", "b"], weights, "both", combination_type=combination, **rank, **options
    )
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    stock = read_adapter(tmp_path / "both")
    ours = merge(
        [read_adapter(tmp_path / "a"), read_adapter(tmp_path / "b")],
        method, weights=weights, rank=rank.get("svd_rank"), **options,
    ).adapter  # fmt: skip
    assert ours.modules.keys() == stock.modules.keys()
    for module, update in ours.modules.items():
        assert torch.allclose(update.dense(), stock.modules[module].dense(), atol=1e-5), module


def test_rslora_and_patterns_merge_exactly(tmp_path):
    kinds = {
        "rs": {"use_rslora": True, "alpha": 16},
        "pattern": {"alpha_pattern": {"v_proj": 9}, "rank_pattern": {"q_proj": 2}},
    }
    read = [peft_folder(tmp_path / n, k, **kw)[1] for k, (n, kw) in enumerate(kinds.items())]
    stock = [peft_model(k, **kw) for k, kw in enumerate(kinds.values())]
    merged = merge(read, "sum").adapter
    for module, update in merged.modules.items():
        layers = [m.base_model.model.get_submodule(module) for m in stock]
        expected = sum(layer.get_delta_weight("default") for layer in layers)
        assert torch.allclose(update.dense(), expected, atol=1e-5), module


def test_a_merge_is_written_as_one_plain_lora(tmp_path):
    adapters = [peft_folder(tmp_path / str(k), k, r=2 + k)[1] for k in range(2)]
    merged = merge(adapters, "mean", rank=4).adapter
    write_adapter(merged, tmp_path / "out", card=merged.card)
    back = read_adapter(tmp_path / "out")
    assert back.ranks == [4]
    assert sorted(back.config["target_modules"]) == sorted(TARGETS)
    assert back.card["certificate"]["total"] == merged.card["certificate"]["total"]
    for module, update in merged.modules.items():
        assert torch.allclose(update.dense(), back.modules[module].dense(), atol=1e-6)


# ---- what is refused, in one line that says what would do

PAIR = [one_module("a", EAST), one_module("b", NORTH)]
NAN = one_module("c", LowRank(torch.tensor([[1.0], [math.nan]]), torch.ones(1, 2)))


@pytest.mark.parametrize(
    ("adapters", "method", "kwargs", "error", "line"),
    [
        (PAIR, "slurp", {}, MergeError, f"'slurp'; known are {', '.join(METHODS)}"),
        (PAIR, "ties", {"lamda": 1}, MergeError, "no option 'lamda'; it takes density"),
        (PAIR, "mean", {"scale": 1}, MergeError, "no option 'scale'; it takes none"),
        (PAIR, "sum", {"scale": "big"}, MergeError, "'big'; expected a number"),
        (PAIR, "sum", {"scale": math.inf}, MergeError, "'scale' of 'sum' is inf; expected it"),
        (PAIR, "ties", {"density": 0}, MergeError, "density is 0"),
        (PAIR, "ties", {"density": 1.5}, MergeError, "density is 1.5"),
        (PAIR, "ties", {"density": math.nan}, MergeError, "'density' of 'ties' is nan; expected"),
        (PAIR, "svc", {"alpha": 0}, MergeError, "alpha is 0"),
        (PAIR, "linear", {"weights": [1]}, MergeError, "1 weights for 2 adapters"),
        (PAIR, "linear", {"weights": [1, math.nan]}, MergeError, "the weight of 'b' is nan"),
        (PAIR, "mean", {"weights": [1, 1]}, MergeError, "give them to 'linear'"),
        (PAIR, "ties", {"weights": [0, 0]}, MergeError, "all weights are 0"),
        (PAIR, "mean", {"rank": 0}, MergeError, "rank is 0"),
        ([], "mean", {}, MergeError, "got no adapters"),
        ([PAIR[0], NAN], "mean", {}, AdapterMismatch, "'c' has NaN or infinite entries in lora_B"),
        (
            [*PAIR, one_module("far", EAST, module="other")],
            "mean", {}, AdapterMismatch, "'far' adapts no module that another adapter adapts",
        ),
        (
            [PAIR[0], one_module("wide", rank_one([1.0, 0.0], [1.0, 0.0, 0.0]))],
            "mean", {}, AdapterMismatch, "trained on different bases",
        ),
        (
            [PAIR[0], Adapter("alien", {"q": EAST}, base="another")],
            "mean", {}, AdapterMismatch, "merge only adapters of one base",
        ),
    ],
)  # fmt: skip
def test_refusals(adapters, method, kwargs, error, line):
    with pytest.raises(error) as caught:
        merge(adapters, method, **kwargs)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
