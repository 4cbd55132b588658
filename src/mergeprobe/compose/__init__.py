"""Adapters and a plan in, something that runs out. Carries decisions out; never makes them."""

from mergeprobe.compose.apply import apply_plan, deployed
from mergeprobe.compose.deployment import Deployment, read_deployment
from mergeprobe.compose.executor import Executor
from mergeprobe.compose.merge import METHODS, Merged, merge, merge_folders, merge_into_base
from mergeprobe.compose.osrm import osrm_init, start_from
from mergeprobe.compose.prune import prune

__all__ = [
    "METHODS",
    "Deployment",
    "Executor",
    "Merged",
    "apply_plan",
    "deployed",
    "merge",
    "merge_folders",
    "merge_into_base",
    "osrm_init",
    "prune",
    "read_deployment",
    "start_from",
]
