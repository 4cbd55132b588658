"""Arguments that name adapters or probes: files, PEFT folders, or folders full of either."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergeprobe.errors import MergeProbeError

if TYPE_CHECKING:
    from mergeprobe.adapters.checkpoint import Adapter
    from mergeprobe.capture.probe import Probe


def expand(arguments: Sequence[Path], *, probes: bool = True) -> list[Path]:
    """Every adapter folder and, with `probes`, every probe file, in natural order inside a folder.

    A folder that is no adapter itself stands for what is directly inside. Raises MergeProbeError
    for one that holds nothing of the kind. A path that does not exist is left for its reader.
    """
    from mergeprobe.adapters.checkpoint import natural

    found: list[Path] = []
    for path in arguments:
        if not path.is_dir() or is_adapter(path):
            found.append(path)
            continue
        inside = [
            child
            for child in sorted(path.iterdir(), key=lambda child: natural(child.name))
            if not child.name.startswith(".")
            and (is_adapter(child) or (probes and child.suffix == ".safetensors"))
        ]
        if not inside:
            what = "neither an adapter nor a probe" if probes else "no adapter"
            raise MergeProbeError(
                f"'{path}' holds {what}: expected PEFT folders with adapter_config.json"
                + (" or .safetensors probes" if probes else "")
            )
        found += inside
    return found


def is_adapter(path: Path) -> bool:
    """Whether a folder means to be a PEFT adapter, sound or not."""
    names = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    return path.is_dir() and any((path / name).exists() for name in names)


def read_sources(arguments: Sequence[Path]) -> list[Probe]:
    """Probes as they are, adapters as probes that have their update only."""
    from mergeprobe.adapters.checkpoint import read_adapter
    from mergeprobe.capture.probe import Probe, read_probe

    return [
        Probe.from_adapter(read_adapter(path)) if path.is_dir() else read_probe(path)
        for path in expand(arguments)
    ]


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
