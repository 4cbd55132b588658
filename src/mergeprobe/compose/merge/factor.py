"""A dense merged module back to factors, with an exact certificate: see `lowrank.factor`."""

from mergeprobe.lowrank import factor

__all__ = ["factor"]
