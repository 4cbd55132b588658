"""mergeprobe merge: every rule, its options, weights by part, configs, data, whole models."""

import json
import shutil

import pytest
import torch
import yaml
from cli_samples import ANSWERS, command, printed, refused, small_world
from safetensors.torch import load_file

from mergeprobe.adapters.adapter import CARD, CARD_SCHEMA
from mergeprobe.adapters.checkpoint import read_adapter
from mergeprobe.compose.merge import METHODS, merge

NAMES = sorted(ANSWERS)
QUICK = {"lorahub": {"budget": 3}, "adamerging": {"steps": 2}, "wudi": {"steps": 3}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _no_progress(monkeypatch):
    monkeypatch.setattr("mergeprobe.cli.show.QUIET_SECONDS", 1e9)


def adapters(world):
    return [read_adapter(world.adapters / name) for name in NAMES]


def same(folder, merged, tolerance=1e-6):
    found = read_adapter(folder).modules
    for module, update in merged.adapter.modules.items():
        assert torch.allclose(found[module].dense(), update.dense(), atol=tolerance), module


@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_every_method_can_be_given(capsys, world, tmp_path, name):
    row, out = METHODS[name], tmp_path / name
    options = {**row.defaults, **QUICK.get(name, {})}
    given = [word for key, value in options.items() for word in ("--option", f"{key}={value}")]
    data = ("--probes", world.probes) if row.needs else ()
    base = ("--base", world.base) if "batches" in row.needs else ()
    arguments = ("--method", name, "--rank", "2", *given, *data, *base, "--out", out, "--json")
    found = json.loads(printed(capsys, "merge", world.adapters, *arguments))
    card = json.loads((out / "mergeprobe.json").read_text())
    assert (found["method"], found["merged_from"], found["rank"]) == (name, NAMES, 2)
    assert (card["method"], card["options"]) == (name, pytest.approx(options))
    assert card["certificate"]["total"] == found["error"]
    assert set(found["modules"]) == set(read_adapter(out).modules)


def test_named_options_are_short_for_options(capsys, world, tmp_path):
    for out, words in (("a", ("--density", "0.3")), ("b", ("-o", "density=0.3"))):
        printed(
            capsys, "merge", world.adapters, "--method", "ties", *words, "--out", tmp_path / out
        )
        same(tmp_path / out, merge(adapters(world), "ties", density=0.3))


def test_weights_by_part_space_seed_and_scaling(capsys, world, tmp_path):
    words = (
        "--method", "dare_ties", "--weights", "1,0.5,1", "--weights", "mlp=2,1,1", "--rank", "3",
        "--space", "core", "--seed", "7", "--scaling", "0.5", "--exact-svd",
    )  # fmt: skip
    printed(capsys, "merge", world.adapters, *words, "--out", tmp_path / "m")
    weights = {"all": [1, 0.5, 1], "mlp": [2, 1, 1]}
    kwargs = {"space": "core", "seed": 7, "scaling": 0.5, "exact_svd": True}
    same(
        tmp_path / "m", merge(adapters(world), "dare_ties", weights=weights, rank=3, **kwargs), 1e-5
    )
    card = json.loads((tmp_path / "m" / "mergeprobe.json").read_text())
    assert (card["weights"], card["space"], card["seed"]) == (weights, "core", 7)


def test_searched_weights_are_printed_and_kept(capsys, world, tmp_path):
    words = (
        "--method", "lorahub", "-o", "budget=4", "--probes", world.probes, "--base", world.base,
    )  # fmt: skip
    text = printed(capsys, "merge", world.adapters, *words, "--out", tmp_path / "m")
    assert "Weights found in 4 evaluations:\n  all: " in text
    card = json.loads((tmp_path / "m" / "mergeprobe.json").read_text())
    same(tmp_path / "m", merge(adapters(world), "linear", weights=card["weights"]))
    assert card["search"]["value"] <= card["search"]["start"]


def test_a_mergekit_config_stands_for_adapters_and_rule(capsys, world, tmp_path):
    models = [
        {"model": f"base+{world.adapters / name}", "parameters": {"weight": k + 1.0}}
        for k, name in enumerate(NAMES)
    ]
    config = {
        "merge_method": "dare_linear", "base_model": "base", "models": models, "dtype": "bfloat16",
        "parameters": {"density": 0.5, "lambda": 0.5},
    }  # fmt: skip
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "m"
    text = printed(capsys, "merge", "--config", tmp_path / "m.yaml", "--rank", "4", "--out", out)
    assert "Note: entries kept are divided by their chance" in text
    expected = merge(
        adapters(world), "dare_linear", weights=[1, 2, 3], density=0.5, scaling=0.5, rank=4
    )
    same(out, expected, 2e-2)
    assert {t.dtype for t in load_file(out / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }
    both = ("merge", world.adapters, "--config", tmp_path / "m.yaml", "--out", tmp_path / "n")
    assert command(capsys, *both)[0] == 2
    models[0]["parameters"]["gamma"] = 1
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(config))
    line = refused(capsys, "merge", "--config", tmp_path / "m.yaml", "--out", tmp_path / "n")
    assert "has a parameter 'gamma', unknown here" in line


def test_whole_models_are_the_base_with_the_merge_added(capsys, world, tmp_path):
    words = ("--method", "ties", "--full-weights", "--base", world.base, "--out", tmp_path / "full")
    text = printed(capsys, "merge", world.adapters, *words)
    assert "merged by ties into the base model" in text
    base = load_file(world.base / "model.safetensors")
    full = load_file(tmp_path / "full" / "model.safetensors")
    assert full.keys() == base.keys()
    updates = merge(adapters(world), "ties", rank=64).adapter.modules
    for key, value in base.items():
        update = updates.get(key.removesuffix(".weight"))
        expected = value if update is None else value + update.dense()
        assert torch.allclose(full[key], expected, atol=1e-6), key
    card = json.loads((tmp_path / "full" / "mergeprobe.json").read_text())
    assert card["method"] == "ties"
    assert 0 < card["certificate"]["total"] < 1e-5  # float32's rounding
    # it is a model, and of the adapters' own base only
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "full")


def test_a_bf16_base_says_what_rounding_cost(capsys, world, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    words = ("--full-weights", "--base", tmp_path / "bf16", "--out", tmp_path / "full", "--json")
    found = json.loads(printed(capsys, "merge", world.adapters, *words))
    base = load_file(tmp_path / "bf16" / "model.safetensors")
    full = load_file(tmp_path / "full" / "model.safetensors")
    lost = whole = 0.0
    for module, update in merge(adapters(world)).adapter.modules.items():
        key, exact = f"{module}.weight", update.dense().double()
        lost += float((full[key].double() - base[key].double() - exact).square().sum())
        whole += float(exact.square().sum())
    assert found["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert found["error"] > 1e-3


def test_full_weights_of_another_base_are_refused(capsys, world, tmp_path):
    shutil.copytree(world.adapters, tmp_path / "adapters")
    card = {"schema": CARD_SCHEMA, "base_fingerprint": "feedfacefeedface"}
    (tmp_path / "adapters" / NAMES[0] / CARD).write_text(json.dumps(card))
    words = ("--full-weights", "--base", world.base, "--out", tmp_path / "m")
    line = refused(capsys, "merge", tmp_path / "adapters", *words)
    assert f"'{NAMES[0]}' was trained on base feedfacefeedface, but" in line
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--method", "tees"), "unknown merge method 'tees'; known are mean, linear"),
        (("--method", "linear", "--weights", "1,0.5"), "2 weights for 3 adapters"),
        (("--method", "linear", "--weights", "top=1,1,1"), "no part 'top' to weight"),
        (("--method", "ties", "--density", "0"), "density is 0.0"),
        (("--method", "iso_c", "-o", "scale=nan"), "option 'scale' of 'iso_c' is nan; expected"),
        (("--method", "sum", "-o", "scale=inf"), "option 'scale' of 'sum' is inf; expected"),
        (("--method", "linear", "--scaling", "nan"), "scaling is nan"),
        (("--method", "ties", "--density", "1.2"), "density is 1.2"),
        (("--method", "ties", "--alpha", "1"), "'ties' has no option 'alpha'; it takes density"),
        (("--method", "sum", "-o", "scales=1"), "'sum' has no option 'scales'; it takes scale"),
        (("-o", "out=1"), "'mean' has no option 'out'; it takes none"),
        (("--rank", "400"), "rank 400 is above the exact rank of this merge, 6"),
        (("--space", "sphere"), "unknown space 'sphere'"),
        (("--method", "regmean"), "'regmean' needs a probe of each adapter"),
        (("--method", "lorahub"), "'lorahub' runs the base model: give it with --base"),
        (("--method", "mean", "--weights", "1,1,1"), "'mean' takes no weights"),
    ],
)
def test_one_line_for_what_cannot_be(capsys, world, tmp_path, words, line):
    assert line in refused(capsys, "merge", world.adapters, *words, "--out", tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("--option", "density"),
        ("--option", "density=much"),
        ("--weights", "1,1,1", "--weights", "all=1,1,1", "--method", "linear"),
        ("--full-weights",),
        ("--full-weights", "--base", "b", "--rank", "3"),
    ],
)
def test_wrong_usage(capsys, world, tmp_path, words):
    status, out, err = command(capsys, "merge", world.adapters, *words, "--out", tmp_path / "m")
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    assert command(capsys, "merge", "--out", tmp_path / "m")[0] == 2  # nothing to merge


def test_a_probe_of_another_adapter_is_no_help(capsys, world, tmp_path):
    words = ("--method", "regmean", "--probes", world.probes / f"{NAMES[0]}.safetensors")
    line = refused(capsys, "merge", world.adapters, *words, "--out", tmp_path / "m")
    assert f"'regmean' needs a probe of '{NAMES[1]}'" in line
