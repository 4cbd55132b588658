"""The jobs of a cohort: what each makes, what it needs first. A job is done iff its file is there.

So nothing else keeps the score: a run that was killed looks at the files and goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from mergeprobe.bench.bank.folder import CohortFolder
from mergeprobe.bench.measure import JOINT, Measurement, result_path

# kind -> seconds of one job on one core with a base of 135 M weights and short items: what the
# time left is judged by until jobs of that kind have been timed
KINDS = {
    "train": 240.0,
    "joint": 1100.0,
    "single": 8.0,
    "length": 5.0,
    "files": 10.0,
    "early": 60.0,
    "pair": 18.0,
    "cut": 6.0,
    "merge": 10.0,
    "truncated": 4.0,
}


@dataclass(frozen=True)
class Job:
    """kind: one of KINDS. adapters: whose. point: the probe point, for signals. method, rank: the
    merge, for measurements."""

    cohort: str
    kind: str
    adapters: tuple[str, ...] = ()
    point: float | None = None
    method: str | None = None
    rank: int | None = None

    @property
    def label(self) -> str:
        what = [self.kind, "+".join(self.adapters)]
        what += [self.method] if self.method and self.kind == "merge" else []
        what += [f"to rank {self.rank}"] if self.kind == "truncated" else []
        what += [f"at {self.point:.1%}"] if self.point is not None else []
        return f"{self.cohort}: {' '.join(part for part in what if part)}"

    def measurement(self) -> Measurement:
        assert self.method is not None
        return Measurement(self.method, self.adapters, self.rank)

    def message(self) -> dict[str, Any]:
        """As JSON for a worker."""
        return asdict(self)


def job_from(message: dict[str, Any]) -> Job:
    known = {key: message[key] for key in Job.__dataclass_fields__}
    known["adapters"] = tuple(known["adapters"])
    return Job(**known)


def jobs_of(folder: CohortFolder) -> list[Job]:
    """Every job of a cohort, in an order in which each comes after what it needs."""
    spec, name = folder.spec, folder.spec.name
    jobs = [Job(name, "train", (one,)) for one in spec.names]
    jobs += [Job(name, "joint", (JOINT,))] if spec.joint else []
    jobs += [Job(name, "single", (one,)) for one in spec.names]
    # slow ones first: two workers end at about the same time
    jobs += [Job(name, "files", spec.names, point) for point in spec.points]
    for point in spec.measured_points:
        jobs += [Job(name, "length", (one,), point) for one in spec.names]
    for point in spec.measured_points:
        jobs += [Job(name, "early", (one,), point) for one in spec.names]
        jobs += [Job(name, "pair", pair, point) for pair in combinations(spec.names, 2)]
        jobs += [Job(name, "cut", (one,), point) for one in dict(spec.truncations())]
    merges = sorted(folder.merges(), key=lambda wanted: -len(wanted.adapters))
    jobs += [Job(name, "merge", m.adapters, None, m.method, m.rank) for m in merges]
    cut = folder.truncations()
    jobs += [Job(name, "truncated", m.adapters, None, m.method, m.rank) for m in cut]
    return jobs


def needs(job: Job, folder: CohortFolder) -> Iterator[Job]:
    """The jobs that have to be done before."""
    name = job.cohort
    trained = [Job(name, "train", (one,)) for one in job.adapters]
    if job.kind in ("single", "length", "files", "merge", "truncated"):
        yield from trained
    if job.kind == "merge" and job.method == JOINT:
        yield Job(name, "joint", (JOINT,))
    if job.kind in ("pair", "cut"):
        yield from (Job(name, "length", (one,), job.point) for one in job.adapters)
    if job.kind == "early":
        yield from (Job(name, "length", (one,), job.point) for one in folder.spec.names)


def done(job: Job, folder: CohortFolder) -> bool:
    """Whether the job's file is there."""
    adapters, point = job.adapters, job.point
    match job.kind:
        case "train" | "joint":
            return folder.trained(adapters[0])
        case "single":
            found = [result_path(folder.measured, m) for m in folder.singles(adapters[0])]
            return all(path.exists() for path in found)
        case "merge" | "truncated":
            return result_path(folder.measured, job.measurement()).exists()
    assert point is not None
    match job.kind:
        case "length":
            return folder.lengths(adapters[0], point).exists()
        case "files":
            return folder.file_tier(point).exists()
        case "early":
            return folder.early(adapters[0], point).exists()
        case "pair":
            return folder.early_pair(adapters[0], adapters[1], point).exists()
        case "cut":
            return folder.cut(adapters[0], point).exists()
    raise AssertionError(f"no job of kind {job.kind}")
