"""Arguments that name adapters or probes: files, PEFT folders, or folders full of either."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergeprobe.adapters.sources import expand
from mergeprobe.errors import MergeProbeError

if TYPE_CHECKING:
    from mergeprobe.adapters.checkpoint import Adapter
    from mergeprobe.capture.probe import Probe


def read_sources(arguments: Sequence[Path]) -> list[Probe]:
    """Probes as they are, adapters as probes that have their update only."""
    from mergeprobe.capture.probe import read_source

    return [read_source(path) for path in expand(arguments)]


def read_adapters(arguments: Sequence[Path]) -> dict[str, Adapter]:
    """Adapters by folder name; MergeProbeError where two folders have the same."""
    from mergeprobe.adapters.checkpoint import read_adapter

    found: dict[str, Adapter] = {}
    for path in expand(arguments, probes=False):
        adapter = read_adapter(path)
        if adapter.name in found:
            raise MergeProbeError(
                f"two adapters are called '{adapter.name}': '{found[adapter.name].path}' and "
                f"'{path}'; rename one folder"
            )
        found[adapter.name] = adapter
    return found
