"""One forecast from the opinions that a tier has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from mergeprobe.plan import Forecast
from mergeprobe.predict import ridge

Tier = Literal["weights", "file", "model"]


def blend(parts: Mapping[str, float], method: str, tier: Tier) -> Forecast:
    """One forecast from its parts; a nominal 90 % interval, uncalibrated.

    weights: the pilot's average (ridge on weights). file, and pairs that the model tier's budget
    did not reach: the surrogate, with the pilot's spread around it. model: the mean of the ridge
    and the extrapolated early merge, which err apart (the ridge has never seen a task like a
    planted conflict, the early merge overstates damage); their disagreement widens the interval.
    """
    if tier == "weights":
        return ridge.forecast_pair_weights(parts, method)
    if tier == "file" or "extrapolated_merge" not in parts:
        spread = ridge.forecast_pair_weights(parts, method)
        middle = parts.get("surrogate", spread.retention)
        return around(middle, spread, abs(middle - spread.retention))
    known = ridge.forecast_pair(parts, method)
    early = clip(parts["extrapolated_merge"])
    return around((known.retention + early) / 2, known, abs(known.retention - early) / 2)


def around(middle: float, like: Forecast, apart: float) -> Forecast:
    """An interval around `middle` with `like`'s half-widths, or `apart` where that is wider."""
    middle = clip(middle)
    below = max(like.retention - like.low, apart)
    above = max(like.high - like.retention, apart)
    return Forecast(
        retention=middle,
        low=max(ridge.LOWEST, middle - below),
        high=max(middle, min(ridge.HIGHEST, middle + above)),
    )


def clip(value: float) -> float:
    return min(ridge.HIGHEST, max(ridge.LOWEST, value))
