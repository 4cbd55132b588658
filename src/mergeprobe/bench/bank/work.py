"""What a worker does for the bank: one job of one cohort, its file written at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergeprobe.adapters.base import Base, load_base
from mergeprobe.artefact import atomic_folder, write_parquet
from mergeprobe.bench.bank.early import write_cut, write_early, write_length, write_pair
from mergeprobe.bench.bank.folder import CohortFolder, read_spec
from mergeprobe.bench.bank.jobs import Job, done, job_from
from mergeprobe.bench.measure import Bench
from mergeprobe.bench.training import train
from mergeprobe.bench.worker import Say
from mergeprobe.capture.probe import read_probe
from mergeprobe.predict.surrogate import adapter_table
from mergeprobe.signals import tables


class Work:
    """Does the jobs of the cohorts in one working folder.

    A message is a Job's, plus "data": the folder of real tasks or None. The base model, and the
    adapters and test items of a cohort, are kept from one job to the next.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._base: Base | None = None
        self._folder: CohortFolder | None = None
        self._bench: Bench | None = None

    def __call__(self, message: dict[str, Any], say: Say) -> None:
        job = job_from(message)
        folder = self._opened(job.cohort, message.get("data"))
        if done(job, folder):
            return
        self._do(job, folder, say)

    def _do(self, job: Job, folder: CohortFolder, say: Say) -> None:
        base = self._loaded(folder.spec.base)
        match job.kind:
            case "train" | "joint":
                _train(folder, base, job, say)
            case "single":
                for wanted in folder.singles(job.adapters[0]):
                    self._measuring(folder, base).run(wanted)
            case "merge" | "truncated":
                self._measuring(folder, base).run(job.measurement())
            case "files":
                write_file_tier(folder, _point(job))
            case "length":
                write_length(folder, base, job.adapters[0], _point(job))
            case "early":
                write_early(folder, base, job.adapters[0], _point(job))
            case "pair":
                write_pair(folder, base, job.adapters, _point(job))
            case "cut":
                write_cut(folder, base, job.adapters[0], _point(job))

    def _opened(self, cohort: str, data: str | None) -> CohortFolder:
        if self._folder is None or self._folder.spec.name != cohort:
            spec, _ = read_spec(self.path / cohort / "cohort.json")
            self._folder, self._bench = CohortFolder(self.path, spec, data), None
        return self._folder

    def _loaded(self, name: str) -> Base:
        if self._base is None or self._base.name != name:
            self._base = self._bench = None
            # one precision everywhere: retention is a ratio of small differences of losses
            self._base = load_base(name, dtype="float32")
        return self._base

    def _measuring(self, folder: CohortFolder, base: Base) -> Bench:
        if self._bench is None:
            self._bench = Bench(
                base,
                adapters=folder.adapters,
                items=folder.test_items,
                measured=folder.measured,
            )
        return self._bench


def _point(job: Job) -> float:
    assert job.point is not None
    return job.point


def _train(folder: CohortFolder, base: Base, job: Job, say: Say) -> None:
    name = job.adapters[0]
    steps = folder.spec_of(name).steps

    def on_step(step: int, loss: float) -> None:
        say("step", cohort=job.cohort, name=name, step=step, steps=steps, loss=loss)

    train(folder.run(name), base, to_probe=False, on_step=on_step)


def write_file_tier(folder: CohortFolder, point: float) -> None:
    """The tables of mergeprobe.signals and the surrogate's facts, as Parquet files."""
    probes = [read_probe(folder.probe(name, point)) for name in folder.spec.names]
    sets: Sequence[Sequence[str]] = folder.spec.larger_sets()
    found = tables(probes, sets)
    found["facts"] = adapter_table(probes, found["adapters"])
    with atomic_folder(folder.file_tier(point)) as target:
        for name in ("pairs", "adapters", "sets", "quadratic", "linear", "facts"):
            write_parquet(found[name], target / f"{name}.parquet")
