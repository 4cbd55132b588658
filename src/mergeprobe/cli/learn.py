"""fit and bench report: a predictor from rows, and the tables that judge it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergeprobe.cli.options import Force, Json

if TYPE_CHECKING:
    from mergeprobe.predict.predictor import Predictor

FIT = (
    "mergeprobe fit --rows runs/bank/rows --out predictor",
    "mergeprobe fit --rows rows/ --only-mine --out predictor",
)
TABLES = (
    "mergeprobe bench report --rows runs/bank/rows --out results",
    "mergeprobe bench report --held-out h1 --held-out h2",
)

Seed = Annotated[int, typer.Option(help="Of folds, trees and bootstrap.")]


def fit(
    rows: Annotated[
        list[Path],
        typer.Option(
            help="A folder of cohorts, each with adapters, pairs, outcomes and sets as Parquet; "
            "may be given several times.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where the predictor's folder goes.")] = Path(
        "predictor"
    ),
    only_mine: Annotated[
        bool, typer.Option("--only-mine", help="Without the rows that come with mergeprobe.")
    ] = False,
    frozen: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COHORT",
            help="A cohort that is fitted on but chooses no model, so that tables of what was "
            "chosen without it hold for the predictor. May be given several times.",
            show_default="h1, h2 and h3 of ours",
        ),
    ] = None,
    seed: Seed = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Fit the predictor on your own measured merges, together with ours.

    Which model serves each tier is chosen on families of tasks that it has not seen, and so are
    the scores that are printed. A minute for a dozen cohorts.
    """
    from mergeprobe.artefact import refuse_existing
    from mergeprobe.cli import show
    from mergeprobe.predict.refit import OURS, refit

    refuse_existing(out, force=force)
    with show.working("fitting") as say:
        ours = None if only_mine else OURS
        predictor = refit(rows, ours=ours, frozen=frozen or (), seed=seed, say=say)
    predictor.save(out, force=force)
    if json:
        show.emit({"predictor": str(out), **predictor.card})
        return
    show_card(predictor)
    show.console().print(f"predictor: '{out}'")


def show_card(predictor: Predictor) -> None:
    """What it was fitted on, and its scores on families left out."""
    from mergeprobe.cli import show

    card: dict[str, Any] = dict(predictor.card)
    families, cohorts = len(card["families"]), len(card["cohorts"])
    show.console().print(
        f"{card['rows']} rows of {cohorts} cohorts and {families} families; left out: "
        + ("; ".join(f"{n} {why}" for why, n in card["dropped"].items()) or "none")
    )
    for tier, model in card["models"].items():
        show.console().print(f"{tier} tier: {model['chosen']}")
    names = ("Spearman", "within partners", "R2", "MAE", "AUC")
    made = show.table("tier", "cohorts", "of", "method", "rows", *names, left=4)
    for row in card["scores"]:
        words = (row["tier"], row["cohorts"], row["of"], row["method"])
        made.add_row(*words, str(row["rows"]), *(show.number(row[name]) for name in names))
    show.print_table("Scores, all tasks unseen", made)


def bench_report(
    rows: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder of cohorts' rows; may be given several times.",
            show_default="the bank that comes with mergeprobe",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="A folder for the pages and figures.")] = Path(
        "docs/results"
    ),
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COHORT",
            help="A cohort to keep frozen: nothing is fitted on it. May be given several times.",
            show_default="those whose name begins with h",
        ),
    ] = None,
    runs: Annotated[int, typer.Option(min=20, help="Bootstrap samples.")] = 500,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Write the tables: skill, transfer, ablations and decisions on held-out cohorts.

    Markdown and figures, each with the command, seeds, and what its errors are over. Minutes on
    one core, no model needed. What the rows do not allow is said, not left out.
    """
    from mergeprobe.bench.tables.report import write_report
    from mergeprobe.cli import show
    from mergeprobe.predict.refit import OURS

    folders = rows or [OURS]
    with show.working("report") as say:
        written = write_report(
            folders,
            out,
            held_out=held_out or (),
            runs=runs,
            seed=seed,
            shown=" --rows ".join(_shown(folder) for folder in folders),
            say=say,
        )
    if json:
        show.emit([str(path) for path in written])
        return
    for path in written:
        show.console().print(f"'{path}'")


def _shown(folder: Path) -> str:
    """A path as captions may show it: nothing of this machine."""
    from mergeprobe.predict.refit import OURS

    if folder == OURS:
        return "src/mergeprobe/bank"
    return folder.name if folder.is_absolute() else folder.as_posix()
