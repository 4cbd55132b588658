"""`mergeprobe probe` and `doctor` on checkpoints whose update depends on the base."""

import json

import peft
import pytest
import torch
from cli_samples import command, data_file, printed, refused
from peft import get_peft_model
from tiny_base import tiny_model, write_tiny_base

from mergeprobe.capture import read_probe

LINEARS = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "dora": ("LoraConfig", {"r": 4, "use_dora": True}, "DoRA"),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}, "IA³"),
    "oft": ("OFTConfig", {"oft_block_size": 4}, "OFT"),
    "vera": ("VeraConfig", {"r": 3}, "VeRA"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """base, data.jsonl, one checkpoint of each kind, and a fine-tuned model's folder."""
    root = tmp_path_factory.mktemp("types")
    write_tiny_base(root / "base")
    data_file(root / "data.jsonl", " 7", 0)
    for kind, (config, options, _) in CONFIGS.items():
        torch.manual_seed(0)
        options = {"target_modules": LINEARS, "task_type": "CAUSAL_LM"} | options
        model = get_peft_model(tiny_model(), getattr(peft, config)(**options))
        moved(p for p in model.parameters() if p.requires_grad)
        model.save_pretrained(str(root / "adapters" / kind))
    model = tiny_model()
    moved([model.model.layers[1].mlp.up_proj.weight])
    model.save_pretrained(root / "full")
    return root


def moved(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("kind", CONFIGS)
def test_doctor_asks_for_the_base_in_one_line_and_takes_it(kind, capsys, folders):
    adapter = folders / "adapters" / kind
    status, out, err = command(capsys, "doctor", adapter)
    assert status == 1
    assert err == f"mergeprobe: 1 of 1 adapters cannot be merged: '{kind}'\n"
    (line,) = [line for line in out.splitlines() if "depends on the base model" in line]
    assert f"is {CONFIGS[kind][2]}, whose update" in line
    assert "pass the base with --base" in line
    found = json.loads(printed(capsys, "doctor", adapter, "--base", folders / "base", "--json"))
    assert found["findings"][0]["problem"] is None
    assert found["findings"][0]["norm"] > 0


def test_doctor_compares_types_and_reads_a_whole_model(capsys, folders):
    found = json.loads(
        printed(capsys, "doctor", folders / "adapters", "--base", folders / "base", "--json")
    )
    assert found["groups"] == [sorted(CONFIGS)]
    full = json.loads(
        printed(capsys, "doctor", folders / "full", "--base", folders / "base", "--json")
    )
    assert full["findings"][0]["modules"] == 1


@pytest.mark.parametrize(("kind", "exact"), [("dora", False), ("vera", True), ("full", False)])
def test_probe_says_the_type_and_what_the_cut_lost(kind, exact, capsys, folders, tmp_path):
    adapter = folders / "full" if kind == "full" else folders / "adapters" / kind
    common = ("--base", folders / "base", "--data", folders / "data.jsonl")
    out = tmp_path / "one.safetensors"
    facts = json.loads(printed(capsys, "probe", adapter, *common, "--out", out, "--json"))
    probe = read_probe(out)
    for key in ("peft_type", "exact", "truncation_error"):
        assert facts[key] == probe.meta[key]
    assert facts["exact"] is exact
    assert (facts["truncation_error"] > 1e-6) is not exact
    said = printed(capsys, "probe", adapter, *common, "--out", tmp_path / "two.safetensors")
    assert facts["peft_type"] in said
    assert ("cut to rank 32 (loses" in said) is not exact
    whole = printed(
        capsys, "probe", adapter, *common, "--out", tmp_path / "3.safetensors", "--rank", "96"
    )
    assert "loses" not in whole


def test_what_cannot_be_probed_is_one_line(capsys, folders, tmp_path):
    common = ("--data", folders / "data.jsonl", "--out", tmp_path / "x.safetensors")
    status, _, err = command(capsys, "probe", folders / "adapters" / "dora", *common)
    assert status == 2, "--base is needed for every probe"
    assert "--base" in err
    base = ("--base", folders / "base")
    assert "is not a folder" in refused(capsys, "probe", tmp_path / "no", *base, *common)
    assert "nothing was trained" in refused(capsys, "probe", folders / "base", *base, *common)
    model = tiny_model()
    moved([model.model.norm.weight])
    model.save_pretrained(tmp_path / "norm")
    said = refused(capsys, "probe", tmp_path / "norm", *base, *common)
    assert "also trained 'model.norm.weight', which is no Linear's weight" in said
    assert not (tmp_path / "x.safetensors").exists()
