"""Write a safetensors file one tensor at a time, so that no more than one is in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# names of the format, https://github.com/huggingface/safetensors
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True, eq=False)
class Planned:
    """A tensor that is still to be made: what the header says of it, and what makes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count * self.dtype.itemsize


def write_tensors(
    path: Path, planned: Mapping[str, Planned], metadata: Mapping[str, str] | None = None
) -> None:
    """The file that safetensors' save_file would write, up to the order of the tensors in it."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    # wide types first, as the format asks for alignment
    order = sorted(planned, key=lambda name: (-planned[name].dtype.itemsize, name))
    for name in order:
        one, start = planned[name], end
        end = start + one.bytes
        header[name] = {
            "dtype": DTYPES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            tensor = planned[name].make().detach().cpu().contiguous()
            assert tuple(tensor.shape) == tuple(planned[name].shape), name
            assert tensor.dtype == planned[name].dtype, name
            if tensor.numel():
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
