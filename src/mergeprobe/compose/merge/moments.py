"""The moments that a data-assisted rule works with, checked, and the shares of the adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mergeprobe.capture.probe import Moment
from mergeprobe.compose.merge.data import ModuleData
from mergeprobe.errors import MergeError


def moments_of(
    method: str,
    data: Sequence[ModuleData],
    part: Literal["inputs", "outputs"],
    absent: Sequence[bool],
    width: int,
) -> list[Moment | None]:
    """One moment for each adapter; None only where the adapter does not adapt the module.

    absent: which adapters do not adapt it: nothing was recorded there, and no moment is asked
    for. width: the module's own. Raises MergeError for a moment that is missing or of another
    width, and where no adapter has one.
    """
    if len(data) != len(absent):
        raise MergeError(
            f"'{method}' got the data of {len(data)} adapters for {len(absent)}; one for each"
        )
    found: list[Moment | None] = []
    for place, (one, gone) in enumerate(zip(data, absent, strict=True)):
        moment = getattr(one, part)
        if moment is None and not gone:
            raise MergeError(
                f"'{method}' needs the second moments of the module's {part} from every adapter, "
                f"and adapter {place} (counted from 0) has none: give its probe, with moments"
            )
        if moment is not None and moment.factor.shape[0] != width:
            raise MergeError(
                f"'{method}': the {part} moment of adapter {place} (counted from 0) is "
                f"{moment.factor.shape[0]} wide, the module {width}; the probe is of another base"
            )
        found.append(moment)
    if all(moment is None for moment in found):
        raise MergeError(f"'{method}' has no second moment of the module's {part} at all")
    return found


def shares(method: str, weights: Sequence[float]) -> list[float]:
    """The weights over their sum; MergeError for one below 0, or where all are 0."""
    if min(weights) < 0:
        raise MergeError(
            f"a weight of '{method}' is {min(weights)}; it weighs data, so expected 0 or more"
        )
    total = sum(weights)
    if total == 0:
        raise MergeError(f"all weights of '{method}' are 0; raise one above 0")
    return [weight / total for weight in weights]


def stood_in(portions: Sequence[float], known: Sequence[bool]) -> list[float]:
    """The portions, those of adapters without a moment shared out evenly among the others.

    An adapter without the module is a zero update there and weighs as much as it does in a mean:
    the mean of the others' moments stands in for the one that it has not.
    """
    rest = sum(p for p, has in zip(portions, known, strict=True) if not has)
    each = rest / sum(known)
    return [p + each if has else 0.0 for p, has in zip(portions, known, strict=True)]
