"""export_deployment: writes a deployment for one server, reads it back, and says what it cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mergeprobe.adapters.checkpoint import Adapter, check_same_base, read_adapter, write_adapter
from mergeprobe.artefact import atomic_folder, refuse_existing
from mergeprobe.compose.deployment import Deployment, Entry, written_parameters
from mergeprobe.errors import ExportError
from mergeprobe.export.base_shape import BaseShape, base_shape, gguf_file_of, gguf_shape, is_local
from mergeprobe.export.check import Check, check_folder
from mergeprobe.export.fit import Fitted, fit, unsaid, written_error
from mergeprobe.export.gguf_adapter import read_gguf, write_gguf
from mergeprobe.export.launch import Served, Shipment
from mergeprobe.export.recipes import recipe_files
from mergeprobe.export.report import as_data, readme
from mergeprobe.export.targets import Target, target_of
from mergeprobe.lowrank import LowRank
from mergeprobe.plan import Action, Route, check_name

if TYPE_CHECKING:
    from mergeprobe.adapters.base import Base
    from mergeprobe.evaluate.data import Example

REPORT, README, FOLDER = "export.json", "README.md", "adapters"
# entries of a card that are those of its own file
WRITTEN = ("schema", "made_by", "base_fingerprint", "weights_sha256", "read_truncation")


@dataclass(frozen=True)
class Shipped:
    """One file or folder of an export.

    error, worst_error: relative Frobenius error of the written update against the deployment's, of
    the whole and of the worst module, measured on the files. deployment_error: the deployment's
    own, against the exact rule. lowered: in words. checks: see check.py.
    """

    name: str
    path: str
    rank: int
    error: float
    worst_error: float
    deployment_error: float
    lowered: tuple[str, ...]
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class LossChange:
    """Mean loss an item, of the deployment and of what was exported; se of the difference."""

    deployed: float
    exported: float
    difference: float
    se: float
    items: int


@dataclass(frozen=True)
class Export:
    """names: adapter name -> what a request asks for. lowered: of the deployment as a whole.
    rank: that the server is started with. launch: file name -> its text."""

    target: str
    path: Path
    base: str
    fingerprint: str | None
    dtype: str
    rank: int
    names: Mapping[str, str]
    adapters: tuple[Shipped, ...]
    lowered: tuple[str, ...]
    launch: Mapping[str, str]
    losses: Mapping[str, LossChange] = field(default_factory=dict)


def export_deployment(
    deployment: Deployment,
    to: str,
    out: str | Path,
    *,
    base: str | Path | None = None,
    max_rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    lower: bool = False,
    every_name: bool = False,
    originals: Mapping[str, Path] | None = None,
    loaded: Base | None = None,
    examples: Mapping[str, Sequence[Example]] | None = None,
    force: bool = False,
) -> Export:
    """Writes `deployment` for one of TARGETS; whole or not at all.

    base: overrides the deployment's name of it. Shapes are checked where it is given or lies here;
    llama.cpp needs it.
    max_rank: truncates what is above. lower: serve by name what the target can't compose or route.
    every_name: a model of its own for each adapter name, where several share one folder.
    originals: adapter name -> its own folder, for mergekit to run the merge rule itself.
    loaded, examples: also measure each name's loss, as deployed and as exported.
    Raises ExportError for what the target can't take, and OutputExists.
    """
    refuse_existing(out, force=force)
    target = target_of(to)
    fallen = unsaid(deployment, target)
    if fallen and not lower:
        raise ExportError(f"{fallen[0]}: pass --lower (lower=True) to accept that")
    name = str(base) if base is not None else deployment.base
    if not name:
        raise ExportError("the deployment names no base model; give it with --base")
    shape = _shape(target, base, name)
    fitted = fitted_folders(deployment, target, name, max_rank, shape)
    with atomic_folder(out, force=force) as temporary:
        shipped, written = _ship(temporary, deployment, fitted, target, shape, dtype)
        losses = _losses(deployment, written, loaded, examples)
        shipment, asked = _shipment(deployment, fitted, target, shape, name, shipped, every_name)
        launch = target.launch(shipment)
        if target.form == "recipes":
            launch |= recipe_files(deployment, shipment, originals)
        export = Export(
            target=target.name,
            path=Path(out),
            base=name,
            fingerprint=deployment.fingerprint,
            dtype=str(dtype).removeprefix("torch."),
            rank=shipment.rank,
            names=asked,
            adapters=tuple(shipped),
            lowered=tuple(fallen),
            launch=launch,
            losses=losses,
        )
        _write_texts(temporary, export, target)
    return export


def fitted_folders(
    deployment: Deployment,
    target: Target,
    base: str,
    max_rank: int | None,
    shape: BaseShape | None,
) -> dict[str, Fitted]:
    """Every folder's adapter as the target takes it. ExportError for one that can't be."""
    adapters = deployment.folders()
    others = list(adapters.values())
    return {
        folder: fit(adapter, target, base=base, max_rank=max_rank, shape=shape, others=others)
        for folder, adapter in adapters.items()
    }


def _ship(
    root: Path,
    deployment: Deployment,
    fitted: Mapping[str, Fitted],
    target: Target,
    shape: BaseShape | None,
    dtype: torch.dtype,
) -> tuple[list[Shipped], dict[str, dict[str, LowRank]]]:
    """Writes every adapter, reads it back, and compares: (what was written, its updates)."""
    own = {entry.folder: entry.error for entry in deployment.entries.values()}
    shipped, written = [], {}
    for folder, adapter in deployment.folders().items():
        one = fitted[folder]
        path, checks = _write(root, folder, one, target, shape, dtype)
        written[folder] = _read(root / path, one.adapter, target, shape)
        error, worst = written_error(adapter.modules, written[folder])
        rank = max(one.adapter.ranks)
        shipped.append(
            Shipped(folder, path, rank, error, worst, own[folder], one.lowered, tuple(checks))
        )
    return shipped, written


def _shipment(
    deployment: Deployment,
    fitted: Mapping[str, Fitted],
    target: Target,
    shape: BaseShape | None,
    base: str,
    shipped: Sequence[Shipped],
    every_name: bool,
) -> tuple[Shipment, dict[str, str]]:
    """What the launch command says, and adapter name -> what a request asks for."""
    entries = deployment.entries
    model = {name: name if every_name else entry.folder for name, entry in entries.items()}
    paths = {one.name: one.path for one in shipped}
    served = {model[name]: paths[entry.folder] for name, entry in entries.items()}
    modules = {m.rpartition(".")[2] for one in fitted.values() for m in one.adapter.modules}
    shipment = Shipment(
        base=str(shape.path) if shape and shape.path else base,
        served=tuple(Served(name, path) for name, path in served.items()),
        rank=target.bucket(max(one.rank for one in shipped)),
        modules=tuple(sorted(modules)),
    )
    return shipment, _asked(model, served, target)


def _write_texts(root: Path, export: Export, target: Target) -> None:
    for file, text in export.launch.items():
        (root / file).write_text(text, "utf-8")
        (root / file).chmod(0o755 if file.endswith(".sh") else 0o644)
    data = json.dumps(as_data(export), indent=2, ensure_ascii=False)
    (root / REPORT).write_text(data + "\n", "utf-8")
    (root / README).write_text(readme(export, target.title), "utf-8")


def unmerged(adapters: Mapping[str, Adapter]) -> Deployment:
    """Adapters as they are, each served by its name. Raises what `check_same_base` raises."""
    given = list(adapters.values())
    fingerprint = check_same_base(given)
    entries = {
        name: Entry("all", check_name(name), Action.route, None, adapter.lost(),
                    max(adapter.truncation.values(), default=0.0))
        for name, adapter in adapters.items()
    }  # fmt: skip
    return Deployment(
        next((adapter.base for adapter in given if adapter.base), ""),
        fingerprint,
        Route(),
        dict(adapters),
        entries,
        sum(written_parameters(adapter) for adapter in given if adapter.modules),
    )


def _shape(target: Target, base: str | Path | None, name: str) -> BaseShape | None:
    if target.form == "gguf":
        file = gguf_file_of(name)
        return gguf_shape(file, name) if file is not None else base_shape(name)
    return base_shape(name) if base is not None or is_local(name) else None


def _write(
    root: Path, name: str, one: Fitted, target: Target, shape: BaseShape | None, dtype: torch.dtype
) -> tuple[str, list[Check]]:
    """(path, its checks); ExportError where the file is not what the target takes."""
    if target.form == "gguf":
        assert shape is not None  # the target needs it
        path = f"{FOLDER}/{name}.gguf"
        (root / FOLDER).mkdir(exist_ok=True)
        write_gguf(replace(one.adapter, name=name), root / path, shape, dtype)
        rank = max(one.adapter.ranks)
        has = len(shape.tensors) or len(shape.modules)
        return path, [
            Check("one rank", True, f"{rank}, alpha {rank}: scaling 1"),
            Check("architecture", True, shape.kind),
            Check("fits the base", bool(has), f"{len(one.adapter.modules)} tensors, names, shapes"),
        ]
    path = f"{FOLDER}/{name}"
    card = {key: value for key, value in one.adapter.card.items() if key not in WRITTEN}
    write_adapter(one.adapter, root / path, card=card | {"exported_for": target.name}, dtype=dtype)
    checks = check_folder(root / path, target, shape)
    for check in checks:
        if check.ok is False:
            raise ExportError(f"'{name}' for {target.name}: {check.name}: {check.said}")
    return path, checks


def _read(
    path: Path, adapter: Adapter, target: Target, shape: BaseShape | None
) -> dict[str, LowRank]:
    if target.form == "gguf":
        assert shape is not None
        return read_gguf(path, shape, adapter.modules)
    return read_adapter(path, extras=target.extras).modules


def _asked(asked: Mapping[str, str], served: Mapping[str, str], target: Target) -> dict[str, str]:
    """Adapter name -> what a request says, in the server's own terms."""
    order = list(served)
    if target.name == "llama.cpp":
        return {a: f"lora id {order.index(name)} ({served[name]})" for a, name in asked.items()}
    if target.name == "lorax":
        return {a: f"model: the path of {served[name]}" for a, name in asked.items()}
    return dict(asked)


def _losses(
    deployment: Deployment,
    written: Mapping[str, Mapping[str, LowRank]],
    loaded: Base | None,
    examples: Mapping[str, Sequence[Example]] | None,
) -> dict[str, LossChange]:
    if loaded is None or not examples:
        return {}
    from mergeprobe.evaluate.score import batch_of, score, score_deployed

    found = {}
    for name, items in examples.items():
        if name not in deployment.entries:
            raise ExportError(f"examples are for '{name}', which the deployment does not serve")
        batch = batch_of(loaded, items)
        before = score_deployed(loaded, deployment, name, batch).loss.double()
        after = score(loaded, written[deployment.entries[name].folder], batch).loss.double()
        change = after - before
        se = float(change.std() / len(change) ** 0.5) if len(change) > 1 else float("nan")
        found[name] = LossChange(
            float(before.mean()), float(after.mean()), float(change.mean()), se, len(change)
        )
    return found
