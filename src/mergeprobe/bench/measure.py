"""Measuring outcomes: per-item losses of the base, single adapters, merges and deployments.

A `Measurement` says what to run; its result is one JSON file, so a killed run goes on where it
was and nothing is measured twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from mergeprobe.adapters.base import Base
from mergeprobe.adapters.checkpoint import Adapter, read_adapter
from mergeprobe.artefact import read_json, write_json
from mergeprobe.bench.folder import Config
from mergeprobe.capture.batch import ItemScores
from mergeprobe.compose import merge, read_deployment
from mergeprobe.compose.logits import Composition
from mergeprobe.compose.router_file import make_router, route
from mergeprobe.errors import DataError
from mergeprobe.evaluate.data import Example
from mergeprobe.evaluate.score import (
    batch_of,
    score,
    score_composed,
    score_deployed,
    score_each,
)

DEPLOYED = "deployed"
BASE_MODEL = "base"
JOINT = "joint"
TRUNCATED = "truncated"
BY_PROMPT = "by_prompt"
LOGITS = "logits"


@dataclass(frozen=True)
class Measurement:
    """Run every adapter's test items under what serves it.

    method: a merge rule over `adapters` at `rank` (None: exact), `deployed` for what the plan's
    deployment serves, `base` for the base model, `joint` for one adapter of that name, trained on
    the data of all, or `truncated` for one adapter alone, cut to `rank`. A single adapter is its
    own mean. Decided at decode time: `by_prompt` for the adapter that a router picks for each
    prompt (or the base), `logits` for a uniform mixture of all adapters' predictions.
    """

    method: str
    adapters: tuple[str, ...]
    rank: int | None = None

    @property
    def key(self) -> str:
        rank = "" if self.rank is None else f"-r{self.rank}"
        return f"{self.method}{rank}-{'+'.join(self.adapters)}"


@dataclass(frozen=True)
class Measured:
    """losses, exact: task -> one value per test item. parameters: resident, for merges. chosen:
    task -> the adapter that a router picked for each item, None for the base; rivals: task -> those
    whose prompts look like its own."""

    losses: dict[str, torch.Tensor]
    exact: dict[str, torch.Tensor]
    parameters: int
    error: float
    chosen: dict[str, list[str | None]] = field(default_factory=dict)
    rivals: dict[str, list[str]] = field(default_factory=dict)

    def accuracy(self, task: str) -> float:
        return float(self.exact[task].double().mean())


def singles(config: Config) -> list[Measurement]:
    """The base and every adapter alone: retention's denominator."""
    return [Measurement(BASE_MODEL, (name,)) for name in config.tasks] + [
        Measurement("mean", (name,)) for name in config.tasks
    ]


def subsets(config: Config, methods: Sequence[str]) -> list[Measurement]:
    """Every set of two or more adapters under every method, at the adapters' own rank."""
    return [
        Measurement(method, group, config.rank)
        for method in methods
        for size in range(2, len(config.tasks) + 1)
        for group in combinations(config.tasks, size)
    ]


class Bench:
    """The base model and a run's adapters and test items, loaded once.

    adapters: a folder of PEFT folders. items: adapter name -> its test items. measured: the folder
    for results. deployment: what `deployed` means. examples: adapter name -> the items that a
    router is made from.
    """

    def __init__(
        self,
        base: Base,
        *,
        adapters: Path,
        items: Callable[[str], Sequence[Example]],
        measured: Path,
        deployment: Path | None = None,
        examples: Callable[[str], Sequence[Example]] | None = None,
    ) -> None:
        self.base, self.items, self.measured = base, items, measured
        self.examples = examples
        self.adapters, self.deployment = adapters, deployment
        self._adapters: dict[str, Adapter] = {}
        self._batches: dict[str, Any] = {}

    def adapter(self, name: str) -> Adapter:
        if name not in self._adapters:
            self._adapters[name] = read_adapter(self.adapters / name)
        return self._adapters[name]

    def batch(self, name: str) -> Any:
        if name not in self._batches:
            self._batches[name] = batch_of(self.base, self.items(name))
        return self._batches[name]

    def run(self, wanted: Measurement) -> None:
        """Measures and writes the result, unless it is there."""
        target = result_path(self.measured, wanted)
        if target.exists():
            return
        error, more = 0.0, dict[str, Any]()
        if wanted.method == DEPLOYED:
            assert self.deployment is not None
            deployment = read_deployment(self.deployment)
            found = {
                name: score_deployed(self.base, deployment, name, self.batch(name))
                for name in wanted.adapters
            }
            parameters = deployment.resident_parameters
        elif wanted.method in (BY_PROMPT, LOGITS):
            parameters = sum(self.adapter(name).parameters for name in wanted.adapters)
            found, more = self._decided(wanted)
        else:
            serving, error, parameters = self._serving(wanted)
            found = {n: score(self.base, serving[n], self.batch(n)) for n in wanted.adapters}
        losses = {name: scores.loss.tolist() for name, scores in found.items()}
        exact = {name: scores.exact.tolist() for name, scores in found.items()}
        write_json(
            target,
            {
                "measurement": asdict(wanted),
                "losses": losses,
                "exact": exact,
                "parameters": parameters,
                "error": error,
                **more,
            },
        )

    def _decided(self, wanted: Measurement) -> tuple[dict[str, ItemScores], dict[str, Any]]:
        """What is decided at decode time; with what the router chose and could not promise."""
        names, adapters = wanted.adapters, {name: self.adapter(name) for name in wanted.adapters}
        if wanted.method == LOGITS:
            updates = [adapter.modules for adapter in adapters.values()]
            how = Composition((1 / len(names),) * len(names), "mixture")
            return {n: score_composed(self.base, updates, how, self.batch(n)) for n in names}, {}
        assert self.examples is not None
        prompts = {name: [item.prompt for item in self.examples(name)] for name in names}
        router = make_router(self.base, prompts)
        found, chosen = {}, {}
        for name in names:
            texts = [item.prompt for item in self.items(name)]
            chosen[name] = [choice.name for choice in route(router, self.base, texts)]
            found[name] = score_each(self.base, adapters, chosen[name], self.batch(name))
        rivals = {name: router.rivals(name) for name in names}
        return found, {"chosen": chosen, "rivals": rivals}

    def _serving(self, wanted: Measurement) -> tuple[Mapping[str, Adapter | None], float, int]:
        if wanted.method == BASE_MODEL:
            return dict.fromkeys(wanted.adapters), 0.0, 0
        if wanted.method == JOINT:
            joint = self.adapter(JOINT)
            return dict.fromkeys(wanted.adapters, joint), 0.0, joint.parameters
        # an adapter alone is its own mean
        method = "mean" if wanted.method == TRUNCATED else wanted.method
        merged = merge([self.adapter(name) for name in wanted.adapters], method, rank=wanted.rank)
        serving = dict.fromkeys(wanted.adapters, merged.adapter)
        return serving, merged.certificate.total, merged.adapter.parameters


def result_path(measured: Path, wanted: Measurement) -> Path:
    return measured / f"{wanted.key}.json"


def read_measured(measured: Path, wanted: Measurement) -> Measured:
    """The result of a measurement; DataError if it has not been made."""
    value = read_json(result_path(measured, wanted), DataError)
    return Measured(
        losses={name: torch.tensor(v, dtype=torch.float64) for name, v in value["losses"].items()},
        exact={name: torch.tensor(v, dtype=torch.bool) for name, v in value["exact"].items()},
        parameters=value["parameters"],
        error=value["error"],
        chosen=value.get("chosen", {}),
        rivals=value.get("rivals", {}),
    )


def pending(measured: Path, wanted: Iterable[Measurement]) -> list[Measurement]:
    return [item for item in wanted if not result_path(measured, item).exists()]
