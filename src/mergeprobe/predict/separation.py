"""Can a router tell the tasks apart by their prompts?"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np
from jaxtyping import Float

from mergeprobe.errors import NotForecastable

SEPARABLE_AUC = 0.95


def separable(auc: float) -> bool:
    """Whether calibration prompts separate well enough for a router: AUC ≥ 0.95."""
    return auc >= SEPARABLE_AUC


def prompt_auc(
    features: Mapping[str, Float[np.ndarray, "items d"]],
) -> dict[tuple[str, str], float]:
    """How well the calibration prompts of each two tasks separate, in [0, 1].

    features: task -> one row per prompt (such as the base model's mean-pooled states), at least
    two rows each and equally wide. Returns one AUC per unordered pair, in the order given.
    Each prompt is scored by ‖x − c_b‖² − ‖x − c_a‖², the distances to the two tasks' centroids,
    its own left out; the AUC is the chance that a prompt of a scores above one of b (ties count
    half). 1: always told apart. Equal prompts come out at or *below* one half, because leaving
    x out pushes its own centroid away from it.
    """
    checked = {name: _rows(name, rows) for name, rows in features.items()}
    if len({rows.shape[1] for rows in checked.values()}) > 1:
        widths = ", ".join(f"'{name}' {rows.shape[1]}" for name, rows in checked.items())
        raise NotForecastable(f"prompt features differ in width: {widths}; use one base model")
    return {(a, b): _pair_auc(checked[a], checked[b]) for a, b in combinations(checked, 2)}


def _rows(name: str, rows: np.ndarray) -> Float[np.ndarray, "items d"]:
    rows = np.asarray(rows, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[0] < 2:
        raise NotForecastable(
            f"prompt features of '{name}' have shape {rows.shape}; expected (items, d), 2+ items"
        )
    if not np.isfinite(rows).all():
        raise NotForecastable(f"prompt features of '{name}' hold NaN or infinite entries")
    return rows


def _pair_auc(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    from_a = _apart(a, b.mean(axis=0)) - _apart(a, _others_mean(a))
    from_b = _apart(b, _others_mean(b)) - _apart(b, a.mean(axis=0))
    above = (from_a[:, None] > from_b[None, :]).mean()
    equal = (from_a[:, None] == from_b[None, :]).mean()
    return float(above + equal / 2)


def _others_mean(rows: Float[np.ndarray, "items d"]) -> Float[np.ndarray, "items d"]:
    """Row i: the mean of all rows but i."""
    return (rows.sum(axis=0) - rows) / (len(rows) - 1)


def _apart(rows: Float[np.ndarray, "items d"], centre: np.ndarray) -> Float[np.ndarray, " items"]:
    return ((rows - centre) ** 2).sum(axis=1)
