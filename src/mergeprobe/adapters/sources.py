"""Paths that name adapters or probes: files, PEFT folders, or folders full of either."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mergeprobe.errors import MergeProbeError


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
    """Whether a folder means to be a PEFT adapter, sound or not, or holds a fine-tuned model."""
    from mergeprobe.adapters.finetuned import is_model_folder

    names = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    return path.is_dir() and (
        any((path / name).exists() for name in names) or is_model_folder(path)
    )
