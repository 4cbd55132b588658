"""What a worker does for a demo run: probe, finish, forecast, measure."""

from __future__ import annotations

from typing import Any

import torch

from mergeprobe.adapters.base import load_base
from mergeprobe.bench.folder import RunFolder
from mergeprobe.bench.forecasting import forecast_and_plan
from mergeprobe.bench.measure import Bench, Measurement
from mergeprobe.bench.training import train
from mergeprobe.bench.worker import Say


class Stages:
    """Does the jobs of one run's folder: {"job": "probe" | "finish", "name": …},
    {"job": "forecast"} and {"job": "measure", "measurement": …}."""

    def __init__(self, path: str, threads: int, cores: int) -> None:
        self.folder, self.threads, self.cores = RunFolder(path), threads, cores
        self.config = config = self.folder.config()
        self.base = load_base(config.base)
        self.bench = Bench(
            self.base,
            adapters=self.folder.adapters,
            items=lambda name: self.folder.task(name, config).generate(
                "test", config.test_items, config.seed
            ),
            examples=lambda name: self.folder.task(name, config).generate(
                "calibration", config.calibration_items, config.seed
            ),
            measured=self.folder.measured,
            deployment=self.folder.deployment,
        )

    def __call__(self, job: dict[str, Any], say: Say) -> None:
        if job["job"] == "measure":
            spec = job["measurement"]
            self.bench.run(Measurement(spec["method"], tuple(spec["adapters"]), spec["rank"]))
        elif job["job"] == "forecast":
            torch.set_num_threads(self.cores)  # the other workers wait for the plan
            forecast_and_plan(
                self.folder, self.base, lambda message: say("forecast", message=message)
            )
            torch.set_num_threads(self.threads)
        else:
            name = job["name"]
            train(
                self.folder.run(name, self.config),
                self.base,
                to_probe=job["job"] == "probe",
                on_step=lambda step, loss: say("step", name=name, step=step, loss=loss),
            )
