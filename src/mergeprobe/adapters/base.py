"""Base models: a hub id, a folder, a GGUF file or an alias -> model, tokenizer, fingerprint."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mergeprobe.adapters.packaged import ALIASES, Notify, cache_folder, packaged_file
from mergeprobe.artefact import atomic_folder, sha256
from mergeprobe.errors import BaseModelError


@dataclass(frozen=True, eq=False)
class Base:
    """A loaded base model. name: what the user asked for; it goes into configs and plans."""

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_base(
    spec: str | Path,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    notify: Notify = lambda message: None,
) -> Base:
    """Loads a causal language model and its tokenizer, in eval mode, parameters frozen.

    spec: an alias of ALIASES, a folder, a `.gguf` file, or a hub id.
    device: "auto" takes a GPU when there is one. dtype: "auto" is float32 on CPU and bfloat16
    on a GPU that has it. GGUF files are dequantised once into the user's cache.
    Raises BaseModelError with one line.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = torch.device(_device(device))
    wanted = _dtype(dtype, target)
    folder = resolve_base(spec, notify=notify)
    quiet_transformers()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=wanted)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError) as problem:
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else repr(problem)
        raise BaseModelError(
            f"base model '{spec}' cannot be loaded: {first}; expected a hub id, a folder, "
            f"a .gguf file or one of {sorted(ALIASES)}"
        ) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.requires_grad_(False)
    model.eval().to(target)
    return Base(str(spec), model, tokenizer, fingerprint(model))


def resolve_base(spec: str | Path, *, notify: Notify = lambda message: None) -> str:
    """Where transformers can load `spec` from: a folder (aliases, GGUF, local, the hub's cache
    without a network) or the hub id."""
    text = str(spec)
    if text in ALIASES:
        packaged = ALIASES[text]
        return str(_dequantised(packaged.sha256, lambda: packaged_file(packaged, notify), notify))
    if text.endswith(".gguf"):
        file = Path(text)
        if not file.is_file():
            raise BaseModelError(f"base model '{file}' does not exist")
        return str(_dequantised(sha256(file), lambda: file, notify))
    if Path(text).is_dir():
        if not (Path(text) / "config.json").exists():
            raise BaseModelError(f"'{text}' is a folder without config.json: no base model")
        return text
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise BaseModelError(f"base model folder '{text}' does not exist")
    return _on_hub(text)


def _on_hub(repository: str) -> str:
    """The name of a repository; where the hub does not answer, its folder in the hub's cache.

    Asked once: what loads a model tries for half a minute, even where the cache has it all.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().model_info(repository, timeout=10)
    except (HfHubHTTPError, HFValidationError):  # an answer, if not a good one
        return repository
    except Exception:  # whatever its HTTP library calls no network, no answer in time, or offline
        try:
            return snapshot_download(repository, local_files_only=True)
        except OSError:
            raise BaseModelError(
                f"base model '{repository}' is no folder and not in the hub's cache, and the hub "
                f"cannot be reached; expected a hub id, a folder, a .gguf file or one of "
                f"{sorted(ALIASES)}"
            ) from None
    return repository


def needs_unpacking(spec: str | Path) -> bool:
    """Whether loading `spec` would first dequantise a GGUF file into the cache."""
    text = str(spec)
    if text in ALIASES:
        return not (_unpacked(ALIASES[text].sha256) / "config.json").exists()
    if text.endswith(".gguf") and Path(text).is_file():
        return not (_unpacked(sha256(text)) / "config.json").exists()
    return False


def _unpacked(digest: str) -> Path:
    return cache_folder() / "base" / digest[:16]


def _dequantised(digest: str, source: Callable[[], Path], notify: Notify) -> Path:
    """A folder in the cache with the GGUF's weights as float32 safetensors."""
    target = _unpacked(digest)
    if (target / "config.json").exists():
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = source()
    notify(f"unpacking {file.name} into the cache (once, about half a minute)")
    quiet_transformers()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except Exception as problem:  # a damaged file makes its reader fail in any way
        raise BaseModelError(f"'{file}' cannot be read as GGUF: {problem}") from None
    # the loaded weights are plain tensors, but the model still calls itself quantised
    # and would refuse to be saved
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    with atomic_folder(target, force=True) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return target


def fingerprint(model: nn.Module) -> str:
    """A short name for the base's weights: equal across dtypes and devices, else different.

    Hashes the shapes of all matrices and the signs of 256 fixed entries of each. Rounding to
    bfloat16 or float16 keeps signs (only magnitudes below 6e-8 vanish in float16), while another
    training run, or a fine-tune of this one, flips some. Adapters attached with PEFT are left
    out, so a model has the same fingerprint with and without them.
    Raises BaseModelError for packed (quantised) weights, whose entries cannot be read.
    """
    total = hashlib.sha256()
    for name, weight in sorted(base_weights(model)):
        if weight.ndim < 2:
            continue
        if not weight.is_floating_point():
            raise BaseModelError(
                f"'{name}' is stored as {weight.dtype}: a packed base has no fingerprint; "
                "load it unquantised once to verify it"
            )
        flat = weight.detach().reshape(-1)
        count = min(256, flat.numel())
        generator = torch.Generator().manual_seed(flat.numel())
        where = torch.randint(flat.numel(), (count,), generator=generator)
        signs = (flat[where.to(flat.device)] > 0).cpu().to(torch.uint8)
        total.update(f"{name}|{tuple(weight.shape)}|".encode())
        total.update(bytes(signs.tolist()))
    return total.hexdigest()[:16]


def base_weights(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The frozen weights by their names in the base model, adapters of any PEFT type left out."""
    # a PEFT layer keeps the base's module as base_layer or original_module, its own beside it
    kept = ("base_layer", "original_module")
    added = {
        f"{name}.{inside}"
        for name, module in model.named_modules()
        if any(held in module._modules for held in kept)
        for inside, _ in module.named_parameters()
        if inside.partition(".")[0] not in kept
    }
    weights = []
    for name, weight in model.named_parameters():
        if name in added:
            continue
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        weights.append((plain.removeprefix("base_model.model."), weight))
    return weights


def quiet_transformers() -> None:
    """Keeps transformers' loading bars and notices out of our output."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def _device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise BaseModelError(
            f"unknown dtype '{dtype}'; expected auto, float32, bfloat16 or float16"
        )
    return found
