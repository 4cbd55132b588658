"""Probes whose tensors stay on disk until a module of theirs is read, and are let go after it.

A file is read and verified once, as a whole, by the reader of its kind; what the file then holds
byte for byte is dropped and read again when it is asked for, a tensor's own range of the file, so
no handle stays open and a thousand adapters take no memory. What was computed on reading (another
PEFT type's update) is no tensor of the file, and stays in memory.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergeprobe.capture.probe import Moment, Probe
from mergeprobe.errors import ProbeError
from mergeprobe.lowrank import LowRank

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WEIGHTS = "adapter_model.safetensors"
SKETCHES = ("halfway", "gradient_base", "gradient")
MOMENTS = ("inputs", "outputs")
WHOLE = ("drift", "calibration")  # small, and needed as a whole

# key -> (dtype, shape, first byte, bytes), counted from the end of the header
Layout = dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]


@dataclass(frozen=True)
class TensorFile:
    """Where the tensors of one safetensors file lie; refuses a file that changed meanwhile.

    held: the bytes after the header, where all are in memory.
    """

    path: Path
    layout: Layout
    start: int
    stamp: tuple[int, int]
    held: bytearray | None = None

    @classmethod
    def of(cls, path: Path) -> TensorFile:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return cls(path, _layout(json.dumps(header)), 8 + length, _stamp(path))

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return self.stamp[0] - self.start

    def whole(self) -> TensorFile:
        """The same with all bytes read: its tensors are views of them."""
        return replace(self, held=self._bytes(0, self.size))

    def read(self, key: str) -> Tensor:
        dtype, shape, first, size = self.layout[key]
        if self.held is None:
            return torch.frombuffer(self._bytes(first, size), dtype=dtype).reshape(shape)
        count = size // dtype.itemsize
        found = torch.frombuffer(self.held, dtype=dtype, count=count, offset=first)
        return found.reshape(shape)

    def _bytes(self, first: int, size: int) -> bytearray:
        # a range is read, not mapped: a third of the time, and no page of a file stays resident
        into = bytearray(size)
        file = os.open(self.path, os.O_RDONLY)
        try:
            status = os.fstat(file)
            same = (status.st_size, status.st_mtime_ns) == self.stamp
            if not same or os.preadv(file, [into], self.start + first) != size:
                raise ProbeError(f"'{self.path}' changed while it was measured; start again")
        finally:
            os.close(file)
        return into


@dataclass(frozen=True)
class OnDisk(Mapping[str, Any]):
    """One part of a probe by module, read from its file on every access.

    make: (file, module) -> the value. shapes: module -> its shape, known without reading. ranks:
    of updates.
    """

    file: TensorFile
    make: Callable[[TensorFile, str], Any]
    shapes: dict[str, tuple[int, ...]]
    ranks: dict[str, int] | None = None

    def __getitem__(self, module: str) -> Any:
        if module not in self.shapes:
            raise KeyError(module)
        return self.make(self.file, module)

    def __contains__(self, module: object) -> bool:
        return module in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def shape_of(part: Mapping[str, Any], module: str) -> tuple[int, ...]:
    """The shape of one module's value, without reading it where it is stored."""
    return part.shapes[module] if isinstance(part, OnDisk) else tuple(part[module].shape)


def rank_of(updates: Mapping[str, Any], module: str) -> int:
    """The number of a module's rank components, without reading it where it is stored."""
    ranks = updates.ranks if isinstance(updates, OnDisk) else None
    return updates[module].r if ranks is None else ranks[module]


def on_disk(probe: Probe) -> Probe:
    """The same probe with every part that its file holds as it is left on disk.

    A probe without a file, or one that was derived from its file, comes back as it is.
    """
    path = probe.path
    if path is None:
        return probe
    path = path / WEIGHTS if path.is_dir() else path
    if not path.is_file():
        return probe
    file = TensorFile.of(path)
    changed: dict[str, Any] = {"updates": _updates(probe.updates, file)}
    changed |= {part: _sketches(part, getattr(probe, part), file) for part in SKETCHES}
    changed |= {part: _moments(part, getattr(probe, part), file) for part in MOMENTS}
    changed |= {part: _copied(getattr(probe, part)) for part in WHOLE}
    return replace(probe, **changed)


def in_memory(probes: Sequence[Probe], most: int) -> list[Probe]:
    """The probes with what is on disk read, each file at once (a tensor at a time takes several
    times as long); as they are if those files hold more than `most` bytes."""
    parts = [
        {name: part for name, part in vars(probe).items() if isinstance(part, OnDisk)}
        for probe in probes
    ]
    files = [{part.file.path: part.file for part in each.values()} for each in parts]
    if sum(file.size for each in files for file in each.values()) > most:
        return list(probes)
    found = []
    for probe, each, its in zip(probes, parts, files, strict=True):
        whole = {path: file.whole() for path, file in its.items()}
        read = {
            name: {module: part.make(whole[part.file.path], module) for module in part}
            for name, part in each.items()
        }
        found.append(replace(probe, **read) if read else probe)
    return found


def _copied(part: Any) -> Any:
    """A copy whose tensors do not keep the file that they were read from mapped."""
    if part is None:
        return None
    return replace(
        part,
        **{name: v.clone() for name, v in vars(part).items() if isinstance(v, Tensor)},
    )


def _updates(updates: Mapping[str, LowRank], file: TensorFile) -> Mapping[str, LowRank]:
    keys: dict[str, tuple[str, str, float]] = {}
    for module, update in updates.items():
        found = [
            next((key for key in names if _holds(file, key, factor)), None)
            for names, factor in zip(_names(module), (update.B, update.A), strict=True)
        ]
        if found[0] is None or found[1] is None:
            return updates
        keys[sys.intern(module)] = (found[0], found[1], update.scaling)

    def make(file: TensorFile, module: str) -> LowRank:
        b, a, scaling = keys[module]
        return LowRank(file.read(b), file.read(a), scaling)

    shapes = {module: updates[module].shape for module in keys}
    return OnDisk(file, make, shapes, {module: updates[module].r for module in keys})


def _names(module: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys under which a file may hold B and A of a module."""
    b, a = (
        (
            f"update.{side}:{module}",
            f"base_model.model.{module}.lora_{side}.weight",
            f"{module}.lora_{side}.weight",
        )
        for side in "BA"
    )
    return b, a


def _sketches(part: str, values: Mapping[str, Tensor], file: TensorFile) -> Mapping[str, Tensor]:
    if not all(_holds(file, f"{part}:{module}", value) for module, value in values.items()):
        return values
    shapes = {sys.intern(module): tuple(value.shape) for module, value in values.items()}

    def make(file: TensorFile, module: str) -> Tensor:
        return file.read(f"{part}:{module}").to(torch.float32)

    return OnDisk(file, make, shapes)


def _moments(part: str, values: Mapping[str, Moment], file: TensorFile) -> Mapping[str, Moment]:
    kept: dict[int, str] = {}  # q, k and v read one input, which is in the file once
    keys: dict[str, tuple[str, float]] = {}
    for module, moment in values.items():
        if _holds(file, f"{part}:{module}", moment.factor):
            kept[id(moment.factor)] = f"{part}:{module}"
    for module, moment in values.items():
        if id(moment.factor) not in kept:
            return values
        keys[sys.intern(module)] = kept[id(moment.factor)], moment.tail

    def make(file: TensorFile, module: str) -> Moment:
        key, tail = keys[module]
        return Moment(file.read(key).to(torch.float32), tail)

    return OnDisk(file, make, {module: tuple(values[module].factor.shape) for module in keys})


def _holds(file: TensorFile, key: str, value: Tensor) -> bool:
    """Whether the file's tensor is this value (what is bfloat16 there is float32 in memory)."""
    return (
        key in file.layout
        and file.layout[key][1] == tuple(value.shape)
        and torch.equal(file.read(key).to(value.dtype), value)
    )


@lru_cache(maxsize=64)
def _layout(header: str) -> Layout:
    """Shared by all files of one layout: a thousand adapters of one config have one."""
    found = {}
    for key, entry in json.loads(header).items():
        if entry["dtype"] in DTYPES:
            first, end = entry["data_offsets"]
            dtype = DTYPES[entry["dtype"]]
            found[sys.intern(key)] = dtype, tuple(entry["shape"]), first, end - first
    return found


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
