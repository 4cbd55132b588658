"""The scheduler: one thread that runs the model, with requests joining between two tokens."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mergeprobe.adapters.base import Base
from mergeprobe.compose.router import Router
from mergeprobe.errors import DeploymentError
from mergeprobe.serve.batch import Batch, Sequenced
from mergeprobe.serve.catalogue import Catalogue, Source, Target
from mergeprobe.serve.deciding import decide
from mergeprobe.serve.job import Asked, Failure, Job, Tell
from mergeprobe.serve.metrics import Metrics
from mergeprobe.serve.pace import Pace
from mergeprobe.serve.resident import Resident
from mergeprobe.serve.sampling import next_tokens

PREFILL = 2048  # tokens of prompts, padding included, that join in one pass; a longer one alone
PATIENCE = 64  # tokens for which a request may be overtaken while its adapters have no room
WAIT = 0.5  # of the timeout: a request that would wait longer is refused at once
FLOOD = 5.0  # seconds after a refusal in which the model leaves a core to those who ask

CLOSED = Failure(503, "the server is shutting down")

log = logging.getLogger("mergeprobe.serve")


@dataclass(frozen=True)
class Limits:
    """adapters: resident at once. rows: of the batch. queue: requests that wait. tokens: of prompt
    and answer together. timeout: seconds of a whole request. body: bytes."""

    adapters: int = 8
    rows: int = 16
    queue: int = 256
    tokens: int = 2048
    timeout: float = 300.0
    body: int = 1 << 20


LIMITS = Limits()


class Engine:
    """Decodes what is submitted until `close`. Every method but `run` may be called anywhere."""

    def __init__(
        self,
        catalogue: Catalogue,
        limits: Limits = LIMITS,
        *,
        router: Router | None = None,
        pinned: tuple[str, ...] = (),
    ) -> None:
        base = catalogue.base
        self.base: Base = base
        self.catalogue, self.limits, self.router = catalogue, limits, router
        self.metrics = Metrics()
        self.resident = Resident(base.model, limits.adapters)
        self.batch = Batch(base, self.resident, limits.rows)
        self.ends = end_tokens(base)
        self.waiting: list[Job] = []
        self.jobs: dict[Sequenced, Job] = {}
        self._inbox: queue.SimpleQueue[Job | Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = 0  # submitted, and neither running nor ended
        self._pace = Pace()
        self._refused = -FLOOD  # when a request was refused last
        self._threads = torch.get_num_threads()
        self._drain_until: float | None = None
        self._over = False
        self._pin(pinned)
        self._thread = threading.Thread(target=self._run, name="mergeprobe-engine", daemon=True)

    # ------------------------------------------------------------------ from any thread
    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._drain_until is None

    def submit(self, asked: Asked, tell: Tell) -> Job:
        """Puts a request in the queue. `tell` hears of it, also that the queue is full."""
        job = Job(asked, tell, asked.target)
        with self._lock:
            refusal = CLOSED if self._over else self._full()
            if refusal is None:
                self._open += 1
                self._inbox.put(job)
        if refusal is not None:
            if refusal is not CLOSED:
                self.metrics.ended(job, "refused")
            tell(refusal)
        return job

    def refusal(self) -> Failure | None:
        """Why no request would be taken now, whatever it says; None where one may be."""
        with self._lock:
            found = self._full()
        if found is not None:
            self.metrics.unread()
        return found

    def _full(self) -> Failure | None:
        """429 where too many wait, or for too long. A queue that nobody gets to the end of in time
        would keep all busy and answer none."""
        wait = self._pace.wait(self._open)
        if self._open >= self.limits.queue:
            text = f"{self.limits.queue} requests wait already; try again"
        elif wait > WAIT * self.limits.timeout:
            text = f"{self._open} requests wait already, for {wait:.0f} seconds; try again"
        else:
            return None
        self._refused = time.monotonic()
        return Failure(429, text, max(1, min(60, round(wait or self.metrics.mean_seconds()))))

    def drain(self, grace: float) -> None:
        """Takes no more; what waits fails now, what runs may end within `grace` seconds. Safe in
        a signal handler."""
        self._drain_until = time.monotonic() + grace
        self._inbox.put(None)

    def close(self) -> None:
        """Fails whatever is left, ends the thread and leaves the model as it was."""
        if self._drain_until is None:
            self.drain(0)
        with self._lock:
            self._over = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()
        self.resident.close()

    def check_target(self, target: Target) -> None:
        """DeploymentError for one that this server's limits could never run."""
        self.resident.check_room(target)
        if target.rows > self.limits.rows:
            raise DeploymentError(
                f"'{target.name}' takes {target.rows} rows of the batch, but there are "
                f"{self.limits.rows}; use --max-batch {target.rows}"
            )

    def load(self, name: str, folder: Path) -> None:
        """Serves one more adapter. Raises what `Catalogue.load` and `check_target` raise."""
        target = self.catalogue.load(name, folder)
        try:
            self.check_target(target)
        except DeploymentError:
            self.catalogue.unload(name)
            raise

    def unload(self, name: str) -> None:
        """Serves a name no more. DeploymentError for a pinned one or one that is not served."""
        target = self.catalogue.find(name)
        if target.sources and set(target.sources) <= self.resident.pinned:
            raise DeploymentError(f"'{name}' is pinned; it stays loaded")
        self.catalogue.unload(name)
        self._inbox.put(self._forget_unserved)

    def _pin(self, names: tuple[str, ...]) -> None:
        for name in names:
            target = self.catalogue.find(name)
            self.check_target(target)
            self.resident.pinned |= {*target.sources}
        for target in self.catalogue.targets.values():
            self.check_target(target)
        self.resident.ensure([*self.resident.pinned], ())

    # ------------------------------------------------------------------ the engine's own thread
    def _run(self) -> None:
        with torch.inference_mode():
            while not self._over:
                self._take()
                self._expire()
                try:
                    self._admit()
                    if self.batch.rows:
                        self._spread()
                        self._step()
                except Exception:  # the model failed: all that ran is lost, the server is not
                    log.exception("a forward pass failed")
                    self._fail_running(Failure(500, "the model failed on this batch"))
                self.metrics.state(self)
            self._take()
            self._expire()
        torch.set_num_threads(self._threads)

    def _spread(self) -> None:
        """As many threads as the process was given; one fewer in a flood of requests. On a core
        that is also wanted elsewhere a thread of a product keeps all the others waiting for it:
        on two cores a flood made tokens several times slower than one thread less does."""
        flood = time.monotonic() - self._refused < FLOOD
        wanted = max(1, self._threads - flood)
        if wanted != torch.get_num_threads():
            torch.set_num_threads(wanted)

    def _take(self) -> None:
        """What came in; waits for it where there is nothing else to do."""
        idle = not (self.batch.rows or self.waiting or self._over)
        while True:
            try:
                item = self._inbox.get(block=idle, timeout=1.0 if idle else None)
            except queue.Empty:
                return
            idle = False
            if isinstance(item, Job):
                self.waiting.append(item)
            elif item is not None:
                item()

    def _expire(self) -> None:
        """Lets go of requests that nobody waits for, are too late, or in a server that closes."""
        now, until = time.monotonic(), self._drain_until
        for job in [*self.waiting, *self.jobs.values()]:
            waits = job.sequence is None
            if job.cancelled:
                self._end(job, "cancelled")
            elif now > job.asked.deadline:
                where = "in the queue" if waits else f"after {job.answered} tokens"
                self._end(job, "timeout", Failure(504, f"the request ran out of time {where}"))
            elif self._over or (until is not None and (waits or now > until)):
                self._end(job, "closed", CLOSED)

    def _admit(self) -> None:
        """Lets requests join, first come first served as far as rows and adapters allow."""
        coming: list[Job] = []
        rows, longest = 0, 0
        for job in [*self.waiting]:
            if rows >= self.batch.free:
                break
            if not self._decided(job):
                continue
            assert job.target is not None
            longest, width = max(longest, len(job.asked.ids)), rows + job.target.rows
            if width > self.batch.free or (coming and longest * width > PREFILL):
                break
            in_use = self.batch.sources() | {s for c in coming for s in c.target.sources}  # type: ignore[union-attr]
            if not self._made_resident(job, in_use):
                job.overtaken += 1
                if job.overtaken > PATIENCE:
                    break
                continue
            if job in self.waiting:
                coming.append(job)
                rows = width
        if coming:
            self._join(coming)

    def _decided(self, job: Job) -> bool:
        """Whether it is clear what answers; ends it where that cannot be said."""
        try:
            decide(job, self.catalogue, self.router, self.resident)
        except DeploymentError as problem:
            self._end(job, "failed", Failure(503, f"the router cannot decide: {problem}"))
            return False
        except Exception:
            log.exception("the router failed")
            self._end(job, "failed", Failure(500, "the router failed on this prompt"))
            return False
        return True

    def _made_resident(self, job: Job, in_use: set[Source]) -> bool:
        """Whether its adapters are on the model; ends it where they cannot be read."""
        assert job.target is not None
        try:
            return self.resident.ensure(job.target.sources, in_use)
        except Exception as problem:
            log.error("'%s' cannot be loaded: %s", job.target.name, problem)
            self._end(job, "failed", Failure(500, f"'{job.target.name}' cannot be loaded any more"))
            return True

    def _join(self, coming: list[Job]) -> None:
        sequences = []
        for job in coming:
            self.waiting.remove(job)
            sequence = job.begin(self.base.tokenizer)
            self.jobs[sequence] = job
            sequences.append(sequence)
        with self._lock:
            self._open -= len(coming)
            self._pace.left(len(coming), self._open)
        logits = self.batch.join(sequences)
        self._continue(coming, logits)

    def _step(self) -> None:
        begun = time.perf_counter()
        running = [self.jobs[sequence] for sequence in self.batch.running]
        self._continue(running, self.batch.step())
        self.metrics.step.observe(time.perf_counter() - begun)

    def _continue(self, jobs: list[Job], logits: torch.Tensor) -> None:
        sound = logits.amax(-1).isfinite().tolist()
        tokens = next_tokens(logits, [j.asked.sampling for j in jobs], [j.draw for j in jobs])
        for job, token, finite in zip(jobs, tokens, sound, strict=True):
            if not finite:
                what = Failure(500, f"'{job.target.name}' gave logits that are no numbers")  # type: ignore[union-attr]
                self._end(job, "failed", what, spoiled=True)
                continue
            piece = job.take(token, self.ends)
            if piece is not None and piece.reason is not None:
                self._end(job, "done")
            if piece is not None:
                job.tell(piece)

    def _end(
        self, job: Job, how: str, failure: Failure | None = None, *, spoiled: bool = False
    ) -> None:
        if job.sequence is None:
            self.waiting.remove(job)
            with self._lock:
                self._open -= 1
                self._pace.left(0, self._open)
        else:
            del self.jobs[job.sequence]
            if job.sequence in self.batch.running:
                self.batch.leave(job.sequence, spoiled=spoiled)
        self.metrics.ended(job, how)
        if failure is not None:
            job.tell(failure)

    def _fail_running(self, failure: Failure) -> None:
        self.batch.clear()
        for job in [*self.jobs.values()]:
            self._end(job, "failed", failure)

    def _forget_unserved(self) -> None:
        served = {s for target in [*self.catalogue.targets.values()] for s in target.sources}
        for source in [*self.resident.held]:
            if source not in served and source not in self.batch.sources():
                self.resident.forget(source)


def end_tokens(base: Base) -> tuple[int, ...]:
    """Token ids that end an answer, of the model's and the tokenizer's settings."""
    config = getattr(base.model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    ends = found if isinstance(found, list) else [found]
    return tuple({int(t) for t in [*ends, base.tokenizer.eos_token_id] if t is not None})
