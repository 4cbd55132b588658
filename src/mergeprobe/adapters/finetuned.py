"""A whole fine-tuned model read against its base: what it changed, as updates and extras."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergeprobe.adapters.adapter import CONFIG
from mergeprobe.adapters.stored import Contents
from mergeprobe.adapters.weights import BaseWeights
from mergeprobe.errors import AdapterError


def is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a model's own weights (transformers' save_pretrained), no adapter."""
    return (
        not (folder / CONFIG).exists()
        and (folder / "config.json").exists()
        and any(folder.glob("model*.safetensors"))
    )


def finetuned_contents(folder: Path, base: BaseWeights | None, rank: int | None) -> Contents:
    """Updates W_trained − W_base by module, and the values of other parameters that changed.

    Reads one tensor at a time; what is equal in both is left out, so full fine-tuning of chosen
    modules gives those modules only. Embeddings, norms and biases are the other parameters.
    Raises AdapterError without a base, AdapterMismatch for a parameter that the base lacks or has
    in another shape.
    """
    if base is None:
        raise AdapterError(
            f"'{folder}' is a whole model, which is read as its difference from its base; pass the "
            "base with --base (base=... in Python)"
        )
    contents = Contents(rank)
    for name, trained, before in changed_parameters(folder, base):
        module, _, last = name.rpartition(".")
        if last == "weight" and base.is_linear(module):
            change = trained.double() - before.double()
            contents.add(module, change if base.is_upright(module) else change.T)
        else:
            contents.extras[name] = trained
    return contents


def changed_parameters(folder: Path, base: BaseWeights) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, trained, the base's) of every parameter that is not the same in both, on the CPU."""
    for file in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():
                    trained = opened.get_tensor(name)
                    before = base.parameter(name).cpu()
                    if before.shape != trained.shape or not trained.is_floating_point():
                        raise AdapterError(
                            f"'{folder}': '{name}' is {trained.dtype} {tuple(trained.shape)}, the "
                            f"base's is {tuple(before.shape)}: it was trained on another base, or "
                            "is packed"
                        )
                    if bool((trained.double() != before.double()).any()):
                        yield name, trained, before
        except (SafetensorError, OSError, ValueError, RuntimeError) as problem:
            raise AdapterError(f"'{file}' is truncated or damaged: {problem}") from None
