"""Merged modules on their way to disk: out of memory as soon as they are made."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mergeprobe.lowrank import LowRank


class Spool:
    """Updates kept in a nameless temporary file beside `out`, and read back memory-mapped.

    The rank of a file of adapters is that of its largest module, so nothing can go to its place
    before all are known. The temporary file is gone when the process is, however it ends. An
    error of the file system names `out`.
    """

    def __init__(self, out: Path) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        self._out = out
        self._file = tempfile.TemporaryFile(dir=out.parent)  # noqa: SIM115 - open as long as this is
        self._shapes: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}

    def add(self, module: str, update: LowRank) -> None:
        out, into = update.folded()
        self._shapes[module] = (out.shape[0], out.shape[1]), (into.shape[0], into.shape[1])
        try:
            for factor in (out, into):
                if factor.numel():
                    flat = factor.float().contiguous().reshape(-1)
                    self._file.write(flat.view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as problem:
            problem.filename = str(self._out)
            raise

    def updates(self) -> dict[str, LowRank]:
        """All that was added, float32, backed by the file."""
        entries = sum(math.prod(shape) for pair in self._shapes.values() for shape in pair)
        if entries == 0:
            flat = torch.zeros(0)
        else:
            # copy-on-write: torch wants memory that could be written to
            flat = torch.from_numpy(np.memmap(self._file, np.float32, "c", shape=(entries,)))
        found, start = {}, 0
        for module, pair in self._shapes.items():
            factors: list[Tensor] = []
            for shape in pair:
                end = start + math.prod(shape)
                factors.append(flat[start:end].view(shape))
                start = end
            found[module] = LowRank(factors[0], factors[1])
        return found
