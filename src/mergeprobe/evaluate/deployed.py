"""Retention of every adapter under a deployment, on the caller's own items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mergeprobe.adapters.base import Base
from mergeprobe.adapters.checkpoint import Adapter
from mergeprobe.compose.deployment import Deployment
from mergeprobe.errors import AdapterMismatch, DataError, DeploymentError
from mergeprobe.evaluate.data import Example
from mergeprobe.evaluate.retention import Retention, retention
from mergeprobe.evaluate.score import batch_of, score, score_deployed


def deployed_retention(
    base: Base,
    deployment: Deployment,
    adapters: Mapping[str, Adapter],
    examples: Mapping[str, Sequence[Example]],
    *,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Retention]:
    """Adapter name -> its retention on its own examples, for every name that is served.

    adapters: the single adapters that went in, by name; examples: held-out items of each one's
    task. Three passes over the items of each: base, adapter alone, deployment.
    Raises DeploymentError or DataError for a name without adapter or examples, AdapterMismatch
    where the base is another.
    """
    if lacking := [name for name in deployment.entries if name not in adapters]:
        raise DeploymentError(
            f"the deployment serves {lacking}, but that adapter was not given; "
            f"given are {sorted(adapters)}"
        )
    if lacking := [name for name in deployment.entries if not examples.get(name)]:
        raise DataError(f"no examples for {lacking}; expected some for every name that is served")
    _check_base(base, deployment)
    found = {}
    for name in deployment.entries:
        progress(name)
        batch = batch_of(base, examples[name])
        without, alone = (score(base, what, batch).loss for what in (None, adapters[name]))
        deployed = score_deployed(base, deployment, name, batch).loss
        found[name] = retention(without, alone, deployed)
    return found


def _check_base(base: Base, deployment: Deployment) -> None:
    if deployment.fingerprint and deployment.fingerprint != base.fingerprint:
        raise AdapterMismatch(
            f"the deployment is for base {deployment.fingerprint} "
            f"({deployment.base or 'unnamed'}), but the base given is {base.fingerprint} "
            f"({base.name})"
        )
