"""Doctor: what is wrong with these adapter folders, and which of them can be merged.

Reads weights and configs only, and the base model where an update depends on it; no data. One
folder that cannot be read never hides the others. Whether a merge that is possible is also *good*
is a forecast, not asked here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from mergeprobe.adapters.checkpoint import (
    CONFIG,
    Adapter,
    check_same_base,
    is_zero,
    read_adapter,
)
from mergeprobe.adapters.inits import Init, init_of, input_overlaps
from mergeprobe.adapters.weights import BaseWeights
from mergeprobe.artefact import read_json
from mergeprobe.errors import AdapterError, AdapterMismatch, BaseModelError

TRAITS = {
    "use_dora": "DoRA",
    "use_rslora": "rsLoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "lora_bias": "LoRA biases",
    "modules_to_save": "saved modules",
    "trainable_token_indices": "trained tokens",
    "layer_replication": "replicated layers",
    "target_parameters": "bare parameters",
    "rank_pattern": "rank pattern",
    "alpha_pattern": "alpha pattern",
}


@dataclass(frozen=True)
class Fault:
    """Bad weights in one module. count: entries that are NaN or infinite (all of a zero update).

    side: "A" or "B", or "BA" where the module's update is zero.
    """

    module: str
    side: Literal["A", "B", "BA"]
    kind: Literal["nan", "infinite", "zero"]
    count: int


@dataclass(frozen=True)
class Finding:
    """One adapter folder. Fields after `variant` are empty where `readable` is false.

    problem: why it cannot be read or merged, in one line, or None.
    scalings: the smallest and the largest of its modules'. norm: Frobenius, of the whole ΔW,
    or None where an entry is not finite. verified: whether it carries its base's fingerprint.
    untrained: every module's update is zero (B = 0 is LoRA before its first step).
    """

    name: str
    path: str
    readable: bool
    problem: str | None
    variant: str
    base: str = ""
    fingerprint: str | None = None
    verified: bool = False
    modules: int = 0
    parameters: int = 0
    ranks: list[int] = field(default_factory=list)
    scalings: list[float] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    norm: float | None = None
    untrained: bool = False
    faults: list[Fault] = field(default_factory=list)

    @property
    def mergeable(self) -> bool:
        return self.problem is None


@dataclass(frozen=True)
class Pair:
    """Two mergeable adapters. problem: why they do not merge with each other, or None.

    common, only_a, only_b: numbers of modules that both or one adapts.
    verified: both carry the same base fingerprint.
    overlap: see `input_overlaps`; None where they have no module of one shape in common.
    """

    a: str
    b: str
    problem: str | None
    verified: bool
    common: int
    only_a: int
    only_b: int
    overlap: float | None
    init: Init | None


@dataclass(frozen=True)
class Examination:
    """All findings. groups: names that can be merged together, largest first.

    `dataclasses.asdict` makes it JSON-ready. verdicts: one line each, for people.
    """

    findings: list[Finding]
    pairs: list[Pair]
    groups: list[list[str]]
    verdicts: list[str]


def examine(paths: Sequence[str | Path], base: BaseWeights | None = None) -> Examination:
    """Inspects adapter folders, one by one and against each other; never raises for a bad one.

    base: for adapters whose update depends on the base model; without it they say so.
    """
    findings, adapters = [], []
    names = [Path(path).resolve().name for path in paths]
    for path, name in zip(paths, names, strict=True):
        # two folders of one name are told apart by their paths
        finding, adapter = inspect(path, str(path) if names.count(name) > 1 else name, base)
        findings.append(finding)
        if adapter is not None and finding.mergeable:
            adapters.append(adapter)
    overlaps = input_overlaps(adapters)
    pairs = [
        _pair(adapters[i], adapters[j], overlaps[i, j])
        for i, j in combinations(range(len(adapters)), 2)
    ]
    groups = _groups(adapters, pairs)
    return Examination(findings, pairs, groups, verdicts(findings, pairs, groups))


def inspect(
    path: str | Path, name: str | None = None, base: BaseWeights | None = None
) -> tuple[Finding, Adapter | None]:
    """One folder: what it holds and what is wrong with it; None where it cannot be read."""
    folder = Path(path)
    name = name or folder.resolve().name
    try:
        adapter = read_adapter(folder, base, name=name, strict=False)
    except (AdapterError, AdapterMismatch, BaseModelError) as problem:
        return Finding(name, str(folder), False, str(problem), _variant_on_disk(folder)), None
    faults = [fault for module in adapter.modules for fault in _faults(adapter, module)]
    zeros = sum(fault.kind == "zero" for fault in faults)
    broken = [fault for fault in faults if fault.kind != "zero"]
    updates = list(adapter.modules.values())
    problem = None
    if broken:
        first = broken[0]
        problem = (
            f"NaN or infinite entries in {len({f.module for f in broken})} of {len(updates)} "
            f"modules, the first lora_{first.side} of '{first.module}': its training diverged"
        )
    elif zeros == len(updates):
        problem = "its update is zero everywhere: never trained, or saved before training"
    finding = Finding(
        name=name,
        path=str(folder),
        readable=True,
        problem=problem,
        variant=variant(adapter.config),
        base=adapter.base,
        fingerprint=adapter.fingerprint,
        verified=adapter.fingerprint is not None,
        modules=len(updates),
        parameters=adapter.parameters,
        ranks=adapter.ranks,
        scalings=[min(u.scaling for u in updates), max(u.scaling for u in updates)],
        dtypes=sorted({str(t.dtype).removeprefix("torch.") for u in updates for t in (u.B, u.A)}),
        norm=None if broken else adapter.norm(),
        untrained=zeros == len(updates),
        faults=faults,
    )
    return finding, adapter


def variant(config: dict[str, Any]) -> str:
    """The kind of adapter in words, such as "LoRA", "rsLoRA, rank pattern" or "DoRA"."""
    kind = config.get("peft_type")
    if kind != "LORA":
        return str(kind or "unknown")
    traits = [name for key, name in TRAITS.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        traits.append("trained biases")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init != "gaussian":
        traits.append(f"{init} init")
    named = {"DoRA", "rsLoRA", "QALoRA", "BD-LoRA", "KaSA", "aLoRA", "Arrow"} & set(traits)
    return ", ".join(traits if named else ["LoRA", *traits])


def verdicts(findings: list[Finding], pairs: list[Pair], groups: list[list[str]]) -> list[str]:
    """What merges with what, what does not and why; one line each."""
    lines = []
    by_names = {frozenset((pair.a, pair.b)): pair for pair in pairs}
    for group in groups:
        if len(group) > 1:
            inside = [by_names[frozenset(two)] for two in combinations(group, 2)]
            lines.append(_group_verdict(group, inside, findings))
    for one, two in combinations(groups, 2):
        pair = next(
            p for p in pairs if p.problem and {p.a, p.b} & set(one) and {p.a, p.b} & set(two)
        )
        lines.append(f"'{pair.a}' does not merge with '{pair.b}': {pair.problem}")
    for finding in findings:
        if finding.problem:
            lines.append(f"'{finding.name}' merges with nothing: {finding.problem}")
        elif zeros := [fault.module for fault in finding.faults if fault.kind == "zero"]:
            lines.append(
                f"'{finding.name}' has {len(zeros)} of {finding.modules} modules at zero, "
                f"such as '{zeros[0]}'"
            )
    if len(findings) == 1 and findings[0].mergeable:
        lines.append(f"'{findings[0].name}' is sound; a merge needs at least one more adapter")
    return lines


def _group_verdict(group: list[str], pairs: list[Pair], findings: list[Finding]) -> str:
    notes = ["base verified" if all(p.verified for p in pairs) else "base unverified"]
    inits = {pair.init for pair in pairs if pair.init}
    notes.append(f"{inits.pop()} init" if len(inits) == 1 else "inits shared by some only")
    ranks = sorted({rank for f in findings if f.name in group for rank in f.ranks})
    if len(ranks) > 1:
        notes.append(f"unequal ranks {ranks}: averages of factors are out, merges of ΔW are fine")
    alone = sum(pair.only_a > 0 or pair.only_b > 0 for pair in pairs)
    if alone:
        notes.append(f"{alone} of {len(pairs)} pairs adapt different sets of modules")
    names = ", ".join(f"'{name}'" for name in group)
    return f"{names} can be merged ({'; '.join(notes)})"


def _pair(a: Adapter, b: Adapter, overlap: float | None) -> Pair:
    common = a.modules.keys() & b.modules.keys()
    problem, fingerprint = None, None
    try:
        fingerprint = check_same_base([a, b])
    except AdapterMismatch as mismatch:
        problem = str(mismatch)
    if problem is None and not common:
        problem = (
            f"they adapt no module in common: {next(iter(a.modules))}... "
            f"and {next(iter(b.modules))}..."
        )
    return Pair(
        a=a.name,
        b=b.name,
        problem=problem,
        verified=fingerprint is not None,
        common=len(common),
        only_a=len(a.modules) - len(common),
        only_b=len(b.modules) - len(common),
        overlap=overlap,
        init=None if overlap is None else init_of(overlap),
    )


def _groups(adapters: Sequence[Adapter], pairs: list[Pair]) -> list[list[str]]:
    """Names in groups without a bad pair: each goes to the first group that takes it."""
    bad = {frozenset((pair.a, pair.b)) for pair in pairs if pair.problem}
    groups: list[list[str]] = []
    for adapter in adapters:
        for group in groups:
            if not any(frozenset((adapter.name, other)) in bad for other in group):
                group.append(adapter.name)
                break
        else:
            groups.append([adapter.name])
    return sorted(groups, key=len, reverse=True)


def _faults(adapter: Adapter, module: str) -> list[Fault]:
    update = adapter.modules[module]
    found = [
        Fault(module, "A", "nan", int(update.A.isnan().sum())),
        Fault(module, "A", "infinite", int(update.A.isinf().sum())),
        Fault(module, "B", "nan", int(update.B.isnan().sum())),
        Fault(module, "B", "infinite", int(update.B.isinf().sum())),
    ]
    found = [fault for fault in found if fault.count]
    if not found and is_zero(update):
        found.append(Fault(module, "BA", "zero", update.shape[0] * update.shape[1]))
    return found


def _variant_on_disk(folder: Path) -> str:
    try:
        config = read_json(folder / CONFIG, AdapterError)
    except AdapterError:
        return "unknown"
    return variant(config) if isinstance(config, dict) else "unknown"
