"""Deployment: which adapter serves which name, in memory or as a folder on disk.

The folder holds one PEFT folder for each distinct adapter, `routing.json`, a README for people
and, where prompts are routed, `router.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mergeprobe.adapters.checkpoint import Adapter, read_adapter, write_adapter
from mergeprobe.artefact import MADE_BY, atomic_folder, check_schema, read_json
from mergeprobe.compose.logits import Composition, Mode
from mergeprobe.compose.router import Router
from mergeprobe.compose.router_file import ROUTER, read_router, write_router
from mergeprobe.errors import DeploymentError, MergeError, PlanError
from mergeprobe.plan import Action, Route, check_name

ROUTING, CARD = "routing.json", "README.md"
ROUTING_SCHEMA = 1


@dataclass(frozen=True)
class Entry:
    """How one adapter name is served.

    error: relative Frobenius error, in [0, 1], of the folder's update against the exact rule;
    worst_error: that of its worst module. method is None for a routed adapter; for logits it is
    the mode, and `Deployment.compositions` says with whom the folder's logits are composed.
    """

    group: str
    folder: str
    action: Action
    method: str | None
    error: float
    worst_error: float


@dataclass(frozen=True)
class LogitGroup:
    """Adapters whose next-token logits are composed, for each of their names and the group's.

    weights: one for each adapter; where `gated` the router gives them for each prompt instead.
    plausibility: as in `mergeprobe.compose.logits.compose`.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    mode: Mode = "sum"
    plausibility: float | None = None
    gated: bool = False

    def composition(self) -> Composition:
        """Raises MergeError for weights that the mode can't take."""
        return Composition(self.weights, self.mode, self.plausibility)


@dataclass(frozen=True, eq=False)
class Deployment:
    """serving: adapter name -> the adapter that serves it (one object where several share it).

    entries: adapter name -> how. resident_parameters: entries of all B and A as they are written,
    each folder counted once, at its one uniform rank. compositions: by group name. router: where
    prompts are routed. path: None while only in memory.
    """

    base: str
    fingerprint: str | None
    route: Route
    serving: dict[str, Adapter]
    entries: dict[str, Entry]
    resident_parameters: int
    compositions: dict[str, LogitGroup] = field(default_factory=dict)
    router: Router | None = None
    path: Path | None = None

    def composition_of(self, name: str) -> LogitGroup | None:
        """The composition that serves an adapter's name, None where one adapter does."""
        entry = self.entries[name]
        return self.compositions.get(entry.group) if entry.action is Action.logits else None

    def folders(self) -> dict[str, Adapter]:
        """The distinct adapters by folder name, in the order of the plan."""
        return {entry.folder: self.serving[name] for name, entry in self.entries.items()}


def written_parameters(adapter: Adapter) -> int:
    """Entries of B and A in the folder that `write_adapter` makes: all at the largest rank."""
    return max(adapter.ranks) * sum(sum(update.shape) for update in adapter.modules.values())


def write_deployment(
    deployment: Deployment, out: str | Path, *, full_routing: int, force: bool = False
) -> None:
    """Writes the folder, whole or not at all. full_routing: parameters without any merge."""
    with atomic_folder(out, force=force) as folder:
        for name, adapter in deployment.folders().items():
            write_adapter(adapter, folder / name, card=adapter.card)
        routing = {
            "schema": ROUTING_SCHEMA,
            "made_by": MADE_BY,
            "base": deployment.base,
            "base_fingerprint": deployment.fingerprint,
            "route": deployment.route.model_dump(),
            "resident_parameters": deployment.resident_parameters,
            "entries": {name: asdict(entry) for name, entry in deployment.entries.items()},
            "compositions": {name: asdict(g) for name, g in deployment.compositions.items()},
        }
        if deployment.router is not None:
            write_router(deployment.router, folder / ROUTER)
        text = json.dumps(routing, indent=2, ensure_ascii=False)
        (folder / ROUTING).write_text(text + "\n", "utf-8")
        (folder / CARD).write_text(card(deployment, full_routing), "utf-8")


def read_deployment(path: str | Path) -> Deployment:
    """Reads and checks a deployment folder; DeploymentError with one line if it is not sound."""
    path = Path(path)
    where = f"'{path / ROUTING}'"
    if not path.is_dir():
        raise DeploymentError(f"'{path}' is not a folder; expected a deployment with {ROUTING}")
    routing = read_json(path / ROUTING, DeploymentError)
    if not isinstance(routing, dict):
        raise DeploymentError(f"{where} holds no JSON object")
    check_schema(routing.get("schema"), ROUTING_SCHEMA, where, DeploymentError)
    try:
        route = Route.model_validate(routing["route"])
        entries = {name: _entry(value) for name, value in routing["entries"].items()}
        listed = routing.get("compositions", {})
        compositions = {check_name(name): _logit_group(value) for name, value in listed.items()}
    except (KeyError, TypeError, ValueError, AttributeError, PlanError, MergeError) as problem:
        reason = str(problem).splitlines()[0]
        raise DeploymentError(f"{where} is malformed: {reason}; deploy again") from None
    if not entries:
        raise DeploymentError(f"{where} serves no adapter; deploy again")
    for name, group in compositions.items():
        if stray := sorted(set(group.adapters) - set(entries)):
            raise DeploymentError(f"{where}: '{name}' composes {stray}, which it does not serve")
    gated = [name for name, group in compositions.items() if group.gated]
    router = read_router(path / ROUTER) if route.by == "prompt" or gated else None
    folders = {name: read_adapter(path / name) for name in {e.folder: 0 for e in entries.values()}}
    for name, adapter in folders.items():
        declared = routing.get("base_fingerprint") or adapter.fingerprint
        if adapter.fingerprint and adapter.fingerprint != declared:
            raise DeploymentError(
                f"'{path / name}' is for base {adapter.fingerprint} but {where} is for "
                f"{declared}; deploy again"
            )
    return Deployment(
        base=routing.get("base") or "",
        fingerprint=routing.get("base_fingerprint"),
        route=route,
        serving={name: folders[entry.folder] for name, entry in entries.items()},
        entries=entries,
        resident_parameters=sum(written_parameters(a) for a in folders.values()),
        compositions=compositions,
        router=router,
        path=path,
    )


def _entry(value: Mapping[str, Any]) -> Entry:
    return Entry(
        group=str(value["group"]),
        folder=check_name(value["folder"]),
        action=Action(value["action"]),
        method=value["method"],
        error=float(value["error"]),
        worst_error=float(value["worst_error"]),
    )


def _logit_group(value: Mapping[str, Any]) -> LogitGroup:
    group = LogitGroup(
        adapters=tuple(str(name) for name in value["adapters"]),
        weights=tuple(float(weight) for weight in value["weights"]),
        mode=value["mode"],
        plausibility=value["plausibility"],
        gated=bool(value["gated"]),
    )
    if len(group.weights) != len(group.adapters):
        raise ValueError(f"{len(group.weights)} weights for {len(group.adapters)} adapters")
    group.composition()
    return group


def card(deployment: Deployment, full_routing: int) -> str:
    """The README of a deployment: what is served by what, how exactly, and how to load it."""
    base = deployment.base or "the base model the adapters were trained on"
    verified = "" if deployment.fingerprint else " (unverified: not every adapter records it)"
    share = deployment.resident_parameters / full_routing if full_routing else 0.0
    rows = [
        f"| {_cell(name)} | `{_cell(e.folder)}` | {e.action} | {e.method or '-'} | {e.error:.3g} |"
        for name, e in deployment.entries.items()
    ]
    first = next(iter(deployment.entries.values())).folder
    return "\n".join(
        [
            "# Adapter deployment",
            "",
            f"Base model: {base}{verified}.",
            f"Resident adapter parameters: {deployment.resident_parameters:,} "
            f"({share:.0%} of the {full_routing:,} that one folder for each adapter would take).",
            "",
            "| adapter | served by | action | method | relative error |",
            "|---|---|---|---|---|",
            *rows,
            "",
            *_how_chosen(deployment),
            "is a plain LoRA that PEFT and LoRA servers load. The relative error is that of the",
            "folder's update against the exact rule: 0 where nothing was truncated. It does not",
            "say how well a merge keeps a task; measure that.",
            "",
            "```python",
            "from peft import PeftModel",
            "",
            f'model = PeftModel.from_pretrained(base_model, "{first}")',
            "```",
            "",
            f"Made by {MADE_BY}.",
            "",
        ]
    )


def _how_chosen(deployment: Deployment) -> list[str]:
    said = ["The caller names the adapter; `routing.json` says which folder serves it."]
    if deployment.route.by == "prompt":
        said.append(f"Or `{ROUTER}` chooses by the prompt: `mergeprobe route` says what, and why.")
    for name, group in deployment.compositions.items():
        gates = "the router's" if group.gated else ", ".join(f"{w:g}" for w in group.weights)
        said.append(
            f"`{name}` composes the logits of {', '.join(group.adapters)} ({group.mode}, weights "
            f"{gates}): one forward pass of {len(group.adapters) + 1} rows a token."
        )
    return [*said, "Each folder"]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
