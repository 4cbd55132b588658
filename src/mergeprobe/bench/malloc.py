"""glibc's malloc, told to keep large blocks. Needs no torch: it is asked before torch loads."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

# one training step of a small model took 2.9 s with these and 6–35 s without: glibc gives large
# blocks back to the kernel after every step and faults them in again
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


def with_malloc_settings(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a process that computes on the CPU for long."""
    return {**(os.environ if environment is None else environment), **MALLOC}


def malloc_matters() -> bool:
    """Whether this process would gain from the settings and lacks them: glibc reads them once,
    at the start of a process, so only a new one can have them."""
    if not sys.platform.startswith("linux") or Path("/proc/driver/nvidia/version").exists():
        return False
    return any(key not in os.environ for key in MALLOC)
