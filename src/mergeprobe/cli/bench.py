"""bench: MERGE-PEFT's bank of cohorts; many hours, in as many sittings as you like."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergeprobe.cli.options import Json

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from mergeprobe.bench.bank.jobs import Job

RUN = (
    "mergeprobe bench run t1",
    "mergeprobe bench run --work runs/bank --out rows --data data/",
    "mergeprobe bench run --work /shared/bank --ray auto",
)


def run(
    cohorts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="COHORT",
            help="Names of cohorts; all of them (those of real data only with --data) by default.",
            show_default=False,
        ),
    ] = None,
    work: Annotated[Path, typer.Option(help="Where unfinished work is kept.")] = Path("runs/bank"),
    out: Annotated[
        Path | None,
        typer.Option(help="Where a folder of rows for each cohort goes.", show_default="WORK/rows"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="A folder of real tasks.", show_default=False),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Worker processes.",
            show_default="one a core up to two; one a GPU",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Work on a Ray cluster that shares WORK: auto for the one of this machine, local "
            "to start one, or host:port.",
            show_default=False,
        ),
    ] = None,
    keep_snapshots: Annotated[
        bool,
        typer.Option(
            help="Keep probes and adapters of a cohort whose rows are written; a new signal needs "
            "them."
        ),
    ] = True,
    json: Json = False,
) -> None:
    """Train, probe, merge and measure cohorts of six adapters, and write their rows.

    About an hour a cohort on two cores. Killed at any moment, the same command goes on where
    it was; with all rows there it does nothing.
    """
    from mergeprobe.bench.bank.cohorts import chosen
    from mergeprobe.bench.bank.queue import run_cohorts
    from mergeprobe.cli import show

    specs = chosen(cohorts or [], with_data=data is not None)
    with Progressing() as notify:
        rows = run_cohorts(
            specs,
            work,
            out or work / "rows",
            data=data,
            workers=workers,
            ray=ray,
            keep_snapshots=keep_snapshots,
            notify=notify,
        )
    if json:
        show.emit({spec.name: str(path) for spec, path in zip(specs, rows, strict=True)})
        return
    for path in rows:
        show.console().print(f"rows: '{path}'")


class Progressing:
    """Progress on stderr: one bar with the time left on a terminal, else a line now and then.

    Called as notify(stage, **data) with the stages of bench/bank/queue.py.
    """

    def __init__(self) -> None:
        from mergeprobe.cli import show

        self.screen = show.console(err=True)
        self.spaced = show.every_few_seconds(self.screen.print)
        self.bar: Progress | None = None
        self.row: TaskID | None = None
        self.total = 0
        self.training: dict[str, str] = {}

    def __enter__(self) -> Progressing:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, stage: str, **data: Any) -> None:
        match stage:
            case "note":
                self.screen.print(data["message"])
            case "begin":
                self.begin(**data)
            case "step":
                self.step(**data)
            case "job":
                self.job(**data)
            case "died":
                self.screen.print(f"a worker died; once more: {data['job'].label}")
            case "cohort":
                self.screen.print(f"{data['name']}: rows are in '{data['rows']}'")

    def begin(self, left: int, seconds: float) -> None:
        self.screen.print(f"{left} jobs to do, about {duration(seconds)}")
        self.total = left
        if not self.screen.is_terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.screen,
        )
        self.bar.start()
        self.row = self.bar.add_task("jobs", total=left, note=f"{duration(seconds)} left")

    def step(self, cohort: str, name: str, step: int, steps: int, loss: float) -> None:
        line = f"{cohort}: {name}, step {step} of {steps}, loss {loss:.3f}"
        if self.bar is None or self.row is None:
            self.spaced(line)
        else:
            self.bar.update(self.row, description=line)

    def job(self, job: Job, seconds: float, left: int, remaining: float) -> None:
        done = f"{self.total - left} of {self.total}"
        if self.bar is None or self.row is None:
            say = self.screen.print if job.kind in ("train", "joint") else self.spaced
            say(f"{job.label}: {seconds:.0f} s; {done} jobs, {duration(remaining)} left")
            return
        note = f"{duration(remaining)} left"
        self.bar.update(self.row, completed=self.total - left, description=job.label, note=note)


def duration(seconds: float) -> str:
    """Such as "3 h 20 min" or "4 min"."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
