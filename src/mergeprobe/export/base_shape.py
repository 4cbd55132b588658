"""What an export needs to know of the base model: its modules' shapes, layers and heads.

No weights are loaded: a config is built on the meta device, a GGUF file's header is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mergeprobe.adapters.base import quiet_transformers, resolve_base
from mergeprobe.adapters.packaged import ALIASES, packaged_file
from mergeprobe.errors import BaseModelError


@dataclass(frozen=True)
class BaseShape:
    """A base model without its weights.

    kind: `model_type` of transformers, or for a GGUF file its `general.architecture`.
    modules: Linear module -> (out, in), empty for a GGUF file. tensors: GGUF tensor -> (out, in),
    empty for others. tied: the output layer is the embedding. path: where it lies, if it is local.
    """

    name: str
    kind: str
    layers: int
    heads: int
    kv_heads: int
    modules: dict[str, tuple[int, int]] = field(default_factory=dict)
    tensors: dict[str, tuple[int, int]] = field(default_factory=dict)
    tied: bool = False
    path: Path | None = None


def base_shape(spec: str | Path) -> BaseShape:
    """Of whatever `load_base` takes; BaseModelError with one line if it is not there or unknown."""
    from transformers import AutoConfig, AutoModelForCausalLM

    where = resolve_base(spec)
    quiet_transformers()
    try:
        config: Any = AutoConfig.from_pretrained(where)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, RuntimeError) as problem:
        first = (str(problem).strip() or repr(problem)).splitlines()[0]
        raise BaseModelError(f"the config of base '{spec}' cannot be read: {first}") from None
    text = config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", 0))
    return BaseShape(
        name=str(spec),
        kind=str(text.model_type),
        layers=int(text.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        modules={name: shape for name, part in model.named_modules() if (shape := _shape(part))},
        tied=bool(getattr(text, "tie_word_embeddings", False)),
        path=Path(where).absolute() if Path(where).is_dir() else None,
    )


def _shape(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if hasattr(module, "nf") and hasattr(module, "nx"):  # Conv1D
        return int(module.nf), int(module.nx)  # type: ignore[arg-type]
    return None


def is_local(name: str) -> bool:
    """Whether the base can be read without asking the hub."""
    path = Path(name)
    return (
        name in ALIASES
        or (path / "config.json").exists()
        or (name.endswith(".gguf") and path.is_file())
    )


def gguf_file_of(spec: str | Path) -> Path | None:
    """The GGUF file that `spec` is or stands for, else None."""
    text = str(spec)
    if text in ALIASES:
        return packaged_file(ALIASES[text], lambda message: None)
    return Path(text) if text.endswith(".gguf") else None


def gguf_shape(path: Path, name: str) -> BaseShape:
    """From the header of a base model's GGUF file."""
    from gguf import GGUFReader

    if not path.is_file():
        raise BaseModelError(f"base model '{path}' does not exist")
    try:
        reader = GGUFReader(path)
        fields = {key: found.contents() for key, found in reader.fields.items()
                  if not key.startswith("tokenizer.")}  # fmt: skip
        kind = str(fields["general.architecture"])
        heads = int(fields[f"{kind}.attention.head_count"])
        found = BaseShape(
            name=name,
            kind=kind,
            layers=int(fields[f"{kind}.block_count"]),
            heads=heads,
            kv_heads=int(fields.get(f"{kind}.attention.head_count_kv", heads)),
            tensors={t.name: (int(t.shape[1]), int(t.shape[0]))
                     for t in reader.tensors if len(t.shape) == 2},
            tied=not any(t.name == "output.weight" for t in reader.tensors),
            path=path.absolute(),
        )  # fmt: skip
    except (KeyError, ValueError, TypeError, IndexError, OSError) as problem:
        raise BaseModelError(f"'{path}' cannot be read as a GGUF model: {problem!r}") from None
    return found
