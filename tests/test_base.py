"""Bases: fingerprints, loading from a folder, refusals."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mergeprobe.adapters.base import (
    ALIASES,
    fingerprint,
    load_base,
    needs_unpacking,
    resolve_base,
)
from mergeprobe.errors import BaseModelError
from tests.tiny_base import tiny_model, write_tiny_base


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fingerprint_is_the_same_in_every_dtype(dtype):
    assert fingerprint(tiny_model().to(dtype)) == fingerprint(tiny_model())


def test_fingerprint_tells_bases_apart():
    assert fingerprint(tiny_model(0)) != fingerprint(tiny_model(1))
    tuned = tiny_model(0)
    generator = torch.Generator().manual_seed(0)
    for weight in tuned.parameters():  # a fine-tune that moves weights by a hundredth
        noise = torch.randn(weight.shape, generator=generator)
        weight.data += 0.01 * weight.data.std() * noise if weight.ndim > 1 else 0.0
    assert fingerprint(tuned) != fingerprint(tiny_model(0))


def test_fingerprint_does_not_see_the_adapter():
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear"))
    assert fingerprint(adapted) == fingerprint(tiny_model())


def test_a_folder_loads(tmp_path):
    base = load_base(write_tiny_base(tmp_path / "base"))
    assert base.fingerprint == fingerprint(tiny_model())
    assert base.model.dtype == torch.float32 or base.device.type == "cuda"
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.tokenizer.decode(base.tokenizer("What is 2 + 2?")["input_ids"]) == "What is 2 + 2?"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nothing.gguf", "does not exist"),
        ("./nothing", "does not exist"),
        ("no-such-model-anywhere", "expected a hub id"),
    ],
)
def test_a_missing_base_is_one_clear_line(spec, said):
    with pytest.raises(BaseModelError) as caught:
        load_base(spec)
    assert said in str(caught.value)
    assert spec in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(BaseModelError, match=r"config\.json"):
        resolve_base(tmp_path)


def test_a_damaged_gguf_is_one_clear_line(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF but no model")
    with pytest.raises(BaseModelError, match=r"x\.gguf"):
        load_base(tmp_path / "x.gguf")
    assert ALIASES["smollm2-135m-instruct-q4"].licence == "Apache-2.0"


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(BaseModelError, match="float31"):
        load_base(tmp_path, dtype="float31")


def test_only_packed_bases_need_unpacking(tmp_path):
    assert not needs_unpacking(write_tiny_base(tmp_path / "base"))
    assert needs_unpacking("smollm2-135m-instruct-q4"), "the tests' cache is empty"
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert needs_unpacking(tmp_path / "x.gguf")
