"""Recipes for mergekit: a whole model for each folder of a deployment.

Without the original adapters a recipe adds the deployment's own update to the base, exactly. With
them it states the merge rule itself, where mergekit has it; each such recipe is read back by our
own reader of mergekit's YAML and must say the same as the deployment's card.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergeprobe.compose.deployment import Deployment
from mergeprobe.compose.mergekit import KIN, parse_mergekit
from mergeprobe.errors import ExportError, MergeError
from mergeprobe.export.launch import Shipment

SUMS = ("mean", "linear", "sum")  # task_arithmetic there
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


def recipe_files(
    deployment: Deployment, shipment: Shipment, originals: Mapping[str, Path] | None
) -> dict[str, str]:
    """File name -> YAML, one for each name that is served."""
    import yaml

    if "+" in shipment.base:
        raise ExportError(f"mergekit reads the '+' in base '{shipment.base}' as an adapter's")
    adapters = deployment.folders()
    found = {}
    for one in shipment.served:
        folder = Path(one.path).name
        card, note = adapters[folder].card, ""
        if originals is not None and len(card.get("merged_from") or ()) > 1:
            config = stated(folder, card, shipment.base, originals)
            if card["method"] in RANDOM:
                note = "# drawn at random: the same chances as the deployment's, other draws\n"
        else:
            # a path of one '/' is asked for on the hub
            config = recipe("task_arithmetic", shipment.base, {f"./{one.path}": 1.0})
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        found[f"{one.name}.yml"] = note + text
    return found


def stated(
    name: str, card: Mapping[str, Any], base: str, originals: Mapping[str, Path]
) -> dict[str, Any]:
    """The merge rule of a deployment's card on the original folders; ExportError where mergekit
    has no such rule, or a part of it that it can't say."""
    method, options = str(card["method"]), dict(card.get("options") or {})
    weights, names = card.get("weights"), list(card["merged_from"])
    if lacking := [one for one in names if one not in originals]:
        raise ExportError(f"'{name}' was merged from {lacking}; give their folders too")
    why = None
    if method not in (*SUMS, *KIN) or method == "slerp":
        why = f"mergekit has no rule '{method}' for adapters"
    elif card.get("space", "full") != "full":
        why = f"mergekit has no space '{card['space']}'"
    elif not isinstance(weights, list):
        why = "its weights differ between parts of the model"
    elif card.get("pruned"):
        why = "it was pruned first"
    if why is not None:
        raise ExportError(f"'{name}': {why}; leave --adapters out to add its update as it is")
    assert isinstance(weights, list)
    if method == "sum":
        scale = options.pop("scale", 1.0)
        weights = [scale * weight for weight in weights]
    folders = {str(originals[one].absolute()): w for one, w in zip(names, weights, strict=True)}
    kin = "task_arithmetic" if method in SUMS else method
    normalize = bool(options.pop("normalise", 0))
    shared = {"normalize": normalize, "lambda": float(card.get("scaling", 1.0)), **options}
    config = recipe(kin, base, folders, shared)
    _check(name, config, "linear" if method in SUMS else method, weights, options, normalize)
    return config


def recipe(
    method: str, base: str, folders: Mapping[str, float], shared: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    if plus := [folder for folder in folders if "+" in folder]:
        raise ExportError(f"mergekit splits '{plus[0]}' at its '+'; rename the folder")
    models = [
        {"model": f"{base}+{folder}", "parameters": {"weight": float(weight)}}
        for folder, weight in folders.items()
    ]
    found: dict[str, Any] = {"merge_method": method, "base_model": base, "models": models}
    if shared:
        found["parameters"] = dict(shared)
    return found | {"dtype": "float32"}


def _check(
    name: str,
    config: Mapping[str, Any],
    method: str,
    weights: list[float],
    options: Mapping[str, Any],
    normalize: bool,
) -> None:
    """That the recipe, as mergekit reads it, is the rule that was asked for."""
    try:
        read = parse_mergekit(dict(config))
    except MergeError as problem:
        raise ExportError(f"'{name}': mergekit cannot say this merge: {problem}") from None
    wanted = dict(options) | ({"normalise": float(normalize)} if _elects(method) else {})
    if (read.method, read.weights) != (method, tuple(weights)) or read.options != wanted:
        raise ExportError(
            f"'{name}': mergekit would read {read.method} {read.options}, not {method} {wanted}; "
            "leave --adapters out to add its update as it is"
        )


def _elects(method: str) -> bool:
    return method in KIN and KIN[method].election
