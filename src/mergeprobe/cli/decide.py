"""forecast and plan: from probes or adapters to what to deploy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergeprobe.cli.options import (
    Base,
    Budget,
    Force,
    Items,
    Json,
    PredictorFolder,
    Sources,
)
from mergeprobe.cli.routing import Trained

if TYPE_CHECKING:
    from mergeprobe.predict.planning import Forecasts

FORECAST = (
    "mergeprobe forecast probes/",
    "mergeprobe forecast probes/ --base smollm2-135m-instruct-q4",
    "mergeprobe forecast adapters/math adapters/code --method sum --json",
)
PLAN = (
    "mergeprobe plan adapters/*",
    "mergeprobe plan probes/ --base smollm2-135m-instruct-q4 --out plan.json",
    "mergeprobe plan probes/ --min-retention 0.95 --cost parameters",
    "mergeprobe plan probes/ --base ./base --together math,code --route-by prompt",
)


class RouteBy(StrEnum):
    by_name = "name"
    by_prompt = "prompt"


class Cost(StrEnum):
    adapters = "adapters"
    parameters = "parameters"


ROUGH = "Uncalibrated: read the intervals as rough."


def forecast(
    sources: Sources,
    base: Base = None,
    budget: Budget = None,
    items: Items = 16,
    predictor: PredictorFolder = None,
    method: Annotated[
        str,
        typer.Option(
            help="The merge rule to forecast: any that the predictor was fitted on; mean, sum or "
            "equal_norm_mean without one."
        ),
    ] = "mean",
    json: Json = False,
) -> None:
    """Forecast how much of its gain each adapter keeps when merged with each other one.

    Retention 1 means that nothing is lost, 0 that the adapter might as well not be there. The
    interval is meant to hold the measured value nine times in ten.
    """
    from mergeprobe.cli import show
    from mergeprobe.cli.tables import show_missing

    with show.working("forecasting") as progress:
        forecaster = _forecaster(sources, base, budget, items, predictor, progress)
        rows = _pairs(forecaster, method)
    if json:
        show.emit(
            {
                "tier": forecaster.tier,
                "calibrated": forecaster.calibrated,
                "method": method,
                "predictor": _described(forecaster),
                "forecasts": rows,
                "warnings": forecaster.warnings(),
                "missing": forecaster.missing,
            }
        )
        return
    title = f"Retention of each adapter when merged by {method} with one other (90 % interval)"
    table = show.table("adapter", "merged with", "retention", "low", "high", left=2)
    for row in rows:
        numbers = [show.number(row[key]) for key in ("forecast", "low", "high")]
        table.add_row(row["adapter"], row["with"], *numbers)
    show.print_table(title, table)
    said = f", {_described(forecaster)}." if forecaster.calibrated else f". {ROUGH}"
    show.console().print(f"Tier: {forecaster.tier}{said}")
    for warning in forecaster.warnings():
        show.console().print(f"Note: {warning}.")
    show_missing(forecaster.missing)


def plan(
    sources: Sources,
    base: Base = None,
    min_retention: Annotated[
        float, typer.Option(help="The floor: what every adapter has to keep of its gain, 0 to 1.")
    ] = 0.9,
    max_adapters: Annotated[
        int | None,
        typer.Option(min=1, help="The most adapters that may stay resident; before the floor."),
    ] = None,
    cost: Annotated[
        Cost,
        typer.Option(
            help="What is made small: adapters that stay resident (of equals their parameters), or "
            "parameters alone, where routing at small ranks competes with merging."
        ),
    ] = Cost.adapters,
    keep_ranks: Annotated[
        bool,
        typer.Option("--keep-ranks", help="Cut no group to a smaller rank (needs --base to try)."),
    ] = False,
    together: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A,B",
            help="Adapters that one answer needs: they share a group, merged or, where that is "
            "forecast to fail, with their logits composed (needs --base). May be given again.",
            show_default=False,
        ),
    ] = None,
    route_by: Annotated[
        RouteBy,
        typer.Option(
            help="Who picks the group: the caller by name, or a router by the prompt (needs "
            "--base, and probes with calibration items)."
        ),
    ] = RouteBy.by_name,
    trained_router: Trained = False,
    budget: Budget = None,
    items: Items = 16,
    predictor: PredictorFolder = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the plan (JSON).", show_default="-")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Decide which adapters share one, which stay apart, and why.

    The cheapest grouping wins whose worst forecast keeps the floor. Finished PEFT folders are
    enough, without data and base model; the answer then says what is missing to do better.
    """
    from mergeprobe.artefact import refuse_existing
    from mergeprobe.cli import show
    from mergeprobe.cli.tables import show_plan
    from mergeprobe.plan import plan_dict, write_plan

    if out is not None:
        refuse_existing(out, force=force)
    with show.working("planning") as progress:
        joint = [names.split(",") for names in together or ()]
        forecaster = _forecaster(
            sources, base, budget, items, predictor, progress, joint, max_adapters
        )
        made = forecaster.plan(
            min_retention=min_retention,
            max_adapters=max_adapters,
            keep_ranks=keep_ranks,
            cost=cost.value,
            together=joint,
            route_by=route_by.value,
            prompt_auc=_prompt_auc(forecaster, trained_router)
            if route_by is RouteBy.by_prompt
            else None,
        )
    if out is not None:
        write_plan(made, out, force=force)
    if json:
        show.emit(plan_dict(made))
        return
    show_plan(made)
    if out is not None:
        show.console().print(f"Written to '{out}'.")
    else:
        show.console().print("Nothing was written; --out plan.json keeps the plan for `apply`.")


def _forecaster(
    sources: Sequence[Path],
    base: str | None,
    budget: int | None,
    items: int,
    predictor: str | None,
    progress: Callable[[str], None],
    together: Sequence[Sequence[str]] = (),
    max_adapters: int | None = None,
) -> Forecasts:
    from mergeprobe.adapters.base import load_base
    from mergeprobe.cli.sources import read_sources
    from mergeprobe.predict.early import open_tier
    from mergeprobe.predict.forecast import forecast_probes
    from mergeprobe.predict.neighbourhoods import MANY
    from mergeprobe.predict.planner import check_together
    from mergeprobe.predict.predictor import opened

    learned = opened(predictor) or "none"  # before what takes minutes
    loaded = load_base(base, notify=progress) if base is not None else None
    probes = read_sources(sources, loaded, in_memory=MANY)
    check_together([probe.name for probe in probes], together)  # before what takes minutes
    tier = None
    if loaded is not None:
        tier = open_tier(loaded, probes, items=items, budget=budget, progress=progress)
    return forecast_probes(
        probes,
        model=tier,
        predictor=learned,
        together=together,
        max_adapters=max_adapters,
        progress=progress,
    )


def _prompt_auc(forecaster: Forecasts, trained: bool) -> dict[tuple[str, str], float]:
    """How well each two adapters' calibration prompts separate, as a router would see them."""
    from mergeprobe.compose.router_file import router_from_probes

    if forecaster.model is None:
        raise typer.BadParameter("prompts are read with the base model", param_hint="--base")
    router = router_from_probes(forecaster.model.base, forecaster.probes, trained=trained)
    pairs = combinations(range(len(router.names)), 2)
    return {(router.names[a], router.names[b]): float(router.separation[a, b]) for a, b in pairs}


def _described(forecaster: Forecasts) -> str:
    """Which predictor speaks, in one line; "" without one."""
    return forecaster.learned.predictor.in_words() if forecaster.learned is not None else ""


def _pairs(forecaster: Forecasts, method: str) -> list[dict[str, Any]]:
    rows = []
    forecaster.ask_pairs([method])
    for name, other in forecaster.pairs():
        found = forecaster.forecast(name, (name, other), method)
        row = {"adapter": name, "with": other, "forecast": found.retention}
        row |= {"low": found.low, "high": found.high}
        row |= {"source": forecaster.source(name, (other,), method)}
        rows.append(row | {"signals": forecaster.evidence.get((name, (other,), method), {})})
    return rows
