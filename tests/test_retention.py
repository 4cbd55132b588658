"""Retention: values worked by hand."""

import math

import pytest
import torch

from mergeprobe.errors import DataError
from mergeprobe.evaluate.retention import retention, set_retention


def test_by_hand():
    base = torch.tensor([4.0, 4.0, 2.0, 2.0])
    single = torch.tensor([1.0, 1.0, 1.0, 1.0])
    merged = torch.tensor([2.0, 2.0, 1.0, 1.0])
    # gains 3, 3, 1, 1 (mean 2); kept 2, 2, 1, 1 (mean 1.5)
    found = retention(base, single, merged)
    assert found.gain == pytest.approx(0.75)
    assert found.own_gain == pytest.approx(2.0)
    # residual kept − 0.75 · own: −0.25, −0.25, 0.25, 0.25; sd √(4 · 0.0625 / 3); / √4 / 2
    assert found.gain_se == pytest.approx(math.sqrt(0.25 / 3) / 2 / 2)
    # mean losses 1 alone, 1.5 merged
    assert found.ratio == pytest.approx(math.exp(-0.5))
    assert found.excess == pytest.approx(math.log(1.5))
    assert found.items == 4
    assert found.note == ""


def test_identity_and_no_adapter():
    base, single = torch.tensor([3.0, 2.5, 2.0]), torch.tensor([1.0, 0.7, 0.9])
    same = retention(base, single, single)
    assert (same.gain, same.gain_se, same.ratio, same.excess) == (1.0, 0.0, 1.0, 0.0)
    assert retention(base, single, base).gain == 0.0


def test_a_gain_within_noise_is_undefined():
    base = torch.tensor([1.0, 2.0, 3.0, 4.0])
    single = torch.tensor([2.0, 1.0, 4.0, 2.9])  # gains −1, 1, −1, 1.1
    found = retention(base, single, single)
    assert found.gain is None
    assert found.gain_se is None
    assert "undefined" in found.note
    worse = retention(base, base + 1.0, base)
    assert worse.gain is None


def test_items_must_match():
    with pytest.raises(DataError, match=r"3 under the base, 2 alone"):
        retention(torch.ones(3), torch.ones(2), torch.ones(3))
    with pytest.raises(DataError, match="0 under the base"):
        retention(torch.ones(0), torch.ones(0), torch.ones(0))


def test_set_by_hand():
    base = torch.tensor([4.0, 4.0, 2.0, 2.0])
    single = torch.ones(4)
    parts = {
        "a": retention(base, single, torch.tensor([2.0, 2.0, 1.0, 1.0])),
        "b": retention(base, single, single),
        "noise": retention(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0]), torch.ones(2)),
    }
    found = set_retention(parts)
    assert found.mean == pytest.approx((0.75 + 1.0) / 2)
    assert found.worst == pytest.approx(0.75)
    assert found.worst_adapter == "a"
    assert found.left_out == ("noise",)
    assert found.mean_se == pytest.approx(parts["a"].gain_se / 2)
    with pytest.raises(DataError, match="nothing to retain"):
        set_retention({"noise": parts["noise"]})
