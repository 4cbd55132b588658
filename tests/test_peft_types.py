"""Every PEFT type's update against PEFT's own merged weights: W_merged − W_base, module by module;
and a weight-1 merge of one adapter against PEFT's own logits."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_checkpoint import logits, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from mergeprobe.adapters.checkpoint import CARD, CONFIG, WEIGHTS, read_adapter, write_adapter
from mergeprobe.adapters.extras import average_extras
from mergeprobe.adapters.stored import LARGEST
from mergeprobe.adapters.variants import PEFT_TYPES
from mergeprobe.compose import merge
from mergeprobe.errors import (
    AdapterError,
    AdapterMismatch,
    BaseModelError,
    MergeError,
    MergeProbeError,
)

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADALORA = {"init_r": 4, "target_r": 2, "total_step": 10}
# id -> (PEFT config, its options, whether the base is needed)
TYPES = {
    "lora": ("LoraConfig", {"r": 3, "lora_alpha": 7}, False),
    "rslora": ("LoraConfig", {"r": 4, "lora_alpha": 8, "use_rslora": True}, False),
    "lora-patterns": (
        "LoraConfig",
        {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
        False,
    ),
    "dora": ("LoraConfig", {"r": 4, "lora_alpha": 8, "use_dora": True}, True),
    "dora-rslora-patterns": (
        "LoraConfig",
        {"r": 4, "use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
        True,
    ),
    "adalora": ("AdaLoraConfig", ADALORA, False),
    "adalora-alpha": ("AdaLoraConfig", ADALORA | {"lora_alpha": 3}, False),
    "loha": ("LoHaConfig", {"r": 2, "alpha": 5}, False),
    "loha-full-rank": ("LoHaConfig", {"r": 6, "alpha": 5}, False),
    "loha-patterns": (
        "LoHaConfig",
        {"r": 2, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 9}},
        False,
    ),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 5}, False),
    "lokr-factors": ("LoKrConfig", {"r": 1, "alpha": 5, "decompose_both": True}, False),
    "lokr-factor-2": ("LoKrConfig", {"r": 2, "alpha": 5, "decompose_factor": 2}, False),
    "lokr-patterns": (
        "LoKrConfig",
        {"r": 2, "rank_pattern": {"q_proj": 1}, "alpha_pattern": {"v_proj": 9}},
        False,
    ),
    "vera": ("VeraConfig", {"r": 3}, True),
    "vera-from-seed": (
        "VeraConfig",
        {"r": 3, "save_projection": False, "projection_prng_key": 11},
        True,
    ),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}, True),
    "oft": ("OFTConfig", {"oft_block_size": 4}, True),
    "oft-cayley": ("OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False}, True),
    "oft-3-terms": ("OFTConfig", {"oft_block_size": 4, "num_cayley_neumann_terms": 3}, True),
    "oft-7-terms": ("OFTConfig", {"oft_block_size": 4, "num_cayley_neumann_terms": 7}, True),
    "oft-2-terms": ("OFTConfig", {"oft_block_size": 4, "num_cayley_neumann_terms": 2}, True),
    "oft-shared": ("OFTConfig", {"oft_block_size": 4, "block_share": True}, True),
    "oft-constrained": ("OFTConfig", {"oft_block_size": 4, "coft": True, "eps": 0.05}, True),
}


def trained(kind, *, base=None, seed=1, **more):
    """A PEFT model of that kind whose every adapter parameter has moved."""
    config, options, _ = TYPES[kind]
    options = {"target_modules": LINEARS, "task_type": "CAUSAL_LM"} | options | more
    torch.manual_seed(seed)
    model = get_peft_model(tiny_llama() if base is None else base, getattr(peft, config)(**options))
    moved = (
        "lora_",
        "hada_",
        "lokr_",
        "vera_lambda",
        "ia3_",
        "oft_",
        "modules_to_save",
        "trainable_tok",
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in moved) and "ranknum" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def merged_differences(model, base):
    """module -> W_merged − W_base of every module that PEFT's own merge changed, (out, in)."""
    before = {name: value.detach().clone() for name, value in base.named_parameters()}
    merged = copy.deepcopy(model).merge_and_unload()
    found = {}
    for name, value in merged.named_parameters():
        change = (value - before[name]).detach()
        if change.any():
            conv1d = hasattr(merged.get_submodule(name.rpartition(".")[0]), "nf")
            found[name] = change.T if conv1d and change.ndim == 2 else change
    return found


@pytest.mark.parametrize("kind", TYPES)
def test_the_update_is_what_peft_merges(kind, tmp_path):
    model = trained(kind)
    model.save_pretrained(tmp_path / "a")
    needs_base = TYPES[kind][2]
    adapter = read_adapter(tmp_path / "a", tiny_llama() if needs_base else None)
    wanted = merged_differences(model, tiny_llama())
    assert {f"{module}.weight" for module in adapter.modules} == wanted.keys()
    assert len(wanted) == 14
    for module, update in adapter.modules.items():
        difference = wanted[f"{module}.weight"]
        error = torch.linalg.vector_norm(update.dense() - difference)
        # PEFT adds in float32: that rounding, relative to the weights, is what is left
        assert error < 2e-6 * torch.linalg.vector_norm(difference) + 1e-6, module
    assert adapter.truncation == {}


@pytest.mark.parametrize("kind", TYPES)
def test_the_base_given_where_it_is_not_needed_changes_nothing(kind, tmp_path):
    if TYPES[kind][2]:
        trained(kind).save_pretrained(tmp_path / "a")
        with pytest.raises(AdapterError, match="pass the base with --base"):
            read_adapter(tmp_path / "a")
        return
    trained(kind).save_pretrained(tmp_path / "a")
    alone, beside = read_adapter(tmp_path / "a"), read_adapter(tmp_path / "a", tiny_llama())
    for module, update in alone.modules.items():
        assert torch.equal(update.dense(), beside.modules[module].dense())


@pytest.mark.parametrize("kind", TYPES)
def test_a_merge_of_one_gives_pefts_own_logits(kind, tmp_path):
    """The identity that PEFT's add_weighted_adapter misses by 0.86 (rsLoRA) and 0.34 (DoRA)."""
    model = trained(kind)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a", tiny_llama())
    made = merge([adapter], "linear", weights=[1.0])
    assert made.certificate.total < 1e-6
    write_adapter(made.adapter, tmp_path / "merged")
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "merged")).eval()
    assert (logits(loaded) - wanted).abs().max() < 2e-5
    assert (logits(tiny_llama()) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_pefts_own_weight_1_merge_fails(kind):
    """Why the test above exists; if PEFT mends it, this says so."""
    model = trained(kind)
    wanted = logits(model)
    model.add_weighted_adapter(["default"], [1.0], "one", combination_type="linear")
    model.set_adapter("one")
    assert (logits(model) - wanted).abs().max() > 1e-2


def test_a_mean_of_different_types_is_the_mean_of_their_updates(tmp_path):
    base, adapters, changes = tiny_llama(), [], []
    for seed, kind in enumerate(["dora", "ia3", "lokr"]):
        model = trained(kind, seed=seed)
        model.save_pretrained(tmp_path / kind)
        adapters.append(read_adapter(tmp_path / kind, base))
        changes.append(merged_differences(model, tiny_llama()))
    made = merge(adapters, "mean")
    for module, update in made.adapter.modules.items():
        mean = sum(change[f"{module}.weight"] for change in changes) / 3
        assert torch.allclose(update.dense(), mean, atol=2e-6)


# --- truncation --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dora", "ia3", "oft", "lokr", "loha-full-rank", "lora"])
def test_a_rank_truncates_with_its_certificate(kind, tmp_path):
    model = trained(kind)
    model.save_pretrained(tmp_path / "a")
    whole = read_adapter(tmp_path / "a", tiny_llama())
    cut = read_adapter(tmp_path / "a", tiny_llama(), rank=2)
    assert max(cut.ranks) == 2
    assert cut.truncation.keys() == {name for name, u in whole.modules.items() if u.r > 2}
    for module, error in cut.truncation.items():
        exact = whole.modules[module].dense().double()
        spectrum = torch.linalg.svdvals(exact)
        best = float((spectrum[2:].square().sum() / spectrum.square().sum()).sqrt())
        left = torch.linalg.vector_norm(exact - cut.modules[module].dense())
        assert error == pytest.approx(float(left / torch.linalg.vector_norm(exact)), abs=1e-5)
        assert error == pytest.approx(best, abs=1e-5)
    gaps = [whole.modules[m].dense() - cut.modules[m].dense() for m in whole.modules]
    total = sum(float(gap.double().square().sum()) for gap in gaps) ** 0.5
    assert cut.lost() == pytest.approx(total / whole.norm(), abs=1e-5)
    assert whole.lost() == 0.0
    out = write_adapter(cut, tmp_path / "cut")
    assert json.loads((out / CARD).read_text())["read_truncation"] == cut.truncation
    with pytest.raises(AdapterError, match="at rank 0"):
        read_adapter(tmp_path / "a", tiny_llama(), rank=0)


# --- AdaLoRA's pruning --------------------------------------------------------------------------


def test_pruned_adalora_keeps_the_scaling_of_its_first_rank(tmp_path):
    model = trained("adalora")
    pattern = {
        f"{name}.lora_E": [True, index % 2 == 0, False, True]
        for index, name in enumerate(
            f"model.layers.{layer}.{kind}"
            for layer in range(2)
            for kind in ("self_attn.q_proj", "mlp.up_proj")
        )
    }
    model.peft_config["default"].rank_pattern = pattern
    model.save_pretrained(tmp_path / "a")
    assert len({v.shape for k, v in load_file(tmp_path / "a" / WEIGHTS).items() if "E" in k}) == 3
    model = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "a")).eval()
    wanted = merged_differences(model, tiny_llama())
    adapter = read_adapter(tmp_path / "a")
    for module, update in adapter.modules.items():
        assert torch.allclose(update.dense(), wanted[f"{module}.weight"], atol=1e-6), module


def test_adalora_modules_pruned_to_rank_0_are_left_out(tmp_path):
    trained("adalora").save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    gone = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    tensors |= {
        f"{gone}A": torch.zeros(0, 16),
        f"{gone}B": torch.zeros(24, 0),
        f"{gone}E": torch.zeros(0, 1),
    }
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    adapter = read_adapter(tmp_path / "a")
    assert len(adapter.modules) == 13
    assert "model.layers.0.mlp.up_proj" not in adapter.modules


# --- Conv1D, biases -----------------------------------------------------------------------------


def tiny_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "adalora", "vera"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_conv1d_updates_are_out_by_in(kind, tmp_path):
    model = trained(kind, base=tiny_gpt2(), target_modules=["c_attn", "c_proj"])
    wanted, difference = logits(model), merged_differences(model, tiny_gpt2())
    model.save_pretrained(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a", tiny_gpt2())
    assert adapter.modules["transformer.h.0.attn.c_attn"].shape == (48, 16)
    for module, update in adapter.modules.items():
        assert torch.allclose(update.dense(), difference[f"{module}.weight"], atol=2e-6), module
    write_adapter(merge([adapter], "linear", weights=[1.0]).adapter, tmp_path / "merged")
    loaded = PeftModel.from_pretrained(tiny_gpt2(), str(tmp_path / "merged")).eval()
    assert (logits(loaded) - wanted).abs().max() < 2e-5


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_ia3_scales_biases_too_and_they_are_extras(tmp_path):
    base = tiny_gpt2()
    model = trained(
        "ia3",
        base=base,
        target_modules=["c_attn", "mlp.c_proj"],
        feedforward_modules=["mlp.c_proj"],
    )
    wanted = logits(model)
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"also trained 'transformer.h.0.attn.c_attn.bias'"):
        read_adapter(tmp_path / "a", tiny_gpt2())
    adapter = read_adapter(tmp_path / "a", tiny_gpt2(), extras=True)
    difference = merged_differences(model, tiny_gpt2())
    for module, update in adapter.modules.items():
        assert torch.allclose(update.dense(), difference[f"{module}.weight"], atol=2e-6), module
    assert sorted(adapter.extras) == [f"transformer.h.{k}.attn.c_attn.bias" for k in range(2)]
    write_adapter(adapter, tmp_path / "plain")
    loaded = PeftModel.from_pretrained(tiny_gpt2(), str(tmp_path / "plain")).eval()
    assert (logits(loaded) - wanted).abs().max() < 2e-5


# --- what else was trained ----------------------------------------------------------------------

EXTRAS = {
    "saved": ({"modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]}, 4),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, 1),
    "tokens": ({"trainable_token_indices": {"embed_tokens": [1, 5]}}, 1),
}


@pytest.mark.parametrize("what", EXTRAS)
def test_trained_extras_are_refused_by_default_and_carried_when_asked(what, tmp_path):
    options, count = EXTRAS[what]
    model = trained("lora", **options)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"extras=True \(--extras\)"):
        read_adapter(tmp_path / "a")
    base = tiny_llama() if what == "tokens" else None
    adapter = read_adapter(tmp_path / "a", base, extras=True)
    assert len(adapter.extras) == count
    after = copy.deepcopy(model).merge_and_unload()
    for name, value in adapter.extras.items():
        assert torch.allclose(value, after.get_parameter(name), atol=1e-6), name
    write_adapter(adapter, tmp_path / "plain")
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "plain")).eval()
    assert (logits(loaded) - wanted).abs().max() < 2e-5
    again = read_adapter(tmp_path / "plain", extras=True)
    assert again.extras.keys() == adapter.extras.keys()


def test_trained_tokens_need_the_base_and_fitting_indices(tmp_path):
    trained("lora", **EXTRAS["tokens"][0]).save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match="has trained tokens, whose value depends on the base"):
        read_adapter(tmp_path / "a", extras=True)
    path = tmp_path / "a" / CONFIG
    config = json.loads(path.read_text())
    for indices in ([1], [1, 99], [1, -1], ["1", 5], {"other": [1, 5]}, 3):
        path.write_text(json.dumps(config | {"trainable_token_indices": indices}))
        with pytest.raises(AdapterError, match="do not fit the"):
            read_adapter(tmp_path / "a", tiny_llama(), extras=True)


def test_with_the_base_a_saved_linear_is_an_update(tmp_path):
    """Full fine-tuning of chosen modules, as PEFT keeps it."""
    model = trained("lora", target_modules=["q_proj"], modules_to_save=["down_proj"])
    wanted = merged_differences(model, tiny_llama())
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match="whole modules"):
        read_adapter(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a", tiny_llama())
    assert {f"{module}.weight" for module in adapter.modules} == wanted.keys()
    assert adapter.extras == {}
    for module, update in adapter.modules.items():
        assert torch.allclose(update.dense(), wanted[f"{module}.weight"], atol=1e-6), module
    write_adapter(merge([adapter], "linear", weights=[1.0]).adapter, tmp_path / "merged")
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "merged")).eval()
    assert (logits(loaded) - logits(model)).abs().max() < 2e-5


def test_a_saved_norm_is_refused_even_with_the_base(tmp_path):
    trained("lora", modules_to_save=["input_layernorm"]).save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"also trained 'model.layers.0.input_layernorm.weight'"):
        read_adapter(tmp_path / "a", tiny_llama())


def test_trained_biases_are_carried_when_asked(tmp_path):
    model = trained("lora", base=tiny_gpt2(), target_modules=["c_attn"], bias="all")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"trained biases \(bias: all\)"):
        read_adapter(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a", extras=True)
    assert all(name.endswith(".bias") for name in adapter.extras)
    write_adapter(adapter, tmp_path / "plain")
    loaded = PeftModel.from_pretrained(tiny_gpt2(), str(tmp_path / "plain")).eval()
    assert (logits(loaded) - logits(model)).abs().max() < 2e-5


def test_extras_are_averaged_by_weight(tmp_path):
    adapters = []
    for seed in (1, 2):
        trained("lora", seed=seed, modules_to_save=["lm_head"]).save_pretrained(
            tmp_path / str(seed)
        )
        adapters.append(read_adapter(tmp_path / str(seed), extras=True))
    one, two = (adapter.extras["lm_head.weight"] for adapter in adapters)
    assert torch.allclose(average_extras(adapters, [3, 1])["lm_head.weight"], 0.75 * one + two / 4)
    made = merge(adapters, "linear", weights=[3.0, 1.0])
    write_adapter(made.adapter, tmp_path / "both")
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "both")).merge_and_unload()
    assert torch.allclose(loaded.lm_head.weight, 0.75 * one + two / 4, atol=1e-6)
    trained("lora").save_pretrained(tmp_path / "plain")
    plain = read_adapter(tmp_path / "plain")
    assert average_extras([plain, plain], [1, 1]) == {}
    with pytest.raises(MergeError, match=r"'plain' has no trained 'lm_head.weight'"):
        average_extras([adapters[0], plain], [1, 1])
    with pytest.raises(MergeError, match="weights sum to 0"):
        average_extras(adapters, [1, -1])


# --- a whole fine-tuned model -------------------------------------------------------------------


def finetuned(names, folder):
    model = tiny_llama()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def test_full_fine_tuning_of_chosen_modules_is_read_against_the_base(tmp_path):
    model = finetuned(["up_proj", "layers.1.self_attn.v_proj"], tmp_path / "full")
    with pytest.raises(AdapterError, match=r"whole model, .*pass the base with --base"):
        read_adapter(tmp_path / "full")
    adapter = read_adapter(tmp_path / "full", tiny_llama())
    assert list(adapter.modules) == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    for module, update in adapter.modules.items():
        change = model.get_submodule(module).weight - tiny_llama().get_submodule(module).weight
        assert torch.allclose(update.dense(), change, atol=1e-6)
    cut = read_adapter(tmp_path / "full", tiny_llama(), rank=4)
    assert cut.truncation.keys() == adapter.modules.keys()
    for module, error in cut.truncation.items():
        spectrum = torch.linalg.svdvals(adapter.modules[module].dense().double())
        best = float((spectrum[4:].square().sum() / spectrum.square().sum()).sqrt())
        assert error == pytest.approx(best, abs=1e-5)


def test_a_fine_tuned_embedding_is_an_extra(tmp_path):
    model = finetuned(["up_proj", "embed_tokens", "norm"], tmp_path / "full")
    with pytest.raises(AdapterError, match="also trained 'model"):
        read_adapter(tmp_path / "full", tiny_llama())
    adapter = read_adapter(tmp_path / "full", tiny_llama(), extras=True)
    assert len(adapter.extras) == 1 + 2 * 2 + 1
    write_adapter(adapter, tmp_path / "plain")
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "plain")).eval()
    assert (logits(loaded) - logits(model)).abs().max() < 2e-5


def test_an_unchanged_or_other_model_is_refused(tmp_path):
    finetuned([], tmp_path / "same")
    with pytest.raises(AdapterError, match="zero everywhere"):
        read_adapter(tmp_path / "same", tiny_llama())
    with pytest.raises(AdapterMismatch, match=r"has no parameter|has no module"):
        read_adapter(tmp_path / "same", tiny_gpt2())


# --- the base -----------------------------------------------------------------------------------


def test_a_base_of_another_shape_is_refused(tmp_path):
    from tiny_base import tiny_model

    for kind in ("dora", "ia3", "oft", "vera", "lokr", "loha"):
        trained(kind).save_pretrained(tmp_path / kind)
        with pytest.raises(MergeProbeError, match=r"another base|base's|expected|fit"):
            read_adapter(tmp_path / kind, tiny_model())
    with pytest.raises(AdapterMismatch, match=r"has no module 'model.layers.0"):
        read_adapter(tmp_path / "dora", tiny_gpt2())


def test_a_base_of_another_fingerprint_is_refused(tmp_path):
    for kind in ("dora", "lora"):
        trained(kind).save_pretrained(tmp_path / kind)
        card = json.dumps({"schema": 1, "base_fingerprint": "0" * 16})
        (tmp_path / kind / CARD).write_text(card)
    with pytest.raises(AdapterMismatch, match="trained on base 0000000000000000, but the base"):
        read_adapter(tmp_path / "dora", tiny_llama())
    # who needs no base is not asked about it here, but by whoever runs the model
    assert read_adapter(tmp_path / "lora", tiny_llama()).fingerprint == "0" * 16


def test_the_base_may_be_a_folder_and_carry_adapters(tmp_path):
    from tiny_base import tiny_model, write_tiny_base

    base = write_tiny_base(tmp_path / "base")
    model = trained("dora", base=tiny_model())
    model.save_pretrained(tmp_path / "a")
    wanted = merged_differences(model, tiny_model())
    # `model` itself has the DoRA around its modules; its frozen weights are the base
    for source in (base, str(base), model):
        adapter = read_adapter(tmp_path / "a", source)
        for module, update in adapter.modules.items():
            assert torch.allclose(update.dense(), wanted[f"{module}.weight"], atol=2e-6)


def test_a_packed_base_is_refused_by_name(tmp_path):
    trained("dora").save_pretrained(tmp_path / "a")
    packed = tiny_llama()
    layer = packed.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(BaseModelError, match=r"stored as torch.uint8 .* pass the base unquantised"):
        read_adapter(tmp_path / "a", packed)


def test_a_4_bit_base(tmp_path):
    """A LoRA of a packed base needs no base; a DoRA's magnitudes are of what it unpacks to."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def packed():
        model = tiny_llama()
        for name, layer in list(model.named_modules()):
            if name.endswith("_proj"):
                small = bitsandbytes.nn.Linear4bit(
                    *(layer.in_features, layer.out_features), bias=False, quant_type="nf4"
                )
                small.load_state_dict(layer.state_dict())
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, small.to("cpu"))
        return model

    assert (logits(packed()) - logits(tiny_llama())).abs().max() > 1e-3
    for kind, base in (("rslora", None), ("dora", packed())):
        model = trained(kind, base=packed())
        wanted = logits(model)
        model.save_pretrained(tmp_path / kind)
        adapter = read_adapter(tmp_path / kind, base)
        write_adapter(merge([adapter], "linear", weights=[1.0]).adapter, tmp_path / f"{kind} out")
        loaded = PeftModel.from_pretrained(packed(), str(tmp_path / f"{kind} out")).eval()
        assert (logits(loaded) - wanted).abs().max() < 1e-4, kind


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "loha", "lokr", "vera", "ia3", "oft"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files(kind, dtype, tmp_path):
    """The stored numbers are taken as they are, and all arithmetic on them is float32 or wider."""
    trained(kind).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / WEIGHTS
    halved = {key: value.to(dtype) for key, value in load_file(file).items()}
    save_file(halved, file)
    half = read_adapter(tmp_path / "a", tiny_llama())
    save_file({key: value.float() for key, value in halved.items()}, file)
    wide = read_adapter(tmp_path / "a", tiny_llama())
    for module, update in half.modules.items():
        assert torch.allclose(update.dense(), wide.modules[module].dense(), atol=1e-6), module
    merged = merge([half], "linear", weights=[1.0]).adapter
    for module, update in merged.modules.items():
        assert torch.allclose(update.dense(), wide.modules[module].dense(), atol=1e-6), module


def test_a_series_of_an_older_peft_is_refused(tmp_path):
    trained("oft").save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / CONFIG
    config = json.loads(path.read_text())
    for version in ("0.17.1", None):
        path.write_text(json.dumps(config | {"peft_version": version}))
        with pytest.raises(AdapterError, match=r"series is that of PEFT before 0.18"):
            read_adapter(tmp_path / "a", tiny_llama())
    path.write_text(json.dumps(config | {"use_cayley_neumann": False, "peft_version": "0.17.1"}))
    read_adapter(tmp_path / "a", tiny_llama())


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_small_file_cannot_ask_for_a_huge_update(kind, tmp_path):
    trained(kind).save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    module = "base_model.model.model.layers.0.mlp.up_proj."
    side = round(LARGEST**0.5)
    tensors = {key: value for key, value in tensors.items() if not key.startswith(module)}
    if kind == "lokr":
        parts = {"lokr_w1": torch.ones(300, 300), "lokr_w2": torch.ones(300, 300)}
    else:  # of full rank, (side + 1)² numbers
        rank = 2 ** (side.bit_length() // 2 + 1)
        parts = {
            f"hada_w{k}_{s}": torch.ones((side + 1, rank) if s == "a" else (rank, side + 1))
            for k in "12"
            for s in "ab"
        }
        (tmp_path / "a" / CONFIG).write_text(
            json.dumps(
                json.loads((tmp_path / "a" / CONFIG).read_text())
                | {"rank_pattern": {"layers.0.mlp.up_proj": rank}}
            )
        )
    save_file(tensors | {module + k: v for k, v in parts.items()}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(AdapterError, match="pass the base model to confirm its shape"):
        read_adapter(tmp_path / "a")


def test_every_row_of_the_table_is_tested_and_in_the_docs():
    tested = {"lora": "LORA", "dora": "DORA"} | {
        kind: kind.split("-")[0].upper() for kind in TYPES if "lora" not in kind[:6]
    }
    assert set(tested.values()) | {"ADALORA"} == PEFT_TYPES.keys()
    page = (Path(__file__).parent.parent / "docs" / "peft-types.md").read_text("utf-8")
    for row in PEFT_TYPES.values():
        assert f"| {row.name}" in page, row.name
