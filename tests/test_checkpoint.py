"""Adapter folders: what stock PEFT writes is read exactly, what we write it loads, the rest is
refused by name."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mergeprobe.adapters.checkpoint import (
    CARD,
    CONFIG,
    WEIGHTS,
    Adapter,
    check_same_base,
    read_adapter,
    shared_placement,
    write_adapter,
)
from mergeprobe.artefact import sha256
from mergeprobe.errors import AdapterError, AdapterMismatch, OutputExists
from mergeprobe.lowrank import LowRank, concat, inner, norm, truncate

IDS = torch.tensor([[1, 5, 9, 2, 7]])


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def peft_model(seed=1, **options):
    """A tiny Llama with a LoRA whose B is not zero."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | options
    torch.manual_seed(seed)
    model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A plain LoRA folder as PEFT writes it; copy it before changing it."""
    folder = tmp_path_factory.mktemp("peft") / "plain"
    peft_model().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


def edit(folder, **changes):
    path = folder / CONFIG
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = {key: value.clone() for key, value in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


Q = "model.layers.0.self_attn.q_proj"
KEY_A, KEY_B = (f"base_model.model.{Q}.lora_{side}.weight" for side in "AB")


# --- reading -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 1, "lora_alpha": 1},
        {"r": 3, "lora_alpha": 7},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}},
        {"alpha_pattern": {"v_proj": 32, r"layers\.0\..*": 3}},
        {"rank_pattern": {"down_proj": 8}, "alpha_pattern": {"down_proj": 4, "mlp.down_proj": 99}},
        {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}},
        {"use_rslora": True, "rank_pattern": {"k_proj": 9}, "alpha_pattern": {"k_proj": 5}},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=str,
)
def test_reads_exactly_what_peft_applies(tmp_path, options):
    peft_model(**options).save_pretrained(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    # reloaded, not as trained: PEFT writes its config with sorted keys, so where two patterns
    # match one module it trains with the first as given and loads with the first in the alphabet
    model = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "a"))
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert adapter.modules.keys() == layers.keys()
    for name, layer in layers.items():
        assert torch.allclose(
            adapter.modules[name].dense(), layer.get_delta_weight("default"), atol=1e-6, rtol=0
        )
        assert adapter.modules[name].r == layer.r["default"]
        assert adapter.modules[name].scaling == pytest.approx(layer.scaling["default"])


def test_an_init_that_leaves_the_base_alone_is_read(tmp_path):
    """MiCA takes B from the base's minor directions and starts A at 0: ΔW is B A all the same."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="mica")
    base = tiny_llama()
    before = base.model.layers[0].self_attn.q_proj.weight.clone()
    model = get_peft_model(base, config)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.base_layer.weight, before)
    model.save_pretrained(tmp_path / "untrained")
    with pytest.raises(AdapterError, match="zero everywhere"):
        read_adapter(tmp_path / "untrained")
    torch.nn.init.normal_(layer.lora_A["default"].weight)
    model.save_pretrained(tmp_path / "trained")
    found = read_adapter(tmp_path / "trained").modules[Q]
    assert torch.allclose(found.dense(), layer.get_delta_weight("default"), atol=1e-6)


def test_what_an_adapter_says_of_itself(folder):
    edit(folder, base_model_name_or_path="org/base")
    adapter = read_adapter(folder)
    assert adapter.name == "adapter"
    assert read_adapter(folder, name="other").name == "other"
    assert adapter.base == "org/base"
    assert adapter.fingerprint is None  # stock PEFT records none
    assert adapter.ranks == [4]
    assert adapter.parameters == sum(t.numel() for t in load_file(folder / WEIGHTS).values())
    squares = sum(float(u.dense().double().square().sum()) for u in adapter.modules.values())
    assert adapter.norm() == pytest.approx(squares**0.5)
    assert list(adapter.modules)[:2] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.gate_proj",
    ]


@pytest.mark.parametrize("name", ["with spaces", "ünïcødé 适配器", "dots..and-dashes"])
def test_names_with_spaces_and_unicode(saved, tmp_path, name):
    copy = shutil.copytree(saved, tmp_path / name)
    assert read_adapter(copy).name == name
    assert read_adapter(tmp_path / name / ".." / name).name == name
    write_adapter(read_adapter(copy), tmp_path / f"{name} merged")
    assert read_adapter(tmp_path / f"{name} merged").name == f"{name} merged"


# --- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "PEFT type is PREFIX_TUNING"),
        ({"peft_type": "DORA"}, "PEFT type is DORA"),
        ({"peft_type": ["LORA"]}, "PEFT type is"),
        ({"peft_type": None}, "PEFT type is None"),
        ({"use_dora": True}, "DoRA, whose update depends on the base model's weights; pass"),
        ({"modules_to_save": ["lm_head"]}, r"whole modules \(modules_to_save: \['lm_head'\]\)"),
        ({"bias": "all"}, r"biases \(bias: all\)"),
        ({"bias": "lora_only"}, r"biases \(bias: lora_only\)"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trained tokens"),
        ({"layer_replication": [[0, 2]]}, "replicates layers"),
        ({"target_parameters": ["experts.up"]}, "bare parameters"),
        ({"use_qalora": True}, "QALoRA"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
        ({"kasa_config": {"beta": 1e-4}}, "KaSA"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        *[
            ({"init_lora_weights": init}, f"'{init}' changed the base weights")
            for init in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga")
        ],
        ({"r": 8}, "rank 4 in the weights but 8"),
        ({"rank_pattern": {"q_proj": 2}}, "rank 4 in the weights but 2"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": 0}, "zero everywhere"),
    ],
    ids=str,
)
def test_variants_are_refused_by_name(folder, changes, reason):
    edit(folder, **changes)
    with pytest.raises(AdapterError, match=reason) as caught:
        read_adapter(folder)
    assert "\n" not in str(caught.value)
    assert "adapter" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "lora_only"}],
    ids=str,
)
def test_real_peft_folders_of_other_variants_are_refused(tmp_path, options):
    peft_model(**options).save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"cannot be read as an update|pass the base"):
        read_adapter(tmp_path / "a")
    edit(tmp_path / "a", use_dora=False, modules_to_save=None, bias="none")
    if options != {"bias": "lora_only"}:  # a tiny Llama has no bias to save
        with pytest.raises(AdapterError, match="which is no LoRA factor"):
            read_adapter(tmp_path / "a")  # a config that hides it does not help


def trained_embedding(tensors):
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.ones(4, 32)


def lonely(tensors):
    del tensors[KEY_B]


def unchained(tensors):
    tensors[KEY_B] = torch.ones(16, 5)


def rankless(tensors):
    tensors[KEY_A], tensors[KEY_B] = torch.ones(0, 16), torch.ones(16, 0)


def convolution(tensors):
    tensors[KEY_A] = torch.ones(4, 16, 1, 1)


def integers(tensors):
    tensors[KEY_A] = torch.ones(4, 16, dtype=torch.int8)


def twice(tensors):
    tensors[KEY_A.removeprefix("base_model.model.")] = torch.ones(4, 16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (trained_embedding, "embed_tokens.lora_embedding_A', which is no LoRA factor"),
        (lonely, f"'{Q}' has lora_A but not lora_B, which LoRA needs"),
        (unchained, f"'{Q}': factors do not chain"),
        (rankless, f"'{Q}': lora_A.weight is \\(0, 16\\)"),
        (convolution, r"is \(4, 16, 1, 1\); expected a \(rows, columns\) matrix \(convolutions"),
        (integers, "torch.int8"),
        (twice, f"lora_A of '{Q}' twice"),
        (dict.clear, "holds no LoRA factors"),
    ],
)
def test_weights_that_are_no_plain_lora_are_refused(folder, change, reason):
    edit_tensors(folder, change)
    with pytest.raises(AdapterError, match=reason):
        read_adapter(folder)


def set_to(value, keys=None):
    def change(tensors):
        for key in keys or list(tensors):
            tensors[key][..., 0] = value
            if value == 0.0:
                tensors[key].zero_()

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_to(float("nan"), [KEY_A]), f"NaN or infinite entries in lora_A of '{Q}'"),
        (set_to(float("-inf"), [KEY_B]), f"NaN or infinite entries in lora_B of '{Q}'"),
        (set_to(0.0), "zero everywhere"),
    ],
)
def test_degenerate_weights_are_refused_unless_asked_for(folder, change, reason):
    edit_tensors(folder, change)
    with pytest.raises(AdapterError, match=reason):
        read_adapter(folder)
    loose = read_adapter(folder, strict=False)
    with pytest.raises(AdapterError, match=reason):
        write_adapter(loose, folder.parent / "out")
    assert not (folder.parent / "out").exists()


def test_one_zero_module_is_no_reason_to_refuse(folder):
    edit_tensors(folder, set_to(0.0, [KEY_B]))
    assert norm(read_adapter(folder).modules[Q]) == 0.0


# --- damage --------------------------------------------------------------------------------


def test_a_truncated_file_is_refused_wherever_it_ends(folder):
    whole = (folder / WEIGHTS).read_bytes()
    for length in [0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 4, len(whole) - 1]:
        (folder / WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(AdapterError, match="is truncated or damaged") as caught:
            read_adapter(folder)
        assert "\n" not in str(caught.value)
    (folder / WEIGHTS).write_bytes(whole + b"\0")
    with pytest.raises(AdapterError, match="is truncated or damaged"):
        read_adapter(folder)


def test_flipped_bits_in_the_header_never_raise_anything_else(folder):
    """A stock file has no checksum, so a flip may also read as another valid header."""
    whole = bytearray((folder / WEIGHTS).read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for position in range(0, header, 17):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        (folder / WEIGHTS).write_bytes(flipped)
        try:
            read_adapter(folder, strict=False)
        except AdapterError:
            refused += 1
    assert refused > 0.9 * len(range(0, header, 17))


def test_any_flipped_bit_in_a_file_of_ours_is_found(folder, tmp_path):
    ours = write_adapter(read_adapter(folder), tmp_path / "ours")
    whole = (ours / WEIGHTS).read_bytes()
    for position in range(0, len(whole), 997):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        (ours / WEIGHTS).write_bytes(flipped)
        with pytest.raises(AdapterError, match="does not match the checksum"):
            read_adapter(ours)
    (ours / WEIGHTS).write_bytes(whole)
    read_adapter(ours)


def test_missing_and_malformed_files(folder, tmp_path):
    with pytest.raises(AdapterError, match="is not a folder"):
        read_adapter(tmp_path / "none")
    with pytest.raises(AdapterError, match="is not a folder"):
        read_adapter(folder / CONFIG)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match=f"{CONFIG}' does not exist"):
        read_adapter(tmp_path / "empty")
    for text, reason in [("", "not valid JSON"), ('{"r": ', "line 1"), ("[]", "no JSON object")]:
        (folder / CONFIG).write_text(text)
        with pytest.raises(AdapterError, match=reason):
            read_adapter(folder)


def test_no_weights_and_pickled_weights(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match="has a config but no weights"):
        read_adapter(folder)
    torch.save({KEY_A: torch.ones(4, 16)}, folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="is a pickle, which is never loaded"):
        read_adapter(folder)


def test_cards_are_checked(folder):
    for card, reason in [
        ("[]", "no JSON object"),
        ('{"made_by": "x"}', "no valid schema version"),
        ('{"schema": 99}', "has schema 99; this mergeprobe reads up to 1: upgrade"),
        ('{"schema": 1, "weights_sha256": "0"}', "does not match the checksum"),
    ]:
        (folder / CARD).write_text(card)
        with pytest.raises(AdapterError, match=reason):
            read_adapter(folder)


# --- writing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}],
    ids=str,
)
def test_stock_peft_loads_what_we_write_with_the_same_logits(tmp_path, options):
    model = peft_model(**options)
    model.save_pretrained(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    write_adapter(adapter, tmp_path / "b")
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "b")).eval()
    assert (logits(loaded) - logits(tiny_llama())).abs().max() > 1e-3  # it does something
    assert (logits(loaded) - logits(model)).abs().max() < 1e-5
    again = read_adapter(tmp_path / "b")
    assert again.ranks == [max(adapter.ranks)]
    assert {update.scaling for update in again.modules.values()} == {1.0}
    for name, update in adapter.modules.items():
        assert torch.allclose(again.modules[name].dense(), update.dense(), atol=1e-6)


def test_merges_and_pruned_adapters_load_in_stock_peft(tmp_path):
    """Concatenated (unequal modules and ranks), truncated, and with a module dropped."""
    peft_model(seed=1, r=2).save_pretrained(tmp_path / "a")
    peft_model(seed=2, r=5, target_modules=["q_proj", "up_proj"]).save_pretrained(tmp_path / "b")
    a, b = read_adapter(tmp_path / "a"), read_adapter(tmp_path / "b")
    modules = {
        name: truncate(concat([u[name] for u in (a.modules, b.modules) if name in u]), 6)[0]
        for name in a.modules.keys() | b.modules.keys()
    }
    del modules["model.layers.0.mlp.down_proj"]
    merged = Adapter("merged", modules, config=shared_placement([a, b]))
    write_adapter(merged, tmp_path / "merged")
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "merged")).eval()
    by_hand = tiny_llama()
    with torch.no_grad():
        for name, update in modules.items():
            by_hand.get_submodule(name).weight += update.dense()
    assert (logits(loaded) - logits(by_hand)).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_with_its_own_config_and_fewer_modules_loads_without_the_dropped(tmp_path):
    model = peft_model()
    model.save_pretrained(tmp_path / "a")
    a = read_adapter(tmp_path / "a")
    fewer = {name: update for name, update in a.modules.items() if "layers.1" in name}
    write_adapter(Adapter("fewer", fewer, config=a.config), tmp_path / "fewer")
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "fewer")).eval()
    by_hand = tiny_llama()
    with torch.no_grad():
        for name, update in fewer.items():
            by_hand.get_submodule(name).weight += update.dense()
    assert (logits(loaded) - logits(by_hand)).abs().max() < 1e-5


def test_the_card_says_what_made_it(folder, tmp_path):
    adapter = Adapter("a", read_adapter(folder).modules, base="org/base", fingerprint="f00d")
    out = write_adapter(adapter, tmp_path / "deep" / "out", card={"method": "mean"})
    card = json.loads((out / CARD).read_text())
    assert card["schema"] == 1
    assert card["made_by"].startswith("mergeprobe ")
    assert card["method"] == "mean"
    assert card["weights_sha256"] == sha256(out / WEIGHTS)
    again = read_adapter(out)
    assert (again.base, again.fingerprint) == ("org/base", "f00d")
    assert sorted(path.name for path in out.iterdir()) == sorted([CONFIG, WEIGHTS, CARD])


def test_an_existing_output_is_refused_unless_forced(folder, tmp_path):
    adapter = read_adapter(folder)
    out = tmp_path / "out"
    out.mkdir()
    write_adapter(adapter, out)  # an empty folder is no output
    before = sha256(out / WEIGHTS)
    doubled = Adapter("d", {m: u * 2.0 for m, u in adapter.modules.items()})
    with pytest.raises(OutputExists, match="already exists; choose another output or pass --force"):
        write_adapter(doubled, out)
    assert sha256(out / WEIGHTS) == before
    write_adapter(doubled, out, force=True)
    assert read_adapter(out).norm() == pytest.approx(2 * adapter.norm())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_half_precision_output_and_its_overflow(folder, tmp_path):
    adapter = read_adapter(folder)
    write_adapter(adapter, tmp_path / "half", dtype=torch.bfloat16)
    half = read_adapter(tmp_path / "half")
    assert {u.B.dtype for u in half.modules.values()} == {torch.bfloat16}
    for name, update in adapter.modules.items():
        cosine = inner(half.modules[name], update) / norm(half.modules[name]) / norm(update)
        assert cosine > 0.9999
    large = Adapter("large", {m: u * 1e6 for m, u in adapter.modules.items()})
    with pytest.raises(AdapterError, match=r"'large' overflows torch.float16"):
        write_adapter(large, tmp_path / "overflow", dtype=torch.float16)
    assert not (tmp_path / "overflow").exists()


# --- do they belong together? --------------------------------------------------------------


def named(name, base="", fingerprint=None, out=3):
    return Adapter(name, {"m": LowRank(torch.ones(out, 1), torch.ones(1, 2))}, base, fingerprint)


def test_one_base_verified_or_not():
    assert check_same_base([named("a", "x", "f1"), named("b", "y", "f1")]) == "f1"
    assert check_same_base([named("a", "x", "f1"), named("b", "x")]) is None
    assert check_same_base([named("a", "x"), named("b", "x")]) is None
    assert check_same_base([named("a"), named("b", "x")]) is None
    # one base in two folders, and a stock adapter that names one of them
    assert check_same_base([named("a", "x", "f1"), named("b", "y", "f1"), named("c", "y")]) is None


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ([named("a", "x", "f1"), named("b", "x", "f2")], "'a' was trained on base f1"),
        ([named("a", "x"), named("b", "y")], "names base 'x' but 'b' names 'y'|names base 'y'"),
        ([named("a", "x", "f1"), named("b", "y")], "'b' names base 'y' but 'a' names 'x'"),
        ([named("a"), named("b", out=4)], r"'m' is \(3, 2\) in 'a' but \(4, 2\) in 'b'"),
    ],
)
def test_two_bases_are_refused(adapters, message):
    with pytest.raises(AdapterMismatch, match=message):
        check_same_base(adapters)


def test_a_common_placement_is_kept_and_a_mixed_one_is_not(folder):
    a = read_adapter(folder)
    assert sorted(shared_placement([a, a])["target_modules"]) == sorted(a.config["target_modules"])
    fewer = Adapter("b", dict(list(a.modules.items())[:3]), config=a.config)
    assert shared_placement([a, fewer]) == {"task_type": "CAUSAL_LM"}
