"""Arguments that name adapters or probes: files, PEFT folders, or folders full of either."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeprobe.adapters.sources import expand
from mergeprobe.errors import MergeProbeError

if TYPE_CHECKING:
    from mergeprobe.adapters.checkpoint import Adapter
    from mergeprobe.capture.probe import Probe


def read_sources(
    arguments: Sequence[Path], base: Any = None, *, in_memory: int | None = None
) -> list[Probe]:
    """Probes as they are, adapters as probes that have their update only.

    base: what `read_adapter` takes, for adapters whose update depends on it; loaded once.
    in_memory: where there are more than so many, tensors stay on disk until they are needed.
    """
    from mergeprobe.capture.probe import read_source
    from mergeprobe.signals import on_disk

    known = opened(base)
    paths = expand(arguments)
    if in_memory is None or len(paths) <= in_memory:
        return [read_source(path, known) for path in paths]
    return [on_disk(read_source(path, known)) for path in paths]


def read_adapters(
    arguments: Sequence[Path], base: Any = None, *, rank: int | None = None, extras: bool = False
) -> dict[str, Adapter]:
    """Adapters by folder name; MergeProbeError where two folders have the same.

    base, rank, extras: see `read_adapter`; the base is loaded once.
    """
    from mergeprobe.adapters.checkpoint import read_adapter

    known = opened(base)
    found: dict[str, Adapter] = {}
    for path in expand(arguments, probes=False):
        adapter = read_adapter(path, known, rank=rank, extras=extras)
        if adapter.name in found:
            raise MergeProbeError(
                f"two adapters are called '{adapter.name}': '{found[adapter.name].path}' and "
                f"'{path}'; rename one folder"
            )
        found[adapter.name] = adapter
    return found


def opened(base: Any) -> Any:
    from mergeprobe.adapters.weights import BaseWeights

    return None if base is None else BaseWeights.of(base)
