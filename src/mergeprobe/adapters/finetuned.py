"""A whole fine-tuned model read against its base: what it changed, as updates and extras."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mergeprobe.adapters.adapter import CONFIG, natural
from mergeprobe.adapters.weights import BaseWeights
from mergeprobe.errors import AdapterError


def is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a model's own weights (transformers' save_pretrained), no adapter."""
    return (
        not (folder / CONFIG).exists()
        and (folder / "config.json").exists()
        and any(folder.glob("model*.safetensors"))
    )


def finetuned_update(
    folder: Path, base: BaseWeights | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(module -> W_trained − W_base in float64, other parameters that changed -> their values).

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
    updates: dict[str, Tensor] = {}
    extras: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():
                    _compare(name, opened.get_tensor(name), base, folder, updates, extras)
        except (SafetensorError, OSError, ValueError, RuntimeError) as problem:
            raise AdapterError(f"'{file}' is truncated or damaged: {problem}") from None
    return {module: updates[module] for module in sorted(updates, key=natural)}, extras


def _compare(
    name: str,
    trained: Tensor,
    base: BaseWeights,
    folder: Path,
    updates: dict[str, Tensor],
    extras: dict[str, Tensor],
) -> None:
    before = base.parameter(name).cpu()
    if before.shape != trained.shape:
        raise AdapterError(
            f"'{folder}': '{name}' is {tuple(trained.shape)}, the base's is {tuple(before.shape)}: "
            "it was trained on another base"
        )
    change = trained.double() - before.double()
    if not bool(change.any()):
        return
    module, _, last = name.rpartition(".")
    layer = base.layer(module)
    if last == "weight" and isinstance(layer, nn.Linear):
        updates[module] = change
    elif last == "weight" and hasattr(layer, "nf"):  # Conv1D keeps its weight transposed
        updates[module] = change.T
    else:
        extras[name] = trained
