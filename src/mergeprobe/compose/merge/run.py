"""merge: any rule of METHODS over whole adapters in memory, module by module, with a certificate.

`stream.merge_folders` does the same from folders to a folder, holding a module a thread.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from mergeprobe.adapters.checkpoint import Adapter, check_same_base, natural, shared_placement
from mergeprobe.adapters.extras import average_extras
from mergeprobe.capture.probe import Probe
from mergeprobe.compose.merge.data import (
    Probes,
    module_data,
    probes_for,
)
from mergeprobe.compose.merge.module import Exact, absent, exact_merge, exact_rank, written
from mergeprobe.compose.merge.recipe import Recipe, recipe
from mergeprobe.compose.merge.weights import Weights, depth_of, weights_at
from mergeprobe.errors import AdapterMismatch, MergeError
from mergeprobe.lowrank import LowRank
from mergeprobe.threads import in_order


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


@dataclass
class Errors:
    """Adds up a certificate, one module at a time."""

    modules: dict[str, float] = field(default_factory=dict)
    lost: float = 0.0
    whole: float = 0.0

    def add(self, module: str, error: float, size: float) -> None:
        """error: relative. size: the norm of the exact merge."""
        self.modules[module] = error
        self.lost += (error * size) ** 2
        self.whole += size**2

    def certificate(self) -> Certificate:
        total = math.sqrt(self.lost / self.whole) if self.whole > 0 else 0.0
        return Certificate(total, self.modules)


@dataclass(frozen=True, eq=False)
class Merged:
    """The merged adapter and how exactly it carries out its rule."""

    adapter: Adapter
    certificate: Certificate


def merge(
    adapters: Sequence[Adapter],
    method: str = "mean",
    *,
    weights: Weights | None = None,
    rank: int | None = None,
    space: str = "full",
    probes: Probes | None = None,
    seed: int = 0,
    exact_svd: bool = False,
    scaling: float = 1.0,
    name: str = "merged",
    **options: Any,
) -> Merged:
    """Merges adapters of one base by a rule of METHODS.

    weights: one per adapter, in their order; where None, the rule's own uniform weights (1/T, or
    1 for the rules that sum). By part of the model too: {"all": [1, 0.5], "late": [1, 0]}, where
    factors multiply (weights.py). rank: of every module of the result; smaller truncates, larger
    pads with zeros. None keeps a low-rank rule exact, at rank Σ rᵢ or full rank if that is less;
    for an entry-wise rule, whose result has no low rank, it means that same rank, and the
    certificate says what was lost. space: "full", or a small space of spaces.SPACES in which the
    rule is carried out. probes: for the rules that need data (METHODS[method].needs), one per
    adapter in their order, or by name. seed: for what is drawn at random, module by module.
    exact_svd: cut dense results and long sums by a full SVD, not by a sampled one. scaling: of
    the merge as a whole, such as TIES' final λ. options: the rule's own
    (METHODS[method].defaults).

    A module that only some adapters have counts as a zero update in the others. Deterministic.
    Raises MergeError for a rule, weight, rank, option or missing data that cannot be,
    AdapterMismatch for adapters of different bases or shapes, or one that shares no module with
    the others.
    """
    names = [adapter.name for adapter in adapters]
    asked = recipe(
        names, method, options, weights=weights, rank=rank, space=space, seed=seed,
        exact_svd=exact_svd, scaling=scaling,
    )  # fmt: skip
    given = probes_for(method, asked.row.needs, names, probes)
    check_adapters(adapters)
    fingerprint = check_same_base(adapters)
    modules, errors = {}, Errors()
    finish = partial(written, recipe=asked)
    for module, update, error, size in each_module(adapters, asked, given, finish):
        modules[module] = update
        errors.add(module, error, size)
    certificate = errors.certificate()
    merged = Adapter(
        name,
        modules,
        base=next((a.base for a in adapters if a.base), ""),
        fingerprint=fingerprint,
        config=shared_placement(adapters),
        card=asked.card() | {"certificate": asdict(certificate)},
        extras=average_extras(adapters, asked.weights["all"]),
    )
    return Merged(merged, certificate)


Finish = Callable[[Exact, int], tuple[LowRank, float, float]]
"""finish(exact, its rank) -> (what is written of it, relative error, norm)."""


def each_module(
    adapters: Sequence[Adapter], asked: Recipe, probes: Sequence[Probe], finish: Finish
) -> Iterator[tuple[str, LowRank, float, float]]:
    """(module, what `finish` makes of its exact merge) for one module after the other; as many at
    a time as there are threads.

    Raises what `merged_module` does.
    """
    modules = module_names(adapters)
    depth = depth_of(modules)

    def one(module: str) -> tuple[str, LowRank, float, float]:
        exact = merged_module(adapters, asked, probes, module, depth)
        return module, *finish(exact, exact_rank(updates_at(adapters, module)))

    return in_order(one, modules)


def merged_module(
    adapters: Sequence[Adapter],
    asked: Recipe,
    probes: Sequence[Probe],
    module: str,
    depth: int,
) -> Exact:
    """One module's exact merge. depth: layers of the model, for weights by depth third.

    Raises AdapterMismatch for NaN or infinite entries, MergeError where all weights of the module
    are 0 and the rule needs their ratios.
    """
    for adapter in adapters:
        if module in adapter.modules:
            check_finite(adapter.name, module, adapter.modules[module])
    held = [module in adapter.modules for adapter in adapters]
    data = module_data(asked.method, asked.row.needs, module, held, probes)
    weights = weights_at(asked.weights, module, depth)
    if asked.row.weights == "ratios" and not any(weights):
        raise MergeError(
            f"all weights of '{module}' are 0, but '{asked.method}' needs their ratios; "
            "raise one above 0"
        )
    return exact_merge(asked, module, updates_at(adapters, module), weights, data)


def module_names(adapters: Sequence[Adapter]) -> list[str]:
    """All modules that any adapter adapts, in natural order."""
    return sorted({module for adapter in adapters for module in adapter.modules}, key=natural)


def updates_at(adapters: Sequence[Adapter], module: str) -> list[LowRank]:
    """One module's updates, one for each adapter; of rank 0 where it lacks the module."""
    held = [adapter.modules.get(module) for adapter in adapters]
    one = next(update for update in held if update is not None)
    return [absent(one) if update is None else update for update in held]


def check_adapters(adapters: Sequence[Adapter]) -> None:
    """Raises AdapterMismatch for an adapter that has nothing in common with the others."""
    everywhere = Counter(module for adapter in adapters for module in adapter.modules)
    for adapter in adapters:
        if len(adapters) > 1 and all(everywhere[module] == 1 for module in adapter.modules):
            others = {m for a in adapters if a is not adapter for m in a.modules}
            raise AdapterMismatch(
                f"'{adapter.name}' adapts no module that another adapter adapts: it has "
                f"{sorted(adapter.modules)[:2]}…, the others {sorted(others)[:2]}…"
            )


def check_finite(name: str, module: str, update: LowRank) -> None:
    for side, factor in (("A", update.A), ("B", update.B)):
        # NaN and infinity survive a sum, and one pass makes no mask; a sum may overflow, though
        if not math.isfinite(float(factor.sum())) and not bool(factor.isfinite().all()):
            raise AdapterMismatch(
                f"'{name}' has NaN or infinite entries in lora_{side} of '{module}': "
                "its training diverged; leave it out or train it again"
            )
