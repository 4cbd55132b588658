"""Worker processes and who does what: one list of jobs, each worker takes the next that can be."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Queue
from typing import Any, Literal

import torch

from mergeprobe.bench.malloc import with_malloc_settings
from mergeprobe.errors import MergeProbeError

Job = dict[str, Any]
Event = Callable[[dict[str, Any]], None]


def worker_count() -> int:
    """One worker a core up to two (each holds the base model); one a GPU where there are some."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return max(1, min(2, _cores()))


class Pool:
    """Starts workers when there are jobs; `close()` (or leaving the `with`) ends them.

    work: what the workers know to do (bench/worker.py). folder: their folder, and of their log.
    """

    def __init__(
        self, work: Literal["demo", "bank"], folder: Path, workers: int | None = None
    ) -> None:
        self.folder, self.count = folder, workers or worker_count()
        self.workers: dict[int, subprocess.Popen[str]] = {}
        self.slots: dict[int, int] = {}
        self.events: Queue[tuple[int, dict[str, Any] | None]] = Queue()
        self.logs = folder / "workers.log"
        self.command = [sys.executable, "-m", "mergeprobe.bench.worker", work, str(folder)]
        self._started = 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def close(self) -> None:
        for worker in self.workers.values():
            with contextlib.suppress(OSError):
                assert worker.stdin
                worker.stdin.close()
        for worker in self.workers.values():
            try:
                worker.wait(timeout=10)
            except subprocess.TimeoutExpired:
                worker.kill()
        self.workers = {}

    def _start(self) -> int:
        """Starts one worker and returns its number, which no later one has."""
        number, self._started = self._started, self._started + 1
        slot = min(set(range(self.count)) - set(self.slots.values()))
        threads = max(1, _cores() // self.count)
        with open(self.logs, "a", encoding="utf-8") as log:
            worker = subprocess.Popen(
                [*self.command, str(threads), str(_cores())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(threads, slot),
            )
        self.workers[number], self.slots[number] = worker, slot
        # one reader a worker for its whole life: two would steal each other's lines
        threading.Thread(target=_read, args=(number, worker, self.events), daemon=True).start()
        return number

    def run(
        self,
        jobs: Sequence[Job],
        on_event: Event,
        *,
        ready: Callable[[Job], bool] = lambda job: True,
        retries: int = 0,
    ) -> None:
        """Does all jobs, in their order as far as they are ready.

        ready: whether a job can be done now; asked anew after every finished job. retries: how
        often a job is done again whose worker died. on_event gets what the workers say, and
        {"event": "began" | "died", "job": …}.
        MergeProbeError if a job fails, or its workers keep dying, naming the job.
        """
        waiting, doing = list(jobs), {}
        deaths: Counter[str] = Counter()
        self._hand_out(waiting, doing, ready, on_event)
        while doing:
            number, event = self.events.get()
            if event is None:
                self._bury(number)
                job = doing.pop(number, None)
                if job is not None:
                    deaths[str(job)] += 1
                    if deaths[str(job)] > retries:
                        raise MergeProbeError(self._died(job))
                    on_event({"event": "died", "job": job})
                    waiting.insert(0, job)
            else:
                on_event(event)
                if event["event"] == "failed":
                    raise MergeProbeError(event["why"])
                if event["event"] == "done":
                    del doing[number]
            self._hand_out(waiting, doing, ready, on_event)
        assert not waiting, f"nothing makes these ready: {waiting[:3]}"

    def _hand_out(
        self,
        waiting: list[Job],
        doing: dict[int, Job],
        ready: Callable[[Job], bool],
        on_event: Event,
    ) -> None:
        while waiting and len(doing) < self.count:
            job = next((job for job in waiting if ready(job)), None)
            if job is None:
                return
            idle = [number for number in self.workers if number not in doing]
            number = idle[0] if idle else self._start()
            waiting.remove(job)
            doing[number] = job
            stdin = self.workers[number].stdin
            assert stdin
            # a dead worker's reader reports it, and the job with it
            with contextlib.suppress(BrokenPipeError):
                stdin.write(json.dumps(job) + "\n")
                stdin.flush()
            on_event({"event": "began", "job": job})

    def _bury(self, number: int) -> None:
        worker = self.workers.pop(number)
        self.slots.pop(number)
        with contextlib.suppress(OSError):
            assert worker.stdin
            worker.stdin.close()
        worker.wait()

    def _died(self, job: Job) -> str:
        return (
            f"a worker died while doing {job}; see '{self.logs}', then run the same command "
            "again: it goes on where it was"
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _environment(threads: int, slot: int) -> dict[str, str]:
    found = with_malloc_settings() | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if torch.cuda.is_available() and torch.cuda.device_count() > 1:
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = given.split(",") if given else [str(k) for k in range(torch.cuda.device_count())]
        found["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return found


def _read(
    number: int, worker: subprocess.Popen[str], events: Queue[tuple[int, dict[str, Any] | None]]
) -> None:
    assert worker.stdout
    for line in worker.stdout:
        # a worker killed in the middle of a line ends with a part of one
        with contextlib.suppress(ValueError):
            events.put((number, json.loads(line)))
    events.put((number, None))
