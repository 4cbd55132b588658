"""Calibration items from collated rows, and probe points, worked by hand."""

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mergeprobe.capture.items import from_features, items_of, spread, spread_rows
from mergeprobe.capture.points import probe_points
from mergeprobe.errors import DataError, ProbeError


def shown(batch):
    return [
        (ids[real.bool()].tolist(), scored[real.bool()].tolist())
        for ids, real, scored in zip(
            batch.ids, batch.attention_mask, batch.completion_mask, strict=True
        )
    ]


RIGHT = {
    "input_ids": torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
    "labels": torch.tensor([[-100, 6, 7, -100], [8, 9, -100, -100]]),
}
EXPECTED = [([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])]


def test_padding_on_either_side_is_dropped():
    left = {key: value.flip(1) for key, value in RIGHT.items()}
    left["input_ids"] = torch.tensor([[0, 5, 6, 7], [0, 0, 8, 9]])
    left["labels"] = torch.tensor([[-100, -100, 6, 7], [-100, -100, 8, 9]])
    assert shown(from_features(RIGHT)) == EXPECTED
    assert shown(from_features(left)) == EXPECTED
    assert from_features(left).ids.tolist() == [[5, 6, 7], [8, 9, 0]]


def test_packed_rows_are_cut_where_positions_start_again():
    packed = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
        "labels": torch.tensor([[-100, 6, 7, -100, 9]]),
    }
    assert shown(from_features(packed)) == EXPECTED


def test_left_padded_positions_start_at_the_first_real_token():
    """Some collators give position 1 to padding on the left; that is no start of a sequence."""
    features = {
        "input_ids": torch.tensor([[0, 0, 8, 9]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1]]),
        "position_ids": torch.tensor([[1, 1, 0, 1]]),
    }
    assert shown(from_features(features)) == [([8, 9], [0, 1])]


def test_rows_in_which_nothing_counts_are_left_out():
    silent = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[-100, -100]])}
    assert items_of(silent) == []
    with pytest.raises(DataError, match="counts in the loss"):
        from_features(silent)
    odd = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[1], [2]])}
    with pytest.raises(DataError, match="one shape"):
        from_features(odd)
    with pytest.raises(DataError, match="pixel_values"):
        from_features({"pixel_values": torch.zeros(1, 3)})


def test_long_rows_keep_what_counts():
    labels = torch.full((1, 5000), -100)
    labels[0, 4000:4010] = 1
    ((ids, scored),) = items_of({"input_ids": torch.arange(5000)[None], "labels": labels})
    assert len(ids) == 1024
    assert ids[scored.bool()].tolist() == list(range(4000, 4010))
    assert int(ids[0]) == 4000 - 512


def test_rows_are_spread_and_nothing_is_drawn():
    assert spread(7, 3) == [0, 2, 4]
    assert spread(2, 32) == [0, 1]

    class Rows:
        def __len__(self):
            return 64

        def __getitem__(self, index):
            random.random(), np.random.random(), torch.rand(1)
            return index

    def collate(rows):
        return {"input_ids": torch.tensor([[row, row + 1] for row in rows])}

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    batch = spread_rows(SimpleNamespace(dataset=Rows(), collate_fn=collate))
    assert batch is not None
    assert batch.ids[:, 0].tolist() == list(range(0, 64, 2))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert spread_rows(SimpleNamespace(dataset=iter([]), collate_fn=collate)) is None


def test_probe_points_of_one_run():
    one = probe_points("p/math.safetensors", 1000)
    assert [(p.step, p.half, p.path) for p in one] == [(50, 25, Path("p/math.safetensors"))]
    several = probe_points("p/{point}/math.safetensors", 500, fraction=(0.01, 0.02, 0.05, 0.1))
    assert [(p.step, str(p.path)) for p in several] == [
        (8, "p/1pct/math.safetensors"),  # never before step 8
        (10, "p/2pct/math.safetensors"),
        (25, "p/5pct/math.safetensors"),
        (50, "p/10pct/math.safetensors"),
    ]
    by_step = probe_points("p/{point}.safetensors", 500, at_step=[40, 3])
    assert [(p.step, str(p.path)) for p in by_step] == [
        (3, "p/step3.safetensors"),
        (40, "p/step40.safetensors"),
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"fraction": (0.05, 0.0)}, "fraction is 0.0"),
        ({"at_step": 0}, "at_step is 0"),
        ({"at_step": (3, 3)}, "given twice"),
        ({"at_step": ()}, "no probe point"),
        ({"at_step": (3, 4)}, "{point}"),
    ],
)
def test_impossible_points_are_refused(options, said):
    with pytest.raises(ProbeError, match=said.replace("{", r"\{").replace("}", r"\}")):
        probe_points("p/math.safetensors", 100, **options)
