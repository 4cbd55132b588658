"""What a data-assisted rule may know of one module, for one adapter: parts of its probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergeprobe.capture.probe import Moment, Probe
from mergeprobe.errors import MergeError

# one probe for each adapter in their order, or by adapter name
Probes = Sequence[Probe] | Mapping[str, Probe]
MOMENTS = ("inputs", "outputs")


@dataclass(frozen=True, eq=False)
class ModuleData:
    """One adapter's data at one module; None where its probe has none.

    inputs: E[xxᵀ] of the module's inputs on the adapter's own task. outputs: E[δδᵀ] of the loss
    gradients at its outputs. Moments are F Fᵀ + tail · I. An adapter that lacks the module
    usually has neither.
    """

    inputs: Moment | None = None
    outputs: Moment | None = None


def probes_for(
    method: str, needs: Sequence[str], names: Sequence[str], probes: Probes | None
) -> list[Probe]:
    """The probes of the adapters called `names`, in that order; none for a rule without needs.

    MergeError if a probe is missing, or lacks a part that the rule needs.
    """
    if not needs:
        return []
    found = _in_order(method, names, probes)
    for name, probe in zip(names, found, strict=True):
        for need in needs:
            if not probe.has(need):
                raise MergeError(
                    f"'{method}' needs the {need} of every probe, which the one of '{name}' "
                    "lacks; measure it again with `mergeprobe probe --base`"
                )
    return found


def _in_order(method: str, names: Sequence[str], probes: Probes | None) -> list[Probe]:
    if probes is None:
        raise MergeError(f"'{method}' needs a probe of each adapter; give them as probes")
    if isinstance(probes, Mapping):
        if missing := [name for name in names if name not in probes]:
            raise MergeError(
                f"'{method}' needs a probe of '{missing[0]}'; given are those of {sorted(probes)}"
            )
        return [probes[name] for name in names]
    if len(probes) != len(names):
        raise MergeError(f"{len(probes)} probes for {len(names)} adapters; expected one for each")
    return list(probes)


def module_data(
    method: str, needs: Sequence[str], module: str, held: Sequence[bool], probes: Sequence[Probe]
) -> list[ModuleData]:
    """One module's data, one entry for each adapter. held: which adapters have the module.

    Raises MergeError if an adapter has the module but its probe lacks what the rule needs there.
    """
    if not needs:
        return []
    found = []
    for here, probe in zip(held, probes, strict=True):
        parts = {part: getattr(probe, part).get(module) for part in MOMENTS}
        for part in needs:
            if here and part in parts and parts[part] is None:
                raise MergeError(
                    f"'{method}' needs the {part} of '{module}', which the probe '{probe.name}' "
                    "lacks; it is of another adapter or was cut short"
                )
        found.append(ModuleData(**parts))
    return found
