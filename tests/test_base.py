"""Bases: fingerprints, loading from a folder, refusals."""

import hashlib
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mergeprobe.adapters.base import fingerprint, load_base, needs_unpacking, resolve_base
from mergeprobe.adapters.packaged import ALIASES, Packaged, Part, packaged_file
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


def test_a_packaged_file_is_joined_from_its_parts_and_verified(tmp_path, monkeypatch):
    parts = []
    for name, text in (("one", b"GGUF first "), ("two", b"and second")):
        package = tmp_path / "site" / f"tiny_{name}"
        (package / "data").mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "data" / "x.part").write_bytes(text)
        parts.append(Part(f"tiny-{name}", f"tiny_{name}", "data/x.part"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("MERGEPROBE_CACHE", str(tmp_path / "cache"))
    right = hashlib.sha256(b"GGUF first and second").hexdigest()
    said = []
    packaged = Packaged(tuple(parts), "1.0", "x.gguf", right, "Some Terms")
    file = packaged_file(packaged, said.append)
    assert file.read_bytes() == b"GGUF first and second"
    assert said == ["x.gguf comes under the Some Terms"]
    assert packaged_file(packaged, said.append) == file
    assert len(said) == 1  # it was there
    other = replace(packaged, sha256="0" * 64)
    with pytest.raises(BaseModelError, match="reinstall tiny-one tiny-two"):
        packaged_file(other, said.append)
    assert not (tmp_path / "cache" / "gguf" / ("0" * 16)).exists()  # nothing is left of it
    # a single part is used where it is installed
    only = hashlib.sha256(b"GGUF first ").hexdigest()
    alone = Packaged(tuple(parts[:1]), "1.0", "x.part", only, "Apache-2.0")
    assert packaged_file(alone, said.append) == tmp_path / "site" / "tiny_one" / "data" / "x.part"


def test_without_a_network_the_hubs_cache_is_asked_and_nothing_else(tmp_path, monkeypatch):
    def no_network(self, *args, **options):
        raise OSError("name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BaseModelError, match="'some/model' is no folder and not in the hub"):
        resolve_base("some/model")
    stored = tmp_path / "models--some--model"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text("1" * 40)
    snapshot = stored / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert resolve_base("some/model") == str(snapshot)


def test_a_hub_that_answers_leaves_the_name_as_it_is(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, *args, **options: None)
    assert resolve_base("some/model") == "some/model"
