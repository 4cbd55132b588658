"""Retention of every merge rule on a demo run's adapters: at its defaults, and lightly tuned.

    mergeprobe demo --out runs/s0
    python benchmarks/methods_retention.py runs/s0 --out docs/results/methods.md

All adapters of the run are merged into one. Gain retention on the run's test items. Tuned: each
half of the items (even, odd) is measured under what was best on the other half (highest worst
retention, then mean), so no item is scored under a choice that it had a part in. Tried are scales
on what the rule gives, other values of its options, and twice the weight on the adapter that the
defaults keep worst; one change at a time. Standard errors are over items. Rules that need data get
the run's probes, searches their calibration items, rules that draw at random one seed.

Every merge that is measured leaves a file in --work (default: methods/ in the run's folder), so a
killed run goes on where it was. The whole table is about 250 merges of 5 × 48 items: hours on two
cores. --methods takes a part of it, and another call the rest.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mergeprobe.adapters.base import Base, load_base
from mergeprobe.adapters.checkpoint import read_adapter
from mergeprobe.artefact import atomic_file, read_json, write_json
from mergeprobe.bench.folder import Config, RunFolder
from mergeprobe.capture.batch import Batch
from mergeprobe.capture.probe import Probe, read_probe
from mergeprobe.compose import METHODS, Merged, merge
from mergeprobe.errors import DataError
from mergeprobe.evaluate.retention import Retention, SetRetention, retention, set_retention
from mergeprobe.evaluate.score import batch_of, score
from mergeprobe.evaluate.weights import search_weights
from mergeprobe.lowrank import LowRank

SCALES = (0.4, 0.7, 1.0, 1.5, 2.0)
DENSITIES = tuple({"density": density} for density in (0.1, 0.2, 0.5, 0.8))
# what tuning tries besides the scales
GRID: dict[str, tuple[dict[str, Any], ...]] = {
    "ties": DENSITIES,
    "magnitude_prune": DENSITIES,
    "breadcrumbs": DENSITIES,
    "dare_linear": DENSITIES,
    "dare_ties": DENSITIES,
    "della": ({"density": 0.3}, {"density": 0.7}),
    "della_linear": ({"density": 0.3}, {"density": 0.7}),
    "svc": ({"alpha": 0.5}, {"alpha": 0.9}),
    "iso_c": ({"scale": 3.0},),  # best at 2, the largest of SCALES: one beyond
    "iso_cts": ({"scale": 3.0},),
    "fisher": ({"normalise": 0},),
    "regmean": ({"ridge": 0.1}, {"ridge": 1.0}, {"shrink": 0.5}, {"shrink": 0.0}),
    "osrm": ({"directions": 1}, {"directions": 3}, {"directions": 16}),
    "core_isolation": ({"core": 0.05}, {"core": 0.2}),
    "core_isolation_lowrank": ({"components": 2}, {"components": 4}),
}
SEARCHED = 16  # calibration items a task that searches run on
# searches tune themselves; adamerging's 500 published steps of 1e-3 are shortened to as far a way
SEARCHES: dict[str, tuple[dict[str, Any], ...]] = {
    "lorahub": ({}, {"start": "mean"}, {"start": "mean", "objective": "worst", "penalty": 0.0}),
    "adamerging": ({"steps": 50, "rate": 1e-2}, {"steps": 50, "rate": 1e-2, "by": "third"}),
}


@dataclass(frozen=True)
class Trial:
    """One merge of all adapters. scale: on what the rule gives. lean: the adapter that weighs
    twice as much as the others (their sum stays), or ""."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    lean: str = ""

    @property
    def label(self) -> str:
        said = [f"{key} {value}" for key, value in self.options.items()]
        said += [f"scale {self.scale:g}"] if self.scale != 1.0 else []
        return ", ".join([*said, *([f"more of {self.lean}"] if self.lean else [])])

    @property
    def key(self) -> str:
        return "-".join([self.method, *(self.label.replace(", ", "-").replace(" ", "_").split())])


@dataclass(frozen=True)
class Losses:
    """losses: task -> per item. error: the certificate. note: what a search found."""

    losses: dict[str, torch.Tensor]
    error: float = 0.0
    note: str = ""


def trials(method: str) -> list[Trial]:
    """The default first."""
    row = METHODS[method]
    if row.kind == "search":
        return [Trial(method, options) for options in SEARCHES[method]]
    if method == "mean":
        return [Trial(method)]  # scaled, it is another rule: linear
    options = [o for o in GRID.get(method, ()) if any(row.defaults[k] != v for k, v in o.items())]
    scaled = [Trial(method, scale=scale) for scale in SCALES if scale != 1.0]
    return [Trial(method), *scaled, *(Trial(method, each) for each in options)]


class Run:
    """A demo run's adapters, probes and items, loaded once, and the cache of what was measured."""

    def __init__(self, folder: RunFolder, work: Path, items: int | None, rank: int | None) -> None:
        self.config: Config = folder.config()
        self.names = self.config.tasks
        self.work, self.rank = work, rank
        self._last: tuple[Trial, Merged] | None = None
        self.items = items or self.config.test_items
        self.adapters = [read_adapter(folder.adapters / name) for name in self.names]
        self.probes: list[Probe] = [read_probe(folder.probe(name)) for name in self.names]
        self.base: Base = load_base(self.config.base)
        self.batches = {
            name: batch_of(
                self.base,
                folder.task(name, self.config).generate("test", self.items, self.config.seed),
            )
            for name in self.names
        }

    def measured(self, trial: Trial) -> Losses:
        file = self._file(trial.key)
        if not file.exists():
            updates, error, note = self._merged(trial)
            self._write(file, dict.fromkeys(self.names, updates), error, note)
        return self._read(file)

    def alone(self) -> Losses:
        """Each adapter on its own task."""
        file = self._file("alone")
        if not file.exists():
            own = {a.name: a.modules for a in self.adapters}
            self._write(file, {name: own[name] for name in self.names}, 0.0, "")
        return self._read(file)

    def without(self) -> Losses:
        file = self._file("base")
        if not file.exists():
            self._write(file, dict.fromkeys(self.names), 0.0, "")
        return self._read(file)

    def _file(self, key: str) -> Path:
        rank = "exact" if self.rank is None else f"r{self.rank}"
        return self.work / f"{self.items}-items-{rank}" / f"{key}.json"

    def _merged(self, trial: Trial) -> tuple[dict[str, LowRank], float, str]:
        if METHODS[trial.method].kind == "search":
            return self._searched(trial)
        unscaled = replace(trial, scale=1.0)
        if self._last is None or self._last[0] != unscaled:  # scales of one merge come in a row
            merged = merge(
                self.adapters,
                trial.method,
                weights=self._weights(trial),
                rank=self.rank,
                probes=self.probes if METHODS[trial.method].needs else None,
                **trial.options,
            )
            self._last = unscaled, merged
        merged = self._last[1]
        scaled = {m: update * trial.scale for m, update in merged.adapter.modules.items()}
        return scaled, merged.certificate.total, ""

    def _weights(self, trial: Trial) -> list[float] | None:
        if not trial.lean:
            return None
        parts = [2.0 if name == trial.lean else 1.0 for name in self.names]
        whole = 1.0 if METHODS[trial.method].uniform == "1/T" else float(len(parts))
        return [whole * part / sum(parts) for part in parts]

    def _searched(self, trial: Trial) -> tuple[dict[str, LowRank], float, str]:
        options = dict(trial.options)
        if options.pop("start", None) == "mean":
            options["start"] = [1.0 / len(self.names)] * len(self.names)
        batches = [calibration(probe) for probe in self.probes]
        found = search_weights(self.base, self.adapters, batches, trial.method, **options)
        merged = merge(self.adapters, "linear", weights=found.weights, rank=self.rank)
        note = json.dumps({k: [round(w, 2) for w in v] for k, v in found.weights.items()})
        return merged.adapter.modules, merged.certificate.total, note

    def _write(self, file: Path, serving: Mapping[str, Any], error: float, note: str) -> None:
        losses = {
            name: score(self.base, updates, self.batches[name]).loss.tolist()
            for name, updates in serving.items()
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"losses": losses, "error": error, "note": note})

    def _read(self, file: Path) -> Losses:
        value = read_json(file, DataError)
        losses = {k: torch.tensor(v, dtype=torch.float64) for k, v in value["losses"].items()}
        return Losses(losses, value["error"], value["note"])


def calibration(probe: Probe) -> Batch:
    kept = probe.calibration
    if kept is None:
        raise DataError(f"the probe of '{probe.name}' holds no calibration items to search on")
    batch = Batch(kept.ids.long(), kept.attention_mask.long(), kept.completion_mask.long())
    return batch.rows(0, SEARCHED)


def kept(run: Run, losses: Mapping[str, torch.Tensor], half: int | None = None) -> SetRetention:
    """half: None for all items, 0 or 1 for the even or odd ones."""
    base, alone = run.without().losses, run.alone().losses
    found: dict[str, Retention] = {}
    for name in run.names:
        parts = (base[name], alone[name], losses[name])
        if half is not None:
            parts = tuple(part[half::2] for part in parts)
        found[name] = retention(*parts)
    return set_retention(found)


def tuned(run: Run, tried: Sequence[Trial]) -> tuple[SetRetention, list[Trial]]:
    """Retention over all items, each half under the trial that was best on the other; and both."""
    chosen = []
    for half in (0, 1):
        more = [*tried, *leaning(run, tried[0], half)]
        chosen.append(max(more, key=lambda t, h=half: _rank(kept(run, run.measured(t).losses, h))))
    crossed = {}
    for name in run.names:
        losses = torch.empty_like(run.without().losses[name])
        for half in (0, 1):
            losses[half::2] = run.measured(chosen[1 - half]).losses[name][half::2]
        crossed[name] = losses
    return kept(run, crossed), chosen


def leaning(run: Run, default: Trial, half: int) -> list[Trial]:
    """The default with more of the adapter that it keeps worst on this half."""
    row = METHODS[default.method]
    if row.kind == "search" or row.weights == "fixed":
        return []
    return [replace(default, lean=kept(run, run.measured(default).losses, half).worst_adapter)]


def _rank(found: SetRetention) -> tuple[float, float]:
    return found.worst, found.mean


def table(run: Run, methods: Sequence[str], say=print) -> list[str]:
    lines = [
        "| method | worst | adapter | mean | error | tuned: worst | mean | chosen |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = []
    for place, method in enumerate(methods):
        tried = trials(method)
        for number, trial in enumerate(tried):
            say(f"{place + 1}/{len(methods)} {method}, {number + 1}/{len(tried)} {trial.label}")
            run.measured(trial)
        first = run.measured(tried[0])
        plain, (best, chosen) = kept(run, first.losses), tuned(run, tried)
        names = list(dict.fromkeys(trial.label or "defaults" for trial in chosen))
        rows.append(
            (
                best.worst,
                f"| {method} | {plain.worst:.2f} ± {plain.worst_se:.2f} | {plain.worst_adapter} "
                f"| {plain.mean:.2f} ± {plain.mean_se:.2f} | {first.error:.3f} "
                f"| {best.worst:.2f} ± {best.worst_se:.2f} | {best.mean:.2f} ± {best.mean_se:.2f} "
                f"| {' or '.join(names)} |",
            )
        )
    return lines + [line for _, line in sorted(rows, key=lambda row: -row[0])]


WORDS = (
    "Gain retention, mean over the adapters and worst adapter, ± standard error over items. "
    "Left: published defaults. Right: scales {scales} on what the rule gives, other options, or "
    "twice the weight on the adapter kept worst, one change at a time, chosen on one half of the "
    "items and scored on the other, both ways; *chosen* names both choices. Error: of what was "
    "written against the rule. The probes behind {data} are those of the run, taken early in "
    "training. Searches run on 16 of their calibration items a task; adamerging takes 50 steps of "
    "0.01 for the published {steps} of {rate:g}. "
    "Rows by tuned worst retention."
)


def page(run: Run, methods: Sequence[str], command: str) -> str:
    config = run.config
    what = (
        f"Adapters {', '.join(run.names)} of a demo run (base {Path(config.base).name}, "
        f"seed {config.seed}, control {config.control}, rank {config.rank}, {config.steps} steps), "
        f"all merged into one {'of the exact rank' if run.rank is None else f'of rank {run.rank}'}"
        f"; {run.items} test items a task."
    )
    words = WORDS.format(
        scales=", ".join(f"{scale:g}" for scale in SCALES),
        data=", ".join(name for name, row in METHODS.items() if "inputs" in row.needs),
        **METHODS["adamerging"].defaults,
    )
    title = "# Retention of every merge rule"
    lines = [title, "", f"    {command}", "", what, "", words, "", *table(run, methods), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", help="a demo run's folder (mergeprobe demo --out …)")
    parser.add_argument("--out", type=Path, default=Path("docs/results/methods.md"))
    parser.add_argument("--work", type=Path, help="where measurements go (default: RUN/methods)")
    parser.add_argument("--items", type=int, help="test items a task (default: the run's)")
    parser.add_argument("--rank", type=int, help="of what is merged (default: exact)")
    parser.add_argument("--methods", help="some of the table, separated by commas")
    asked = parser.parse_args()
    methods = asked.methods.split(",") if asked.methods else list(METHODS)
    if unknown := [method for method in methods if method not in METHODS]:
        parser.error(f"unknown method '{unknown[0]}'; known are {', '.join(METHODS)}")
    folder = RunFolder(asked.run)
    run = Run(folder, asked.work or folder.path / "methods", asked.items, asked.rank)
    told = [f"{flag} {value}" for flag in ("items", "rank", "methods")
            if (value := getattr(asked, flag)) is not None]  # fmt: skip
    command = f"python benchmarks/methods_retention.py {shlex.quote(asked.run)}"
    command = " ".join([command, *(f"--{one}" for one in told)])
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    text = page(run, methods, command)
    with atomic_file(asked.out, force=True) as temporary:
        Path(temporary).write_text(text, "utf-8")
    print(f"wrote {asked.out}")


if __name__ == "__main__":
    main()
