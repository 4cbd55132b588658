"""A worker process: takes jobs as JSON lines on standard input, answers with events.

Several workers with one thread each train faster than one worker with all threads. A worker ends
when its standard input closes, so none outlives the process that started it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

Say = Callable[..., None]
"""say(event, **data): sends an event to the process that started the worker."""


def main(work: str, path: str, threads: int, cores: int) -> None:
    """work: "demo" (jobs of bench/stages.py, in a run's folder) or "bank" (jobs of bench/bank/)."""
    jobs: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    # libraries print to standard output; events have it to themselves
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    import torch

    torch.set_num_threads(threads)
    from mergeprobe.errors import MergeProbeError

    def say(event: str, **data: Any) -> None:
        events.write(json.dumps({"event": event, **data}) + "\n")

    if work == "bank":
        from mergeprobe.bench.bank.work import Work

        do = Work(path)
    else:
        from mergeprobe.bench.stages import Stages

        do = Stages(path, threads, cores)
    say("ready")
    while True:
        job = json.loads(jobs.get())
        try:
            do(job, say)
            say("done", job=job)
        except MergeProbeError as problem:
            say("failed", job=job, why=str(problem))


def _listen(jobs: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        jobs.put(line)
    os._exit(0)  # whoever started us is gone


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
