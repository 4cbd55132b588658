"""The verb tree."""

from __future__ import annotations

from typing import Annotated

import typer

from mergeprobe.cli.bench import RUN, run
from mergeprobe.cli.carry_out import APPLY, apply
from mergeprobe.cli.decide import FORECAST, PLAN, forecast, plan
from mergeprobe.cli.demo import DEMO, demo
from mergeprobe.cli.export import EXPORT, export
from mergeprobe.cli.judge import DOCTOR, EVALUATE, REPORT, doctor, evaluate, report
from mergeprobe.cli.learn import FIT, TABLES, bench_report, fit
from mergeprobe.cli.measure import PROBE, probe
from mergeprobe.cli.merging import MERGE, merge
from mergeprobe.cli.options import examples, flowing
from mergeprobe.cli.routing import ROUTE, route
from mergeprobe.cli.serve import SERVE, serve
from mergeprobe.cli.signals import SIGNALS, signals
from mergeprobe.version import __version__

# verb -> (what it does, its examples), in the order of a user's way
VERBS = {
    "demo": (demo, DEMO),
    "probe": (probe, PROBE),
    "signals": (signals, SIGNALS),
    "forecast": (forecast, FORECAST),
    "plan": (plan, PLAN),
    "apply": (apply, APPLY),
    "merge": (merge, MERGE),
    "route": (route, ROUTE),
    "export": (export, EXPORT),
    "serve": (serve, SERVE),
    "evaluate": (evaluate, EVALUATE),
    "report": (report, REPORT),
    "doctor": (doctor, DOCTOR),
    "fit": (fit, FIT),
}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "mergeprobe demo",
        "mergeprobe plan adapters/*",
        "mergeprobe apply plan.json --adapters adapters/ --out deployment/",
    ),
)


def _version(asked: bool) -> None:
    if asked:
        print(f"mergeprobe {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Will these LoRA adapters merge, and what should I deploy?

    Answered from the first few percent of training, carried out, and measured.
    """


for _verb, (_function, _lines) in VERBS.items():
    app.command(_verb, help=flowing(_function.__doc__ or ""), epilog=examples(*_lines))(_function)

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="MERGE-PEFT, the benchmark: its bank of cohorts, and the tables made from it.",
)
app.add_typer(bench, name="bench")
BENCH_VERBS = {"run": (run, RUN), "report": (bench_report, TABLES)}
for _verb, (_function, _lines) in BENCH_VERBS.items():
    bench.command(_verb, help=flowing(_function.__doc__ or ""), epilog=examples(*_lines))(_function)
