"""mergekit's YAML: what it says, what is refused, and the same numbers as mergekit's own."""

import json

import pytest
import torch
from compose_samples import peft_model, tiny_llama
from safetensors.torch import load_file

from mergeprobe.adapters.checkpoint import read_adapter
from mergeprobe.compose.merge import METHODS, merge_folders, merge_into_base
from mergeprobe.compose.mergekit import KIN, parse_mergekit, read_mergekit
from mergeprobe.errors import MergeError

try:
    import mergekit
except ImportError:
    mergekit = None


def config(
    method, parameters=None, models=(("a", {"weight": 1.0}), ("b", {"weight": 3.0})), **more
):
    listed = [{"model": name, "parameters": own} for name, own in models]
    return {
        "merge_method": method, "base_model": "base", "models": listed,
        "parameters": parameters or {}, **more,
    }  # fmt: skip


# ---- what it says


def test_every_kin_is_a_method_and_its_options_are_its_own():
    for kin in KIN.values():
        assert kin.options.keys() <= METHODS[kin.method].defaults.keys()


def test_linear_is_normalised_and_task_arithmetic_is_not():
    assert parse_mergekit(config("linear")).weights == (0.25, 0.75)
    assert parse_mergekit(config("task_arithmetic")).weights == (1.0, 3.0)
    assert parse_mergekit(config("task_arithmetic", {"normalize": True})).weights == (0.25, 0.75)
    found = parse_mergekit(config("task_arithmetic", {"lambda": 0.4}))
    assert (found.method, found.scaling, found.options) == ("linear", 0.4, {})


def test_mergekits_defaults_hold_where_ours_are_others():
    found = parse_mergekit(config("ties"))
    assert found.options == {"density": 1.0, "normalise": 1.0}
    assert parse_mergekit(config("dare_ties", {"density": 0.5})).options == {
        "density": 0.5, "normalise": 0.0,
    }  # fmt: skip
    # at density 1 mergekit keeps everything, outliers too
    assert parse_mergekit(config("breadcrumbs")).options == {"density": 1.0, "gamma": 0.0}


def test_what_a_model_states_comes_before_what_all_share():
    models = (("a", {"weight": 0.5}), ("base+b", {"density": 0.3}))
    found = parse_mergekit(config("ties", {"weight": 2.0, "density": 0.3}, models))
    assert (found.folders, found.weights, found.options["density"]) == (("a", "b"), (0.5, 2.0), 0.3)


def test_the_base_may_be_listed_too():
    models = (("base", {}), ("a", {"weight": 1.0}))
    assert parse_mergekit(config("ties", models=models)).folders == ("a",)


def test_slerp_starts_at_its_base_model():
    given = {
        "merge_method": "slerp", "base_model": "b", "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"t": 0.25}, "dtype": "bfloat16",
    }  # fmt: skip
    found = parse_mergekit(given)
    assert (found.folders, found.weights, found.dtype) == (("b", "a"), (0.75, 0.25), "bfloat16")
    assert "on the updates" in found.notes[0]


# ---- what is refused, by name

MIXED = (("a", {"weight": 1, "density": 0.2}), ("b", {"weight": 1, "density": 0.3}))
SIGNED = (("a", {"weight": 1.0}), ("b", {"weight": -1.0}))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([], "no merge_method"),
        (config("model_stock"), "mergekit's method 'model_stock' is not carried out here; known"),
        (config("breadcrumbs_ties"), "'breadcrumbs_ties' is not carried out here"),
        (config("ties", slices=[]), "'slices' means nothing for adapters"),
        (config("ties", tokenizer_source="union"), "'tokenizer_source' means nothing"),
        (config("ties", {"select_topk": 0.1}), "'ties' has no parameter 'select_topk'"),
        (config("ties", models=(("a", {"weight": 1, "gamma": 1}),)), "'a' has a parameter 'gamma'"),
        (config("ties", models=MIXED), "density differs between models ([0.2, 0.3])"),
        (config("ties", models=SIGNED), "'ties' with a weight below 0"),
        (config("ties", models=(("a", {}),)), "'a' has no weight"),
        (config("ties", models=(("a", {"weight": [0, 1]}),)), "weight of 'a' is [0, 1]"),
        (config("ties", {"normalize": 1}), "normalize is 1; expected true or false"),
        (config("ties", {"rescale": True}), "'ties' is carried out here with rescale: false only"),
        (config("dare_linear", {"rescale": False}), "with rescale: true only"),
        (config("linear", {"normalize": False}), "weights of sum 4 would scale the base"),
        (config("linear", models=SIGNED), "add up to 0"),
        (config("linear", models=(("base", {"weight": 1}),)), "linear gives the base a weight"),
        (config("ties", models=(("base", {}),)), "the only model is the base"),
        (config("ties", dtype="int8"), "dtype 'int8' is not written here"),
        (config("slerp"), "slerp's base_model is 'base'; expected one of the two"),
        ({"merge_method": "ties"}, "no list of models"),
        ({"merge_method": "ties", "models": ["a"]}, "a model is 'a'; expected model: FOLDER"),
    ],
)  # fmt: skip
def test_refusals(given, line):
    with pytest.raises(MergeError) as caught:
        parse_mergekit(given)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"), [("a: [", "is no YAML"), ("merge_method: karcher", "'karcher'")]
)
def test_a_bad_file_is_named(tmp_path, text, line):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(MergeError, match=r"m\.yaml'") as caught:
        read_mergekit(tmp_path / "m.yaml")
    assert line in str(caught.value)
    with pytest.raises(MergeError, match="cannot be read"):
        read_mergekit(tmp_path / "none.yaml")


# ---- mergekit itself, on full models


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, three adapters on it, and the full model of each, as files."""
    work = tmp_path_factory.mktemp("mergekit")
    tiny_llama().save_pretrained(work / "base")
    for seed, name in enumerate("abc"):
        model = peft_model(seed, r=3 + seed, alpha=5)
        model.save_pretrained(work / name)
        model.merge_and_unload().save_pretrained(work / f"full-{name}")
    return work


def both(world, tmp_path, method, parameters, weights):
    """(mergekit's merge minus the base, the same config on adapters) by weight name."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    def stated(prefix):
        models = [
            (f"{world}/{prefix}{n}", {"weight": w}) for n, w in zip("abc", weights, strict=True)
        ]
        return config(method, parameters, models, dtype="float32") | {"base_model": f"{world}/base"}

    full = stated("full-")
    if method == "linear":
        del full["base_model"]
    run_merge(
        MergeConfiguration.model_validate(full), str(tmp_path / "theirs"),
        options=MergeOptions(copy_tokenizer=False, quiet=True, cuda=False),
    )  # fmt: skip
    (tmp_path / "m.yaml").write_text(json.dumps(stated("")))  # JSON is YAML
    asked = read_mergekit(tmp_path / "m.yaml")
    base = load_file(world / "base" / "model.safetensors")
    theirs = {}
    for shard in (tmp_path / "theirs").glob("*.safetensors"):
        theirs |= load_file(shard)
    return {k: theirs[k] - base[k] for k in base if k in theirs}, asked


EXACT = [
    ("linear", {}, (1.0, 3.0, 2.0)),
    ("task_arithmetic", {"lambda": 0.7}, (0.5, -0.25, 1.0)),
    ("task_arithmetic", {"normalize": True}, (0.5, 0.25, 1.0)),
    # shares of 4,096, 2,048 and 6,144 entries that are whole numbers
    ("ties", {"density": 0.25}, (1.0, 0.5, 0.75)),
    ("ties", {"density": 0.25, "normalize": False, "lambda": 0.5}, (1.0, 0.5, 0.75)),
    ("ties", {}, (1.0, 1.0, 1.0)),
    ("breadcrumbs", {"density": 0.25, "gamma": 0.125}, (1.0, 0.5, 0.75)),
    ("breadcrumbs", {}, (1.0, 0.5, 0.75)),
    # what they draw cannot be drawn again, so nothing is dropped
    ("dare_linear", {"density": 1.0}, (1.0, 0.5, 0.75)),
    ("dare_ties", {"density": 1.0}, (1.0, 0.5, 0.75)),
    ("della", {"density": 1.0}, (1.0, 0.5, 0.75)),
    ("della_linear", {"density": 1.0, "normalize": True}, (1.0, 0.5, 0.75)),
]


@pytest.mark.skipif(mergekit is None, reason="mergekit is not installed: pip install mergekit")
@pytest.mark.parametrize(("method", "parameters", "weights"), EXACT)
def test_agrees_with_mergekit_on_full_models(world, tmp_path, method, parameters, weights):
    theirs, asked = both(world, tmp_path, method, parameters, weights)
    given = {"weights": asked.weights, "scaling": asked.scaling, **asked.options}
    merge_into_base(asked.folders, asked.method, base=world / "base", out=tmp_path / "m", **given)
    rank = 64 if METHODS[asked.method].kind == "entrywise" else None  # nothing is truncated
    merge_folders(
        asked.folders, asked.method, out=tmp_path / "lora", rank=rank, exact_svd=True, **given
    )  # fmt: skip
    ours = load_file(tmp_path / "m" / "model.safetensors")
    base = load_file(world / "base" / "model.safetensors")
    for key, change in theirs.items():
        assert torch.allclose(ours[key] - base[key], change, atol=1e-5), key
    updates = read_adapter(tmp_path / "lora").modules
    assert max(float(change.abs().max()) for change in theirs.values()) > 0.1
    for module, update in updates.items():
        assert torch.allclose(update.dense(), theirs[f"{module}.weight"], atol=1e-5), module
