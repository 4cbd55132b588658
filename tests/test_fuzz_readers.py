"""Damaged and hostile files: whatever the readers of adapters and probes are given, they read it or
raise one of our errors, in one line, with memory bounded by what they were given.

100,000 files; `python benchmarks/fuzz_readers.py --files 10000000` is the same with more.
"""

import json
import os
import shutil
import struct
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from benchmarks.fuzz_readers import MODULE, fast_folder, fuzz, samples
from mergeprobe.adapters.adapter import CONFIG, PREFIX, WEIGHTS
from mergeprobe.adapters.checkpoint import read_adapter
from mergeprobe.adapters.variants import PEFT_TYPES
from mergeprobe.capture.probe import read_probe
from mergeprobe.errors import AdapterError, MergeProbeError, ProbeError

FILES = 100_000
# the files are of some kilobytes; the rest is the allocator's own
ROOM = 48 << 20
SAMPLES = {sample.name: sample for sample in samples()}


def _fuzz(name, count, seed):
    torch.set_num_threads(1)
    folder = fast_folder()
    try:
        return name, fuzz(SAMPLES[name], count, seed, folder)
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def outcomes():
    """Every sample's outcome; in processes of their own, as many as there are cores."""
    each = -(-FILES // len(SAMPLES))
    names = sorted(SAMPLES)
    context = get_context("fork")
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=context) as pool:
        return dict(pool.map(_fuzz, names, [each] * len(names), [0] * len(names)))


def test_there_is_a_sample_of_every_reader():
    assert SAMPLES.keys() == {*PEFT_TYPES, "extras", "ours", "probe", "model"}


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_only_our_errors_come_out(outcomes, name):
    outcome = outcomes[name]
    assert outcome.failures == []
    refused = sum(outcome.counts.values()) - outcome.counts["read"]
    # a mutation that nothing notices is no test, one that is always refused at the door neither
    assert refused > 0.2 * sum(outcome.counts.values())
    assert outcome.counts["read"] > 0.05 * sum(outcome.counts.values())


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_memory_stays_bounded(outcomes, name):
    assert outcomes[name].grown < ROOM


def test_the_fuzzer_finds_a_reader_that_fails(tmp_path):
    """The check can fail: a reader that lets a KeyError out is caught at it."""
    sample = SAMPLES["LORA"]

    def careless(folder):
        adapter = read_adapter(folder)
        return adapter.modules[MODULE], json.loads((folder / CONFIG).read_text())["bias"]

    found = fuzz(type(sample)("careless", sample.files, careless), 800, 0, tmp_path)
    assert any("KeyError" in what for _, _, what in found.failures)


# --- by hand -------------------------------------------------------------------------------------


def written(folder, name, **config):
    for file, whole in SAMPLES[name].files.items():
        (folder / file).write_bytes(whole)
    if config:
        text = json.loads(SAMPLES[name].files[CONFIG]) | config
        (folder / CONFIG).write_text(json.dumps(text))
    return folder


def header_of(entries, data=b""):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "entries",
    [
        {"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**82]}},
        {"x": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64]}},
        {"x": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}},
        {"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 0]}},
    ],
)
def test_a_huge_declared_shape_is_refused_before_anything_is_allocated(entries, tmp_path):
    written(tmp_path, "LORA")
    (tmp_path / WEIGHTS).write_bytes(header_of(entries, b"\0" * 16))
    with pytest.raises(AdapterError, match="truncated or damaged"):
        read_adapter(tmp_path)
    (tmp_path / "p.safetensors").write_bytes(header_of(entries, b"\0" * 16))
    with pytest.raises(ProbeError, match="truncated or damaged"):
        read_probe(tmp_path / "p.safetensors")


@pytest.mark.parametrize("kind", sorted(PEFT_TYPES))
def test_shapes_of_no_size_and_any_side_are_refused(kind, tmp_path):
    """safetensors takes (10¹², 0): it declares no bytes, but what is built from it would."""
    written(tmp_path, kind)
    length = struct.unpack("<Q", SAMPLES[kind].files[WEIGHTS][:8])[0]
    header = json.loads(SAMPLES[kind].files[WEIGHTS][8 : 8 + length])
    for shape in ([10**12, 0], [0, 10**12], [0]):
        entries = {
            key: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
            for key in header
            if key != "__metadata__"
        }
        (tmp_path / WEIGHTS).write_bytes(header_of(entries))
        with pytest.raises(MergeProbeError):
            SAMPLES[kind].read(tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"r": 10**400}, "r is 1000.*expected a number"),
        ({"lora_alpha": 10**400, "alpha_pattern": {}}, "lora_alpha is 1000"),
        ({"rank_pattern": {"a{99999999999}": 3}, "r": 7}, "has rank 2 in the weights but 7"),
        ({"rank_pattern": {"(" * 5000: 3}, "r": 7}, "has rank 2 in the weights but 7"),
        ({"alpha_pattern": {"proj": [1]}}, r"lora_alpha is \[1\]"),
        ({"peft_type": "LO\nRA"}, r"its PEFT type is LO\\nRA"),
        ({"peft_type": "\x1b[2J"}, r"its PEFT type is \\x1b\[2J"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_hostile_configs(config, reason, tmp_path):
    with pytest.raises(AdapterError, match=reason) as caught:
        read_adapter(written(tmp_path, "LORA", **config))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["²", "layers.²", "9" * 5000, "a\nb", "layers..proj", "\u0661"])
def test_odd_module_names_are_names(name, tmp_path):
    """Superscripts are digits to str.isdigit, and 5,000 digits are no int: sorting took both."""
    written(tmp_path, "LORA")
    whole = SAMPLES["LORA"].files[WEIGHTS]
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    renamed = {key.replace(MODULE, name): entry for key, entry in header.items()}
    (tmp_path / WEIGHTS).write_bytes(header_of(renamed, whole[8 + length :]))
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    assert list(read_adapter(tmp_path).modules) == [name]
    assert PREFIX + MODULE in str(header)


def test_a_folder_where_a_file_should_be_and_no_permission(tmp_path):
    written(tmp_path, "LORA")
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(AdapterError):
        read_adapter(tmp_path)
    (tmp_path / CONFIG).unlink()
    (tmp_path / CONFIG).mkdir()
    with pytest.raises(AdapterError, match="cannot be read"):
        read_adapter(tmp_path)


def test_a_probe_sealed_over_parts_that_do_not_fit(tmp_path):
    """The digests are right; the parts are not."""
    from dataclasses import replace

    from mergeprobe.capture.probe import Moment, write_probe
    from mergeprobe.lowrank import LowRank

    file = tmp_path / "p.safetensors"
    file.write_bytes(SAMPLES["probe"].files["p.safetensors"])
    probe = read_probe(file)
    update = probe.updates[MODULE]
    assert probe.drift is not None
    assert probe.calibration is not None
    unsound = {
        "scaling": {"updates": {MODULE: LowRank(update.B, update.A, "x")}},
        "inputs of": {"inputs": {MODULE: Moment(torch.ones(7, 2), 0.1)}},
        "outputs of": {"outputs": {MODULE: Moment(torch.ones(7, 2), 0.1)}},
        "tail of": {"inputs": {MODULE: Moment(probe.inputs[MODULE].factor, "x")}},
        "pair of factors": {"updates": {MODULE: LowRank(update.B.to(torch.int8), update.A)}},
        "gradient of": {"gradient": {MODULE: torch.ones(3)}},
        "weight norm": {"weight_norms": {MODULE: None}},
        "distributions": {"drift": replace(probe.drift, tail=torch.ones(9))},
        "drift is": {"drift": replace(probe.drift, hidden=torch.ones(2))},
        "masks": {"calibration": replace(probe.calibration, ids=torch.ones(9, 9).long())},
        "losses": {"calibration": replace(probe.calibration, loss=torch.ones(9))},
    }
    for reason, changes in unsound.items():
        write_probe(replace(probe, **changes), tmp_path / "unsound.safetensors")
        with pytest.raises(ProbeError, match=reason):
            read_probe(tmp_path / "unsound.safetensors")
