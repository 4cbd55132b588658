"""Deployments for other people's servers: files, a launch command, and what had to be lowered."""

from mergeprobe.export.run import Export, Shipped, export_deployment, unmerged
from mergeprobe.export.targets import TARGETS, Target

__all__ = ["TARGETS", "Export", "Shipped", "Target", "export_deployment", "unmerged"]
