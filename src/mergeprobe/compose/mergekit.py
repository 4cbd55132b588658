"""mergekit's YAML, read for what it says about adapters: methods that both have, or a refusal.

Numbers are mergekit's on full models wherever its rule is ours: linear, task_arithmetic, ties and
breadcrumbs agree; dare_*, della* draw at random, with the same chances. What would come out
otherwise than in mergekit is refused by name, never approximated. The one exception is slerp, which
here runs on the updates (mergekit's, on full weights, is nearly linear); `notes` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeprobe.errors import MergeError


@dataclass(frozen=True)
class Kin:
    """A method of mergekit. method: ours. normalize: mergekit's default for it. options: those
    that a model may state, with mergekit's defaults. election: it elects signs, so that ours takes
    `normalise`; the others are sums, whose weights are divided here."""

    method: str
    normalize: bool
    options: Mapping[str, float]
    election: bool = False


KIN: dict[str, Kin] = {
    "linear": Kin("linear", True, {}),
    "task_arithmetic": Kin("linear", False, {}),
    "ties": Kin("ties", True, {"density": 1.0}, election=True),
    "dare_linear": Kin("dare_linear", False, {"density": 1.0}),
    "dare_ties": Kin("dare_ties", False, {"density": 1.0}, election=True),
    "breadcrumbs": Kin("breadcrumbs", False, {"density": 1.0, "gamma": 0.01}),
    "della": Kin("della", True, {"density": 1.0, "epsilon": 0.15}, election=True),
    "della_linear": Kin("della_linear", False, {"density": 1.0, "epsilon": 0.15}),
    "slerp": Kin("slerp", False, {}),
}
TOP = {"merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "name"}
# `rescale` restores the L1 norm of what DARE and DELLA keep, ours its expectation: see _rescale
SHARED = {"normalize", "lambda", "int8_mask", "rescale", "t"}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class MergekitConfig:
    """A merge as mergekit's YAML states it, in our terms; the fields are those of merge_folders."""

    folders: tuple[str, ...]
    method: str
    options: dict[str, float]
    weights: tuple[float, ...] | None
    scaling: float = 1.0
    dtype: str = "float32"
    notes: tuple[str, ...] = ()


def read_mergekit(path: str | Path) -> MergekitConfig:
    """Reads a YAML file; MergeError with one line for whatever it says that we do not do."""
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as problem:
        raise MergeError(f"'{path}' cannot be read: {problem}") from None
    except yaml.YAMLError as problem:
        raise MergeError(f"'{path}' is no YAML: {' '.join(str(problem).split())}") from None
    try:
        return parse_mergekit(found)
    except MergeError as problem:
        raise MergeError(f"'{path}': {problem}") from None


def parse_mergekit(config: Any) -> MergekitConfig:
    if not isinstance(config, dict) or "merge_method" not in config:
        raise MergeError("no merge_method; expected a mergekit config with merge_method and models")
    name = str(config["merge_method"])
    if name not in KIN:
        raise MergeError(
            f"mergekit's method '{name}' is not carried out here; known are {', '.join(KIN)}"
        )
    if stray := sorted(set(map(str, config)) - TOP):
        raise MergeError(f"'{stray[0]}' means nothing for adapters; leave it out, or use mergekit")
    shared = _object(config.get("parameters"), "parameters")
    if stray := sorted(shared.keys() - SHARED - KIN[name].options.keys() - {"weight"}):
        raise MergeError(f"'{name}' has no parameter '{stray[0]}' that is known here")
    models = _models(config, name)
    dtype = str(config.get("out_dtype") or config.get("dtype") or "float32")
    if dtype not in DTYPES:
        raise MergeError(f"dtype '{dtype}' is not written here; expected {', '.join(DTYPES)}")
    if name == "slerp":
        return _slerp(config, models, shared, dtype)
    return _weighted(name, models, shared, dtype)


def _weighted(
    name: str, models: list[tuple[str, dict[str, Any]]], shared: dict[str, Any], dtype: str
) -> MergekitConfig:
    kin = KIN[name]
    weights = [_number(shared | own, "weight", model) for model, own in models]
    normalize = shared.get("normalize", kin.normalize)
    if not isinstance(normalize, bool):
        raise MergeError(f"normalize is {normalize!r}; expected true or false")
    options = {key: _same(key, usual, models, shared) for key, usual in kin.options.items()}
    if kin.election:
        if min(weights) < 0:
            raise MergeError(f"'{name}' with a weight below 0 is not mergekit's rule here")
        options["normalise"] = float(normalize)
    elif normalize:
        total = sum(weights)
        if abs(total) < 1e-8:
            raise MergeError("the weights add up to 0, so they cannot be normalized")
        weights = [weight / total for weight in weights]
    elif name == "linear" and abs(sum(weights) - 1.0) > 1e-6:
        raise MergeError(
            f"linear with normalize false and weights of sum {sum(weights):g} would scale the base "
            "too, which no adapter can; use task_arithmetic, or weights of sum 1"
        )
    if options.get("density") == 1.0 and name.startswith(("breadcrumbs", "della")):
        # at density 1 mergekit drops nothing, whatever gamma or epsilon say
        options |= {"gamma": 0.0} if name == "breadcrumbs" else {"epsilon": 0.0}
    notes = _rescale(name, shared, options)
    scaling = _number({"lambda": 1.0} | shared, "lambda", "parameters")
    folders = tuple(model for model, _ in models)
    return MergekitConfig(folders, kin.method, options, tuple(weights), scaling, dtype, notes)


def _rescale(name: str, shared: Mapping[str, Any], options: Mapping[str, float]) -> tuple[str, ...]:
    """Ours always rescales what is dropped at random and never what is trimmed."""
    random = name.startswith(("dare", "della"))
    if shared.get("rescale", random) != random:
        wanted = "true" if random else "false"
        raise MergeError(f"'{name}' is carried out here with rescale: {wanted} only")
    if random and options["density"] < 1.0:
        return (
            "entries kept are divided by their chance, as DARE and DELLA publish it; mergekit "
            "rescales to the L1 norm: the same in expectation",
        )
    return ()


def _slerp(
    config: dict[str, Any],
    models: list[tuple[str, dict[str, Any]]],
    shared: dict[str, Any],
    dtype: str,
) -> MergekitConfig:
    first = config.get("base_model")
    folders = [_adapter(model) for model in (config.get("models") or []) if model]
    if len(folders) != 2:
        raise MergeError(f"slerp takes two models, got {len(folders)}")
    start = str(first).rpartition("+")[2] if first is not None else folders[0]
    if start not in folders:
        raise MergeError(f"slerp's base_model is '{first}'; expected one of the two models")
    folders = [start, *(folder for folder in folders if folder != start)]
    t = _number({"t": 0.5} | shared, "t", "parameters")
    note = (
        "slerp runs on the updates; mergekit's runs on full weights, where it is nearly linear",
    )
    return MergekitConfig(tuple(folders), "slerp", {}, (1.0 - t, t), 1.0, dtype, note)


def _models(config: dict[str, Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    """(adapter folder, its own parameters) of every model but the base."""
    listed = config.get("models")
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        raise MergeError("no list of models; expected models: with one adapter folder each")
    base = config.get("base_model")
    found = []
    for entry in listed:
        if not isinstance(entry, dict) or "model" not in entry:
            raise MergeError(f"a model is {entry!r}; expected model: FOLDER")
        own = _object(entry.get("parameters"), f"parameters of '{entry['model']}'")
        if name != "slerp" and base is not None and str(entry["model"]) == str(base):
            if name == "linear":
                raise MergeError("linear gives the base a weight of its own; use task_arithmetic")
            continue  # mergekit lists the base too; its update is zero
        if stray := sorted(own.keys() - KIN[name].options.keys() - {"weight"}):
            raise MergeError(f"'{entry['model']}' has a parameter '{stray[0]}', unknown here")
        found.append((_adapter(entry), own))
    if not found:
        raise MergeError("the only model is the base; list the adapters to merge")
    return found


def _adapter(entry: Mapping[str, Any]) -> str:
    """The adapter of mergekit's BASE+ADAPTER, or the folder as it stands."""
    return str(entry["model"]).rpartition("+")[2]


def _same(
    key: str, usual: float, models: list[tuple[str, dict[str, Any]]], shared: dict[str, Any]
) -> float:
    """A rule's option, which every model must state alike."""
    found = {_number({key: usual} | shared | own, key, model) for model, own in models}
    if len(found) > 1:
        raise MergeError(f"{key} differs between models ({sorted(found)}); here it is one for all")
    return found.pop()


def _number(values: Mapping[str, Any], key: str, where: str) -> float:
    if key not in values:
        raise MergeError(f"'{where}' has no {key}; expected parameters: {{{key}: 1.0}}")
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MergeError(
            f"{key} of '{where}' is {value!r}; expected one number (no gradients or filters here)"
        )
    return float(value)


def _object(value: Any, what: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise MergeError(f"{what} are {value!r}; expected names and values")
    return {str(key): item for key, item in value.items()}
