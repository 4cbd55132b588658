"""Adapter: a set of low-rank updates by module name, and which base they belong to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergeprobe.errors import AdapterError, AdapterMismatch
from mergeprobe.lowrank import LowRank, norm

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "mergeprobe.json"
CARD_SCHEMA = 1
PREFIX = "base_model.model."
PLACEMENT = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# sequences of more digits than this are names, not numbers
LONGEST_NUMBER = 18


@dataclass(frozen=True, eq=False)
class Adapter:
    """A set of low-rank updates by module name, and which base they belong to.

    modules: module name in the base model (without PEFT's prefix) -> LowRank.
    base: the base model's name as the adapter's config gives it, or "".
    fingerprint: of that base (see base.py), or None where nobody recorded one.
    config: the PEFT config it was read with, or {}.
    card: what made it (merged adapters of ours), or {}.
    extras: what else was trained, as parameter name in the base -> its trained value, not a
    difference: saved modules, embeddings, biases. Only where the reader was asked for it.
    truncation: module -> relative Frobenius error of `modules` against the true update, where the
    reader was asked for a rank; {} means exact.
    """

    name: str
    modules: dict[str, LowRank]
    base: str = ""
    fingerprint: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    truncation: dict[str, float] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        return sum(update.parameters for update in self.modules.values())

    @property
    def ranks(self) -> list[int]:
        """The distinct ranks of its modules, ascending."""
        return sorted({update.r for update in self.modules.values()})

    def norm(self) -> float:
        """Frobenius norm of the whole update over all modules."""
        return sum(norm(update) ** 2 for update in self.modules.values()) ** 0.5

    def lost(self) -> float:
        """Relative Frobenius error of the whole update by `truncation`; 0 where it is exact."""
        kept, dropped = self.norm() ** 2, 0.0
        for module, error in self.truncation.items():
            # what was kept and what was dropped are orthogonal
            share = min(error, 1.0 - 1e-12) ** 2
            dropped += norm(self.modules[module]) ** 2 * share / (1.0 - share)
        return (dropped / (kept + dropped)) ** 0.5 if dropped else 0.0


def refuse_degenerate(adapter: Adapter) -> None:
    """Raises AdapterError if an entry is not finite or the whole update is zero."""
    zero = True
    for module, update in adapter.modules.items():
        for side, factor in (("A", update.A), ("B", update.B)):
            if not bool(torch.isfinite(factor).all()):
                raise AdapterError(
                    f"'{adapter.name}' has NaN or infinite entries in lora_{side} of '{module}': "
                    "its training diverged; leave it out or train it again"
                )
        zero = zero and is_zero(update)
    for name, value in adapter.extras.items():
        if not bool(torch.isfinite(value).all()):
            raise AdapterError(f"'{adapter.name}' has NaN or infinite entries in '{name}'")
    if zero and not adapter.extras:
        raise AdapterError(
            f"'{adapter.name}' is zero everywhere: it was never trained, or saved before training"
        )


def is_zero(update: LowRank) -> bool:
    """Whether ΔW is zero because a factor or the scaling is: B = 0 is LoRA before training."""
    return update.scaling == 0 or not bool(update.B.any()) or not bool(update.A.any())


def natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    parts = re.split(r"(\d+)", text)
    return [
        (0, int(part), "") if part.isdecimal() and len(part) <= LONGEST_NUMBER else (1, 0, part)
        for part in parts
    ]


def shared_placement(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The config entries that place a merge of `adapters`: theirs if they all agree, else none.

    With none, write_adapter lists the module names in full, which PEFT takes as they are.
    """
    first = adapters[0]
    common = {"task_type": first.config.get("task_type", "CAUSAL_LM")}
    if first.config.get("fan_in_fan_out"):
        common["fan_in_fan_out"] = True
    for other in adapters[1:]:
        if other.modules.keys() != first.modules.keys():
            return common
        for key in PLACEMENT:
            if _unordered(first.config.get(key)) != _unordered(other.config.get(key)):
                return common
    return common | {key: first.config[key] for key in PLACEMENT if first.config.get(key)}


def _unordered(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, list) else value


def check_same_base(adapters: Sequence[Adapter]) -> str | None:
    """The common base fingerprint, or None where not every adapter carries one (unverified).

    Raises AdapterMismatch if two fingerprints, two base names, or the shapes of one module differ.
    """
    known = {a.fingerprint: a for a in adapters if a.fingerprint}
    if len(known) > 1:
        one, two = list(known.values())[:2]
        raise AdapterMismatch(
            f"'{one.name}' was trained on base {one.fingerprint} ({one.base or 'unnamed'}) but "
            f"'{two.name}' on {two.fingerprint} ({two.base or 'unnamed'}); merge only one base"
        )
    # a name says nothing where all carry a fingerprint: one base may lie in two folders
    named = {a.base: a for a in adapters if a.base}
    unverified = [a for a in adapters if a.base and not a.fingerprint]
    for one in unverified:
        for name, two in named.items():
            if name != one.base and one.base not in {a.base for a in adapters if a.fingerprint}:
                raise AdapterMismatch(
                    f"'{one.name}' names base '{one.base}' but '{two.name}' names '{name}'; "
                    "merge only adapters of one base"
                )
    shapes: dict[str, Adapter] = {}
    for adapter in adapters:
        for module, update in adapter.modules.items():
            first = shapes.setdefault(module, adapter)
            if first.modules[module].shape != update.shape:
                raise AdapterMismatch(
                    f"'{module}' is {first.modules[module].shape} in '{first.name}' but "
                    f"{update.shape} in '{adapter.name}': they were trained on different bases"
                )
    verified = all(a.fingerprint for a in adapters)
    return next(iter(known)) if known and verified else None
