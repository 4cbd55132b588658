"""Rules on entries against stock PEFT, where that is right: on true updates, for plain LoRA."""

import pytest
import torch
from compose_samples import TARGETS, fill, peft_model
from peft import LoraConfig

from mergeprobe.adapters.checkpoint import read_adapter
from mergeprobe.compose import merge


@pytest.mark.parametrize(
    ("combination", "method", "weights", "density"),
    [
        ("magnitude_prune_svd", "magnitude_prune", [0.7, 0.6], 0.5),
        # what PEFT draws cannot be drawn again, so nothing is dropped
        ("dare_linear_svd", "dare_linear", [0.7, 0.6], 1.0),
        ("dare_ties_svd", "dare_ties", [1.0, 1.0], 1.0),
    ],
)
def test_agrees_with_stock_peft(tmp_path, combination, method, weights, density):
    model = peft_model(1, name="one")
    model.add_adapter("two", LoraConfig(r=4, lora_alpha=4, target_modules=list(TARGETS)))
    fill(model, "two", 2)
    model.save_pretrained(tmp_path)
    # PEFT cannot load a rank above a module's own
    model.add_weighted_adapter(
        ["one", "two"], weights, "both", combination_type=combination, svd_rank=32, density=density
    )
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    stock = read_adapter(tmp_path / "both").modules
    parts = [read_adapter(tmp_path / name) for name in ("one", "two")]
    ours = merge(parts, method, weights=weights, rank=32, density=density).adapter.modules
    assert ours.keys() == stock.keys()
    for module, update in ours.items():
        assert torch.allclose(update.dense(), stock[module].dense(), atol=1e-5), module
