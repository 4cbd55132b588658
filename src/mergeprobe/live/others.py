"""The runs that a run is forecast against: read at its probe point, the unusable ones named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergeprobe.adapters.checkpoint import check_same_base
from mergeprobe.adapters.sources import expand, is_adapter
from mergeprobe.capture import Probe
from mergeprobe.capture.probe import read_source
from mergeprobe.errors import AdapterMismatch, MergeProbeError, ProbeError

Source = str | Path | Probe


def read_against(
    sources: Sequence[Source], *, leave_out: Sequence[Path] = (), base: Any = None
) -> tuple[list[Probe], dict[str, MergeProbeError]]:
    """(probes, name -> why a file or folder cannot be read).

    Probes as they are; files, PEFT folders and folders of either as of now. leave_out: files that
    are this run's own. base: for folders whose update depends on it. A folder without anything in
    it is no error: other runs may get there later.
    """
    own = {path.resolve() for path in leave_out}
    found: list[Probe] = []
    unreadable: dict[str, MergeProbeError] = {}
    for source in sources:
        if isinstance(source, Probe):
            found.append(source)
            continue
        path = Path(source)
        if path.is_dir() and not is_adapter(path) and not _filled(path):
            continue
        for file in expand([path]):
            if file.resolve() in own:
                continue
            try:
                found.append(read_source(file, base))
            except MergeProbeError as problem:
                unreadable[file.stem if file.is_file() else file.name] = problem
    return found, unreadable


def _filled(folder: Path) -> bool:
    return any(
        is_adapter(child) or (child.suffix == ".safetensors" and not child.name.startswith("."))
        for child in folder.iterdir()
    )


def comparable(
    probe: Probe, others: Sequence[Probe], *, items: bool = False
) -> tuple[list[Probe], dict[str, MergeProbeError]]:
    """(others that can be compared with `probe`, name -> why not for the rest).

    Not those of this run's own name, of another base or other shapes, or without a module in
    common. items: nor those without calibration items, which the model tier runs.
    """
    kept: list[Probe] = []
    left_out: dict[str, MergeProbeError] = {}
    for other in others:
        try:
            _compare(probe, other, items, {known.name for known in kept})
        except MergeProbeError as problem:
            left_out[other.name] = problem
        else:
            kept.append(other)
    return kept, left_out


def _compare(probe: Probe, other: Probe, items: bool, taken: set[str]) -> None:
    if other.name == probe.name or other.name in taken:
        raise ProbeError(
            f"'{other.name}' is the name of two runs, one in '{other.path or other.name}'; rename "
            "one, or leave it out of against="
        )
    check_same_base([probe.to_adapter(), other.to_adapter()])
    if not probe.updates.keys() & other.updates.keys():
        raise AdapterMismatch(f"'{probe.name}' and '{other.name}' adapt no module in common")
    calibration = other.calibration
    if items and (calibration is None or calibration.ids.shape[1] == 0):
        raise ProbeError(f"'{other.name}' holds no calibration items, which budget= would run")
