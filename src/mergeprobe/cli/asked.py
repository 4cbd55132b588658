"""What a merge on the command line asks for: adapters, rule, weights, options, or a config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from mergeprobe.capture.probe import Probe


@dataclass
class Asked:
    """A merge as the command line or a config asks for it."""

    folders: list[Path]
    method: str = "mean"
    options: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, list[float]] | None = None
    scaling: float = 1.0
    dtype: str = "float32"
    notes: tuple[str, ...] = ()


def folders_of(adapters: list[Path] | None) -> list[Path]:
    from mergeprobe.cli.sources import expand

    if not adapters:
        raise typer.BadParameter("nothing to merge; give adapter folders, or --config")
    return expand(adapters, probes=False)


def probes_of(paths: Sequence[Path]) -> dict[str, Probe]:
    from mergeprobe.capture.probe import read_probe
    from mergeprobe.cli.sources import expand

    found = [read_probe(path) for path in expand(paths) if not path.is_dir()]
    return {probe.name: probe for probe in found}


def from_config(path: Path) -> Asked:
    from mergeprobe.compose.mergekit import read_mergekit

    found = read_mergekit(path)
    weights = None if found.weights is None else {"all": list(found.weights)}
    return Asked(
        [Path(folder) for folder in found.folders],
        found.method,
        dict(found.options),
        weights,
        found.scaling,
        found.dtype,
        found.notes,
    )


def only_config(*others: object) -> None:
    if any(other not in (None, [], {}) for other in others):
        raise typer.BadParameter(
            "a config states adapters, rule, weights and options itself; give the one or the other",
            param_hint="--config",
        )


def options_of(given: list[str] | None) -> dict[str, float]:
    found = {}
    for text in given or []:
        key, _, value = text.partition("=")
        try:
            found[key.strip()] = int(value) if value.strip().isdigit() else float(value)
        except ValueError:
            raise typer.BadParameter(
                f"'{text}' is no option; expected name=number, such as density=0.3",
                param_hint="--option",
            ) from None
    return found


def weights_of(given: list[str] | None) -> dict[str, list[float]] | None:
    """Lists by part of the model, from "1,0.5" and "late=1,0"."""
    found = {}
    for text in given or []:
        part, _, numbers = text.rpartition("=")
        part = part.strip() or "all"
        if part in found:
            raise typer.BadParameter(f"weights for {part} twice", param_hint="--weights")
        try:
            found[part] = [float(number) for number in numbers.split(",")]
        except ValueError:
            raise typer.BadParameter(
                f"'{text}' is no list of numbers; expected one for each adapter, such as 1,0.5",
                param_hint="--weights",
            ) from None
    return found or None
