"""A LoRA as the GGUF file that llama.cpp loads, and back.

Source: llama.cpp's own converter and loader (convert_lora_to_gguf.py, llama-adapter.cpp; read at
llama-cpp-python 0.3.36). Tensors are NAME.weight.lora_a (r, in) and NAME.weight.lora_b (out, r)
under llama.cpp's names; the loader applies alpha / r, so alpha is written as the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.adapters.checkpoint import Adapter
from mergeprobe.errors import AdapterMismatch, ExportError
from mergeprobe.export.base_shape import BaseShape
from mergeprobe.lowrank import LowRank, pad

FINGERPRINT = "mergeprobe.base_fingerprint"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Architecture:
    """llama.cpp's name for it. rotated: rows of Q and K are interleaved within each head there,
    because its rotary embedding turns neighbouring rows, transformers' the two halves."""

    name: str
    rotated: bool


# transformers' model_type, or the architecture that a GGUF base states
ARCHITECTURES = {
    "llama": Architecture("llama", True),
    "mistral": Architecture("llama", True),
    "qwen2": Architecture("qwen2", False),
    "qwen3": Architecture("qwen3", False),
    "gemma": Architecture("gemma", False),
    "gemma2": Architecture("gemma2", False),
    "gemma3": Architecture("gemma3", False),
    "gemma3_text": Architecture("gemma3", False),
    "phi3": Architecture("phi3", False),
}


def interleaved(rows: Float[Tensor, "out r"], heads: int) -> Float[Tensor, "out r"]:
    """Transformers' order of Q's or K's output rows -> llama.cpp's: in each head the first and
    second half alternate, 0 1 2 3 -> 0 2 1 3."""
    out, rank = rows.shape
    return rows.reshape(heads, 2, out // heads // 2, rank).swapaxes(1, 2).reshape(out, rank)


def halved(rows: Float[Tensor, "out r"], heads: int) -> Float[Tensor, "out r"]:
    """The inverse of `interleaved`."""
    out, rank = rows.shape
    return rows.reshape(heads, out // heads // 2, 2, rank).swapaxes(1, 2).reshape(out, rank)


def architecture_of(shape: BaseShape) -> Architecture:
    if shape.kind not in ARCHITECTURES:
        raise ExportError(
            f"base '{shape.name}' is a {shape.kind}, whose layout in llama.cpp is not known here; "
            f"known are {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[shape.kind]


def tensor_names(modules: Mapping[str, LowRank], shape: BaseShape) -> dict[str, str]:
    """Module -> its tensor in llama.cpp; ExportError for one that it has no name for."""
    import gguf

    wanted = architecture_of(shape).name
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)
    known = gguf.get_tensor_name_map(arch, shape.layers)
    found: dict[str, str] = {}
    for module, update in modules.items():
        name = known.get_name(module)
        if name is None or (module == "lm_head" and shape.tied):
            why = "its output layer is the embedding" if name else f"a {wanted} has no such tensor"
            raise ExportError(f"llama.cpp takes no LoRA on '{module}': {why}")
        found[module] = f"{name}.weight"
        size = shape.tensors.get(found[module]) or shape.modules.get(module)
        if (shape.tensors or shape.modules) and size != update.shape:
            raise AdapterMismatch(
                f"'{module}' is {size} in base '{shape.name}' but {update.shape} in the adapter: "
                "it was trained on another base"
            )
    return found


def write_gguf(adapter: Adapter, path: Path, shape: BaseShape, dtype: torch.dtype) -> None:
    """Writes one file; every module at the adapter's largest rank, scaling folded into B."""
    import gguf
    from gguf.quants import quantize

    kind = getattr(gguf.GGMLQuantizationType, DTYPES[dtype])
    rank = max(adapter.ranks)
    names = tensor_names(adapter.modules, shape)
    writer = gguf.GGUFWriter(path, architecture_of(shape).name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    writer.add_name(adapter.name)
    if adapter.base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, adapter.base)
    if adapter.fingerprint:
        writer.add_string(FINGERPRINT, adapter.fingerprint)
    for module, update in adapter.modules.items():
        B, A = pad(update, rank).folded()
        if heads := _heads(names[module], shape):
            B = interleaved(B, heads)
        for side, factor in (("a", A), ("b", B)):
            values = factor.float().contiguous().numpy()
            if dtype is torch.float32:
                writer.add_tensor(f"{names[module]}.lora_{side}", values)
            else:
                packed = quantize(values, kind)
                writer.add_tensor(f"{names[module]}.lora_{side}", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _heads(tensor: str, shape: BaseShape) -> int:
    """Of a tensor whose rows llama.cpp keeps in another order; 0 for the others."""
    if not architecture_of(shape).rotated:
        return 0
    if tensor.endswith(".attn_q.weight"):
        return shape.heads
    return shape.kv_heads if tensor.endswith(".attn_k.weight") else 0


def read_gguf(path: Path, shape: BaseShape, modules: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The updates in a file that `write_gguf` made, for the modules given, in transformers' order.

    Applied as llama.cpp's loader does: alpha / r, or nothing where alpha is 0.
    ExportError if a tensor is missing or left over, or the file is no LoRA for this architecture.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    stated = _metadata(reader)
    wanted = architecture_of(shape).name
    if stated["general.type"] != "adapter" or stated["adapter.type"] != "lora":
        raise ExportError(f"'{path}' is no LoRA adapter")
    if stated["general.architecture"] != wanted:
        raise ExportError(f"'{path}' is for {stated['general.architecture']}, expected {wanted}")
    tensors = {t.name: t for t in reader.tensors}
    alpha, found = float(stated["adapter.lora.alpha"]), {}
    for module, name in tensor_names(modules, shape).items():
        sides = []
        for side in "ab":
            tensor = tensors.pop(f"{name}.lora_{side}", None)
            if tensor is None:
                raise ExportError(f"'{path}' lacks lora_{side} of '{name}'")
            values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            sides.append(values.reshape(*reversed([int(n) for n in tensor.shape])))
        A, B = sides
        if heads := _heads(name, shape):
            B = halved(B, heads)
        found[module] = LowRank(B, A, alpha / A.shape[0] if alpha else 1.0)
    if tensors:
        raise ExportError(f"'{path}' holds '{next(iter(tensors))}', which no module stands for")
    return found


def _metadata(reader: Any) -> dict[str, Any]:
    keys = ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha")
    return {key: reader.fields[key].contents() if key in reader.fields else None for key in keys}
