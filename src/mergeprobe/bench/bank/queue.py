"""The queue: the jobs of all asked cohorts, done by workers, until the rows are there.

What is done is said by files alone, written whole or not at all: after a kill of anything at any
moment the same command goes on. Rows are collated when a cohort's last job is done.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mergeprobe.bench.bank.folder import CohortFolder
from mergeprobe.bench.bank.jobs import KINDS, Job, done, job_from, jobs_of, needs
from mergeprobe.bench.bank.ray_queue import run_on_ray
from mergeprobe.bench.bank.rows import collate, collated
from mergeprobe.bench.bank.spec import CohortSpec
from mergeprobe.bench.bank.tasks import check_tasks
from mergeprobe.bench.pool import Pool
from mergeprobe.bench.start import alone, unpack

RETRIES = 1
Notify = Callable[..., None]
"""notify(stage, **data); stages: note, begin, job, step, died, cohort, end."""


def run_cohorts(
    specs: Sequence[CohortSpec],
    work: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    workers: int | None = None,
    ray: str | None = None,
    keep_snapshots: bool = True,
    notify: Notify = lambda stage, **data: None,
) -> list[Path]:
    """Does all cohorts in `work`, or what is left of them; returns their folders of rows in `out`.

    workers: processes; None for one a core up to two, or one a GPU; 0 does the jobs here.
    ray: the address of a Ray cluster whose machines share `work` (bench/bank/ray_queue.py).
    keep_snapshots: False removes a cohort's probes and adapters once its rows are written.
    A job whose worker dies is done once more; then MergeProbeError names it.
    """
    work, out = Path(work), Path(out)
    with alone(work):
        queue = Queue(specs, work, out, data, keep_snapshots, notify)
        queue.collate_ready()
        if queue.left:
            unpack({folder.spec.base for folder in queue.open_folders()}, notify)
            if ray is not None:
                run_on_ray(queue, ray, RETRIES)
            elif workers == 0:
                queue.run_here()
            else:
                with Pool("bank", work, workers) as pool:
                    queue.run_in(pool)
    notify("end")
    return [out / spec.name for spec in specs]


class Queue:
    """What is left to do, and what happens when some of it is done."""

    def __init__(
        self,
        specs: Sequence[CohortSpec],
        work: Path,
        out: Path,
        data: str | Path | None,
        keep_snapshots: bool,
        notify: Notify,
    ) -> None:
        self.work, self.out, self.notify = work, out, notify
        self.data = str(data) if data is not None else None
        self.keep_snapshots = keep_snapshots
        self.folders = {spec.name: CohortFolder(work, spec, data) for spec in specs}
        self.times = Times(work / "times.jsonl")
        self.left: dict[Job, None] = {}  # in order
        self.started: dict[Job, float] = {}
        self.workers = 1
        for folder in self.folders.values():
            if collated(folder, out):
                continue
            check_tasks(folder.spec, folder.data)
            folder.claim()
            self.left |= dict.fromkeys(job for job in jobs_of(folder) if not done(job, folder))

    def open_folders(self) -> list[CohortFolder]:
        """Those of cohorts that still have jobs."""
        return [self.folders[name] for name in dict.fromkeys(job.cohort for job in self.left)]

    def begin(self, workers: int) -> None:
        self.workers = workers
        self.notify("begin", left=len(self.left), seconds=self.seconds_left())

    def run_in(self, pool: Pool) -> None:
        self.begin(pool.count)
        by_message = {json.dumps(self.message(job)): job for job in self.left}
        pool.run(
            [self.message(job) for job in self.left],
            self.on_event,
            ready=lambda message: self.ready(by_message[json.dumps(message)]),
            retries=RETRIES,
        )

    def run_here(self) -> None:
        from mergeprobe.bench.bank.work import Work

        self.begin(1)
        do = Work(self.work)
        for job in list(self.left):
            message = self.message(job)
            self.on_event({"event": "began", "job": message})
            do(message, lambda event, **data: self.on_event({"event": event, **data}))
            self.on_event({"event": "done", "job": message})

    def message(self, job: Job) -> dict[str, Any]:
        return {**job.message(), "data": self.data}

    def ready(self, job: Job) -> bool:
        return not any(need in self.left for need in needs(job, self.folders[job.cohort]))

    def on_event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "step":
            self.notify("step", **{key: value for key, value in event.items() if key != "event"})
            return
        if "job" not in event:
            return
        job = job_from(event["job"])
        if kind == "began":
            self.started[job] = time.monotonic()
        elif kind == "died":
            self.notify("died", job=job)
        elif kind == "done":
            self._finish(job)

    def _finish(self, job: Job) -> None:
        seconds = time.monotonic() - self.started.pop(job, time.monotonic())
        self.times.add(job, seconds)
        del self.left[job]
        self.notify(
            "job", job=job, seconds=seconds, left=len(self.left), remaining=self.seconds_left()
        )
        if not any(other.cohort == job.cohort for other in self.left):
            self._collate(self.folders[job.cohort])

    def collate_ready(self) -> None:
        """Collates the cohorts that were done up to their rows when the last run ended."""
        open_ones = {job.cohort for job in self.left}
        for name, folder in self.folders.items():
            if name not in open_ones and not collated(folder, self.out):
                self._collate(folder)

    def _collate(self, folder: CohortFolder) -> None:
        target = collate(folder, self.out)
        if not self.keep_snapshots:
            for path in (folder.probes, folder.adapters):
                shutil.rmtree(path, ignore_errors=True)
        self.notify("cohort", name=folder.spec.name, rows=target)

    def seconds_left(self) -> float:
        """Of all jobs that are left, shared evenly among the workers."""
        return sum(self.times.of(job.kind) for job in self.left) / self.workers


class Times:
    """How long jobs of each kind took, kept from run to run; the mean of the newest ones."""

    NEWEST = 30

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, list[float]] = defaultdict(list)
        if path.exists():
            for line in path.read_text("utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn last line
                    entry = json.loads(line)
                    self.seconds[entry["kind"]].append(float(entry["seconds"]))

    def add(self, job: Job, seconds: float) -> None:
        self.seconds[job.kind].append(seconds)
        line = json.dumps({"kind": job.kind, "label": job.label, "seconds": round(seconds, 2)})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def of(self, kind: str) -> float:
        known = self.seconds[kind][-self.NEWEST :]
        return sum(known) / len(known) if known else KINDS[kind]
