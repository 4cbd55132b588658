"""Arrow through PEFT: one layer's routing against the formula, and the model left as it was."""

import pytest
import torch
from tiny_base import tiny_model

from mergeprobe.adapters.attach import attached
from mergeprobe.adapters.checkpoint import Adapter
from mergeprobe.compose.arrow import arrowed
from mergeprobe.errors import AdapterMismatch, MergeError
from mergeprobe.lowrank import LowRank

IDS = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]])
LAYER = "model.layers.0.self_attn.q_proj"


def drawn(name, seed, rank=2, endings=("q_proj", "v_proj")):
    draw = torch.Generator().manual_seed(seed)
    updates = {}
    for module, layer in tiny_model().named_modules():
        if module.endswith(endings):
            out, into = layer.weight.shape
            b, a = torch.randn(out, rank, generator=draw), torch.randn(rank, into, generator=draw)
            updates[module] = LowRank(b * torch.tensor([3.0, 1.0, 0.5][:rank]), a / into**0.5, 0.7)
    return Adapter(name, updates)


@torch.no_grad()
@pytest.mark.parametrize("top", [1, 2, 3])
def test_a_layer_s_routing_is_the_formula(top):
    model, adapters = tiny_model(), [drawn("a", 0), drawn("b", 1, rank=3), drawn("c", 2)]
    seen = {}
    with arrowed(model, adapters, top=top, temperature=0.5) as routed:
        layer = routed.get_submodule(f"base_model.model.{LAYER}")
        layer.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
        routed(input_ids=IDS)
        plain = layer.base_layer(seen["x"])
    dense = [adapter.modules[LAYER].dense() for adapter in adapters]
    prototypes = torch.stack([torch.linalg.svd(d).Vh[0] for d in dense])
    near = (seen["x"] @ prototypes.T).abs() / 0.5
    least = near.topk(top, dim=-1).values[..., -1:]
    weights = near.masked_fill(near < least, -torch.inf).softmax(-1)
    each = torch.stack([seen["x"] @ d.T for d in dense], dim=-1)
    expected = plain + (each * weights[..., None, :]).sum(-1)
    assert torch.allclose(seen["y"], expected, atol=2e-4)


@torch.no_grad()
def test_copies_of_one_adapter_are_that_adapter_and_the_model_is_itself_again():
    model, adapter = tiny_model(), drawn("a", 0)
    before = model(input_ids=IDS).logits
    with attached(model, adapter.modules):
        alone = model(input_ids=IDS).logits
    with arrowed(model, [adapter, Adapter("b", adapter.modules)]) as routed:
        assert torch.allclose(routed(input_ids=IDS).logits, alone, atol=1e-4)
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("lora" in name for name, _ in model.named_modules())


def test_what_arrow_cannot_do():
    model, a = tiny_model(), drawn("a", 0)
    with pytest.raises(MergeError, match="got 1, expected 2 or more"), arrowed(model, [a]):
        pass
    with pytest.raises(MergeError, match="top is 0"), arrowed(model, [a, drawn("b", 1)], top=0):
        pass
    other = drawn("b", 1, endings=("q_proj",))
    words = "do not adapt the same modules"
    with pytest.raises(AdapterMismatch, match=words), arrowed(model, [a, other]):
        pass
    assert not any("lora" in name for name, _ in model.named_modules())
