"""What probes must have in common before they are compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergeprobe.adapters.checkpoint import Adapter, check_same_base, natural
from mergeprobe.capture.probe import Probe
from mergeprobe.errors import AdapterMismatch, ProbeError
from mergeprobe.lowrank import LowRank
from mergeprobe.signals.files import shape_of


def check_probes(probes: Sequence[Probe]) -> str | None:
    """The common base fingerprint, or None where not every probe carries one.

    Raises ProbeError for none, two of one name or one without updates, AdapterMismatch for
    other bases or shapes. Reads no tensor of a stored probe."""
    if not probes:
        raise ProbeError("no probes to measure; give at least one")
    seen = set()
    for probe in probes:
        if probe.name in seen:
            raise ProbeError(f"two probes are named '{probe.name}'; give each its own name")
        seen.add(probe.name)
        if not probe.updates:
            raise ProbeError(f"probe '{probe.name}' holds no updates; capture it again")
    known: dict[tuple[int, ...], LowRank] = {}
    return check_same_base([_outline(probe, known) for probe in probes])


def _outline(probe: Probe, known: dict[tuple[int, ...], LowRank]) -> Adapter:
    """The adapter with the shapes of its updates and no entries."""
    shapes = {module: shape_of(probe.updates, module) for module in probe.updates}
    for out, into in set(shapes.values()) - known.keys():
        sides = torch.empty(out, 1, device="meta"), torch.empty(1, into, device="meta")
        known[out, into] = LowRank(*sides)
    return Adapter(
        probe.name,
        {module: known[shape] for module, shape in shapes.items()},
        base=probe.meta.get("base") or "",
        fingerprint=probe.meta.get("base_fingerprint"),
    )


def check_in_common(probes: Sequence[Probe]) -> None:
    """Raises AdapterMismatch for the first two probes that adapt no module in common."""
    kinds: dict[frozenset[str], Probe] = {}
    for probe in probes:
        mine = frozenset(probe.updates)
        if mine in kinds:
            continue
        for theirs, other in kinds.items():
            if not mine & theirs:
                raise AdapterMismatch(
                    f"'{other.name}' and '{probe.name}' adapt no module in common: "
                    f"{sorted(theirs, key=natural)[:2]}... and {sorted(mine, key=natural)[:2]}..."
                )
        kinds[mine] = probe


def resolve(chosen: Sequence[str], probes: Sequence[Probe]) -> tuple[int, ...]:
    """Probe indices of the named adapters, in input order."""
    place = {probe.name: i for i, probe in enumerate(probes)}
    for name in chosen:
        if name not in place:
            some = [*place] if len(place) <= 20 else [*list(place)[:20], "..."]
            raise ProbeError(f"set {list(chosen)} names '{name}'; the probes are {some}")
    if len(set(chosen)) < 2 or len(set(chosen)) != len(chosen):
        raise ProbeError(f"set {list(chosen)} needs at least two adapters, each once")
    return tuple(sorted(place[name] for name in chosen))
