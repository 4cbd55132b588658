"""Forecast and plan at the file tier: seconds and memory for a few adapters and for hundreds.

    mergeprobe demo --out runs/demo
    python benchmarks/file_tier.py runs/demo/probes

The probes of a run are read once; more adapters are made of them by turning a random tenth of each
update, and halving to doubling it; as in `mergeprobe plan`, more than 32 stay on disk. Every count
runs in a process of its own, so that its peak memory is its own: that of the process, and what
forecasting added to it. Timed once the probes are read and the libraries imported; the parts are
signals of all pairs (beyond 32 adapters those within neighbourhoods) with the surrogate, the
predictor's forecasts of these pairs under every rule worth asking, and the search for a plan.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from mergeprobe.bench.malloc import with_malloc_settings
from mergeprobe.capture.probe import Probe, read_probe, write_probe
from mergeprobe.predict.forecast import forecast_probes
from mergeprobe.predict.neighbourhoods import MANY
from mergeprobe.signals import on_disk


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("probes", type=Path, help="a folder of probes of one base")
    parser.add_argument("--counts", type=int, nargs="+", default=[5, 50, 200])
    parser.add_argument("--predictor", help="as of `mergeprobe plan`")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(timed(asked.probes, asked.one, asked.predictor)))
        return
    rows = []
    for count in asked.counts:
        again = [sys.executable, __file__, str(asked.probes), "--one", str(count)]
        again += ["--predictor", asked.predictor] if asked.predictor else []
        done = subprocess.run(again, check=True, stdout=subprocess.PIPE, env=with_malloc_settings())
        rows.append(json.loads(done.stdout))
    names = list(rows[0])
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(str(row[name]) for name in names)} |")


def timed(folder: Path, count: int, predictor: str | None) -> dict[str, float]:
    probes = varied([read_probe(path) for path in sorted(folder.glob("*.safetensors"))], count)
    if count <= MANY:
        return _timed(list(probes), predictor)
    with tempfile.TemporaryDirectory() as into:
        stored = [
            on_disk(read_probe(write_probe(probe, Path(into) / f"{row}.safetensors")))
            for row, probe in enumerate(probes)
        ]
        return _timed(stored, predictor)


def _timed(probes: list[Probe], predictor: str | None) -> dict[str, float]:
    importlib.import_module("xgboost")
    before, start = peak(), time.perf_counter()
    forecaster = forecast_probes(probes, predictor=predictor)
    signals = time.perf_counter()
    forecaster.ask_pairs()
    pairs = time.perf_counter()
    plan = forecaster.plan()
    end = time.perf_counter()
    return {
        "adapters": len(probes),
        "signals, s": round(signals - start, 2),
        "pairs, s": round(pairs - signals, 2),
        "plan, s": round(end - pairs, 2),
        "all, s": round(end - start, 2),
        "peak, MiB": round(peak()),
        "of it added, MiB": round(peak() - before),
        "groups": len(plan.groups),
        "by the predictor": f"{share(forecaster):.0%}",
    }


def share(forecaster) -> float:
    """Of the forecasts of pairs, those that the learned predictor made."""
    rows = forecaster.forecast_rows()
    made = [
        r["source"] == "the learned predictor" for r in rows.to_dicts() if "+" not in r["others"]
    ]
    return sum(made) / len(made)


def varied(probes: list[Probe], count: int) -> Iterator[Probe]:
    for k in range(count):
        probe = probes[k % len(probes)]
        generator = torch.Generator().manual_seed(k)
        size = 4.0 ** (float(torch.rand((), generator=generator)) - 0.5)
        updates = {m: turned(update, generator, size) for m, update in probe.updates.items()}
        yield replace(probe, name=f"{probe.name}-{k:03}", updates=updates)


def turned(update, generator, size: float):
    noise = torch.randn(update.B.shape, generator=generator) * update.B.std()
    return replace(update, B=size * ((0.9**0.5) * update.B + (0.1**0.5) * noise))


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
