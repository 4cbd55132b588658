"""What the server serves under which name: the base, adapters, compositions; changed while it runs.

A name is looked up, never opened. Folders to load from lie inside of one, `root`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mergeprobe.adapters.attach import placed
from mergeprobe.adapters.base import Base
from mergeprobe.adapters.checkpoint import Adapter, read_adapter
from mergeprobe.compose.deployment import Deployment
from mergeprobe.compose.logits import Composition
from mergeprobe.errors import AdapterMismatch, DeploymentError, PlanError
from mergeprobe.lowrank import LowRank
from mergeprobe.plan import Action, check_name

BASE, AUTO = "base", "auto"


@dataclass(frozen=True, eq=False)
class Source:
    """An adapter that can be loaded: a folder, or an adapter in memory. Each is itself only."""

    name: str
    path: Path | None
    adapter: Adapter | None = None

    def read(self) -> Mapping[str, LowRank]:
        """ΔW by module; AdapterError where the folder is gone or damaged."""
        if self.adapter is not None:
            return self.adapter.modules
        assert self.path is not None
        return read_adapter(self.path, name=self.name).modules


@dataclass(frozen=True, eq=False)
class Target:
    """What answers a request. sources: none for the base, one for an adapter; for a composition
    all of its adapters, in the order of `how.weights`. gated: the names by which a router gives
    their weights instead, for each prompt."""

    name: str
    sources: tuple[Source, ...] = ()
    how: Composition | None = None
    gated: tuple[str, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def rows(self) -> int:
        """Rows of a batch: a composition runs the base beside all of its adapters."""
        return 1 if self.how is None else len(self.sources) + 1


class Catalogue:
    """The names that are served. `targets`: name -> what answers. Several threads may read it."""

    def __init__(self, base: Base, targets: Mapping[str, Target], *, root: Path | None = None):
        self.base, self.root = base, root.resolve() if root else None
        self.targets: dict[str, Target] = {BASE: Target(BASE), **targets}

    def find(self, name: str) -> Target:
        """DeploymentError with one line for a name that is not served."""
        target = self.targets.get(name)
        if target is None:
            known = ", ".join(f"'{known}'" for known in [*self.targets][:8])
            more = len(self.targets) - 8
            raise DeploymentError(
                f"model {name[:80]!r} is not served; served are {known}"
                f"{f' and {more} more' if more > 0 else ''}"
            )
        return target

    def load(self, name: str, folder: Path) -> Target:
        """Serves one more adapter, from a folder; nothing changes where it fails.

        Raises DeploymentError for a name that is taken, AdapterError or AdapterMismatch for an
        adapter that cannot be read or is for another base.
        """
        check_free(name, self.targets)
        adapter = read_adapter(folder, name=name)
        check_fits(self.base, adapter)
        target = Target(name, (Source(name, folder),))
        if self.targets.setdefault(name, target) is not target:  # another request was faster
            check_free(name, self.targets)
        return target

    def unload(self, name: str) -> Target:
        """Serves this name no more; what runs or waits already is answered still."""
        if name in (BASE, AUTO):
            raise DeploymentError(f"'{name}' is no adapter that could be unloaded")
        target = self.find(name)
        del self.targets[name]
        return target

    def inside(self, path: str) -> Path:
        """The folder that is meant, inside of `root`. DeploymentError where there is none; what
        lies outside cannot be told from what does not exist."""
        if self.root is None:
            raise DeploymentError("this server loads no adapters; start it with --adapters-root")
        problem = DeploymentError(
            f"no folder {path[:200]!r} in the one that adapters are loaded from; give its path "
            "from there"
        )
        if not path.isprintable():
            raise problem
        try:
            folder = (self.root / path).resolve()
            found = folder.is_dir()
        except (OSError, ValueError):  # a name too long, or a loop of links
            raise problem from None
        if not found or folder == self.root or not folder.is_relative_to(self.root):
            raise problem
        return folder


def check_free(name: str, targets: Mapping[str, Target]) -> None:
    try:
        check_name(name)
    except PlanError as problem:
        raise DeploymentError(str(problem)) from None
    if name in targets or name == AUTO:
        raise DeploymentError(f"'{name}' is served already; unload it first or take another name")


def check_fits(base: Base, adapter: Adapter) -> None:
    """AdapterMismatch unless the adapter is for this base."""
    if adapter.fingerprint and adapter.fingerprint != base.fingerprint:
        raise AdapterMismatch(
            f"'{adapter.name}' is for base {adapter.fingerprint}, but the base served is "
            f"{base.fingerprint} ({base.name})"
        )
    placed(base.model, adapter.modules)


def catalogue_of(base: Base, deployment: Deployment, *, root: Path | None = None) -> Catalogue:
    """The names of a deployment: its adapters, and its groups where one thing answers for all.

    root: the folder that adapters may be loaded from; default: the one the deployment lies in.
    Raises AdapterMismatch for another base, DeploymentError for a name that the server needs.
    """
    if deployment.fingerprint and deployment.fingerprint != base.fingerprint:
        raise AdapterMismatch(
            f"the deployment is for base {deployment.fingerprint} "
            f"({deployment.base or 'unnamed'}), but the base given is {base.fingerprint} "
            f"({base.name})"
        )
    for adapter in deployment.folders().values():
        check_fits(base, adapter)
    where = deployment.path
    sources = {
        folder: Source(folder, where / folder) if where else Source(folder, None, adapter)
        for folder, adapter in deployment.folders().items()
    }
    targets = _targets(deployment, sources)
    if clash := {BASE, AUTO} & {*targets}:
        raise DeploymentError(
            f"the deployment serves '{min(clash)}', a name that the server needs for itself; "
            "rename it in the plan and apply again"
        )
    if root is None and where is not None:
        root = where.resolve().parent
    return Catalogue(base, targets, root=root)


def _targets(deployment: Deployment, sources: Mapping[str, Source]) -> dict[str, Target]:
    """By name: adapters first, then the groups that are one thing."""
    adapters, groups = {}, {}
    for name, entry in deployment.entries.items():
        group = deployment.composition_of(name)
        if group is None:
            answer = Target(name, (sources[entry.folder],))
        else:
            members = tuple(sources[deployment.entries[one].folder] for one in group.adapters)
            gated = group.adapters if group.gated else ()
            answer = Target(name, members, group.composition(), gated)
        adapters[name] = answer
        if entry.action is not Action.route:  # of routed adapters each is for itself
            groups[entry.group] = replace(answer, name=entry.group)
    return groups | adapters
