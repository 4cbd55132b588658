"""demo: the whole idea on a real model, with live progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergeprobe.cli.options import Json

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from mergeprobe.plan import Plan

DEMO = (
    "mergeprobe demo",
    "mergeprobe demo --out runs/quick --quick",
    "mergeprobe demo --out runs/easy --control easy --seed 1",
)
LINE_EVERY = 20  # steps between two lines of a log


class Control(StrEnum):
    conflict = "conflict"
    easy = "easy"


def demo(
    out: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Three tasks, fewer steps.")] = False,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="Another base model: a hub id, a folder, a .gguf file or an alias.",
            show_default="SmolLM2-135M",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of data, inits and order.")] = 0,
    control: Annotated[
        Control, typer.Option(help="easy: tasks without the planted conflict.")
    ] = Control.conflict,
    force: Annotated[bool, typer.Option("--force", help="Start over in the same folder.")] = False,
    json: Json = False,
) -> None:
    """Train five adapters, forecast early whether they merge, deploy, and measure the truth.

    About 15 minutes on two cores. Every stage leaves its files: the same command goes on where it
    was, and does nothing where all is done.
    """
    from mergeprobe.bench.demo import run_demo
    from mergeprobe.bench.folder import Config
    from mergeprobe.bench.summary import summary
    from mergeprobe.cli import show
    from mergeprobe.cli.tables import show_plan, show_results

    make: Callable[..., Config] = Config.quick if quick else Config
    asked: dict[str, Any] = {"seed": seed, "control": control.value} | (
        {"base": base} if base else {}
    )
    with Display(on_plan=None if json else show_plan) as display:
        folder = run_demo(out, make(**asked), force=force, notify=display)
    found = summary(folder)
    if json:
        show.emit(found)
        return
    show_results(found)
    show.console().print(f"The page: '{folder.report}'")


class Display:
    """Progress of a run on stderr: bars on a terminal, else a line now and then.

    Called as notify(stage, **data) with the stages of bench/demo.py. on_plan: shows the plan as
    soon as it stands, or None.
    """

    def __init__(self, on_plan: Callable[[Plan], None] | None) -> None:
        from mergeprobe.cli import show

        self.on_plan = on_plan
        self.screen = show.console(err=True)
        self.spaced = show.every_few_seconds(self.say)
        self.bars: Progress | None = None
        self.rows: dict[str, TaskID] = {}
        self.begun: set[str] = set()
        self.steps = 0
        self.started = time.monotonic()

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __call__(self, stage: str, **data: Any) -> None:
        match stage:
            case "base":
                self.say(f"base model {data['name']}")
            case "note":
                self.say(data["message"])
            case "train":
                self.train(**data)
            case "step":
                self.step(**data)
            case "forecast":
                self.forecast(data["message"])
            case "planned":
                self.close()
                if self.on_plan is not None:
                    self.on_plan(data["plan"])
            case "apply":
                self.say("carrying out the plan")
            case "measure":
                self.measure(**data)
            case "measured":
                self.say(f"measured, {(time.monotonic() - self.started) / 60:.1f} minutes in all")

    def say(self, message: str) -> None:
        self.close()
        self.screen.print(message)

    def close(self) -> None:
        """Ends the bars, if there are some; they stay on the screen as they were."""
        if self.bars is not None:
            self.bars.stop()
        self.bars, self.rows = None, {}

    def train(self, job: str, names: list[str], steps: int) -> None:
        from mergeprobe.bench.training import Run
        from mergeprobe.capture.points import probe_step

        self.steps = probe_step(steps, Run.warmup_steps) if job == "probe" else steps
        goal = "the probe point, step" if job == "probe" else "the end, step"
        self.say(f"training {', '.join(names)} up to {goal} {self.steps} of {steps}")
        self.begun = set()
        self.open()
        if self.bars is not None:
            self.rows = {
                name: self.bars.add_task(name, total=self.steps, start=False, note="waiting")
                for name in names
            }

    def step(self, name: str, step: int, loss: float) -> None:
        first = name not in self.begun
        self.begun.add(name)
        if self.bars is None:
            if first or step % LINE_EVERY == 0 or step >= self.steps:
                self.screen.print(f"{name}: step {step} of {self.steps}, loss {loss:.3f}")
            return
        if first:  # the time that is left is judged from here, not from the checkpoint's step 0
            self.bars.reset(self.rows[name], total=self.steps, completed=step, note="")
        self.bars.update(self.rows[name], completed=step, note=f"loss {loss:.3f}")

    def forecast(self, message: str) -> None:
        if not self.screen.is_terminal:
            self.spaced(f"forecasting: {message}")
            return
        if "forecast" not in self.rows:
            self.close()
            self.open()
            assert self.bars is not None
            self.rows["forecast"] = self.bars.add_task("forecasting", total=None, note="")
        assert self.bars is not None
        self.bars.update(self.rows["forecast"], note=message)

    def measure(self, total: int, left: int) -> None:
        if not self.screen.is_terminal:
            self.spaced(f"measuring: {total - left} of {total}")
            return
        if "measure" not in self.rows:
            self.close()
            self.open()
            assert self.bars is not None
            self.rows["measure"] = self.bars.add_task(
                "measuring", total=total, completed=total - left, note=""
            )
        assert self.bars is not None
        self.bars.update(self.rows["measure"], completed=total - left)

    def open(self) -> None:
        """Bars on a terminal, nothing elsewhere."""
        if not self.screen.is_terminal:
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(),
            console=self.screen,
        )
        self.bars.start()
