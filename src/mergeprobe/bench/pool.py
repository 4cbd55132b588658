"""Worker processes and who does what: one queue, each worker takes the next job."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Queue
from typing import Any

import torch

from mergeprobe.bench.training import with_malloc_settings
from mergeprobe.errors import MergeProbeError

Event = Callable[[dict[str, Any]], None]


def worker_count() -> int:
    """One worker a core up to two (each holds the base model); one where there is a GPU."""
    if torch.cuda.is_available():
        return 1
    return max(1, min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))


class Pool:
    """Starts workers on first use; `close()` (or leaving the `with`) ends them."""

    def __init__(self, folder: Path, workers: int | None = None) -> None:
        self.folder, self.count = folder, workers or worker_count()
        self.workers: list[subprocess.Popen[str]] = []
        self.events: Queue[tuple[int, dict[str, Any] | None]] = Queue()
        self.logs = folder / "workers.log"

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def close(self) -> None:
        for worker in self.workers:
            with contextlib.suppress(OSError):
                assert worker.stdin
                worker.stdin.close()
        for worker in self.workers:
            try:
                worker.wait(timeout=10)
            except subprocess.TimeoutExpired:
                worker.kill()
        self.workers = []

    def _start(self) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        threads = max(1, cores // self.count)
        environment = with_malloc_settings() | {
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        with open(self.logs, "a", encoding="utf-8") as log:
            for index in range(self.count):
                command = [sys.executable, "-m", "mergeprobe.bench.worker", str(self.folder)]
                worker = subprocess.Popen(
                    [*command, str(threads), str(cores)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                )
                self.workers.append(worker)
                # one reader a worker for its whole life: two would steal each other's lines
                reader = threading.Thread(
                    target=_read, args=(index, worker, self.events), daemon=True
                )
                reader.start()

    def run(self, jobs: Sequence[dict[str, Any]], on_event: Event) -> None:
        """Does all jobs; MergeProbeError if one fails or a worker dies, naming the job."""
        if not jobs:
            return
        if not self.workers:
            self._start()
        waiting = list(jobs)
        doing: dict[int, dict[str, Any]] = {}
        for index in range(len(self.workers)):
            if waiting:
                doing[index] = waiting.pop(0)
                self._send(index, doing[index])
        while doing:
            index, event = self.events.get()
            if event is None:
                what = doing.get(index, "nothing")
                raise MergeProbeError(
                    f"a worker died while doing {what}; see '{self.logs}', then run the same "
                    "command again: it goes on where it was"
                )
            on_event(event)
            if event["event"] == "failed":
                raise MergeProbeError(event["why"])
            if event["event"] == "done":
                del doing[index]
                if waiting:
                    doing[index] = waiting.pop(0)
                    self._send(index, doing[index])

    def _send(self, index: int, job: dict[str, Any]) -> None:
        stdin = self.workers[index].stdin
        assert stdin
        try:
            stdin.write(json.dumps(job) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise MergeProbeError(
                f"a worker died before it began {job}; see '{self.logs}'"
            ) from None


def _read(
    index: int, worker: subprocess.Popen[str], events: Queue[tuple[int, dict[str, Any] | None]]
) -> None:
    assert worker.stdout
    for line in worker.stdout:
        events.put((index, json.loads(line)))
    events.put((index, None))
