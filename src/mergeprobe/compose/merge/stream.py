"""merge_folders: adapters on disk in, one plain LoRA on disk out, one module at a time.

The folders are memory-mapped and the result is spooled, so that memory holds one module of every
adapter (for each thread, and one more), whatever their number of modules. The numbers are those of
`merge`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mergeprobe.adapters.checkpoint import (
    Adapter,
    check_same_base,
    is_zero,
    read_adapter,
    shared_placement,
    write_adapter,
)
from mergeprobe.adapters.extras import average_extras
from mergeprobe.adapters.weights import BaseWeights
from mergeprobe.artefact import refuse_existing
from mergeprobe.capture.probe import Probe
from mergeprobe.compose.merge.data import Probes, probes_for
from mergeprobe.compose.merge.module import Exact, exact_rank, rounded, written
from mergeprobe.compose.merge.recipe import Recipe, recipe
from mergeprobe.compose.merge.run import (
    Certificate,
    Errors,
    check_adapters,
    each_module,
    module_names,
    updates_at,
)
from mergeprobe.compose.merge.spool import Spool
from mergeprobe.compose.merge.weights import Weights
from mergeprobe.errors import AdapterError, MergeError
from mergeprobe.lowrank import LowRank

# the largest rank that vLLM serves (--max-lora-rank); an exact merge of many adapters exceeds it
LARGEST_SERVED = 512

# done, of how many, the module's name
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Written:
    """What a merge of folders wrote.

    rank: of every module in the file. exact_rank: the largest that any module would need to lose
    nothing. parameters: entries of all B and A. read_error: adapter -> relative error of what was
    read of it, where a rank truncated that.
    """

    path: Path
    names: tuple[str, ...]
    certificate: Certificate
    rank: int
    exact_rank: int
    parameters: int
    read_error: dict[str, float] = field(default_factory=dict)


def merge_folders(
    folders: Sequence[str | Path],
    method: str = "mean",
    *,
    out: str | Path,
    weights: Weights | None = None,
    rank: int | None = None,
    space: str = "full",
    probes: Probes | None = None,
    seed: int = 0,
    exact_svd: bool = False,
    scaling: float = 1.0,
    dtype: torch.dtype = torch.float32,
    base: Any = None,
    read_rank: int | None = None,
    extras: bool = False,
    stated: dict[str, Any] | None = None,
    force: bool = False,
    progress: Progress = lambda done, of, module: None,
    **options: Any,
) -> Written:
    """Merges PEFT folders by a rule of METHODS into one PEFT folder `out`, whole or not at all.

    As `merge`, but for the rank: None keeps what is exact up to LARGEST_SERVED, and one above the
    exact rank is refused, for it would store zeros. dtype: of what is written; the certificate
    counts its rounding. base, read_rank, extras: as `read_adapter` takes them (DoRA and other
    types need the base); what reading truncated goes into the card. stated: further entries of
    the card. Raises what `merge` and `read_adapter` raise, and OutputExists.
    """
    out = Path(out)
    refuse_existing(out, force=force)
    adapters = open_adapters(folders, base, rank=read_rank, extras=extras)
    names = [adapter.name for adapter in adapters]
    check_adapters(adapters)
    fingerprint = check_same_base(adapters)
    asked = recipe(
        names, method, options, weights=weights, space=space, seed=seed, exact_svd=exact_svd,
        scaling=scaling, rank=rank if rank is not None else _served_rank(adapters),
    )  # fmt: skip
    given = probes_for(method, asked.row.needs, names, probes)
    highest = _highest_rank(adapters, asked)
    if rank is not None and rank > highest:
        raise MergeError(
            f"rank {rank} is above the exact rank of this merge, {highest}, so it would store "
            f"zeros; use at most {highest}, or none to keep the exact rank"
        )
    spool = Spool(out)
    certificate = _spooled(spool, adapters, asked, given, dtype, progress)
    card = asked.card() | {"dtype": str(dtype).removeprefix("torch.")} | (stated or {})
    card["certificate"] = asdict(certificate)
    lost = {adapter.name: adapter.lost() for adapter in adapters if adapter.truncation}
    if lost:
        card["read_truncation"] = lost
    merged = Adapter(
        out.name,
        spool.updates(),
        base=next((a.base for a in adapters if a.base), ""),
        fingerprint=fingerprint,
        config=shared_placement(adapters),
        extras=average_extras(adapters, asked.weights["all"]),
    )
    write_adapter(merged, out, card=card, dtype=dtype, force=force)
    stored = max(merged.ranks)
    entries = stored * sum(sum(update.shape) for update in merged.modules.values())
    return Written(out, tuple(names), certificate, stored, highest, entries, lost)


def _spooled(
    spool: Spool,
    adapters: Sequence[Adapter],
    asked: Recipe,
    probes: Sequence[Probe],
    dtype: torch.dtype,
    progress: Progress,
) -> Certificate:
    """Merges into the spool. AdapterError if an adapter turns out to be zero everywhere."""
    errors, total = Errors(), len(module_names(adapters))
    untrained = {adapter.name for adapter in adapters}

    def finish(exact: Exact, highest: int) -> tuple[LowRank, float, float]:
        update, error, size = written(exact, highest, asked)
        if dtype is not torch.float32:
            update, error = rounded(update, exact, size, dtype)
        return update, error, size

    merged = each_module(adapters, asked, probes, finish)
    for done, (module, update, error, size) in enumerate(merged):
        spool.add(module, update)
        errors.add(module, error, size)
        untrained -= {a.name for a in adapters if trained(a, module)} if untrained else set()
        progress(done + 1, total, module)
    refuse_untrained(untrained)
    return errors.certificate()


def open_adapters(
    folders: Sequence[str | Path],
    base: Any = None,
    *,
    rank: int | None = None,
    extras: bool = False,
) -> list[Adapter]:
    """Memory-mapped where the files hold the factors. MergeError where two have the same name.

    base: loaded at most once, and not before a folder turns out to need it.
    """
    known: BaseWeights | None = None
    found: dict[str, Adapter] = {}
    for folder in folders:
        try:
            adapter = read_adapter(folder, known, rank=rank, extras=extras, strict=False)
        except AdapterError:
            if base is None or known is not None:
                raise
            known = BaseWeights.of(base)
            adapter = read_adapter(folder, known, rank=rank, extras=extras, strict=False)
        if adapter.name in found:
            raise MergeError(
                f"two adapters are called '{adapter.name}': '{found[adapter.name].path}' and "
                f"'{adapter.path}'; rename one folder"
            )
        found[adapter.name] = adapter
    return list(found.values())


def _highest_rank(adapters: Sequence[Adapter], asked: Recipe) -> int:
    """The largest rank that a module's exact merge can have: full for a rule on entries."""
    full = asked.row.kind == "entrywise" and asked.space == "full"
    parts = (updates_at(adapters, module) for module in module_names(adapters))
    return max(min(part[0].shape) if full else exact_rank(part) for part in parts)


def _served_rank(adapters: Sequence[Adapter]) -> int | None:
    parts = (updates_at(adapters, module) for module in module_names(adapters))
    return LARGEST_SERVED if max(exact_rank(part) for part in parts) > LARGEST_SERVED else None


def trained(adapter: Adapter, module: str) -> bool:
    return module in adapter.modules and not is_zero(adapter.modules[module])


def refuse_untrained(names: set[str]) -> None:
    """AdapterError if any adapter has turned out to be zero everywhere."""
    if names:
        raise AdapterError(
            f"'{min(names)}' is zero everywhere: it was never trained, or saved before training; "
            "leave it out"
        )
