"""Recipe: everything a merge needs to know besides the adapters, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergeprobe.compose.merge.methods import METHODS, Method
from mergeprobe.compose.merge.spaces import SPACES
from mergeprobe.compose.merge.weights import Weights, plain, resolve
from mergeprobe.errors import MergeError


@dataclass(frozen=True)
class Recipe:
    """One merge of adapters called `names`, in this order.

    options: the rule's own, defaults filled in. weights: by part of the model (weights.py).
    rank: of what is written, or None for the exact one. space: of SPACES, in
    which the rule runs. seed: of everything drawn at random. exact_svd: no sampled SVD.
    scaling: of the merge as a whole, after its rule (TIES' final λ).
    """

    names: tuple[str, ...]
    method: str
    options: Mapping[str, Any]
    weights: Mapping[str, list[float]]
    rank: int | None
    space: str
    seed: int
    exact_svd: bool = False
    scaling: float = 1.0

    @property
    def row(self) -> Method:
        return METHODS[self.method]

    def card(self) -> dict[str, Any]:
        """As the merged adapter's card states it."""
        return {
            "merged_from": list(self.names),
            "method": self.method,
            "options": dict(self.options),
            "weights": plain(self.weights),
            "rank": self.rank,
            "space": self.space,
            "scaling": self.scaling,
            "seed": self.seed if self.row.seeded else None,
        }


def recipe(
    names: Sequence[str],
    method: str,
    options: Mapping[str, Any],
    *,
    weights: Weights | None = None,
    rank: int | None = None,
    space: str = "full",
    seed: int = 0,
    exact_svd: bool = False,
    scaling: float = 1.0,
) -> Recipe:
    """Raises MergeError, in one line, for whatever of it cannot be."""
    row = check_options(method, options)
    if row.kind == "search":
        raise MergeError(
            f"'{method}' finds weights by running the base model; search them first "
            "(mergeprobe.evaluate), then merge by 'linear' with what was found"
        )
    if not names:
        raise MergeError("nothing to merge: got no adapters, expected at least one")
    given = resolve(method, row, weights, names)
    if rank is not None and rank < 1:
        raise MergeError(f"rank is {rank}; expected at least 1, or None to keep the exact rank")
    _check_space(method, row, space)
    chosen = {**row.defaults, **options}
    if not math.isfinite(scaling):
        raise MergeError(f"scaling is {scaling}; expected a finite number, such as 1")
    return Recipe(tuple(names), method, chosen, given, rank, space, seed, exact_svd, scaling)


def _check_space(method: str, row: Method, space: str) -> None:
    if space not in SPACES:
        raise MergeError(f"unknown space '{space}'; known are {', '.join(SPACES)}")
    if row.needs and space != "full":
        raise MergeError(
            f"'{method}' measures the modules themselves, so it runs in the full space only; "
            f"drop the space '{space}'"
        )


def check_options(method: str, options: Mapping[str, Any]) -> Method:
    """The method's row; MergeError if there is no such method, or it takes no such option."""
    if method not in METHODS:
        raise MergeError(f"unknown merge method '{method}'; known are {', '.join(METHODS)}")
    row = METHODS[method]
    for option, value in options.items():
        if option not in row.defaults:
            known = ", ".join(f"{k} (default {v})" for k, v in row.defaults.items())
            raise MergeError(f"'{method}' has no option '{option}'; it takes {known or 'none'}")
        words = isinstance(row.defaults[option], str)
        if words and not isinstance(value, str):
            raise MergeError(f"option '{option}' of '{method}' is {value!r}; expected a word")
        if not words and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise MergeError(f"option '{option}' of '{method}' is {value!r}; expected a number")
        if isinstance(value, int | float) and not math.isfinite(value):
            raise MergeError(f"option '{option}' of '{method}' is {value}; expected it finite")
    return row
