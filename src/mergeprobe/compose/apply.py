"""Carrying out a plan: what each group says, and nothing that it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mergeprobe.adapters.checkpoint import WEIGHTS, Adapter, check_same_base
from mergeprobe.artefact import refuse_existing, sha256
from mergeprobe.capture.probe import Probe
from mergeprobe.compose.deployment import (
    CARD,
    ROUTING,
    Deployment,
    Entry,
    LogitGroup,
    read_deployment,
    write_deployment,
    written_parameters,
)
from mergeprobe.compose.logits import Mode
from mergeprobe.compose.merge import Merged, check_options, merge
from mergeprobe.compose.prune import prune
from mergeprobe.compose.router import Router
from mergeprobe.errors import MergeError, PlanError
from mergeprobe.plan import Action, Group, Plan, check_name

# the rules that action 'isolate' can name: they keep a core of each adapter verbatim
ISOLATIONS = ("core_isolation", "core_isolation_lowrank")


def apply_plan(
    plan: Plan,
    adapters: Mapping[str, Adapter],
    out: str | Path,
    *,
    probes: Mapping[str, Probe] | None = None,
    router: Router | None = None,
    force: bool = False,
) -> Deployment:
    """Carries out `plan` and writes the deployment folder, whole or not at all.

    adapters: by the names the plan uses; more than it names is fine. probes: by the same names,
    for methods that need data. router: for a plan that routes by prompt or gates logits (see
    `mergeprobe.compose.router_file`). Returns the deployment as read back from `out`. Raises
    PlanError if the plan is for other adapters or asks for what is not given, OutputExists if `out`
    is there and not `force`, and what `merge` raises.
    """
    refuse_existing(out, force=force)
    deployment = deployed(plan, adapters, probes=probes, router=router)
    full = sum(written_parameters(adapters[ref.name]) for ref in plan.adapters)
    write_deployment(deployment, out, full_routing=full, force=force)
    return read_deployment(out)


def deployed(
    plan: Plan,
    adapters: Mapping[str, Adapter],
    *,
    probes: Mapping[str, Probe] | None = None,
    router: Router | None = None,
) -> Deployment:
    """The deployment of `plan` in memory, the same updates that `apply_plan` writes.

    Raises PlanError and what `merge` raises, as `apply_plan` does.
    """
    check_plan(plan, adapters)
    _check_router(plan, router)
    fingerprint = check_same_base([adapters[ref.name] for ref in plan.adapters])
    serving: dict[str, Adapter] = {}
    entries: dict[str, Entry] = {}
    folders: dict[str, Adapter] = {}
    compositions: dict[str, LogitGroup] = {}
    for group in plan.groups:
        if group.action is Action.logits:
            _free(group.name, folders, group)
            compositions[group.name] = _composition(group)
        for folder, merged in CARRY_OUT[group.action](group, adapters, probes).items():
            _free(folder, [*folders, *compositions], group)
            folders[folder] = merged.adapter
            certificate = merged.certificate
            names = (folder,) if group.action in APART else group.adapters
            for name in names:
                serving[name] = merged.adapter
                entries[name] = Entry(
                    group.name, folder, group.action, group.method, certificate.total,
                    certificate.worst,
                )  # fmt: skip
    bases = (a.base for a in folders.values() if a.base)
    resident = sum(written_parameters(adapter) for adapter in folders.values())
    return Deployment(
        base=next(bases, plan.base),
        fingerprint=fingerprint,
        route=plan.route,
        serving=serving,
        entries=entries,
        resident_parameters=resident,
        compositions=compositions,
        router=router if needs_router(plan) else None,
    )


def needs_router(plan: Plan) -> bool:
    """Whether a router has to be given: the plan routes by prompt, or gates logits."""
    gated = (g for g in plan.groups if g.action is Action.logits and g.options.get("gated"))
    return plan.route.by == "prompt" or next(gated, None) is not None


def _check_router(plan: Plan, router: Router | None) -> None:
    if not needs_router(plan):
        return
    if router is None:
        raise PlanError(
            "the plan routes by prompt or gates logits, but no router was given: give the probes "
            "and the base model, or example prompts"
        )
    names = [ref.name for ref in plan.adapters]
    if lacking := sorted(set(names) - set(router.names)):
        raise PlanError(f"the router does not know {lacking}; it knows {list(router.names)}")


def check_plan(plan: Plan, adapters: Mapping[str, Adapter]) -> None:
    """Raises PlanError if the plan is for other adapters, or says what cannot be carried out."""
    if missing := [ref.name for ref in plan.adapters if ref.name not in adapters]:
        raise PlanError(
            f"the plan is for other adapters: {missing} are missing; given are {sorted(adapters)}"
        )
    for ref in plan.adapters:
        if ref.weights_sha256 is not None:
            _check_weights(ref.name, ref.weights_sha256, adapters[ref.name])
        found = adapters[ref.name].fingerprint
        if found and plan.base_fingerprint and found != plan.base_fingerprint:
            raise PlanError(
                f"the plan is for base {plan.base_fingerprint} but '{ref.name}' was trained on "
                f"{found}; plan again"
            )
    for group in plan.groups:
        _check_group(group)


def _check_weights(name: str, planned: str, adapter: Adapter) -> None:
    file = adapter.path / WEIGHTS if adapter.path else None
    if file is None or not file.exists():
        raise PlanError(
            f"the plan ties '{name}' to weights {planned[:12]}…, but the adapter given has no "
            f"{WEIGHTS} to check; read it from its folder or drop weights_sha256 from the plan"
        )
    found = sha256(file)
    if found != planned:
        raise PlanError(
            f"the plan is for other weights of '{name}': planned {planned[:12]}…, "
            f"'{file}' has {found[:12]}…; plan again"
        )


def _check_group(group: Group) -> None:
    where = f"group '{group.name}'"
    if group.pruned and group.action is not Action.prune:
        raise PlanError(
            f"{where} prunes components but its action is '{group.action}'; use action 'prune'"
        )
    if group.action is Action.prune and not group.pruned:
        raise PlanError(f"{where} prunes nothing: say what in 'pruned', or use action 'merge'")
    if group.action is Action.isolate and group.method not in ISOLATIONS:
        raise PlanError(
            f"{where} isolates, but '{group.method}' keeps no cores; "
            f"use one of {', '.join(ISOLATIONS)}"
        )
    if group.action is Action.logits:
        _composition(group)
    merges = group.method or group.options or group.weights or group.part_weights
    if group.action is Action.route and merges:
        raise PlanError(
            f"{where} routes, so nothing is merged: drop its method, options and weights"
        )


def _composition(group: Group) -> LogitGroup:
    """How a group's logits are composed: by default as a uniform mixture, or a plain sum."""
    where = f"group '{group.name}'"
    if stray := sorted(set(group.options) - {"plausibility", "gated"}):
        raise PlanError(f"{where}: logits take no option {stray}; known are plausibility, gated")
    if group.part_weights or group.space != "full":
        raise PlanError(f"{where}: logits have no parts of the model and no space; drop them")
    uniform = 1.0 if group.method == "sum" else 1 / len(group.adapters)
    weights = group.weights or dict.fromkeys(group.adapters, uniform)
    share = group.options.get("plausibility")
    found = LogitGroup(
        adapters=group.adapters,
        weights=tuple(weights[name] for name in group.adapters),
        mode=cast(Mode, group.method),
        plausibility=None if share is None else float(share),
        gated=bool(group.options.get("gated", 0)),
    )
    try:
        found.composition()
    except MergeError as problem:
        raise PlanError(f"{where}: {problem}") from None
    return found


def _merge(
    group: Group, adapters: Mapping[str, Adapter], probes: Mapping[str, Probe] | None
) -> dict[str, Merged]:
    """One merged adapter for the group, after pruning where the group prunes."""
    parts = [
        prune(adapters[name], group.pruned[name]) if name in group.pruned else adapters[name]
        for name in group.adapters
    ]
    assert group.method is not None  # the plan's own check
    options: dict[str, Any] = dict(group.options)
    try:
        row = check_options(group.method, options)
        merged = merge(
            parts,
            group.method,
            weights=_weights(group),
            rank=group.rank,
            space=group.space,
            probes=_probes(group, row.needs, probes),
            seed=group.seed,
            name=group.name,
            **options,
        )
    except MergeError as problem:
        raise PlanError(f"group '{group.name}': {problem}") from None
    if group.pruned:
        merged.adapter.card["pruned"] = {
            name: pruned.model_dump(mode="json") for name, pruned in group.pruned.items()
        }
    return {group.name: merged}


def _weights(group: Group) -> dict[str, list[float]] | None:
    """By part of the model, in the order of the group's adapters; None where it names none."""
    by_part = dict(group.part_weights)
    if group.weights is not None:
        by_part["all"] = group.weights
    named = {part: [given[name] for name in group.adapters] for part, given in by_part.items()}
    return named or None


def _probes(
    group: Group, needs: Sequence[str], probes: Mapping[str, Probe] | None
) -> list[Probe] | None:
    """In the order of the group's adapters, for a rule that needs them."""
    if not needs:
        return None
    if missing := [name for name in group.adapters if name not in (probes or {})]:
        raise PlanError(
            f"group '{group.name}': '{group.method}' needs the {' and '.join(needs)} of each "
            f"adapter's probe; '{missing[0]}' has none"
        )
    return [probes[name] for name in group.adapters] if probes else None


def _route(
    group: Group, adapters: Mapping[str, Adapter], probes: Mapping[str, Probe] | None
) -> dict[str, Merged]:
    """Each adapter of the group for itself, at the group's rank where it has one."""
    return {
        name: merge([adapters[name]], "mean", rank=group.rank, name=name) for name in group.adapters
    }


Carry = Callable[[Group, Mapping[str, Adapter], Mapping[str, Probe] | None], dict[str, Merged]]
# the actions that are built, and what carries them out: -> folder name -> what it holds
CARRY_OUT: dict[Action, Carry] = {
    Action.merge: _merge,
    Action.reweight: _merge,
    Action.prune: _merge,
    Action.isolate: _merge,
    Action.logits: _route,
    Action.route: _route,
}
APART = (Action.logits, Action.route)  # each adapter stays a folder of its own


def _free(folder: str, taken: Iterable[str], group: Group) -> None:
    check_name(folder)
    # some file systems do not tell 'A' from 'a'
    used = {name.lower() for name in (*taken, ROUTING, CARD)}
    if folder.lower() in used:
        raise PlanError(
            f"group '{group.name}' would be written to '{folder}', which is taken already; "
            "rename the group"
        )
