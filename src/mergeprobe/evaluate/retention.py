"""Retention: how much of an adapter's single-task utility survives, with standard errors.

Utility is minus the mean completion loss (nats per token). With per-item losses under the base,
the adapter alone and the deployment, on the same items:

  gain retention ρ = (L_base − L_merged) / (L_base − L_single)     (primary)
  ratio retention  = U_merged / U_single with U = exp(−L), the geometric mean token probability

1 means nothing is lost, 0 that the deployment is as good as no adapter, below 0 that it is worse;
above 1 it is better than the adapter alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mergeprobe.errors import DataError

Losses = Float[Tensor, " items"]
MIN_GAIN_SE = 2.0


@dataclass(frozen=True)
class Retention:
    """gain: ρ; None where the adapter's own gain is within twice its standard error, as `note`
    says. gain_se, ratio_se: standard errors over items (delta method, paired). own_gain: L_base −
    L_single in nats per token, own_gain_se its standard error. excess: log(L_merged/L_single)."""

    gain: float | None
    gain_se: float | None
    ratio: float
    ratio_se: float
    own_gain: float
    own_gain_se: float
    excess: float
    items: int
    note: str = ""


def retention(base: Losses, single: Losses, merged: Losses) -> Retention:
    """Both definitions from paired per-item losses; DataError if the items differ in number."""
    if not (len(base) == len(single) == len(merged)) or len(base) == 0:
        raise DataError(
            f"retention needs the same items thrice; got {len(base)} under the base, "
            f"{len(single)} alone and {len(merged)} merged"
        )
    base, single, merged = base.double(), single.double(), merged.double()
    count = len(base)
    own, kept = base - single, base - merged
    own_gain, own_se = float(own.mean()), _se(own)
    ratio = math.exp(float(single.mean() - merged.mean()))
    shared = {
        "ratio": ratio,
        "ratio_se": ratio * _se(single - merged),
        "own_gain": own_gain,
        "own_gain_se": own_se,
        "excess": math.log(max(float(merged.mean()), 1e-9) / max(float(single.mean()), 1e-9)),
        "items": count,
    }
    if own_gain < MIN_GAIN_SE * own_se or own_gain <= 0:
        note = (
            f"undefined: the adapter alone gained {own_gain:.3f} ± {own_se:.3f} nats, "
            "less than twice its standard error"
        )
        return Retention(None, None, note=note, **shared)
    rho = float(kept.mean()) / own_gain
    # delta method for a ratio of paired means: the residual kept − ρ · own has mean zero
    return Retention(rho, _se(kept - rho * own) / own_gain, **shared)


@dataclass(frozen=True)
class SetRetention:
    """Mean and minimum of gain retention over a set of adapters, with standard errors.

    mean_se assumes adapters' items are independent. worst_se is the standard error of the worst
    adapter's own ρ (the minimum of noisy values is biased low; that is not corrected).
    left_out: adapters whose retention is undefined.
    """

    mean: float
    mean_se: float
    worst: float
    worst_se: float
    worst_adapter: str
    left_out: tuple[str, ...] = ()


def set_retention(parts: Mapping[str, Retention]) -> SetRetention:
    """Raises DataError where no adapter of the set has a defined retention."""
    known = {
        name: (part.gain, part.gain_se)
        for name, part in parts.items()
        if part.gain is not None and part.gain_se is not None
    }
    if not known:
        raise DataError(
            f"no adapter of {sorted(parts)} gained more than twice its standard error: "
            "there is nothing to retain"
        )
    worst = min(known, key=lambda name: (known[name][0], name))
    return SetRetention(
        mean=sum(value for value, _ in known.values()) / len(known),
        mean_se=math.sqrt(sum(se * se for _, se in known.values())) / len(known),
        worst=known[worst][0],
        worst_se=known[worst][1],
        worst_adapter=worst,
        left_out=tuple(name for name in parts if name not in known),
    )


def _se(values: Losses) -> float:
    if len(values) < 2:
        return math.inf
    return float(values.std(unbiased=True)) / math.sqrt(len(values))
