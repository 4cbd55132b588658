"""A run's folder: what it was asked for, and where everything in it is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mergeprobe.artefact import MADE_BY, check_schema, read_json, write_json
from mergeprobe.bench.tasks import DEMO_TASKS, EASY_TASKS, Task
from mergeprobe.bench.training import ProbePoint, Run
from mergeprobe.errors import DataError, OutputExists

RUN_SCHEMA = 1
BASE = "smollm2-135m-instruct-q4"


class Config(BaseModel):
    """What a demo run does. Equal configs give equal results, up to floating point.

    control: "conflict" plants one conflicting pair, "easy" has none. init: "independent" draws
    every adapter's A anew, "shared" gives all the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = RUN_SCHEMA
    made_by: str = MADE_BY
    base: str = BASE
    seed: int = 0
    control: Literal["conflict", "easy"] = "conflict"
    tasks: tuple[str, ...] = ("math", "code", "science", "instruction", "safety")
    steps: int = 100
    rank: int = 8
    learning_rate: float = 1e-3
    batch_size: int = 8
    init: Literal["independent", "shared"] = "independent"
    calibration_items: int = 32
    forecast_items: int = 16
    test_items: int = 48
    min_retention: float = 0.9
    budget: int = 400

    @classmethod
    def quick(cls, **changes: object) -> Config:
        """Three tasks, fewer steps and items: the same path in a quarter of the time."""
        small = {
            "tasks": ("math", "instruction", "safety"),
            "steps": 40,
            "forecast_items": 8,
            "test_items": 24,
            "calibration_items": 16,
        }
        return cls(**(small | changes))  # type: ignore[arg-type]


class RunFolder:
    """Paths inside one run's folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "run.json"
        self.probes = self.path / "probes"
        self.adapters = self.path / "adapters"
        self.checkpoints = self.path / "checkpoints"
        self.measured = self.path / "measured"
        self.signals = self.path / "signals.parquet"
        self.forecasts = self.path / "forecasts.parquet"
        self.layers = self.path / "layers.parquet"
        self.plan = self.path / "plan.json"
        self.deployment = self.path / "deployment"
        self.outcomes = self.path / "outcomes.parquet"
        self.report = self.path / "report.html"

    def claim(self, config: Config) -> Config:
        """Starts a run here, or goes on with the one that is here if it is the same."""
        if self.config_file.exists():
            found = self.config()
            if found.model_dump(exclude={"made_by"}) != config.model_dump(exclude={"made_by"}):
                ours, theirs = config.model_dump(), found.model_dump()
                changed = [key for key in ours if key != "made_by" and ours[key] != theirs[key]]
                what = ", ".join(f"{key} {theirs[key]} (asked: {ours[key]})" for key in changed)
                raise OutputExists(
                    f"'{self.path}' holds a run with other settings: {what}; "
                    "choose another --out, or pass --force to start over"
                )
            return found
        if self.path.exists() and any(self.path.iterdir()):
            raise OutputExists(
                f"'{self.path}' is not empty and holds no run of ours (no run.json); "
                "choose another --out"
            )
        write_json(self.config_file, config.model_dump())
        return config

    def config(self) -> Config:
        value = read_json(self.config_file, DataError)
        check_schema(
            value.get("schema_version") if isinstance(value, dict) else None,
            RUN_SCHEMA,
            f"'{self.config_file}'",
            DataError,
        )
        try:
            return Config.model_validate(value)
        except ValidationError as problem:
            first = problem.errors()[0]
            raise DataError(f"'{self.config_file}': {first['loc']}: {first['msg']}") from None

    def probe(self, name: str) -> Path:
        return self.probes / f"{name}.safetensors"

    def task(self, name: str, config: Config) -> Task:
        return (EASY_TASKS if config.control == "easy" else DEMO_TASKS)[name]

    def run(self, name: str, config: Config) -> Run:
        """The training run of one task."""
        task, order = self.task(name, config), list(DEMO_TASKS).index(name)
        shared = config.init == "shared"
        return Run(
            name=name,
            examples=tuple(task.generate("train", _enough(task, config), config.seed)),
            calibration=tuple(task.generate("calibration", config.calibration_items, config.seed)),
            checkpoints=self.checkpoints / name,
            probes=(ProbePoint(self.probe(name)),),
            adapter=self.adapters / name,
            steps=config.steps,
            learning_rate=config.learning_rate,
            rank=config.rank,
            batch_size=config.batch_size,
            seed=1000 * config.seed + order,
            init_seed=1000 * config.seed + (0 if shared else 100 + order),
        )


def _enough(task: Task, config: Config) -> int:
    """As many training items as the steps use once, or all there are (then they repeat)."""
    return min(task.size("train"), config.steps * config.batch_size)
