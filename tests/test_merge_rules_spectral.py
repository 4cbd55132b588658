"""Rules on directions by hand: SLERP, spaces, units, singular vectors, least squares."""

import math

import pytest
import torch

from mergeprobe.capture.probe import Moment
from mergeprobe.compose.merge.data import ModuleData
from mergeprobe.compose.merge.isolation import core_isolation_lowrank
from mergeprobe.compose.merge.routing import ssr
from mergeprobe.compose.merge.spaces import SPACES, canonical
from mergeprobe.compose.merge.spectral import calibrated, iso_c, iso_cts, pico, tsv_m
from mergeprobe.compose.merge.spherical import slerp, spherical_coefficients
from mergeprobe.compose.merge.units import lora_lego, robust_merge
from mergeprobe.compose.merge.wudi import wudi, wudi_closed
from mergeprobe.errors import MergeError
from mergeprobe.lowrank import LowRank


def diagonal(*values):
    size = len(values)
    return LowRank(torch.diag(torch.tensor(values, dtype=torch.float32)), torch.eye(size))


def outer(column, row):
    return LowRank(torch.tensor([column], dtype=torch.float32).T, torch.tensor([row]).float())


def random(seed, out=12, into=10, r=3, scaling=2.0):
    draw = torch.Generator().manual_seed(seed)
    B, A = torch.randn(out, r, generator=draw), torch.randn(r, into, generator=draw)
    return LowRank(B, A, scaling)


def close(update, expected, atol=1e-5):
    return torch.allclose(update.dense(), torch.as_tensor(expected).float(), atol=atol)


# ---- slerp


def test_slerp_of_two_orthogonal_updates():
    # t = 1/3 of a right angle; the norm is 2/3 · 3 + 1/3 · 6 = 4
    merged = slerp([diagonal(3.0, 0.0), diagonal(0.0, 6.0)], [2.0, 1.0])
    third = math.pi / 6
    assert close(merged, torch.diag(torch.tensor([math.cos(third), math.sin(third)])) * 4)


def test_slerp_of_equal_norms_is_the_formula_that_mergekit_uses():
    a, b = random(1), random(2)
    b = b * float(a.dense().norm() / b.dense().norm())
    angle = math.acos(float((a.dense() * b.dense()).sum()) / float(a.dense().norm()) ** 2)
    for t in (0.1, 0.5, 0.8):
        merged = slerp([a, b], [1 - t, t])
        parts = math.sin((1 - t) * angle) * a.dense() + math.sin(t * angle) * b.dense()
        assert close(merged, parts / math.sin(angle))


def test_slerp_of_three_axes_is_their_diagonal():
    merged = slerp([diagonal(2, 0, 0), diagonal(0, 2, 0), diagonal(0, 0, 2)], [1, 1, 1])
    assert close(merged, torch.eye(3) * 2 / math.sqrt(3))


def test_slerp_minimises_the_squared_angles():
    vectors = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)).double()
    weights = torch.tensor([0.1, 0.4, 0.3, 0.2]).double()
    gram = vectors @ vectors.T

    def cost(direction):
        cosines = vectors @ direction / vectors.norm(dim=1) / direction.norm()
        return float(weights @ torch.arccos(cosines).square())

    mean = spherical_coefficients(gram, weights.tolist()) @ vectors
    draw = torch.Generator().manual_seed(1)
    nudges = 1e-3 * torch.randn(200, 30, generator=draw).double() * mean.norm()
    assert all(cost(mean + nudge) >= cost(mean) for nudge in nudges)


def test_slerp_of_opposite_updates_is_their_mean():
    assert close(slerp([diagonal(3, 1), diagonal(-3, -1)], [0.75, 0.25]), torch.diag(
        torch.tensor([1.5, 0.5])
    ))  # fmt: skip


def test_slerp_with_an_absent_update_shortens_the_other():
    one = random(1)
    absent = LowRank(one.B[:, :0], one.A[:0])
    assert close(slerp([one, absent], [0.5, 0.5]), 0.5 * one.dense())
    assert close(slerp([one, absent], [0.0, 1.0]), 0 * one.dense())


# ---- spaces


@pytest.mark.parametrize("name", SPACES)
def test_a_space_holds_every_update_exactly(name):
    updates = [random(1), random(2, r=1), LowRank(torch.zeros(12, 2), torch.ones(2, 10))]
    space = SPACES[name](updates)
    for matrix, update in zip(space.stack, updates, strict=True):
        assert close(space.back(matrix), update.dense())
    sides = {"full": (12, 10), "knots": (4, 10), "core": (4, 4)}
    assert tuple(space.stack.shape) == (3, *sides[name])


@pytest.mark.parametrize("name", ["knots", "core"])
def test_copies_span_no_more_than_one(name):
    assert SPACES[name]([random(1)] * 3).stack.shape[1] == 3


@pytest.mark.parametrize("name", ["knots", "core"])
def test_coordinates_do_not_depend_on_the_factorisation(name):
    a, b = random(1), random(2, r=2)
    q = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.5, 3.0], [1.0, 0.0, 1.0]]).double()
    again = LowRank(a.B.double() @ q.inverse(), q @ a.A.double(), a.scaling)
    one, other = SPACES[name]([a, b]).stack, SPACES[name]([again, b]).stack
    assert torch.allclose(one.abs(), other.abs(), atol=1e-4)  # axes may be turned round


def test_knots_and_core_of_updates_that_share_no_direction():
    # [ΔW₁ | ΔW₂] has the left singular vectors e₁ (σ 3) and e₂ (σ 2)
    updates = [outer([3, 0, 0], [1, 0, 0]), outer([0, 2, 0], [0, 1, 0])]
    stack = SPACES["knots"](updates).stack.abs()
    assert torch.allclose(stack[0], torch.tensor([[3.0, 0, 0], [0, 0, 0]]), atol=1e-6)
    assert torch.allclose(stack[1], torch.tensor([[0.0, 0, 0], [0, 2, 0]]), atol=1e-6)
    core = SPACES["core"](updates).stack.abs()
    assert torch.allclose(core[0], torch.diag(torch.tensor([3.0, 0])), atol=1e-6)
    assert torch.allclose(core[1], torch.diag(torch.tensor([0.0, 2])), atol=1e-6)


def test_canonical_drops_null_directions():
    doubled = LowRank(torch.ones(4, 2), torch.ones(2, 3))
    u, s, vh = canonical(doubled)
    assert (u.shape, vh.shape) == ((4, 1), (1, 3))
    assert float(s[0]) == pytest.approx(2 * math.sqrt(12))
    assert canonical(LowRank(torch.zeros(4, 2), torch.ones(2, 3)))[1].numel() == 0


# ---- units


def test_lora_lego_merges_alike_units_and_keeps_their_norm():
    # units (√σ v, √σ u): 2e₁e₁ᵀ twice (once with both signs turned), and 3e₂e₂ᵀ
    turned = LowRank(torch.tensor([[-2.0, 0.0], [0.0, 3.0]]), torch.diag(torch.tensor([-1.0, 1.0])))
    updates = [outer([2, 0], [1, 0]), turned]
    assert close(lora_lego(updates, [0.5, 0.5]), torch.diag(torch.tensor([2.0, 3.0])))


def test_lora_lego_with_one_unit_stretches_the_centroid():
    # orthogonal units x = √2 (e₁, e₁) and y = √8 (e₂, e₂), norms 2 and 4; equal weights.
    # centroid (x + y)/2 of norm √5, stretched to 3: √(9/5)/2 · ((√2, √8), (√2, √8)); r = K = 1
    merged = lora_lego([outer([2, 0], [1, 0]), outer([0, 8], [0, 1])], [1, 1], units=1)
    half = torch.tensor([math.sqrt(2), math.sqrt(8)]) / 2 * math.sqrt(9 / 5)
    assert close(merged, torch.outer(half, half))


def test_an_adapter_of_weight_zero_has_no_units_and_no_core():
    first, second = random(1), random(2)
    assert close(lora_lego([first, second], [1, 0]), first.dense())
    assert close(core_isolation_lowrank([first, second], [1, 0]), first.dense())


def test_lora_lego_rescales_for_another_rank():
    # three clusters of one unit each, r = 2: all of both updates, times √(2/3)
    updates = [diagonal(5, 3, 0), diagonal(0, 0, 2)]
    merged = lora_lego(updates, [1, 1], units=3)
    assert close(merged, torch.diag(torch.tensor([5.0, 3.0, 2.0])) * math.sqrt(2 / 3))


def test_robust_merge_by_hand():
    # one direction: √10 (0.8, 0.6) and √10 (0.6, 0.8); half of two entries: 0.8 of each stays.
    # alone, its coefficient over itself is 1
    one = outer([8, 6], [0.6, 0.8])
    expected = torch.tensor([[0.0, 10 * 0.64], [0.0, 0.0]])
    assert close(robust_merge([one], [1.0], density=0.5, scale=1.0), expected)
    # a second update without small entries needs no making up: 1.4/0.8 against 1
    other = outer([0, 10], [1, 0])
    merged = robust_merge([one, other], [1.0, 1.0], density=0.5, scale=1.0)
    lost, kept = 1.75 / 2.75, 1 / 2.75
    assert close(merged, expected * lost + torch.tensor([[0.0, 0.0], [10 * kept, 0.0]]))


# ---- singular vectors


def test_tsv_m_keeps_updates_that_do_not_interfere():
    updates = [outer([3, 0, 0], [1, 0, 0]), outer([0, 2, 0], [0, 1, 0])]
    assert close(tsv_m(updates, [1, 1]), torch.diag(torch.tensor([3.0, 2.0, 0.0])))


def test_tsv_m_turns_vectors_apart():
    # u₁ = e₁ and u₂ at 60°: the nearest orthonormal pair lies 15° outside, at −15° and 75°
    angle, out = math.radians(60), math.radians(15)
    updates = [
        outer([1, 0, 0, 0], [1, 0, 0, 0]),
        outer([math.cos(angle), math.sin(angle), 0, 0], [0, 1, 0, 0]),
    ]
    expected = torch.zeros(4, 4)
    expected[:2, 0] = torch.tensor([math.cos(out), -math.sin(out)])
    expected[:2, 1] = torch.tensor([math.sin(out), math.cos(out)])
    assert close(tsv_m(updates, [1, 1]), expected)


def test_tsv_m_cuts_each_spectrum_to_its_share_of_the_room():
    # room for 4/2 triplets each
    updates = [diagonal(5, 4, 3, 0), diagonal(0, 0, 0, 2)]
    assert close(tsv_m(updates, [1, 1]), torch.diag(torch.tensor([5.0, 4.0, 0.0, 2.0])))


def test_iso_c_flattens_the_spectrum_of_the_sum():
    merged = iso_c([diagonal(5, 0, 0, 0), diagonal(1, 2, 1, 0)], [1, 1])
    # sum 6, 2, 1 over the three directions of the core space
    assert close(merged, torch.diag(torch.tensor([3.0, 3.0, 3.0, 0.0])))
    assert close(iso_c([diagonal(5, 1), diagonal(-5, -1)], [1, 1]), torch.zeros(2, 2))


def test_iso_cts_gives_each_adapter_directions_of_its_own():
    # R = 4, of which 0.5 common: the sum's first two, e₁ (8) and e₂ (6). Outside them the first
    # update has e₃ (2), the second e₄ (1): mean of 8, 6, 2, 1
    updates = [diagonal(4, 3, 2, 0), diagonal(4, 3, 0, 1)]
    assert close(iso_cts(updates, [1, 1], common=0.5), torch.eye(4) * 17 / 4)
    # all common: the sum itself, flattened
    assert close(iso_cts(updates, [1, 1], common=1.0), torch.eye(4) * 17 / 4)


def test_iso_cts_leaves_out_directions_that_nobody_has():
    # R = 3: the common one is e₁ (8), the first's own e₂ (2); the second has no other, so 0
    updates = [diagonal(4, 2, 1), diagonal(4, 0, 0)]
    merged = iso_cts(updates, [1, 1], common=0.34)
    assert close(merged, torch.diag(torch.tensor([10 / 3, 10 / 3, 0.0])))


def test_pico_scales_shared_directions_down_and_restores_the_norm():
    # stack energies: e₁ 2 · 9, e₂ 4 and e₃ 4, of 26: α₁ = 26/44, α₂ = α₃ = 26/30
    updates = [diagonal(3, 2, 0), diagonal(3, 0, 2)]
    parts = calibrated(updates)
    assert close(parts[0], torch.diag(torch.tensor([3 * 26 / 44, 2 * 26 / 30, 0.0])))
    merged = pico(updates, [0.5, 0.5])
    shape = torch.tensor([3 * 26 / 44, 26 / 30, 26 / 30])
    assert close(merged, torch.diag(shape / shape.norm() * math.sqrt(13)))
    assert not pico([updates[0], updates[0] * -1.0], [0.5, 0.5]).dense().any()


# ---- least squares


def test_wudi_does_not_move_updates_that_do_not_interfere():
    # rows e₁ and e₂: (M − ΔW₁) ΔW₁ᵀ is already zero at the sum
    stack = torch.stack([diagonal(3, 0).dense(), diagonal(0, 2).dense()])
    assert torch.equal(wudi(stack, torch.ones(2)), stack.sum(dim=0))


def test_wudi_takes_one_step_of_adam():
    stack = torch.stack([torch.tensor([[2.0, 0.0]]), torch.tensor([[4.0, 0.0]])])
    merged = wudi(stack, torch.ones(2), steps=1, learning_rate=0.01)
    # the gradient 2 (6 − 2) + 2 (6 − 4) is positive, and Adam's first step is the rate
    assert torch.allclose(merged, torch.tensor([[5.99, 0.0]]))


def test_wudi_goes_towards_its_minimum():
    updates = [random(seed, out=6, into=5, r=2) for seed in (1, 2)]
    stack = torch.stack([update.dense() for update in updates])
    goal = wudi_closed(updates, [1.0, 1.0], ridge=0).dense()
    apart = [
        float((wudi(stack, torch.ones(2), steps=steps, learning_rate=1e-2) - goal).norm())
        for steps in (0, 300, 3000)
    ]
    assert apart[0] > 2 * apart[1] > 4 * apart[2]


def test_wudi_closed_by_hand():
    # all on one row: the weighted mean of what they do there
    updates = [outer([2, 0], [1, 0]), outer([0, 4], [1, 0])]
    assert close(wudi_closed(updates, [3, 1], ridge=0), torch.tensor([[1.5, 0.0], [1.0, 0.0]]))
    # rows that share nothing: both at once
    updates = [outer([2, 0], [1, 0]), outer([0, 4], [0, 1])]
    assert close(wudi_closed(updates, [3, 1], ridge=0), torch.tensor([[2.0, 0.0], [0.0, 4.0]]))


def test_wudi_with_a_ridge_goes_towards_the_mean():
    updates = [outer([2, 0], [1, 0]), outer([0, 4], [0, 1])]
    # Σ G = I, so λ = ridge: halfway between both at once and their mean
    merged = wudi_closed(updates, [1, 1], ridge=1.0)
    assert close(merged, torch.tensor([[2.0, 0.0], [0.0, 4.0]]) * 0.75)


def test_the_ridge_keeps_updates_that_share_their_init_short():
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(4, 40, generator=draw)
    updates = [
        LowRank(
            torch.randn(30, 4, generator=draw), start + 0.1 * torch.randn(4, 40, generator=draw)
        )
        for _ in range(5)
    ]
    size = float(updates[0].dense().norm())
    exact, held = (wudi_closed(updates, [1.0] * 5, ridge=ridge).dense() for ridge in (0, 0.1))
    assert float(exact.norm()) > 10 * size
    assert float(held.norm()) < 3 * size


def data(*variances):
    return [ModuleData(inputs=Moment(torch.diag(torch.tensor(v).sqrt()), 0.0)) for v in variances]


def test_ssr_tells_signals_apart_by_the_inputs_of_the_tasks():
    updates = [outer([1, 0], [1, 0]), outer([0, 1], [0, 1])]
    # task 1 has inputs of variance 3 along e₁ and 1 along e₂, task 2 variance 1 and 1:
    # R = diag(3, 1) · diag(4, 2)⁻¹
    merged = ssr(updates, [1, 1], data=data([3.0, 1.0], [1.0, 1.0]), ridge=0.0)
    assert close(merged, torch.diag(torch.tensor([3 / 4, 1 / 2])))


def test_ssr_keeps_adapters_whose_inputs_do_not_meet():
    updates = [outer([1, 2], [1, 0]), outer([3, 1], [0, 1])]
    merged = ssr(updates, [1, 1], data=data([1.0, 0.0], [0.0, 5.0]), ridge=0.0)
    assert close(merged, updates[0].dense() + updates[1].dense())


def test_ssr_needs_the_inputs_of_every_adapter_that_has_the_module():
    one = random(1)
    absent = LowRank(one.B[:, :0], one.A[:0])
    moment = ModuleData(inputs=Moment(torch.eye(10), 0.0))
    assert close(ssr([one, absent], [1, 1], data=[moment, ModuleData()]), one.dense())
    with pytest.raises(MergeError, match="'ssr' needs the second moments"):
        ssr([one, one], [1, 1], data=[moment, ModuleData()])


# ---- core isolation, low rank


def test_cores_with_orthogonal_inputs_stay_verbatim():
    updates = [diagonal(5, 1, 0, 0), diagonal(0, 0, 4, 1)]
    # cores 5e₁ and 4e₃; the rest e₂ and e₄, orthogonal and of norm 1
    root = 1 / math.sqrt(2)
    merged = core_isolation_lowrank(updates, [1, 1])
    assert close(merged, torch.diag(torch.tensor([5.0, root, 4.0, root])))


def test_of_cores_on_one_input_the_stronger_stays_and_the_rest_keeps_off():
    # both read e₁: 4/√17 of the first is more than 3/√13 of the second, whose core finds nothing
    # left; of the rests e₂ → e₂ and e₁ → e₂, that on e₁ is taken off
    first = diagonal(4, 1)
    second = LowRank(torch.tensor([[0.0, 2.0], [3.0, 0.0]]), torch.eye(2))
    merged = core_isolation_lowrank([first, second], [1, 1]).dense()
    assert torch.allclose(merged[:, 0], torch.tensor([4.0, 0.0]), atol=1e-5)


def test_more_components_than_there_are_is_the_sum_of_disjoint_updates():
    updates = [diagonal(5, 1, 0), diagonal(0, 0, 4)]
    merged = core_isolation_lowrank(updates, [1, 1], components=9)
    assert close(merged, torch.diag(torch.tensor([5.0, 1.0, 4.0])))


# ---- what is refused

TWO = [random(1), random(2)]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: slerp(TWO, [1, -1]), "weight is -1"),
        (lambda: lora_lego(TWO, [1, 1], units=1.5), "units is 1.5"),
        (lambda: lora_lego(TWO, [1, 1], units=-1), "units is -1"),
        (lambda: lora_lego(TWO, [1, -1]), "weight is -1"),
        (lambda: robust_merge(TWO, [1, 1], density=0), "density is 0"),
        (lambda: robust_merge(TWO, [1, 1], share=2), "share is 2"),
        (lambda: iso_cts(TWO, [1, 1], common=0), "common is 0"),
        (lambda: wudi(torch.ones(2, 3, 3), torch.ones(2), steps=0.5), "steps 0.5"),
        (lambda: wudi(torch.ones(2, 3, 3), torch.ones(2), learning_rate=0), "learning_rate 0"),
        (lambda: wudi_closed(TWO, [1, -2]), "weight is -2"),
        (lambda: wudi_closed(TWO, [1, 1], ridge=-1), "ridge is -1"),
        (lambda: ssr(TWO, [1, 1], data=[], ridge=-1), "ridge is -1"),
        (lambda: core_isolation_lowrank(TWO, [1, 1], components=0), "components is 0"),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(call, said):
    with pytest.raises(MergeError, match=said) as error:
        call()
    assert "\n" not in str(error.value)
