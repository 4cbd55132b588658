"""Configs whose update cannot be had, refused by name before their weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergeprobe.adapters.extras import ASK
from mergeprobe.adapters.variants import PEFT_TYPES, kind_of
from mergeprobe.errors import AdapterError

# inits that subtract the first B A from the base weights: the folder alone does not
# hold the update, so reading it as ΔW = s B A would be silently wrong. Checked against PEFT
# 0.21: eva, orthogonal, gaussian and mica (frozen B from the base, A = 0) leave the base alone.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# what a LoRA config can ask for that changes what its factors mean
REFUSED_OPTIONS = {
    "lora_bias": "it trained LoRA biases (lora_bias)",
    "layer_replication": "it replicates layers (layer_replication)",
    "target_parameters": "it adapts bare parameters (target_parameters)",
    "use_qalora": "it is QALoRA (use_qalora)",
    "alora_invocation_tokens": "it is an activated LoRA (alora_invocation_tokens)",
    "use_bdlora": "its factors are block-diagonal (use_bdlora)",
    "kasa_config": "it is KaSA (kasa_config): it truncated the base weights",
    "arrow_config": "it routes among other adapters (arrow_config)",
}


def refuse_unreadable(config: Mapping[str, Any], folder: Path, *, extras: bool = False) -> None:
    """Raises AdapterError for every variant whose update cannot be had from its own file."""
    kind = config.get("peft_type")
    reasons: dict[str, Any] = {
        f"its PEFT type is {kind}; known are {', '.join(sorted(PEFT_TYPES))}": (
            kind_of(config) not in PEFT_TYPES or kind == "DORA"
        )
    }
    reasons |= {reason: config.get(key) for key, reason in REFUSED_OPTIONS.items()}
    if not extras:
        saved, bias = config.get("modules_to_save"), config.get("bias", "none")
        reasons |= {
            f"it trained whole modules (modules_to_save: {saved}); {ASK}": saved,
            f"it trained biases (bias: {bias}); {ASK}": bias != "none",
            f"it trained tokens (trainable_token_indices); {ASK}": config.get(
                "trainable_token_indices"
            ),
        }
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        reasons[
            f"its init '{init}' changed the base weights; convert it to a plain LoRA with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...) first"
        ] = True
    for reason, holds in reasons.items():
        if holds:
            raise AdapterError(f"'{folder}' cannot be read as an update: {reason}")
