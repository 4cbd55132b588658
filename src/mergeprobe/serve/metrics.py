"""Counts and durations for Prometheus, in a registry of their own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from mergeprobe.serve.engine import Engine
    from mergeprobe.serve.job import Job

STEPS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def named(kind, name: str, text: str, *labels: str, **others):
            return kind(f"mergeprobe_{name}", text, labels, registry=registry, **others)

        self.requests = named(
            Counter, "requests", "Requests by model and how they ended", "model", "how"
        )
        self.prompt_tokens = named(Counter, "prompt_tokens", "Tokens of prompts run", "model")
        self.tokens = named(Counter, "completion_tokens", "Tokens of answers", "model")
        self.rows = named(Gauge, "batch_rows", "Rows of the batch that run")
        self.waiting = named(Gauge, "waiting_requests", "Requests in the queue")
        self.resident = named(Gauge, "resident_adapters", "Adapters attached to the model")
        self.loads = named(Gauge, "adapter_loads", "Adapters attached so far")
        self.evictions = named(Gauge, "adapter_evictions", "Adapters that made room so far")
        self.step = named(Histogram, "step_seconds", "One token for the batch", buckets=STEPS)
        self.seconds = named(
            Histogram, "request_seconds", "From arrival to the last token", buckets=SECONDS
        )
        self._mean = 1.0

    def ended(self, job: Job, how: str) -> None:
        model = job.target.name if job.target else "auto"
        self.requests.labels(model, how).inc()
        if job.sequence is not None:
            self.prompt_tokens.labels(model).inc(len(job.asked.ids))
            self.tokens.labels(model).inc(job.answered)
        if how == "done":
            taken = time.monotonic() - job.started
            self.seconds.observe(taken)
            self._mean += 0.1 * (taken - self._mean)

    def unread(self) -> None:
        """A request that was refused before anyone looked at which model it wants."""
        self.requests.labels("", "refused").inc()

    def mean_seconds(self) -> float:
        """Of a request, the last ones counting most."""
        return self._mean

    def state(self, engine: Engine) -> None:
        self.rows.set(len(engine.batch.rows))
        self.waiting.set(len(engine.waiting))
        self.resident.set(len(engine.resident.held))
        self.loads.set(engine.resident.loads)
        self.evictions.set(engine.resident.evictions)

    def text(self) -> bytes:
        return generate_latest(self.registry)
