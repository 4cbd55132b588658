"""Read and write PEFT LoRA folders, exactly or not at all.

A folder is `adapter_config.json` + `adapter_model.safetensors`, as PEFT writes it. What changes
the meaning of the factors (rsLoRA, rank and alpha patterns) is folded into each module's
scaling; what cannot be expressed as ΔW = scaling · B A is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergeprobe.artefact import MADE_BY, atomic_folder, check_schema, read_json, sha256
from mergeprobe.errors import AdapterError, AdapterMismatch
from mergeprobe.lowrank import LowRank, norm, pad

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "mergeprobe.json"
CARD_SCHEMA = 1
PREFIX = "base_model.model."

# inits that subtract the first B A from the base weights: the folder alone does not
# hold the update, so reading it as ΔW = s B A would be silently wrong. Checked against PEFT
# 0.21: eva, orthogonal, gaussian and mica (frozen B from the base, A = 0) leave the base alone.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
PLACEMENT = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True, eq=False)
class Adapter:
    """A set of low-rank updates by module name, and which base they belong to.

    modules: module name in the base model (without PEFT's prefix) -> LowRank.
    base: the base model's name as the adapter's config gives it, or "".
    fingerprint: of that base (see base.py), or None where nobody recorded one.
    config: the PEFT config it was read with, or {}.
    card: what made it (merged adapters of ours), or {}.
    """

    name: str
    modules: dict[str, LowRank]
    base: str = ""
    fingerprint: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

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


def read_adapter(path: str | Path, *, name: str | None = None, strict: bool = True) -> Adapter:
    """Reads a PEFT LoRA folder.

    With `strict` (the default) an adapter with a NaN or infinite entry, or one that is zero
    everywhere, is refused; `doctor` reads with strict=False to say what is wrong.
    Raises AdapterError with one line that names the folder and the reason.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterError(f"'{folder}' is not a folder; expected a PEFT adapter with {CONFIG}")
    config = read_json(folder / CONFIG, AdapterError)
    if not isinstance(config, dict):
        raise AdapterError(f"'{folder / CONFIG}' holds no JSON object")
    refuse_unreadable(config, folder)
    card = read_json(folder / CARD, AdapterError) if (folder / CARD).exists() else {}
    if not isinstance(card, dict):
        raise AdapterError(f"'{folder / CARD}' holds no JSON object")
    if card:
        check_schema(card.get("schema"), CARD_SCHEMA, f"'{folder / CARD}'", AdapterError)
        recorded = card.get("weights_sha256")
        if recorded and (folder / WEIGHTS).exists() and recorded != sha256(folder / WEIGHTS):
            raise AdapterError(
                f"'{folder / WEIGHTS}' does not match the checksum in {CARD}: "
                "the file is damaged or was changed; merge again"
            )
    modules = _modules(read_tensors(folder / WEIGHTS), config, folder)
    adapter = Adapter(
        name=name or folder.resolve().name,
        modules=modules,
        base=str(config.get("base_model_name_or_path") or ""),
        fingerprint=card.get("base_fingerprint"),
        config=config,
        card=card,
        path=folder,
    )
    if strict:
        refuse_degenerate(adapter)
    return adapter


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, memory-mapped; AdapterError if missing or damaged."""
    if not path.exists():
        pickled = path.with_suffix(".bin")
        if pickled.exists():
            raise AdapterError(
                f"'{pickled}' is a pickle, which is never loaded; "
                f"save it again as {WEIGHTS} with PEFT's save_pretrained"
            )
        raise AdapterError(f"'{path}' does not exist; the adapter has a config but no weights")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as problem:
        raise AdapterError(f"'{path}' is truncated or damaged: {problem}") from None


def refuse_unreadable(config: dict[str, Any], folder: Path) -> None:
    """Raises AdapterError for every variant whose update is not scaling · B A of its own file."""
    kind = config.get("peft_type")
    reasons = {
        f"its PEFT type is {kind}, expected LORA": kind != "LORA",
        "it is DoRA (use_dora): its update depends on the base weights": config.get("use_dora"),
        f"it trained whole modules (modules_to_save: {config.get('modules_to_save')})": config.get(
            "modules_to_save"
        ),
        f"it trained biases (bias: {config.get('bias')})": config.get("bias", "none") != "none",
        "it trained LoRA biases (lora_bias)": config.get("lora_bias"),
        "it trained tokens (trainable_token_indices)": config.get("trainable_token_indices"),
        "it replicates layers (layer_replication)": config.get("layer_replication"),
        "it adapts bare parameters (target_parameters)": config.get("target_parameters"),
        "it is QALoRA (use_qalora)": config.get("use_qalora"),
        "it is an activated LoRA (alora_invocation_tokens)": config.get("alora_invocation_tokens"),
        "its factors are block-diagonal (use_bdlora)": config.get("use_bdlora"),
        "it is KaSA (kasa_config): it truncated the base weights": config.get("kasa_config"),
        "it routes among other adapters (arrow_config)": config.get("arrow_config"),
    }
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        reasons[
            f"its init '{init}' changed the base weights; convert it to a plain LoRA with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...) first"
        ] = True
    for reason, holds in reasons.items():
        if holds:
            raise AdapterError(f"'{folder}' cannot be read as a plain LoRA: {reason}")


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
    if zero:
        raise AdapterError(
            f"'{adapter.name}' is zero everywhere: it was never trained, or saved before training"
        )


def is_zero(update: LowRank) -> bool:
    """Whether ΔW is zero because a factor or the scaling is: B = 0 is LoRA before training."""
    return update.scaling == 0 or not bool(update.B.any()) or not bool(update.A.any())


def _modules(
    tensors: dict[str, Tensor], config: dict[str, Any], folder: Path
) -> dict[str, LowRank]:
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise AdapterError(
                f"'{folder / WEIGHTS}' holds '{key}', which is no LoRA factor "
                "(trained embeddings, biases and saved modules are refused)"
            )
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise AdapterError(
                f"'{folder / WEIGHTS}': '{key}' is {tensor.dtype} {tuple(tensor.shape)}; "
                "expected a floating (rows, columns) matrix (convolutions are refused)"
            )
        factors = sides.setdefault(match[1], {})
        if match[2] in factors:
            raise AdapterError(
                f"'{folder / WEIGHTS}' holds lora_{match[2]} of '{match[1]}' twice, "
                f"with and without the prefix '{PREFIX}'"
            )
        factors[match[2]] = tensor
    if not sides:
        raise AdapterError(f"'{folder / WEIGHTS}' holds no LoRA factors")
    modules = {}
    for module in sorted(sides, key=natural):
        factors = sides[module]
        if factors.keys() != {"A", "B"}:
            raise AdapterError(f"'{folder}': '{module}' has lora_{''.join(factors)} but not both")
        rank = factors["A"].shape[0]
        if rank == 0 or factors["B"].shape[1] != rank:
            raise AdapterError(
                f"'{folder}': factors of '{module}' do not chain: "
                f"B {tuple(factors['B'].shape)}, A {tuple(factors['A'].shape)}"
            )
        scaling = _scaling(config, module, rank, folder)
        modules[module] = LowRank(factors["B"], factors["A"], scaling)
    return modules


def _scaling(config: dict[str, Any], module: str, rank: int, folder: Path) -> float:
    """alpha / r, or alpha / √r for rsLoRA, as the config and its patterns have it."""
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise AdapterError(f"'{folder / CONFIG}': {key} is {config[key]!r}; expected an object")
    said = _pattern(config.get("rank_pattern"), module, config.get("r"))
    if said != rank:
        raise AdapterError(
            f"'{folder}': '{module}' has rank {rank} in the weights but {said} in {CONFIG}; "
            "its scaling cannot be trusted"
        )
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(f"'{folder / CONFIG}': lora_alpha is {alpha!r}; expected a number")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _pattern(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's own rule: the first key that matches the module name or a dotted suffix of it as a
    regular expression; failing that, a key that is the name itself.
    """
    for key, value in (pattern or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error:
            continue
    return (pattern or {}).get(module, default)


def natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def write_adapter(
    adapter: Adapter,
    path: str | Path,
    *,
    card: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    force: bool = False,
) -> Path:
    """Writes one plain LoRA that stock PEFT loads: scaling 1 (alpha = r), one uniform rank.

    Modules of lower rank are padded with zeros, the scaling is folded into B. Beside PEFT's two
    files goes `mergeprobe.json`: schema, base fingerprint, what made it, checksum, and `card`.
    Atomic: the folder is there whole or not at all.
    """
    refuse_degenerate(adapter)
    rank = max(update.r for update in adapter.modules.values())
    tensors = {}
    for module, update in adapter.modules.items():
        out, into = pad(update, rank).folded()
        for side, factor in (("A", into), ("B", out)):
            stored = factor.to(dtype).contiguous().clone()
            if not bool(torch.isfinite(stored).all()):
                raise AdapterError(
                    f"lora_{side} of '{module}' in '{adapter.name}' overflows {dtype}; "
                    "write it in float32"
                )
            tensors[f"{PREFIX}{module}.lora_{side}.weight"] = stored
    config = {
        "peft_type": "LORA",
        "task_type": adapter.config.get("task_type", "CAUSAL_LM"),
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": adapter.config.get("fan_in_fan_out", False),
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted(adapter.modules, key=natural),
    }
    config |= {key: adapter.config[key] for key in PLACEMENT if adapter.config.get(key)}
    with atomic_folder(path, force=force) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8"
        )
        full_card = {
            "schema": CARD_SCHEMA,
            "made_by": MADE_BY,
            "base_fingerprint": adapter.fingerprint,
            "weights_sha256": sha256(folder / WEIGHTS),
            **(card or {}),
        }
        (folder / CARD).write_text(
            json.dumps(full_card, indent=2, ensure_ascii=False) + "\n", "utf-8"
        )
    return Path(path)


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
            ours, theirs = first.config.get(key), other.config.get(key)
            if (sorted(ours) if isinstance(ours, list) else ours) != (
                sorted(theirs) if isinstance(theirs, list) else theirs
            ):
                return common
    return common | {key: first.config[key] for key in PLACEMENT if first.config.get(key)}


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
