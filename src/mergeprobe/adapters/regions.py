"""Where a module sits in the model, by its name: layer, depth third, attention or MLP."""

from __future__ import annotations

import re

THIRDS = ("early", "middle", "late")
KINDS = ("attention", "mlp")


def layer_of(module: str) -> int | None:
    """The layer index in a module's name, or None outside the layers."""
    match = re.search(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.", module)
    return int(match[1]) if match else None


def third_of(module: str, depth: int) -> str | None:
    """early | middle | late of a model of `depth` layers, or None outside the layers."""
    layer = layer_of(module)
    return None if layer is None else THIRDS[layer * 3 // depth]


def kind_of(module: str) -> str:
    """attention | mlp | other, by the name."""
    if re.search(r"attn|attention|[qkvo]_proj$|qkv", module):
        return "attention"
    if re.search(r"mlp|feed_?forward|ffn|(gate|up|down)_proj$|fc_?[12]$", module):
        return "mlp"
    return "other"
