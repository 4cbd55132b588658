"""A cohort's working folder: where every file of it is, and what its runs are."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from pydantic import ValidationError

from mergeprobe.artefact import MADE_BY, check_schema, read_json, write_json
from mergeprobe.bench.bank.spec import COHORT_SCHEMA, AdapterSpec, CohortSpec
from mergeprobe.bench.bank.tasks import task_of
from mergeprobe.bench.measure import BASE_MODEL, JOINT, TRUNCATED, Measurement
from mergeprobe.bench.training import ProbePoint, Run
from mergeprobe.errors import DataError, OutputExists
from mergeprobe.evaluate.data import Example

SHARED_INIT_SEED = 7_000_000


class CohortFolder:
    """Paths inside WORK/<cohort>/, and the cohort's spec. data: the folder of real tasks."""

    def __init__(self, work: str | Path, spec: CohortSpec, data: str | Path | None = None) -> None:
        self.path, self.spec = Path(work) / spec.name, spec
        self.data = Path(data) if data is not None else None
        self.spec_file = self.path / "cohort.json"
        self.adapters = self.path / "adapters"
        self.checkpoints = self.path / "checkpoints"
        self.probes = self.path / "probes"
        self.measured = self.path / "measured"
        self.signals = self.path / "signals"

    def claim(self) -> None:
        """Starts the cohort here, or goes on with the one that is here if it is the same.

        One that was only announced (a queue claims all its cohorts at once) may still change.
        """
        if self.spec_file.exists():
            self._sweep()
            if any(path != self.spec_file for path in self.path.iterdir()):
                refuse_other(read_spec(self.spec_file)[0], self.spec, self.path)
                return
        write_spec(self.spec_file, self.spec, MADE_BY)

    def _sweep(self) -> None:
        """Removes what a killed run was writing: temporary names, hidden beside their targets."""
        for path in [*self.path.rglob(".*.tmp"), *self.path.rglob(".*.old")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def made_by(self) -> str:
        """What made the cohort: the version that started it."""
        return read_spec(self.spec_file)[1]

    def probe(self, name: str, point: float) -> Path:
        return self.probes / str(point) / f"{name}.safetensors"

    def file_tier(self, point: float) -> Path:
        """The file tier's tables of one point: a folder of Parquet files."""
        return self.signals / str(point) / "file"

    def lengths(self, name: str, point: float) -> Path:
        """An adapter's best length at one point."""
        return self.signals / str(point) / f"length-{name}.json"

    def early(self, name: str, point: float) -> Path:
        """What the model tier says of one adapter at one point, beside and among the others."""
        return self.signals / str(point) / f"early-{name}.json"

    def early_pair(self, one: str, other: str, point: float) -> Path:
        """What the model tier says of both of a pair: the rules whose merges take long."""
        return self.signals / str(point) / f"pair-{'+'.join(sorted((one, other)))}.json"

    def cut(self, name: str, point: float) -> Path:
        """What an adapter's snapshot keeps at smaller ranks."""
        return self.signals / str(point) / f"cut-{name}.json"

    def examples(self, name: str, split: str, count: int) -> list[Example]:
        """`count` items of an adapter's task, or all there are of train items."""
        spec = self.spec.adapter(name)
        task = task_of(spec.task, self.data)
        if split == "train":
            count = min(count, task.size("train"))
        return task.generate(split, count, spec.seed)  # type: ignore[arg-type]

    def training_examples(self, name: str) -> list[Example]:
        """What one adapter is trained on, each item used once while there are enough."""
        if name == JOINT:
            joint = [item for one in self.spec.names for item in self.training_examples(one)]
            random.Random(self.spec.seed).shuffle(joint)
            return joint
        spec = self.spec.adapter(name)
        return self.examples(name, "train", spec.steps * spec.batch_size)

    def test_items(self, name: str) -> list[Example]:
        return self.examples(name, "test", self.spec.test_items)

    def spec_of(self, name: str) -> AdapterSpec:
        return self.spec.joint_spec() if name == JOINT else self.spec.adapter(name)

    def run(self, name: str) -> Run:
        """The training run of one adapter; the joint one is not probed."""
        spec = self.spec_of(name)
        points = () if name == JOINT else self.spec.points
        calibration = (
            [] if name == JOINT else self.examples(name, "calibration", self.spec.calibration_items)
        )
        shared = spec.init == "shared"
        return Run(
            name=name,
            examples=tuple(self.training_examples(name)),
            calibration=tuple(calibration),
            checkpoints=self.checkpoints / name,
            probes=tuple(
                ProbePoint(self.probe(name, point), spec.step_at(point)) for point in points
            ),
            adapter=self.adapters / name,
            steps=spec.steps,
            learning_rate=spec.learning_rate,
            rank=spec.rank,
            batch_size=spec.batch_size,
            seed=spec.seed,
            # of the adapters' seeds, so that a repeated cohort has an init of its own
            init_seed=SHARED_INIT_SEED + self.spec.adapters[0].seed if shared else spec.seed,
        )

    def trained(self, name: str) -> bool:
        points = () if name == JOINT else self.spec.points
        probes = all(self.probe(name, point).exists() for point in points)
        return probes and (self.adapters / name).exists()

    def singles(self, name: str) -> tuple[Measurement, Measurement]:
        """The base and the adapter alone, on the adapter's test items."""
        return Measurement(BASE_MODEL, (name,)), Measurement("mean", (name,))

    def merges(self) -> list[Measurement]:
        """Every merge of the cohort, and the joint adapter."""
        found = [
            Measurement(method, group, self.spec.rank_of(group))
            for group in self.spec.sets()
            for method in self.spec.methods_of(group)
        ]
        return found + ([Measurement(JOINT, self.spec.names)] if self.spec.joint else [])

    def truncations(self) -> list[Measurement]:
        """Every single adapter cut to a smaller rank: what routing costs less with."""
        return [Measurement(TRUNCATED, (name,), rank) for name, rank in self.spec.truncations()]


def write_spec(path: Path, spec: CohortSpec, made_by: str) -> None:
    write_json(path, {"made_by": made_by, **spec.model_dump(mode="json")})


def read_spec(path: Path) -> tuple[CohortSpec, str]:
    """(the spec, what made it) from a cohort.json; DataError if it is damaged or too new."""
    value = read_json(path, DataError)
    if not isinstance(value, dict):
        raise DataError(f"'{path}' is no cohort: expected a JSON object")
    check_schema(value.get("schema_version"), COHORT_SCHEMA, f"'{path}'", DataError)
    made_by = str(value.pop("made_by", ""))
    try:
        return CohortSpec.model_validate(value), made_by
    except ValidationError as problem:
        first = problem.errors()[0]
        raise DataError(f"'{path}': {first['loc']}: {first['msg']}") from None


def refuse_other(found: CohortSpec, asked: CohortSpec, where: Path) -> None:
    """OutputExists, naming what differs, unless both are the same cohort."""
    theirs, ours = found.model_dump(), asked.model_dump()
    changed = [key for key in ours if ours[key] != theirs[key]]
    if changed:
        raise OutputExists(
            f"'{where}' holds a cohort '{found.name}' with other {', '.join(changed)}; "
            "choose another folder, or remove it to start over"
        )
