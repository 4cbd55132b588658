"""Rules on entries by hand: trimming, dropping, PCB, core isolation; and what they refuse."""

import math

import pytest
import torch

from mergeprobe.compose.merge.balance import pcb
from mergeprobe.compose.merge.drop import dare_linear, dare_ties, della, della_linear
from mergeprobe.compose.merge.isolation import (
    core_isolation,
    core_masks,
    core_overlap,
    groups,
    jaccard,
    overlap_lift,
)
from mergeprobe.compose.merge.trim import breadcrumbs, magnitude_prune
from mergeprobe.errors import MergeError
from mergeprobe.lowrank import LowRank

PAIR = torch.tensor([[[5.0, 1.0, -4.0, 0.5]], [[0.1, -3.0, -2.0, 0.2]]])


def seed(number):
    return torch.Generator().manual_seed(number)


def test_magnitude_prune_adds_the_largest_entries():
    # kept: 5, -4 and -3, -2
    merged = magnitude_prune(PAIR, torch.tensor([1.0, 0.5]), density=0.5)
    assert merged.tolist() == [[5.0, -1.5, -5.0, 0.0]]


def test_breadcrumbs_drop_the_largest_and_the_small_entries():
    # of 5, -4, 1, 0.5 the 5 is an outlier and -4, 1 stay; of -3, -2, 0.2, 0.1 the -2 and 0.2 do
    merged = breadcrumbs(PAIR, torch.ones(2), density=0.5, gamma=0.25)
    assert torch.allclose(merged, torch.tensor([[0.0, 1.0, -6.0, 0.2]]))


def test_breadcrumbs_without_outliers_are_magnitude_pruning():
    one = breadcrumbs(PAIR, torch.ones(2), density=0.5, gamma=0.0)
    assert torch.equal(one, magnitude_prune(PAIR, torch.ones(2), density=0.5))


@pytest.mark.parametrize("rule", [dare_linear, della_linear])
def test_dropping_keeps_the_expectation(rule):
    draw = seed(0)
    updates = torch.randn(3, 4, 5, generator=draw)
    weights = torch.tensor([0.5, -1.0, 2.0])
    runs = [rule(updates, weights, generator=draw) for _ in range(4000)]
    mean, spread = torch.stack(runs).mean(dim=0), torch.stack(runs).std(dim=0) / math.sqrt(4000)
    error = (mean - torch.einsum("n,nij->ij", weights, updates)).abs() / spread
    assert error.max() < 4.5  # of 20 standard normal errors the largest is below 4.5
    assert error.square().mean() < 2.5


def test_dare_keeps_an_entry_rescaled_or_not_at_all():
    kept = dare_linear(PAIR[:1], torch.ones(1), generator=seed(3), density=0.25)
    word = torch.empty(1, dtype=torch.int64).random_(-(2**63), None, generator=seed(3))
    draws = [(int(word) >> (16 * k)) % 2**16 for k in range(4)]  # 16 bits an entry
    chosen = torch.tensor([[(draw + 2**15) % 2**16 < 2**14 for draw in draws]])
    assert torch.equal(kept, torch.where(chosen, 4 * PAIR[0], 0.0))


def test_dare_drops_at_the_rate_it_divides_by():
    updates = torch.ones(1, 200, 300)
    for density in (0.03, 0.3, 0.7):
        kept = dare_linear(updates, torch.ones(1), generator=seed(1), density=density)
        assert abs(float((kept > 0).float().mean()) - density) < 4 * (0.25 / 60_000) ** 0.5
        assert float(kept.max()) == pytest.approx(1 / density, rel=1e-3)


def test_dare_that_drops_nothing_is_its_rule():
    updates = torch.tensor([[[3.0, 3.0, 0.0, 2.0]], [[1.0, -1.0, -1.0, -2.0]]])
    merged = dare_ties(updates, torch.ones(2), generator=seed(0), density=1.0)
    assert merged.tolist() == [[2.0, 3.0, -1.0, 0.0]]
    whole = dare_linear(updates, torch.tensor([0.5, 2.0]), generator=seed(0), density=1.0)
    assert whole.tolist() == [[3.5, -0.5, -2.0, -3.0]]


def test_della_keeps_large_entries_of_a_row_more_often():
    row = torch.tensor([[[1.0, -2.0, 3.0]]])
    counts, draw = torch.zeros(1, 3), seed(1)
    for _ in range(4000):
        counts += della(row, torch.ones(1), generator=draw, density=0.5, epsilon=0.4) != 0
    # chances 0.1, 0.5, 0.9; a standard error is at most 0.008
    assert torch.allclose(counts / 4000, torch.tensor([[0.1, 0.5, 0.9]]), atol=0.03)
    sure = della(row, torch.ones(1), generator=draw, density=0.6, epsilon=0.4)
    assert sure[0, 2] == 3.0  # chance 1, and rescaled by it


def test_pcb_by_hand():
    updates = torch.zeros(2, 1, 10)
    updates[:, 0, :2] = torch.tensor([[1.0, 3.0], [2.0, 1.0]])
    merged = pcb(updates, torch.tensor([1.0, 10.0]), density=0.2)
    # of ten magnitudes the largest is clipped to the next: 1 and 1 in both. The sum is (3, 4), so
    # e² tanh 3 < e² tanh 12 in the first and e² tanh 6 > e² tanh 4 in the second: the smaller of
    # the two standings that are kept is scaled to 0, the larger to 1
    assert merged[0, :2].tolist() == [10.0, 1.0]
    assert not merged[0, 2:].any()


def test_pcb_gives_no_standing_to_what_opposes_the_sum():
    updates = torch.zeros(2, 1, 20)
    updates[0, 0, :4] = torch.tensor([4.0, 4.0, 1.0, 4.0])
    updates[1, 0, :4] = torch.tensor([4.0, -1.0, 1.0, 4.0])
    merged = pcb(updates, torch.ones(2), density=0.2)
    assert merged[0, 1] == 4.0  # the -1 is not in the mean
    assert not merged[0, 4:].any()


# ---- core isolation


def test_cores_are_kept_verbatim_and_the_rest_is_slerped():
    updates = torch.tensor([[[9.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, -8.0]]])
    merged = core_isolation(updates, torch.ones(2), core=0.25)
    # without cores: e₂ and e₃, orthogonal and of norm 1, so their slerp is (e₂ + e₃)/√2
    root = 1 / math.sqrt(2)
    assert torch.allclose(merged, torch.tensor([[9.0, root, root, -8.0]]))


def test_where_cores_conflict_the_larger_relative_magnitude_wins():
    updates = torch.tensor([[[6.0, 8.0, 0.0, 0.0]], [[3.0, 0.0, 0.0, 1.0]]])
    # cores: {1, 2} and {1, 4}, Jaccard 1/3. Entry 1: 6/√100 against 3/√10, so the 3 wins
    merged = core_isolation(updates, torch.ones(2), core=0.5, threshold=0.5)
    assert merged.tolist() == [[3.0, 8.0, 0.0, 1.0]]


def test_adapters_of_one_group_share_their_core():
    updates = torch.tensor([[[6.0, 8.0, 0.0, 0.0]], [[3.0, 0.0, 0.0, 1.0]]])
    merged = core_isolation(updates, torch.tensor([1.0, 3.0]), core=0.5, threshold=0.3)
    assert merged.tolist() == [[(6.0 + 3 * 3.0) / 4, 8.0, 0.0, 1.0]]


def test_overlap_of_cores_and_its_lift():
    masks = core_masks(torch.tensor([[[4.0, 3.0, 0.0, 1.0]], [[4.0, 0.0, 3.0, 1.0]]]), 0.5)
    overlap = jaccard(masks)
    assert overlap.tolist() == [[1.0, 1 / 3], [1 / 3, 1.0]]
    # half of the entries each: chance is 0.5/1.5 = 1/3, so this overlap is chance
    assert float(overlap_lift(overlap, 0.5)[0, 1]) == pytest.approx(1.0)


def test_overlap_of_whole_adapters_counts_entries_over_all_modules():
    def row(*values):
        return LowRank(torch.ones(1, 1), torch.tensor([values]))

    absent = LowRank(torch.ones(1, 0), torch.ones(0, 2))
    # cores, half of each module: {0} and {0}; then {1, 2} and {2, 3}; then {0} and none
    modules = [
        [row(2.0, 1.0), row(3.0, 0.0)],
        [row(0.0, 4.0, 5.0, 1.0), row(0.0, 1.0, 2.0, 2.0)],
        [row(7.0, 1.0), absent],
    ]
    overlap = core_overlap(modules, 0.5)
    assert float(overlap[0, 1]) == pytest.approx((1 + 1) / (1 + 3 + 1))
    with pytest.raises(MergeError, match="no module to compare"):
        core_overlap([], 0.5)


def test_random_cores_have_a_lift_of_about_one():
    updates = torch.randn(6, 200, 300, generator=seed(0))
    lift = overlap_lift(jaccard(core_masks(updates, 0.05)), 0.05)
    apart = lift[~torch.eye(6, dtype=torch.bool)]
    assert float(apart.mean()) == pytest.approx(1.0, abs=0.05)


def test_groups_are_connected_components():
    overlap = torch.eye(5)
    for i, j in ((0, 3), (3, 4)):
        overlap[i, j] = overlap[j, i] = 0.2
    assert groups(overlap, 0.1) == [[0, 3, 4], [1], [2]]
    assert groups(overlap, 0.3) == [[0], [1], [2], [3], [4]]


# ---- what is refused


@pytest.mark.parametrize(
    ("rule", "options", "said"),
    [
        (magnitude_prune, {"density": 0.0}, "density is 0.0"),
        (breadcrumbs, {"density": 0.99, "gamma": 0.02}, "density 0.99 and gamma 0.02"),
        (breadcrumbs, {"gamma": -0.1}, "gamma -0.1"),
        (dare_linear, {"density": 1.5, "generator": seed(0)}, "density is 1.5"),
        (dare_ties, {"density": 0, "generator": seed(0)}, "density is 0"),
        (della, {"density": 0.1, "generator": seed(0)}, "chances to keep of -0.05 to 0.25"),
        (della_linear, {"epsilon": 0.6, "generator": seed(0)}, "chances to keep of -0.1 to 1.1"),
        (pcb, {"density": 2}, "density is 2"),
        (core_isolation, {"core": 0}, "core 0 and"),
        (core_isolation, {"threshold": -1}, "threshold -1"),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(rule, options, said):
    with pytest.raises(MergeError, match=said) as error:
        rule(PAIR, torch.ones(2), **options)
    assert "\n" not in str(error.value)
    assert "expected" in str(error.value)
