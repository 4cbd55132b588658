"""Bad input, as a user meets it: status 1, one clear line, nothing half written."""

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from builders import tiny_adapter, tiny_probe
from cli_samples import ANSWERS, printed, refused, small_world
from safetensors.torch import load_file, save_file

from mergeprobe.adapters.checkpoint import CARD, CONFIG, WEIGHTS, read_adapter, write_adapter
from mergeprobe.artefact import read_json, write_json
from mergeprobe.capture.probe import read_probe, write_probe
from mergeprobe.errors import MergeProbeError

NAMES = sorted(ANSWERS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _no_progress(monkeypatch):
    """A slow machine would add lines of progress to what is compared here."""
    monkeypatch.setattr("mergeprobe.cli.show.QUIET_SECONDS", 1e9)


def copied(world, name, to):
    """A copy of an adapter folder that a test may damage."""
    return shutil.copytree(world.adapters / name, to / name)


def ours(path, seed=0, **options):
    """An adapter folder that carries our card: fingerprint and checksum."""
    adapter = tiny_adapter(seed, name=path.name, **{"fingerprint": "f" * 16} | options)
    return write_adapter(adapter, path)


def left(folder):
    """Everything in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def flip(path, at):
    """Flips one bit of a file; `at` counts from the end if negative."""
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(bytes(content))


# --- damaged files


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_weights(capsys, world, tmp_path, share):
    file = copied(world, "math", tmp_path) / WEIGHTS
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    adapters = (tmp_path / "math", world.adapters / "code")
    for verb in (("plan",), ("merge", "--out", tmp_path / "m"), ("signals",)):
        line = refused(capsys, *verb, *adapters)
        assert str(file) in line
        assert "truncated or damaged" in line
    assert left(tmp_path) == ["math"]


def test_a_flipped_bit_in_the_header_of_weights(capsys, world, tmp_path):
    file = copied(world, "math", tmp_path) / WEIGHTS
    size = struct.unpack("<Q", file.read_bytes()[:8])[0]
    for at in (1, 7, 8, 8 + size // 2):
        flip(file, at)
        line = refused(capsys, "merge", file.parent, world.adapters / "code", "--out", "m")
        assert str(tmp_path / "math") in line
        flip(file, at)


def test_a_flipped_bit_in_weights_of_ours(capsys, tmp_path):
    """Stock PEFT files carry no checksum; what we wrote does."""
    folders = [ours(tmp_path / name, seed) for seed, name in enumerate("ab")]
    flip(folders[0] / WEIGHTS, -3)
    assert "does not match the checksum" in refused(capsys, "plan", *folders)


# in the header's length, its provenance, its list of tensors, a digest, and the last tensor
@pytest.mark.parametrize(
    "where", [b"", b"scalings", b"planned_steps", b"schema", b"data_offsets", b'"digest":"', None]
)
def test_a_flipped_bit_in_a_probe(capsys, world, tmp_path, where):
    probe = shutil.copy(world.probes / "math.safetensors", tmp_path / "math.safetensors")
    at = -1 if where is None else probe.read_bytes().index(where) + len(where)
    flip(probe, at)
    line = refused(capsys, "signals", probe, world.probes / "code.safetensors")
    assert str(probe) in line
    assert "damaged" in line


def test_a_truncated_probe(capsys, world, tmp_path):
    probe = tmp_path / "math.safetensors"
    probe.write_bytes((world.probes / "math.safetensors").read_bytes()[:5000])
    assert "truncated or damaged" in refused(capsys, "forecast", world.adapters / "code", probe)


def test_a_safetensors_file_that_is_no_probe(capsys, world):
    line = refused(capsys, "plan", world.adapters / "math" / WEIGHTS, world.adapters / "code")
    assert "no probe" in line


def test_weights_as_a_pickle(capsys, world, tmp_path):
    folder = copied(world, "math", tmp_path)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "never loaded" in refused(capsys, "plan", folder, world.adapters / "code")


def test_a_config_that_is_no_json(capsys, world, tmp_path):
    folder = copied(world, "math", tmp_path)
    (folder / CONFIG).write_text('{"peft_type": "LORA",\n "r": }')
    line = refused(capsys, "plan", folder, world.adapters / "code")
    assert "not valid JSON (line 2" in line


# --- the wrong base


def test_an_adapter_of_another_shape(capsys, world, tmp_path):
    foreign = ours(tmp_path / "foreign")
    out = tmp_path / "p.safetensors"
    data = world.data / "math.jsonl"
    line = refused(capsys, "probe", foreign, "--base", world.base, "--data", data, "--out", out)
    assert "'foreign'" in line
    assert "was trained on base ffffffffffffffff" in line
    stock = ours(tmp_path / "stock", fingerprint=None)
    line = refused(capsys, "probe", stock, "--base", world.base, "--data", data, "--out", out)
    assert "another base" in line
    assert not out.exists()


def test_probes_of_two_bases(capsys, world, tmp_path):
    other = write_probe(tiny_probe(0, name="x"), tmp_path / "x.safetensors")
    line = refused(capsys, "plan", world.probes / "math.safetensors", other)
    assert "'math' was trained on base" in line
    assert "merge only one base" in line


def test_probes_on_another_base_than_given(capsys, world, tmp_path):
    for seed in range(2):
        write_probe(tiny_probe(seed, name=f"p{seed}"), tmp_path / f"p{seed}.safetensors")
    line = refused(capsys, "forecast", tmp_path, "--base", world.base)
    assert "probe 'p0' was taken on base ffffffffffffffff" in line


def test_adapters_that_name_two_bases(capsys, tmp_path):
    one = ours(tmp_path / "a", base="llama", fingerprint=None)
    two = ours(tmp_path / "b", 1, base="gemma", fingerprint=None)
    line = refused(capsys, "merge", one, two, "--out", tmp_path / "m")
    assert "'llama'" in line
    assert "'gemma'" in line
    assert not (tmp_path / "m").exists()


def test_a_deployment_on_another_base(capsys, world, tmp_path):
    ours(tmp_path / "in" / "a")
    plan = write_plan(tmp_path, [{"name": "a", "adapters": ["a"], "action": "route"}])
    printed(capsys, "apply", plan, "--adapters", tmp_path / "in", "--out", tmp_path / "d")
    shutil.copy(world.data / "math.jsonl", tmp_path / "a.jsonl")
    arguments = ("--adapters", tmp_path / "in", "--base", world.base, "--data", tmp_path)
    line = refused(capsys, "evaluate", tmp_path / "d", *arguments)
    assert "the deployment is for base ffffffffffffffff" in line


def test_a_base_that_is_not_there(capsys, world, tmp_path):
    none = tmp_path / "none"
    assert str(none) in refused(capsys, "forecast", world.probes, "--base", none)


# --- adapters that hold nothing usable


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "NaN or infinite entries in lora_B"),
        (float("inf"), "NaN or infinite entries in lora_B"),
        (0.0, "is zero everywhere"),
    ],
)
def test_nan_infinite_and_zero_adapters(capsys, world, tmp_path, value, words):
    folder = copied(world, "math", tmp_path)
    tensors = load_file(folder / WEIGHTS)
    for key, tensor in tensors.items():
        if "lora_B" in key:
            tensor.fill_(value)
    save_file(tensors, folder / WEIGHTS)
    out, other = tmp_path / "m", world.adapters / "code"
    data = ("--base", world.base, "--data", world.data / "math.jsonl", "--out", out)
    for arguments in (("plan", folder, other), ("merge", folder, other, "--out", out)):
        line = refused(capsys, *arguments)
        assert "'math'" in line
        assert words in line
    assert words in refused(capsys, "probe", folder, *data)
    assert left(tmp_path) == ["math"]


def test_no_module_in_common(capsys, tmp_path):
    one = ours(tmp_path / "a", modules=["q_proj"])
    two = ours(tmp_path / "b", 1, modules=["up_proj"])
    for verb in (("plan",), ("signals",), ("merge", "--out", tmp_path / "m")):
        line = refused(capsys, *verb, one, two)
        assert "'a'" in line
        assert "no module" in line
    assert left(tmp_path) == ["a", "b"]


def test_a_module_that_only_some_adapt_counts_as_zero_in_the_others(capsys, tmp_path):
    one, two = ours(tmp_path / "a"), ours(tmp_path / "b", 1, modules=["q_proj"])
    printed(capsys, "plan", one, two)
    printed(capsys, "merge", one, two, "--out", tmp_path / "m")
    merged, whole = read_adapter(tmp_path / "m"), read_adapter(one)
    assert merged.modules.keys() == whole.modules.keys()
    module = "model.layers.1.mlp.up_proj"
    assert torch.allclose(merged.modules[module].dense(), whole.modules[module].dense() / 2)


def test_unequal_ranks_merge(capsys, tmp_path):
    one, two = ours(tmp_path / "a", rank=2), ours(tmp_path / "b", 1, rank=5)
    printed(capsys, "plan", one, two)
    assert "rank 7" in printed(capsys, "merge", one, two, "--out", tmp_path / "m")
    parts = [read_adapter(folder).modules for folder in (one, two)]
    for module, update in read_adapter(tmp_path / "m").modules.items():
        mean = sum(part[module].dense() for part in parts) / 2
        assert torch.allclose(update.dense(), mean, atol=1e-6)


def test_a_gain_within_noise_is_undefined_and_says_so(capsys, world, tmp_path):
    """An adapter that learnt another answer gains a little on some items, loses it on others."""
    adapters, data = tmp_path / "in", tmp_path / "data"
    data.mkdir()
    for name in ("math", "code"):
        copied(world, name, adapters)
    shutil.copy(world.data / "math.jsonl", data / "math.jsonl")
    answers = [" KKKKKK", " QQQQ"] * 6
    rows = [{"prompt": f"What of {10 + n}?", "completion": c} for n, c in enumerate(answers)]
    (data / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = [{"name": n, "adapters": [n], "action": "route"} for n in ("math", "code")]
    plan = write_plan(tmp_path, groups)
    printed(capsys, "apply", plan, "--adapters", adapters, "--out", tmp_path / "d")
    arguments = ("--adapters", adapters, "--base", world.base, "--data", data)
    found = json.loads(printed(capsys, "evaluate", tmp_path / "d", *arguments, "--json"))
    rows = {row["name"]: row for row in found["adapters"]}
    assert rows["code"]["measured"] is None
    assert rows["code"]["note"].startswith("undefined: the adapter alone gained")
    assert found["worst_adapter"] == "math"
    assert "undefined" in printed(capsys, "evaluate", tmp_path / "d", *arguments)


# --- data files


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n', "line 2: not valid JSON"),
        (b'{"prompt": "a", "completion": "b"}\n\n[1]\n', "line 3: got a list"),
        (b'{"prompt": "a"}\n', "line 1: no 'completion'"),
        (b'{"prompt": "a", "completion": ""}\n', "line 1: 'completion' is ''"),
        (b'{"prompt": 7, "completion": "b"}\n', "line 1: 'prompt' is 7"),
        (b'{"prompt": "\xff", "completion": "b"}\n', "line 1: not UTF-8"),
    ],
)
def test_data_files_name_the_line(capsys, world, tmp_path, content, words):
    data, out = tmp_path / "data.jsonl", tmp_path / "p.safetensors"
    data.write_bytes(content)
    arguments = ("--base", world.base, "--data", data, "--out", out)
    line = refused(capsys, "probe", world.adapters / "math", *arguments)
    assert str(data) in line
    assert words in line
    assert left(tmp_path) == ["data.jsonl"]


def test_an_item_that_is_too_long(capsys, world, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "a" * 3000, "completion": "b"}))
    arguments = ("--base", world.base, "--data", data, "--out", tmp_path / "p.safetensors")
    line = refused(capsys, "probe", world.adapters / "math", *arguments)
    assert "tokens, at most 1024" in line
    assert left(tmp_path) == ["data.jsonl"]


def test_a_deployments_data_that_is_not_there(capsys, world, tmp_path):
    plan = write_plan(tmp_path, [{"name": "math", "adapters": ["math"], "action": "route"}])
    printed(capsys, "apply", plan, "--adapters", world.adapters, "--out", tmp_path / "d")
    arguments = ("--adapters", world.adapters, "--base", world.base, "--data", tmp_path)
    line = refused(capsys, "evaluate", tmp_path / "d", *arguments)
    assert "math.jsonl' does not exist" in line


# --- unknown words


def test_unknown_method(capsys, world, tmp_path):
    line = refused(capsys, "merge", world.adapters, "--method", "blend", "--out", tmp_path / "m")
    assert "unknown merge method 'blend'; known are mean" in line
    line = refused(capsys, "forecast", world.adapters, "--method", "blend")
    assert "'blend'" in line
    arguments = ("--method", "mean", "--density", "0.3", "--out", tmp_path / "m")
    assert "'mean' has no option 'density'" in refused(capsys, "merge", world.adapters, *arguments)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("action", "words"),
    [("melt", "got 'melt'"), ("isolate", "needs a method"), ("logits", "needs a method")],
)
def test_unknown_action(capsys, world, tmp_path, action, words):
    group = {"name": "math", "adapters": ["math"], "action": action}
    plan = write_plan(tmp_path, [group])
    out = tmp_path / "d"
    line = refused(capsys, "apply", plan, "--adapters", world.adapters, "--out", out)
    assert words in line
    assert not out.exists()


def write_plan(folder, groups, **more):
    names = [name for group in groups for name in group["adapters"]]
    plan = {"adapters": [{"name": name} for name in names], "groups": groups, **more}
    write_json(folder / "plan.json", plan)
    return folder / "plan.json"


# --- outputs that are there


def test_an_output_that_is_there_is_kept_and_force_replaces_it(capsys, world, tmp_path):
    plan = tmp_path / "plan.json"
    printed(capsys, "plan", world.adapters, "--out", plan)
    base, data = ("--base", world.base), ("--data", world.data / "math.jsonl")
    verbs = {
        "plan": ("plan", world.adapters),
        "signals": ("signals", world.adapters),
        "probe": ("probe", world.adapters / "math", *base, *data),
        "merge": ("merge", world.adapters),
        "apply": ("apply", plan, "--adapters", world.adapters),
    }
    for name, arguments in verbs.items():
        out = tmp_path / f"{name}.out"
        if name in ("merge", "apply"):
            out.mkdir()
            mine = out / "mine.txt"
        else:
            mine = out
        mine.write_text("kept")
        line = refused(capsys, *arguments, "--out", out)
        assert f"'{out}' already exists" in line
        assert "--force" in line
        assert mine.read_text() == "kept"
        printed(capsys, *arguments, "--out", out, "--force")
        assert not mine.exists() or mine.read_bytes() != b"kept"
    assert not [name for name in left(tmp_path) if name.startswith(".")]


def test_a_demo_never_takes_a_foreign_folder(capsys, tmp_path):
    (tmp_path / "thesis.txt").write_text("kept")
    for arguments in ((), ("--force",)):
        line = refused(capsys, "demo", "--out", tmp_path, *arguments)
        assert "no run of ours" in line
    assert left(tmp_path) == ["thesis.txt"]


def test_an_output_below_a_file(capsys, world, tmp_path):
    (tmp_path / "file").write_text("kept")
    line = refused(capsys, "plan", world.adapters, "--out", tmp_path / "file" / "plan.json")
    assert str(tmp_path / "file") in line
    assert "File exists" in line
    assert left(tmp_path) == ["file"]


# --- killed, or no space


@pytest.mark.parametrize("what", ["folder", "file"])
@pytest.mark.parametrize("before", [False, True])
def test_killed_while_writing(tmp_path, what, before):
    """kill -9 in the middle leaves nothing under the final name, or what was there before."""
    out = tmp_path / "out"
    if before:
        mine = out / "mine.txt" if what == "folder" else out
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("kept")
    target = "temporary / 'half'" if what == "folder" else "temporary"
    code = (
        "import os, signal, sys\n"
        f"from mergeprobe.artefact import atomic_{what}\n"
        f"with atomic_{what}(sys.argv[1], force=True) as temporary:\n"
        f"    ({target}).write_text('half of it')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    if before:
        assert mine.read_text() == "kept"
        assert not (out / "half").exists()
    else:
        assert not out.exists()


def small_disk(limit):
    """Files of this process may grow to `limit` bytes: what a full disk does, to one process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@pytest.mark.parametrize("verb", ["merge", "apply", "plan", "signals", "probe"])
def test_no_space_while_writing(world, tmp_path, verb):
    plan = write_plan(tmp_path, [{"name": "math", "adapters": ["math"], "action": "route"}])
    base = ("--base", world.base, "--data", world.data / "math.jsonl")
    arguments = {
        "merge": ("merge", world.adapters),
        "apply": ("apply", plan, "--adapters", world.adapters),
        "plan": ("plan", world.adapters),
        "signals": ("signals", world.adapters),
        "probe": ("probe", world.adapters / "math", *base),
    }[verb]
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "mergeprobe", *map(str, arguments), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: small_disk(500),
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("p")]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"mergeprobe: '{out}': ")
    # a streamed table's writer does not pass the system's own words on
    assert "File too large" in lines[0] or (verb == "signals" and "cannot be written" in lines[0])
    assert left(tmp_path) == ["plan.json"]


# --- plans


def test_a_plan_for_other_adapters(capsys, world, tmp_path):
    out = tmp_path / "d"
    group = {"name": "g", "adapters": ["math", "poetry"], "action": "merge", "method": "mean"}
    plan = write_plan(tmp_path, [group])
    line = refused(capsys, "apply", plan, "--adapters", world.adapters, "--out", out)
    assert "the plan is for other adapters: ['poetry'] are missing" in line
    value = read_json(plan, MergeProbeError)
    value["adapters"] = [{"name": "math", "weights_sha256": "0" * 64}, {"name": "code"}]
    value["groups"][0]["adapters"] = ["math", "code"]
    write_json(plan, value)
    line = refused(capsys, "apply", plan, "--adapters", world.adapters, "--out", out)
    assert "other weights of 'math'" in line
    assert not out.exists()


def test_a_plan_for_another_base(capsys, tmp_path):
    folder = ours(tmp_path / "a")
    groups = [{"name": "a", "adapters": ["a"], "action": "route"}]
    plan = write_plan(tmp_path, groups, base_fingerprint="0" * 16)
    line = refused(capsys, "apply", plan, folder, "--out", tmp_path / "d")
    assert "the plan is for base 0000000000000000" in line
    assert left(tmp_path) == ["a", "plan.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"groups": []}, "stand in no group"),
        ({"colour": 1}, "unknown field 'colour'"),
        ({"adapters": []}, "not among the plan's adapters"),
        ({"route": {"by": "prompt"}}, "routes by prompt, so a router has to be made: give --base"),
    ],
)
def test_a_malformed_plan(capsys, world, tmp_path, change, words):
    plan = write_plan(tmp_path, [{"name": "math", "adapters": ["math"], "action": "route"}])
    write_json(plan, read_json(plan, MergeProbeError) | change)
    out = tmp_path / "d"
    line = refused(capsys, "apply", plan, "--adapters", world.adapters, "--out", out)
    assert words in line
    assert not out.exists()


def test_a_plan_that_is_no_json_or_not_there(capsys, world, tmp_path):
    (tmp_path / "plan.json").write_text("groups: []")
    arguments = ("--adapters", world.adapters, "--out", tmp_path / "d")
    assert "not valid JSON (line 1" in refused(capsys, "apply", tmp_path / "plan.json", *arguments)
    assert "does not exist" in refused(capsys, "apply", tmp_path / "none.json", *arguments)


@pytest.mark.parametrize("floor", ["1.5", "-0.1", "nan"])
def test_a_floor_that_is_no_share(capsys, world, floor):
    line = refused(capsys, "plan", world.adapters, "--min-retention", floor)
    assert "min_retention" in line
    assert "expected 0 to 1" in line


def test_one_adapter_is_no_plan(capsys, world):
    for verb in ("plan", "forecast"):
        assert "at least two adapters" in refused(capsys, verb, world.adapters / "math")


# --- newer schemas


def test_newer_schemas(capsys, world, tmp_path):
    plan = write_plan(tmp_path, [{"name": "a", "adapters": ["a"], "action": "route"}])
    folder = ours(tmp_path / "in" / "a")
    printed(capsys, "apply", plan, folder, "--out", tmp_path / "d")
    words = "schema 99; this mergeprobe reads up to 1: upgrade mergeprobe"

    newer = write_plan(tmp_path, [], schema_version=99)
    assert words in refused(capsys, "apply", newer, folder, "--out", tmp_path / "e")

    routing = tmp_path / "d" / "routing.json"
    write_json(routing, read_json(routing, MergeProbeError) | {"schema": 99})
    base = ("--base", world.base, "--data", world.data)
    assert words in refused(capsys, "evaluate", tmp_path / "d", "--adapters", folder, *base)

    write_json(folder / CARD, read_json(folder / CARD, MergeProbeError) | {"schema": 99})
    assert words in refused(capsys, "plan", folder, ours(tmp_path / "b"))

    write_json(tmp_path / "run" / "run.json", {"schema_version": 99})
    assert words in refused(capsys, "evaluate", tmp_path / "run")
    assert words in refused(capsys, "report", tmp_path / "run")
    assert words in refused(capsys, "demo", "--out", tmp_path / "run")


def test_a_newer_probe(capsys, world, tmp_path):
    file = tmp_path / "math.safetensors"
    content = (world.probes / "math.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    meta = json.loads(header["__metadata__"]["mergeprobe"]) | {"schema": 99}
    header["__metadata__"]["mergeprobe"] = json.dumps(meta)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    assert "schema 99" in refused(capsys, "signals", file)


# --- names


@pytest.mark.parametrize("name", ["two words", "größe – データ", "[red]x :smile:", "a'b"])
def test_odd_names_go_all_the_way(capsys, world, tmp_path, name):
    adapters, data = tmp_path / "in put", tmp_path / "data"
    data.mkdir()
    shutil.copytree(world.adapters / "math", adapters / name)
    shutil.copytree(world.adapters / "code", adapters / "code")
    shutil.copy(world.data / "math.jsonl", data / f"{name}.jsonl")
    shutil.copy(world.data / "code.jsonl", data / "code.jsonl")
    plan, out = tmp_path / f"plan of {name}.json", tmp_path / f"out {name}"
    assert f"'{name}'" in printed(capsys, "plan", adapters, "--out", plan, "--min-retention", "0")
    assert name in printed(capsys, "apply", plan, "--adapters", adapters, "--out", out)
    base = ("--base", world.base, "--data", data)
    probe = tmp_path / f"{name}.safetensors"
    item = ("--base", world.base, "--data", data / "code.jsonl")
    printed(capsys, "probe", adapters / name, *item, "--out", probe)
    assert read_probe(probe).name == name
    found = json.loads(printed(capsys, "evaluate", out, "--adapters", adapters, *base, "--json"))
    assert {row["name"] for row in found["adapters"]} == {name, "code"}
    assert name in printed(capsys, "evaluate", out, "--adapters", adapters, *base)
    assert name in printed(capsys, "doctor", adapters)


@pytest.mark.parametrize("name", ["../evil", "a/b", "..", ".hidden", "a\\b", "a\nb"])
def test_names_that_would_leave_the_folder(capsys, world, tmp_path, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    group = {"name": name, "adapters": ["math"], "action": "route"}
    plan = write_plan(inside, [group])
    arguments = ("--adapters", world.adapters, "--out", inside / "d")
    line = refused(capsys, "apply", plan, *arguments)
    assert "cannot name a group or adapter" in line
    plan = write_plan(inside, [{"name": "g", "adapters": [name], "action": "route"}])
    assert "cannot name a group or adapter" in refused(capsys, "apply", plan, *arguments)
    probe = replace(read_probe(world.probes / "math.safetensors"), name=name)
    write_probe(probe, inside / "p.safetensors")
    line = refused(capsys, "plan", inside / "p.safetensors", world.probes / "code.safetensors")
    assert "cannot name a group or adapter" in line
    assert left(tmp_path) == ["inside"]
    assert left(inside) == ["p.safetensors", "plan.json"]


def test_a_deployment_that_points_outside(capsys, world, tmp_path):
    plan = write_plan(tmp_path, [{"name": "math", "adapters": ["math"], "action": "route"}])
    printed(capsys, "apply", plan, "--adapters", world.adapters, "--out", tmp_path / "d")
    routing = tmp_path / "d" / "routing.json"
    text = routing.read_text().replace('"folder": "math"', '"folder": "../../x"')
    routing.write_text(text)
    arguments = ("--adapters", world.adapters, "--base", world.base, "--data", world.data)
    assert "malformed" in refused(capsys, "evaluate", tmp_path / "d", *arguments)


def test_two_adapters_of_one_name(capsys, world, tmp_path):
    again = copied(world, "math", tmp_path)
    for verb in (("merge", "--out", tmp_path / "m"), ("plan",), ("signals",)):
        line = refused(capsys, *verb, world.adapters / "math", again)
        assert "'math'" in line
    assert left(tmp_path) == ["math"]


def test_sources_that_are_not_there(capsys, world, tmp_path):
    assert "none" in refused(capsys, "plan", tmp_path / "none", world.adapters)
    line = refused(capsys, "signals", tmp_path)
    assert "holds neither an adapter nor a probe" in line
    assert "neither a run" in refused(capsys, "evaluate", tmp_path)
    assert "does not exist" in refused(capsys, "report", tmp_path)
