"""What answers a request: a name, a router's choice, a composition with a router's weights."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.compose.router import Router, prompt_states
from mergeprobe.errors import DeploymentError
from mergeprobe.serve.catalogue import BASE, Catalogue
from mergeprobe.serve.job import Job, Routed
from mergeprobe.serve.resident import Resident


def decide(job: Job, catalogue: Catalogue, router: Router | None, resident: Resident) -> None:
    """Settles the job's target and weights, once; runs the base on its prompt where a router is
    asked. Raises DeploymentError where the router chooses a name that is not served."""
    target, how = job.target, job.target.how if job.target else None
    if target is not None and (how is None or job.weights is not None):
        return
    states = None
    if target is None:
        states = _states(job, catalogue, router, resident)
        choice = router.choose(states)[0]  # type: ignore[union-attr]
        target = catalogue.find(choice.name or BASE)
        job.routed = Routed(target.name, choice.certain, choice.rivals)
    if target.gated:
        if states is None:
            states = _states(job, catalogue, router, resident)
        gates = router.gates(states, among=target.gated)  # type: ignore[union-attr]
        job.weights = tuple(gates[:, 0].tolist())
    elif target.how is not None:
        job.weights = target.how.weights
    job.target = target


def _states(
    job: Job, catalogue: Catalogue, router: Router | None, resident: Resident
) -> Float[Tensor, "1 d"]:
    if router is None:
        raise DeploymentError("the deployment has no router")
    ids = torch.tensor([job.asked.routed_by or job.asked.ids])
    resident.choose([None])
    return prompt_states(catalogue.base.model, ids, torch.ones_like(ids), layer=router.layer)
