"""Weights: one for each adapter, and factors on them for parts of the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from mergeprobe.adapters.regions import KINDS, THIRDS, kind_of, layer_of, third_of
from mergeprobe.compose.merge.methods import Method
from mergeprobe.errors import MergeError

# one weight for each adapter; or lists of them by part of the model
Weights = Sequence[float] | Mapping[str, Sequence[float]]
PARTS = ("all", *THIRDS, *KINDS, "other")


def resolve(
    method: str, row: Method, weights: Weights | None, names: Sequence[str]
) -> dict[str, list[float]]:
    """The weights by part, "all" always among them: the rule's uniform ones where None are given.

    A part is "all", a depth third (early, middle, late) or a kind of module (attention, mlp,
    other). A module's weight is that of "all" times the factors of the parts it belongs to.
    Raises MergeError for a wrong count, an unknown part, or a weight that is not finite.
    """
    uniform = [1.0 if row.uniform == "1" else 1.0 / len(names)] * len(names)
    if weights is None:
        return {"all": uniform}
    if row.weights == "fixed":
        raise MergeError(f"'{method}' takes no weights; give them to 'linear'")
    by_part = weights if isinstance(weights, Mapping) else {"all": weights}
    found = {"all": uniform}
    for part, given in by_part.items():
        if part not in PARTS:
            raise MergeError(f"no part '{part}' to weight; parts are {', '.join(PARTS)}")
        where = "" if part == "all" else f" for {part}"
        found[part] = [float(weight) for weight in given]
        if len(found[part]) != len(names):
            raise MergeError(
                f"{len(found[part])} weights{where} for {len(names)} adapters; "
                "expected one for each"
            )
        for name, weight in zip(names, found[part], strict=True):
            if not math.isfinite(weight):
                raise MergeError(
                    f"the weight of '{name}'{where} is {weight}; expected a finite one"
                )
    if row.weights == "ratios" and not all(any(given) for given in found.values()):
        raise MergeError(f"all weights are 0, but '{method}' needs their ratios; raise one above 0")
    return found


def depth_of(modules: Iterable[str]) -> int:
    """Layers up to the deepest one named; at least 1."""
    layers = (layer_of(module) for module in modules)
    return max((layer + 1 for layer in layers if layer is not None), default=1)


def weights_at(by_part: Mapping[str, Sequence[float]], module: str, depth: int) -> list[float]:
    """The weights of one module, in the order of the adapters."""
    found = list(by_part["all"])
    for part in (third_of(module, depth), kind_of(module)):
        if part is not None and part in by_part:
            found = [weight * factor for weight, factor in zip(found, by_part[part], strict=True)]
    return found


def plain(by_part: Mapping[str, Sequence[float]]) -> list[float] | dict[str, list[float]]:
    """As a card states them: one list where no part has its own."""
    lists = {part: list(given) for part, given in by_part.items()}
    return lists["all"] if lists.keys() == {"all"} else lists
