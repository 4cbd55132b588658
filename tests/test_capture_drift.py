"""The base's side of the probe set: computed once for everything it depends on, never confused."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mergeprobe.adapters.base import fingerprint
from mergeprobe.capture import take_probe
from mergeprobe.capture.drift import measure_drift
from mergeprobe.capture.model import as_base, measuring
from tests.tiny_base import tiny_model, tiny_tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGEPROBE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "probe_set"


def adapted(change=lambda model: None):
    base = tiny_model()
    change(base)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    return model


def drift(model):
    with measuring(model):
        return measure_drift(
            model, tiny_tokenizer(), base=as_base(model), fingerprint=fingerprint(model)
        )


def counted(model):
    runs = []
    handle = model.get_base_model().lm_head.register_forward_hook(lambda *_: runs.append(1))
    found = drift(model)
    handle.remove()
    return len(runs), found


def autocast(model):
    plain = model.forward

    def forward(*args, **kwargs):  # as accelerate wraps it: float32 comes out
        with torch.autocast("cpu", torch.bfloat16):
            out = plain(*args, **kwargs)
        out.logits = out.logits.float()
        return out

    model.forward = forward


def test_the_base_runs_once(cache):
    runs, first = counted(adapted())
    again, second = counted(adapted())
    assert (runs, again) == (2, 1)
    assert torch.equal(first.hidden, second.hidden)
    assert len(list(cache.iterdir())) == 1


CHANGES = {
    "the same signs, other values": lambda model: model.model.norm.weight.data.mul_(1.5),
    "rounded to bfloat16": lambda model: [
        p.data.copy_(p.data.bfloat16().float()) for p in model.parameters()
    ],
    "another precision": lambda model: model.bfloat16(),
    "another configuration": lambda model: setattr(model.config, "rms_norm_eps", 1e-2),
    "eager attention": lambda model: model.set_attn_implementation("eager"),
    "autocast": autocast,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_base_depends_on_is_in_the_name(change, cache):
    """The fingerprint may be the same; what is cached is not mistaken for it."""
    drift(adapted())
    assert fingerprint(adapted()) == fingerprint(adapted(CHANGES[change]))
    runs, found = counted(adapted(CHANGES[change]))
    assert runs == 2
    assert len(list(cache.iterdir())) == 2
    cached = drift(adapted(CHANGES[change]))
    assert torch.equal(found.hidden, cached.hidden)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_entry_is_computed_again(damage, cache):
    _, before = counted(adapted())
    (entry,) = cache.iterdir()
    data = bytearray(entry.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    else:
        data[-1] ^= 1
    entry.write_bytes(bytes(data))
    runs, after = counted(adapted())
    assert runs == 2
    assert torch.equal(before.hidden, after.hidden)
    assert counted(adapted())[0] == 1, "and kept again"


def test_a_cache_that_cannot_be_written_is_said_and_harms_nothing(tmp_path, monkeypatch):
    Path(tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MERGEPROBE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written"):
        runs, found = counted(adapted())
    assert runs == 2
    assert found.hidden.abs().max() > 0


def test_a_packed_base_gives_a_probe_without_a_fingerprint(cache):
    """4-bit weights are stored as integers: nothing is cached, and the base is unverified."""
    model = adapted()
    packed = torch.zeros(4, 4, dtype=torch.uint8)
    model.get_base_model().model.layers[0].register_parameter(
        "packed", torch.nn.Parameter(packed, requires_grad=False)
    )
    probe = take_probe(model, name="x", tokenizer=tiny_tokenizer())
    assert probe.meta["base_fingerprint"] is None
    assert probe.drift is not None
    assert not cache.exists()
