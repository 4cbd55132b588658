"""The queue on a Ray cluster: the same jobs as Ray tasks, on a folder that all machines share.

Needs the extra `ray`. Nothing else changes: files say what is done, so a lost machine costs the
jobs that it was doing.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeprobe.bench.malloc import MALLOC
from mergeprobe.errors import MergeProbeError

if TYPE_CHECKING:
    from mergeprobe.bench.bank.jobs import Job
    from mergeprobe.bench.bank.queue import Queue
    from mergeprobe.bench.bank.work import Work

LOCAL = "local"
_work: dict[str, Work] = {}  # of a Ray worker process: it keeps the base model between jobs


def run_on_ray(queue: Queue, address: str, retries: int) -> None:
    """Does what is left on the cluster at `address`: "auto" for the one that this machine belongs
    to, "local" for one started here, or host:port. One core a job; one GPU where there are some.
    """
    ray = _connected(address)
    try:
        _run(ray, queue, retries)
    finally:
        ray.shutdown()


def _connected(address: str) -> Any:
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MergeProbeError("--ray needs Ray: pip install 'mergeprobe[ray]'") from None
    # an interactive dashboard and reports to others are not wanted
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL:
        options |= {"include_dashboard": False}
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as problem:
        first = str(problem).strip().split(". ")[0].splitlines()[0]
        raise MergeProbeError(
            f"no Ray cluster at '{address}': {first}; start one with `ray start --head`, or pass "
            "--ray local"
        ) from None
    return ray


def _run(ray: Any, queue: Queue, retries: int) -> None:
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    slots = max(1, gpus or int(resources.get("CPU", 1)))
    queue.begin(slots)
    remote = ray.remote(
        num_cpus=1,
        num_gpus=1 if gpus else 0,
        max_retries=0,  # retried here, so that it is said
        max_calls=0,
        runtime_env={"env_vars": {**MALLOC, "OMP_NUM_THREADS": "1"}},
    )(do_job)
    waiting, doing, deaths = list(queue.left), {}, Counter()
    while waiting or doing:
        for job in [job for job in waiting if queue.ready(job)][: slots - len(doing)]:
            waiting.remove(job)
            doing[remote.remote(str(queue.work.resolve()), queue.message(job))] = job
            queue.on_event({"event": "began", "job": queue.message(job)})
        (done,), _ = ray.wait(list(doing), num_returns=1)
        job = doing.pop(done)
        if _ended(ray, done, job):
            queue.on_event({"event": "done", "job": queue.message(job)})
            continue
        deaths[job] += 1
        if deaths[job] > retries:
            raise MergeProbeError(
                f"workers died while doing {job.label}; run the same command again: it goes on "
                "where it was"
            )
        queue.on_event({"event": "died", "job": queue.message(job)})
        waiting.insert(0, job)


def _ended(ray: Any, done: Any, job: Job) -> bool:
    """True if the job is done, False if its worker or machine died; raises what the job raised."""
    try:
        why = ray.get(done)
    except ray.exceptions.RayTaskError as problem:
        last = str(problem).strip().splitlines()[-1]
        raise MergeProbeError(f"{job.label} failed: {last}") from None
    except ray.exceptions.RayError:  # a worker, a machine or its memory is gone
        return False
    if why is not None:
        raise MergeProbeError(why)
    return True


def do_job(work: str, message: dict[str, Any]) -> str | None:
    """One job in a Ray worker; returns what went wrong, if the user can put it right."""
    import torch

    from mergeprobe.bench.bank.work import Work

    torch.set_num_threads(1)
    if work not in _work:
        _work[work] = Work(Path(work))
    try:
        _work[work](message, lambda event, **data: None)
    except MergeProbeError as problem:
        return str(problem)
    return None
