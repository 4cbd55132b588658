"""Predictor: retention of adapter i in set S under method m, with an interval, learned from rows.

One model for each tier (finished adapters, probes, probes and the base model); the method and the
size are inputs. Which candidate of models.CANDIDATES serves is chosen by folds in which all of a
tested set's families are unseen, and the same folds' residuals make the intervals. Saved as a
folder of JSON. Needs no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float

from mergeprobe.artefact import MADE_BY, atomic_folder, check_schema, read_json
from mergeprobe.errors import NotForecastable
from mergeprobe.predict.conformal import LEVEL, family_weights
from mergeprobe.predict.features import COLUMNS, FEATURES, TIERS, Tier
from mergeprobe.predict.learning import Rows
from mergeprobe.predict.menus import CANDIDATES, Candidate
from mergeprobe.predict.model_card import model_card
from mergeprobe.predict.tier import Aim, Centre, Guess, TierModel, fit_tier, tier_from_json

SCHEMA = 2
SHIPPED = Path(__file__).parents[1] / "predictor"
"""The predictor that travels with the package: `mergeprobe fit` on the bank's rows."""
WITHOUT = "none"
QUANTISED = r"([-_.](gguf|q\d\w*|[48]bit|int[48]|fp?\d+|bf16|awq|gptq|bnb))+$"

NEEDED: dict[Tier, tuple[str, ...]] = {
    "weights": ("frobenius_cosine", "norm_ratio"),
    "file": ("gradient_cosine_base", "own_gain_early"),
    "model": ("own_gain", "disturbance_late"),
}
"""What a row must hold (with what the tiers below need) for a tier to speak of it."""


@dataclass(frozen=True, eq=False)
class Predictor:
    """tiers: a model for each tier it was fitted for. card: on what, and how well it does.
    centre: whether a forecast is the median or the mean of its predictive distribution.
    guaranteed: whether intervals are the conformal ones, which are wider (see conformal.py)."""

    tiers: Mapping[Tier, TierModel]
    card: Mapping[str, Any]
    centre: Centre = "median"
    guaranteed: bool = False

    def in_words(self) -> str:
        """What it was fitted on, and what its intervals claim."""
        card = self.card
        bases = ", ".join(card.get("bases", ()))
        return (
            f"forecast by a predictor fitted on {card.get('rows', 0)} rows of "
            f"{len(card.get('families', ()))} task families ({bases}); its 90 % intervals are "
            "calibrated on families left out"
        )

    def base_like(self, name: str | None, fingerprint: str | None) -> str | None:
        """What the rows that it was fitted on call this base, None if none of them is of it: by
        fingerprint, or by the last part of its name but for how it was quantised."""
        for base, known in self.card.get("base_fingerprints", {}).items():
            if fingerprint in known:
                return base
        named = {_plain(base): base for base in self.card.get("bases", ())}
        return named.get(_plain(name)) if name else None

    def knows_method(self, method: str) -> bool:
        """Whether rows of this merge rule are among those that it was fitted on."""
        return method in self.card.get("methods", ())

    def reads(self, name: str) -> bool:
        """Whether any tier reads this feature, its model or how it knows what is far: what is not
        read need not be measured."""
        return any(
            name in tier.model.columns or any(name in far.columns for far in tier.novelty.values())
            for tier in self.tiers.values()
        )

    def supports(self, values: Float[np.ndarray, "rows columns"]) -> list[Tier | None]:
        """The highest tier that can speak of each row; None where not even the lowest can."""
        best: list[Tier | None] = [None] * len(values)
        able = np.ones(len(values), bool)
        for tier in TIERS:
            picked = values[:, [COLUMNS.index(name) for name in NEEDED[tier]]]
            able &= np.isfinite(picked).all(1)
            if tier in self.tiers:
                for row in np.flatnonzero(able):
                    best[row] = tier
        return best

    def predict(
        self,
        values: Float[np.ndarray, "rows columns"],
        tier: Tier | None = None,
        *,
        base: str | None = None,
    ) -> Guess:
        """Forecasts for rows of features.COLUMNS (feature_rows.feature_matrix makes them).

        tier: which model speaks; default: for each row the highest that supports it. Rows that
        no tier supports get NaN. base: the model that the rows are of, as base_like names it; it
        tells what counts as far. By default a row is far if it is far from those of every base.
        Raises NotForecastable for a tier that was not fitted.
        """
        values = np.asarray(values, dtype=float)
        if values.ndim != 2 or values.shape[1] != len(COLUMNS):
            raise NotForecastable(
                f"the predictor takes rows of {len(COLUMNS)} features, got shape {values.shape}"
            )
        how: dict[str, Any] = {"guaranteed": self.guaranteed, "base": base}
        if tier is not None:
            if tier not in self.tiers:
                raise NotForecastable(
                    f"this predictor has no '{tier}' tier; it has {', '.join(self.tiers)}"
                )
            return self.tiers[tier].predict(values, self.centre, **how)
        supported = np.array([t or "" for t in self.supports(values)])
        filled = {name: np.full(len(values), np.nan) for name in Guess.__dataclass_fields__}
        for each, model in self.tiers.items():
            mask = supported == each
            if mask.any():
                part = model.predict(values[mask], self.centre, **how)
                for name in filled:
                    filled[name][mask] = getattr(part, name)
        return Guess(**filled)

    def lacking(self, values: Float[np.ndarray, " columns"], tier: Tier) -> tuple[str, ...]:
        """Features that the tier's model would use and this row has not."""
        return tuple(
            name
            for name in self.tiers[tier].model.columns
            if name in FEATURES and not np.isfinite(values[COLUMNS.index(name)])
        )

    def save(self, folder: str | Path, *, force: bool = True) -> None:
        """card.json, README.md (the model card) and a file for each tier, all or nothing."""
        with atomic_folder(folder, force=force) as temporary:
            head = {
                "schema_version": SCHEMA,
                "made_by": MADE_BY,
                "centre": self.centre,
                "guaranteed": self.guaranteed,
                "tiers": list(self.tiers),
                **self.card,
            }
            (temporary / "card.json").write_text(json.dumps(head, indent=2) + "\n", "utf-8")
            if "models" in self.card:
                (temporary / "README.md").write_text(model_card(self.card), "utf-8")
            for tier, model in self.tiers.items():
                # infinities and NaN have no place in JSON
                text = json.dumps(model.to_json(), allow_nan=False, separators=(",", ":"))
                (temporary / f"{tier}.json").write_text(text + "\n", "utf-8")


def load_predictor(folder: str | Path) -> Predictor:
    """Reads what save wrote; NotForecastable with one line if it is damaged or too new."""
    folder = Path(folder)
    try:
        card = read_json(folder / "card.json", NotForecastable, finite=True)
    except NotForecastable as problem:
        raise NotForecastable(
            f"{problem}; expected a folder that `mergeprobe fit` wrote, or '{WITHOUT}'"
        ) from None
    if not isinstance(card, dict) or not isinstance(card.get("tiers"), list):
        raise NotForecastable(f"'{folder / 'card.json'}' is not the card of a predictor")
    check_schema(card.get("schema_version"), SCHEMA, f"'{folder}'", NotForecastable)
    if card["schema_version"] < SCHEMA:
        raise NotForecastable(
            f"'{folder}' has schema {card['schema_version']}, of an earlier mergeprobe; this one "
            f"reads {SCHEMA}: fit it again (mergeprobe fit)"
        )
    tiers: dict[Tier, TierModel] = {}
    for tier in card["tiers"]:
        file = folder / f"{tier}.json"
        value = read_json(file, NotForecastable, finite=True)
        try:
            tiers[tier] = tier_from_json(value)
        except (KeyError, TypeError, ValueError) as problem:
            raise NotForecastable(f"'{file}' is no predictor: {problem!r}") from None
    known = ("schema_version", "made_by", "centre", "guaranteed", "tiers")
    rest = {key: value for key, value in card.items() if key not in known}
    return Predictor(tiers, rest, card.get("centre", "median"), bool(card.get("guaranteed")))


def _plain(base: str) -> str:
    """HuggingFaceTB/SmolLM2-135M-Instruct and smollm2-135m-instruct-q4 are the same to us."""
    return re.sub(QUANTISED, "", base.rstrip("/").rsplit("/", 1)[-1].lower())


@cache
def shipped_predictor() -> Predictor:
    """The predictor that comes with mergeprobe, read once."""
    return load_predictor(SHIPPED)


def opened(asked: Predictor | str | Path | None) -> Predictor | None:
    """What commands and the callback ask. None: the one that comes with mergeprobe. "none": no
    predictor, so the surrogate and the early merge. Else a folder that `mergeprobe fit` wrote."""
    if asked is None:
        return shipped_predictor()
    if not isinstance(asked, str | Path):
        return asked
    return None if str(asked) == WITHOUT else load_predictor(asked)


def fit_predictor(
    rows: Rows,
    *,
    tiers: Sequence[Tier] = TIERS,
    candidates: Mapping[str, Candidate] = CANDIDATES,
    centre: Centre = "median",
    guaranteed: bool = False,
    aim: Aim = "score",
    seed: int = 0,
    card: Mapping[str, Any] | None = None,
) -> Predictor:
    """A model for each tier, chosen, calibrated and fitted on these rows.

    aim: whether candidates are chosen by the squared error of the score (all rows alike) or of
    retention itself (failures above all). card: what to add to it (scores on held-out cohorts,
    say). Raises NotForecastable with fewer
    than FEWEST_ROWS rows or families that cannot be split.
    """
    fitted: dict[Tier, TierModel] = {
        tier: fit_tier(rows, tier, candidates=candidates, aim=aim, seed=seed) for tier in tiers
    }
    return Predictor(fitted, describe(rows, fitted) | dict(card or {}), centre, guaranteed)


def describe(rows: Rows, tiers: Mapping[Tier, TierModel]) -> dict[str, Any]:
    """The card: what the predictor was fitted on, which candidate each tier took."""
    table = rows.table
    even = family_weights(rows.family)
    return {
        "cohorts": sorted(table["cohort"].unique().to_list()),
        "bases": sorted(table["base"].unique().to_list()),
        "base_fingerprints": _fingerprints(table),
        "families": rows.holds()[0],
        "points": sorted(round(float(p), 4) for p in table["point"].unique()),
        "methods": sorted(table["method"].unique().to_list()),
        "sizes": sorted(table["size"].unique().to_list()),
        "rows": len(rows),
        "dropped": dict(rows.dropped),
        "mean_retention": round(float(even @ rows.target), 4),
        "interval": f"{LEVEL:.0%} of rows of new families, as far as families are exchangeable",
        "models": {
            tier: {
                "chosen": model.chosen,
                "columns": list(model.model.columns),
                "squared_errors": dict(model.errors),
                "guarantee_possible": model.predictive.correction is not None,
                "calibrated_on_families": model.predictive.families,
            }
            for tier, model in tiers.items()
        },
    }


def _fingerprints(table: pl.DataFrame) -> dict[str, list[str]]:
    """Base -> those of its files that rows were measured on."""
    known = table.filter(pl.col("base_fingerprint") != "")
    pairs = known.select("base", "base_fingerprint").unique().sort("base", "base_fingerprint")
    found: dict[str, list[str]] = {}
    for base, fingerprint in pairs.iter_rows():
        found.setdefault(base, []).append(fingerprint)
    return found
