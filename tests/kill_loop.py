"""Runs a cohort in forked children, killed with SIGKILL at random moments; a script for a test.

    python -m tests.kill_loop COHORT_JSON WORK OUT KILLS

Forked, because a fresh process would spend its life importing. Everything heavy is imported here
and nothing is used, so that no child inherits a thread pool. Prints the number of kills.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import datasets  # noqa: F401
import polars  # noqa: F401
import torch
import trl  # noqa: F401

from mergeprobe.bench.bank.folder import read_spec
from mergeprobe.bench.bank.queue import run_cohorts
from mergeprobe.bench.bank.work import Work  # noqa: F401


def main(spec_file: str, work: str, out: str, kills: int) -> None:
    torch.set_num_threads(1)
    spec, _ = read_spec(Path(spec_file))
    drawn, longest, killed = random.Random(0), 1.0, 0
    while True:
        before = files(Path(work))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run_cohorts([spec], work, out, workers=0)
                status = 0
            finally:
                os._exit(status)
        status = ended(child, drawn.uniform(0.0, longest))
        if status is None:
            killed += 1
            if files(Path(work)) == before:
                longest *= 1.2  # too short to get anywhere
        elif status != 0:
            raise SystemExit(f"the run failed after {killed} kills")
        elif killed >= kills:
            print(killed)
            return
        else:  # it got through: once more from the start, until it was killed often enough
            shutil.rmtree(work)
            shutil.rmtree(out)


def ended(child: int, seconds: float) -> int | None:
    """The child's exit status, or None if it had to be killed after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def files(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*") if not path.name.startswith(".")}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
