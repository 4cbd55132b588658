"""A worker process: takes jobs as JSON lines on standard input, answers with events.

Several workers with one thread each train faster than one worker with all threads. A worker ends
when its standard input closes, so none outlives the process that started it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from queue import SimpleQueue
from typing import Any


def main(path: str, threads: int, cores: int) -> None:
    """Jobs: {"job": "probe" | "finish", "name": …}, {"job": "forecast"} and
    {"job": "measure", "measurement": …}."""
    jobs: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    # libraries print to standard output; events have it to themselves
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    import torch

    torch.set_num_threads(threads)
    from mergeprobe.adapters.base import load_base
    from mergeprobe.bench.folder import RunFolder
    from mergeprobe.bench.forecasting import forecast_and_plan
    from mergeprobe.bench.measure import Bench, Measurement
    from mergeprobe.bench.training import train
    from mergeprobe.errors import MergeProbeError

    def say(event: str, **data: Any) -> None:
        events.write(json.dumps({"event": event, **data}) + "\n")

    folder = RunFolder(path)
    config = folder.config()
    base = load_base(config.base)
    bench = Bench(folder, base)
    say("ready")
    while True:
        job = json.loads(jobs.get())
        try:
            if job["job"] == "measure":
                spec = job["measurement"]
                bench.run(Measurement(spec["method"], tuple(spec["adapters"]), spec["rank"]))
            elif job["job"] == "forecast":
                torch.set_num_threads(cores)  # the other workers wait for the plan
                forecast_and_plan(folder, base, lambda message: say("forecast", message=message))
                torch.set_num_threads(threads)
            else:
                name = job["name"]

                def on_step(step: int, loss: float, name: str = name) -> None:
                    say("step", name=name, step=step, loss=loss)

                run = folder.run(name, config)
                train(run, base, to_probe=job["job"] == "probe", on_step=on_step)
            say("done", job=job)
        except MergeProbeError as problem:
            say("failed", job=job, why=str(problem))


def _listen(jobs: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        jobs.put(line)
    os._exit(0)  # whoever started us is gone


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
