"""merge: any rule of METHODS over whole adapters, one module at a time, with a certificate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mergeprobe.adapters.checkpoint import Adapter, check_same_base, natural, shared_placement
from mergeprobe.compose.merge.factor import factor
from mergeprobe.compose.merge.methods import METHODS, Method
from mergeprobe.errors import AdapterMismatch, MergeError
from mergeprobe.lowrank import LowRank, norm, pad, truncate


@dataclass(frozen=True)
class Certificate:
    """How far what was written is from the exact rule, as relative Frobenius errors in [0, 1].

    total: over all modules, √(Σ error²) / √(Σ ‖exact‖²). modules: the same for each module.
    An exact concatenation has 0; a truncation has what it dropped.
    """

    total: float
    modules: dict[str, float]

    @property
    def worst(self) -> float:
        return max(self.modules.values(), default=0.0)


@dataclass(frozen=True, eq=False)
class Merged:
    """The merged adapter and how exactly it carries out its rule."""

    adapter: Adapter
    certificate: Certificate


def merge(
    adapters: Sequence[Adapter],
    method: str = "mean",
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    name: str = "merged",
    **options: float,
) -> Merged:
    """Merges adapters of one base by a rule of METHODS.

    weights: one per adapter, in their order; where None, the rule's own uniform weights (1/T, or
    1 for the rules that sum). rank: of every module of the result; smaller truncates, larger pads
    with zeros. None keeps a low-rank rule exact, at rank Σ rᵢ or full rank if that is less; for an
    entry-wise rule, whose result has no low rank, it means that same rank, and the certificate
    says what was lost. options: the rule's own (METHODS[method].defaults).

    A module that only some adapters have counts as a zero update in the others. Deterministic.
    Raises MergeError for a rule, weight, rank or option that cannot be, AdapterMismatch for
    adapters of different bases or shapes, or one that shares no module with the others.
    """
    row = check_options(method, options)
    chosen = {**row.defaults, **options}
    _check_adapters(adapters)
    given = _weights(method, row, weights, adapters)
    if rank is not None and rank < 1:
        raise MergeError(f"rank is {rank}; expected at least 1, or None to keep the exact rank")
    fingerprint = check_same_base(adapters)
    modules, errors = {}, {}
    lost = whole = 0.0
    for module in sorted({m for a in adapters for m in a.modules}, key=natural):
        parts = _parts(adapters, module)
        modules[module], errors[module], size = _one(row, parts, given, chosen, rank)
        lost += (errors[module] * size) ** 2
        whole += size**2
    certificate = Certificate(math.sqrt(lost / whole) if whole > 0 else 0.0, errors)
    card: dict[str, Any] = {
        "merged_from": [adapter.name for adapter in adapters],
        "method": method,
        "options": chosen,
        "weights": given,
        "rank": rank,
        "certificate": asdict(certificate),
    }
    merged = Adapter(
        name,
        modules,
        base=next((a.base for a in adapters if a.base), ""),
        fingerprint=fingerprint,
        config=shared_placement(adapters),
        card=card,
    )
    return Merged(merged, certificate)


def _one(
    row: Method,
    parts: list[LowRank],
    weights: list[float],
    options: dict[str, float],
    rank: int | None,
) -> tuple[LowRank, float, float]:
    """One module: (the update written, its relative error, the norm of the exact rule)."""
    full = min(parts[0].shape)
    if row.kind == "entrywise":
        stack = torch.stack([part.dense() for part in parts])
        exact = row.function(stack, torch.tensor(weights).to(stack), **options)
        found, error = factor(exact, rank or min(full, sum(part.r for part in parts)))
        return found, error, float(torch.linalg.vector_norm(exact))
    exact = row.function(parts, weights, **options)
    size = norm(exact)
    if rank is None:
        # more columns than the matrix has rank: recompressing loses nothing
        found, error = (exact, 0.0) if exact.r <= full else truncate(exact, full)
    else:
        found, error = (pad(exact, rank), 0.0) if exact.r <= rank else truncate(exact, rank)
    return found, error, size


def _parts(adapters: Sequence[Adapter], module: str) -> list[LowRank]:
    held = [adapter.modules.get(module) for adapter in adapters]
    one = next(update for update in held if update is not None)
    absent = LowRank(one.B[:, :0], one.A[:0])
    return [absent if update is None else update for update in held]


def check_options(method: str, options: Mapping[str, float]) -> Method:
    """The method's row; MergeError if there is no such method, or it takes no such option."""
    if method not in METHODS:
        raise MergeError(f"unknown merge method '{method}'; known are {', '.join(METHODS)}")
    row = METHODS[method]
    for option, value in options.items():
        if option not in row.defaults:
            known = ", ".join(f"{k} (default {v})" for k, v in row.defaults.items())
            raise MergeError(f"'{method}' has no option '{option}'; it takes {known or 'none'}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MergeError(f"option '{option}' of '{method}' is {value!r}; expected a number")
    return row


def _check_adapters(adapters: Sequence[Adapter]) -> None:
    if not adapters:
        raise MergeError("nothing to merge: got no adapters, expected at least one")
    for position, adapter in enumerate(adapters):
        others = {m for k, a in enumerate(adapters) if k != position for m in a.modules}
        if len(adapters) > 1 and not others & adapter.modules.keys():
            raise AdapterMismatch(
                f"'{adapter.name}' adapts no module that another adapter adapts: it has "
                f"{sorted(adapter.modules)[:2]}…, the others {sorted(others)[:2]}…"
            )
        for module, update in adapter.modules.items():
            if not (update.A.isfinite().all() and update.B.isfinite().all()):
                raise AdapterMismatch(
                    f"'{adapter.name}' has NaN or infinite entries in '{module}': "
                    "its training diverged; leave it out or train it again"
                )


def _weights(
    method: str, row: Method, weights: Sequence[float] | None, adapters: Sequence[Adapter]
) -> list[float]:
    count = len(adapters)
    if weights is None:
        return [1.0 if row.uniform == "1" else 1.0 / count] * count
    if row.weights == "fixed":
        raise MergeError(f"'{method}' takes no weights; give them to 'linear'")
    given = [float(weight) for weight in weights]
    if len(given) != count:
        raise MergeError(f"{len(given)} weights for {count} adapters; expected one for each")
    for adapter, weight in zip(adapters, given, strict=True):
        if not math.isfinite(weight):
            raise MergeError(f"the weight of '{adapter.name}' is {weight}; expected a finite one")
    if row.weights == "ratios" and not any(given):
        raise MergeError(f"all weights are 0, but '{method}' needs their ratios; raise one above 0")
    return given
