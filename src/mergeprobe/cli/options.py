"""Arguments and options that several verbs share, each described once."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated

import typer

Sources = Annotated[
    list[Path],
    typer.Argument(
        metavar="PROBE_OR_ADAPTER",
        help="Probe files, PEFT adapter folders, or folders that hold several of either.",
        show_default=False,
    ),
]
Adapters = Annotated[
    list[Path],
    typer.Argument(
        metavar="ADAPTER",
        help="PEFT adapter folders, or folders that hold several.",
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="Base model: a hub id, a folder, a .gguf file or an alias. With it the model itself "
        "is run on the probes' calibration items: the best forecasts, seconds a pair.",
        show_default=False,
    ),
]
NeededBase = Annotated[
    str,
    typer.Option(
        "--base",
        help="Base model: a hub id, a folder, a .gguf file or an alias.",
        show_default=False,
    ),
]
ReadingBase = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="Base model, for adapters whose update depends on it: DoRA, IA3, OFT, VeRA, saved "
        "Linear modules, whole fine-tuned models.",
        show_default=False,
    ),
]
ReadingRank = Annotated[
    int | None,
    typer.Option(
        "--read-rank",
        min=1,
        help="Truncate each adapter to this rank as it is read; for those of full rank.",
        show_default="exact",
    ),
]
Extras = Annotated[
    bool,
    typer.Option(
        "--extras",
        help="Carry trained embeddings, norms, biases and saved modules; merges average them. "
        "Without it an adapter that has some is refused.",
    ),
]
Budget = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="With --base: the most forward passes over a calibration batch; default no limit.",
        show_default=False,
    ),
]
Items = Annotated[
    int, typer.Option(min=2, help="With --base: calibration items to run of each probe.")
]
PredictorFolder = Annotated[
    str | None,
    typer.Option(
        "--predictor",
        metavar="DIR",
        help="A folder that `mergeprobe fit` wrote, or 'none'. What lies far from its rows is "
        "forecast by the surrogate and the early merge.",
        show_default="the one that comes with mergeprobe",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it is there.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout and nothing else there.")]


def flowing(text: str) -> str:
    """A docstring with each paragraph on one line, for the help to wrap at the screen's width."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(" ".join(part.split()) for part in paragraphs)


def examples(*lines: str) -> str:
    """A help's last part; each line is shown on its own."""
    return "\n\n".join(["[bold]Examples[/bold]", *(line.replace("[", "\\[") for line in lines)])
