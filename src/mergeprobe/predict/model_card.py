"""The model card of a predictor: what it was fitted on, what it claims, what it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SCORES = {
    "Spearman": "Spearman",
    "within partners": "within an adapter's partners",
    "R2": "R²",
    "MAE": "MAE",
    "AUC": "AUC, ρ ≥ 0.8",
}


def model_card(card: Mapping[str, Any]) -> str:
    """Markdown from predictor.describe's card, with the scores that refit adds where there are."""
    cohorts, families = card["cohorts"], card["families"]
    parts = [
        "# Predictor of retention after a merge\n\n"
        "Forecasts, from the first part of training, the share of an adapter's own gain in loss "
        "that is left when it is merged with others by a given rule, with an interval. Plain "
        "numbers in JSON, no pickle: `card.json`, and a file for each tier of signals.\n\n"
        f"- **Fitted on** {card['rows']} rows of {len(cohorts)} cohorts ({', '.join(cohorts)}) and "
        f"{len(families)} families of tasks, on {', '.join(card['bases'])}; merge rules: "
        f"{', '.join(card['methods'])}; sets of {', '.join(map(str, card['sizes']))}; signals at "
        f"{', '.join(f'{point:.1%}' for point in card['points'])} of training. Left out: "
        f"{_left_out(card['dropped'])}.{_frozen(card.get('frozen', ()))}\n"
        f"- **Intervals** hold {card['interval']}: nothing is claimed for a single family, "
        "or for tasks of another kind than these.\n"
        "- **Far from its rows** (another base, learning rate, rank or kind of task that makes "
        "signals unlike any in its rows) it does not speak: a novelty score above 1 hands the "
        "forecast to the surrogate and the early merge, and the plan says so.\n"
        "- **Not for** adapters that train other modules than linear layers, merges at other "
        "than uniform weights, or a decision about safety: a forecast of loss is no promise that "
        "a refusal survives. Measure what you deploy (`mergeprobe evaluate`).\n"
        f"- **Families**: {', '.join(families)}.",
        _models(card["models"]),
    ]
    if card.get("scores"):
        parts.append(_scores(card["scores"]))
    return "\n\n".join(parts) + "\n"


def _frozen(cohorts: Sequence[str]) -> str:
    return f" Models were chosen without {', '.join(cohorts)}." if cohorts else ""


def _left_out(dropped: Mapping[str, int]) -> str:
    return "; ".join(f"{count} {why}" for why, count in dropped.items()) or "none"


def _models(models: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [tier, model["chosen"], str(len(model["columns"])), str(model["calibrated_on_families"])]
        for tier, model in models.items()
    ]
    columns = ("tier", "model chosen", "features", "intervals from families")
    return f"## Models\n\n{_table(columns, rows)}"


def _scores(scores: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            *(str(row[key]) for key in ("tier", "cohorts", "of", "method", "rows")),
            *(_number(row[key]) for key in SCORES),
        ]
        for row in scores
    ]
    columns = ("tier", "cohorts", "of", "method", "rows", *SCORES.values())
    return (
        "## Scores on families left out\n\n"
        "Folds of its own rows in which all families of a tested set are unseen, all points of "
        "training together. The models were chosen on the same folds, which flatters them a "
        f"little; no SD or SE, one run an adapter.\n\n{_table(columns, rows)}"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
