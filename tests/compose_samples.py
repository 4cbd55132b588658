"""A tiny Llama and stock PEFT adapters on it, for the tests of composing."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from mergeprobe.adapters.checkpoint import read_adapter

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")


def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=1, eos_token_id=2)).eval()


def peft_model(seed, *, r=4, alpha=4, targets=TARGETS, name="default", model=None, **kwargs):
    """A stock PEFT model with random A and B (PEFT's own init leaves B zero)."""
    config = LoraConfig(
        r=r, lora_alpha=alpha, target_modules=list(targets), task_type="CAUSAL_LM", **kwargs
    )
    model = get_peft_model(model or tiny_llama(), config, adapter_name=name).eval()
    fill(model, name, seed)
    return model


def fill(model, name, seed):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if ".lora_" in key and f".{name}." in key:
                value.copy_(0.2 * torch.randn(value.shape, generator=draw))


def peft_folder(path, seed, **kwargs):
    """(folder, the adapter read from it), as stock PEFT saves it."""
    peft_model(seed, **kwargs).save_pretrained(path)
    return path, read_adapter(path)


def tokens(seed=0, items=3, length=9):
    return torch.randint(3, 128, (items, length), generator=torch.Generator().manual_seed(seed))
