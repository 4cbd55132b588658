"""The small ridge: early signals of a pair -> retention with a 90 % interval, no torch.

What is fitted is not retention ρ but its *score* −log(max(0, 1 − ρ) + FLOOR): the pilot's
retentions crowd at 1 with a long tail of failures, and on this scale the errors are even. A
forecast is therefore a median, and intervals are asymmetric in ρ. Every coefficient's sign is
fixed beforehand (more disturbance never raises a forecast): 20 tasks cannot overrule that, and it
keeps a forecast sane outside the pilot.

Source of every number below: `python benchmarks/fit_pilot_ridge.py --data PILOT` on 188 ordered
pairs (20 tasks in two sets, one seed each, SmolLM2-135M, LoRA r = 8, 60 steps; signals at 5 %
and 10 % of training), measured under mean and sum. Uncalibrated: the intervals are residual
quantiles of families of tasks that the fit had not seen, and claim no more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from mergeprobe.errors import NotForecastable
from mergeprobe.plan import Forecast

FLOOR = 0.05
"""Damage below this is not told apart: about the noise of a measured retention."""

LOWEST, HIGHEST = -1.0, 1.02
"""Forecasts are clipped here; the pilot's targets to [−1, 1.2], of which 1.016 was the largest."""


@dataclass(frozen=True)
class Transform:
    """How a signal enters: clipped to [low, high] (the pilot's range), then `kind` of it.

    log: natural logarithm. damage: the score of a retention. magnitude: absolute value (before
    clipping). linear: as it is. sign: +1 if more of the transformed signal means more retention.
    """

    kind: Literal["linear", "log", "damage", "magnitude"]
    low: float
    high: float
    sign: int


# i is the adapter whose retention is forecast, j the other one; U = c* ΔW (SIGNALS.md)
TRANSFORMS: dict[str, Transform] = {
    "own_gain": Transform("linear", 0.0, 1.0, +1),  # (L_i(θ0) − L_i(U_i)) / L_i(θ0)
    "log_c": Transform("linear", 0.0, math.log(32), +1),  # log c*_i
    "log_c_ratio": Transform("linear", -2.8, 2.8, -1),  # log c*_j − log c*_i
    "disturbance_late": Transform("log", 0.03, 8.0, -1),  # ‖h(U_j) − h0‖ / ‖h(U_i) − h0‖
    "disturbance_final": Transform("log", 0.05, 4.0, -1),  # after the final norm
    "nonadditivity_sum_late": Transform("log", 0.03, 8.0, -1),
    "nonadditivity_sum_final": Transform("log", 0.05, 4.0, -1),
    "nonadditivity_mean_late": Transform("log", 0.1, 4.0, -1),
    "nonadditivity_mean_final": Transform("log", 0.1, 2.0, -1),
    "kl_merge_sum": Transform("log", 0.01, 12.0, -1),  # KL(p_i ‖ p_merged), nats
    "kl_merge_mean": Transform("log", 0.01, 6.0, -1),
    "kl_base_other": Transform("log", 0.01, 14.0, -1),  # KL(p_0 ‖ p_j), nats
    "kl_own_other": Transform("log", 0.1, 14.0, -1),  # KL(p_i ‖ p_j), nats
    "top1_disagreement": Transform("linear", 0.0, 1.0, -1),
    "early_retention_mean": Transform("damage", -1.0, 1.0, +1),  # of U_i and U_j merged
    "early_retention_sum": Transform("damage", -1.0, 1.0, +1),
    "early_transfer": Transform("linear", -1.0, 1.0, -1),  # (L_i(U_j) − L_i(θ0)) / own gain
    # both gradients at θ0: runs that first learn one shared format compete for it (SIGNALS.md);
    # negative is as good as 0, and beyond 0.4 the pilot has five pairs
    "gradient_cosine_base": Transform("linear", 0.0, 0.4, -1),
    "frobenius_cosine": Transform("magnitude", 0.0, 0.45, -1),
    "norm_ratio": Transform("log", 0.36, 2.8, -1),  # ‖ΔW_j‖ / ‖ΔW_i‖
}


@dataclass(frozen=True)
class Term:
    """coefficient · (transform(signal) − mean) / scale; mean and scale are the pilot's."""

    signal: str
    mean: float
    scale: float
    coefficient: float


@dataclass(frozen=True)
class Ridge:
    """score = intercept + Σ terms. spread: (score, 5 % residual, 95 % residual) at the centres of
    the lower and the upper half of the pilot's forecasts, interpolated between."""

    intercept: float
    terms: tuple[Term, ...]
    spread: tuple[tuple[float, float, float], ...]

    @property
    def signals(self) -> tuple[str, ...]:
        return tuple(term.signal for term in self.terms)


# the first model whose signals are all there is used: the second needs no gradients, the third no
# merged forward pass either. Both families of tasks unseen, the first: rank correlation 0.77 (mean)
# and 0.64 (sum), within an adapter's partners 0.52 and 0.50, mean error 0.042 and 0.118, R² 0.36
# and 0.22, coverage 0.89 and 0.92; the own gain alone: 0.71, 0.48; −0.12, −0.24; R² 0.15, 0.02.
MODELS: dict[str, tuple[Ridge, ...]] = {
    "mean": (
        Ridge(
            2.3591,
            (
                Term("own_gain", 0.6935, 0.1888, 0.2865),
                Term("disturbance_late", -0.6791, 1.2108, -0.0926),
                Term("disturbance_final", -0.8097, 0.7846, -0.0492),
                Term("early_retention_mean", 1.9751, 0.8205, 0.0610),
                Term("gradient_cosine_base", 0.1411, 0.0840, -0.1760),
            ),
            ((1.977, -0.954, 0.842), (2.688, -0.851, 0.583)),
        ),
        Ridge(
            2.3591,
            (
                Term("own_gain", 0.6935, 0.1888, 0.3193),
                Term("disturbance_late", -0.6791, 1.2108, -0.0714),
                Term("disturbance_final", -0.8097, 0.7846, -0.1174),
                Term("early_retention_mean", 1.9751, 0.8205, 0.0281),
            ),
            ((2.003, -1.249, 0.904), (2.651, -0.962, 0.564)),
        ),
        Ridge(
            2.3591,
            (
                Term("own_gain", 0.6935, 0.1888, 0.3228),
                Term("disturbance_late", -0.6791, 1.2108, -0.0772),
                Term("disturbance_final", -0.8097, 0.7846, -0.1241),
            ),
            ((2.026, -1.315, 0.863), (2.657, -0.802, 0.551)),
        ),
    ),
    "sum": (
        Ridge(
            2.0929,
            (
                Term("own_gain", 0.6935, 0.1888, 0.2639),
                Term("disturbance_late", -0.6791, 1.2108, -0.2226),
                Term("disturbance_final", -0.8097, 0.7846, -0.0330),
                Term("early_retention_sum", 1.5005, 1.1487, 0.0932),
                Term("gradient_cosine_base", 0.1411, 0.0840, -0.2181),
            ),
            ((1.62, -1.546, 1.493), (2.554, -1.601, 0.898)),
        ),
        Ridge(
            2.0929,
            (
                Term("own_gain", 0.6935, 0.1888, 0.3003),
                Term("disturbance_late", -0.6791, 1.2108, -0.1994),
                Term("disturbance_final", -0.8097, 0.7846, -0.1340),
                Term("early_retention_sum", 1.5005, 1.1487, 0.0414),
            ),
            ((1.653, -1.763, 1.47), (2.514, -1.69, 0.939)),
        ),
        Ridge(
            2.0929,
            (
                Term("own_gain", 0.6935, 0.1888, 0.3009),
                Term("disturbance_late", -0.6791, 1.2108, -0.2087),
                Term("disturbance_final", -0.8097, 0.7846, -0.1549),
            ),
            ((1.651, -1.742, 1.435), (2.514, -1.695, 0.899)),
        ),
    ),
}
# for finished adapters without a base model. On unseen tasks these have no skill (the pilot's
# rank correlation is below 0): they are the pilot's average with its spread, and say so.
WEIGHT_MODELS: dict[str, tuple[Ridge, ...]] = {
    "mean": (
        Ridge(
            2.3591,
            (
                Term("frobenius_cosine", 0.0421, 0.0573, -0.1569),
                Term("norm_ratio", 0.0000, 0.3203, -0.1092),
            ),
            ((2.183, -1.212, 0.974), (2.501, -1.54, 0.629)),
        ),
    ),
    "sum": (
        Ridge(
            2.0929,
            (
                Term("frobenius_cosine", 0.0421, 0.0573, -0.1837),
                Term("norm_ratio", 0.0000, 0.3203, -0.1677),
            ),
            ((1.815, -1.557, 1.373), (2.241, -2.674, 0.93)),
        ),
    ),
}


@dataclass(frozen=True)
class Kin:
    """Where a merge rule stands between the two that the pilot measured.

    exponent e: each of T adapters enters with a weight of about T^−e: 1 for the mean, 0 for the
    sum. For a pair, the score is e · score(mean) + (1 − e) · score(sum), which is log-linear in
    the weight. widen: factor on the interval's half-widths, a judgement, as nothing but mean and
    sum was measured.
    """

    exponent: float
    widen: float


METHODS: dict[str, Kin] = {
    "mean": Kin(1.0, 1.0),
    "sum": Kin(0.0, 1.0),
    "linear": Kin(1.0, 1.25),  # taken as weights that sum to 1
    "norm_preserving_mean": Kin(0.5, 1.25),  # orthogonal updates: weight 1/√T
    "equal_norm_mean": Kin(1.0, 1.25),  # the mean, less what is drowned in it
    "ties": Kin(0.5, 1.5),  # keeps full size where only one speaks, averages where several do
    "svc": Kin(0.0, 1.25),  # the sum, less what shared directions count twice
    "iso_c": Kin(0.5, 1.5),  # as long as the sum, every direction alike
}


def score(retention: float | Float[np.ndarray, "*rows"]) -> Float[np.ndarray, "*rows"]:
    """−log(max(0, 1 − ρ) + FLOOR), ρ clipped to [−1, 1.2]; at most −log FLOOR = 3.0."""
    return -np.log(np.clip(1.0 - np.clip(retention, -1.0, 1.2), 0.0, None) + FLOOR)


def unscore(value: float) -> float:
    """The retention of a score, clipped to [LOWEST, HIGHEST]."""
    return float(np.clip(1.0 + FLOOR - math.exp(-value), LOWEST, HIGHEST))


def transform(signal: str, values: Float[np.ndarray, "*rows"]) -> Float[np.ndarray, "*rows"]:
    """A signal's values as the ridge sees them (TRANSFORMS)."""
    rule = TRANSFORMS[signal]
    values = np.asarray(values, dtype=float)
    values = np.abs(values) if rule.kind == "magnitude" else values
    values = np.clip(values, rule.low, rule.high)
    if rule.kind == "log":
        return np.log(values)
    return score(values) if rule.kind == "damage" else values


def forecast_pair(features: Mapping[str, float], method: str) -> Forecast:
    """Retention of adapter i merged with j alone, from the model tier's signals of (i, j).

    features: the columns of `predict/early.py`; what is absent or not finite counts as missing.
    Where gradients or a merged forward pass are missing a smaller model of MODELS is used
    (`lacking` says what it went without). Retention in [−1, 1.02]; the interval is a nominal
    90 %, uncalibrated.

    Raises NotForecastable naming the missing signals, or the unknown method.
    """
    return _forecast(MODELS, features, method)


def forecast_pair_weights(features: Mapping[str, float], method: str) -> Forecast:
    """The same from two finished adapters' weights alone: `frobenius_cosine` and `norm_ratio`
    (‖ΔW_j‖/‖ΔW_i‖: the signal row of a = j, b = i). In effect the pilot's average retention with
    its spread: weights alone had no skill on unseen tasks (see WEIGHT_MODELS), so the width of
    the interval is the message.
    """
    return _forecast(WEIGHT_MODELS, features, method)


def lacking(features: Mapping[str, float], method: str) -> tuple[str, ...]:
    """The signals that the full model of `method` wants and `features` has not."""
    wanted = [signal for target in _targets(_kin(method)) for signal in MODELS[target][0].signals]
    return tuple(s for s in dict.fromkeys(wanted) if not _known(features, s))


def combine(pairs: Sequence[Forecast], n: int, method: str = "mean") -> Forecast:
    """Retention of adapter i in a set of n, from its forecasts with each of the others alone.

    What i loses beside every partner is read as its own dilution (m = max(0, min_j d_j), d_j =
    1 − ρ_ij; none for the sum), which grows as (1 − w)² with its weight w; the rest is each
    partner's harm, and harm adds:

        1 − ρ_i = m · ((1 − w)/(1 − w₂))² + (n/2)^{¾(1 − e)} Σ_j (d_j − m),   w = n^−e, w₂ = 2^−e

    e is 1 for the mean, 0 for the sum. Second order without cross terms would shrink each harm
    under the mean by (2/n)²; measured sets say otherwise. Over 110 rows of the demo's seeds 0 and
    1 (sets of 3, 4, 5) the damage was 1.1 times Σ d_j under the mean at every size, and 1.3, 1.6
    and 2.1 times under the sum: what counts is the others' size against i's own, and it is not
    small. The bounds go through the same formula (the pairs of one adapter err together), and
    damage is then scaled by 1 ± 0.15 (n − 2)-fold for what the formula leaves out, a judgement.

    pairs: one forecast for each of the n − 1 others; n = 1 gives 1. Retention in [−1, 1.02].
    """
    if len(pairs) != n - 1:
        raise NotForecastable(
            f"an adapter in a set of {n} needs {n - 1} pair forecasts, got {len(pairs)}"
        )
    exponent = _kin(method).exponent
    if n == 1:
        return Forecast(retention=1.0, low=1.0, high=1.0)
    weight, pair_weight = n**-exponent, 2**-exponent
    diluted = ((1 - weight) / (1 - pair_weight)) ** 2 if exponent else 0.0
    harmed = (n / 2) ** (0.75 * (1.0 - exponent))

    def damage(retentions: Sequence[float]) -> float:
        each = [1.0 - value for value in retentions]
        common = max(0.0, min(each)) if exponent else 0.0
        return diluted * common + harmed * sum(d - common for d in each)

    slack = 1.0 + 0.15 * (n - 2)
    middle = damage([p.retention for p in pairs])
    worst = max(middle, damage([p.low for p in pairs]) * slack)
    least = damage([p.high for p in pairs])
    least = min(middle, least / slack if least > 0 else least * slack)
    clipped = [min(max(1.0 - d, LOWEST), HIGHEST) for d in (middle, worst, least)]
    return Forecast(retention=clipped[0], low=clipped[1], high=clipped[2])


def _forecast(
    models: Mapping[str, tuple[Ridge, ...]], features: Mapping[str, float], method: str
) -> Forecast:
    kin = _kin(method)
    centre = below = above = 0.0
    for target, share in _targets(kin).items():
        value, low, high = _scored(models[target], features, target)
        centre, below, above = centre + share * value, below + share * low, above + share * high
    return Forecast(
        retention=min(1.0, unscore(centre)),
        low=min(1.0, unscore(centre + kin.widen * min(below, 0.0))),
        high=unscore(centre + kin.widen * max(above, 0.0)),
    )


def _scored(
    ladder: tuple[Ridge, ...], features: Mapping[str, float], target: str
) -> tuple[float, float, float]:
    for model in ladder:
        if all(_known(features, signal) for signal in model.signals):
            break
    else:
        absent = [s for s in ladder[-1].signals if not _known(features, s)]
        raise NotForecastable(
            f"no forecast for '{target}' without {', '.join(absent)}; "
            f"needed: {', '.join(ladder[-1].signals)}"
        )
    value = model.intercept
    for term in model.terms:
        seen = float(transform(term.signal, np.asarray(features[term.signal])))
        value += term.coefficient * (seen - term.mean) / term.scale
    value = float(np.clip(value, score(LOWEST), score(1.0)))
    at, low, high = zip(*model.spread, strict=True)
    return value, float(np.interp(value, at, low)), float(np.interp(value, at, high))


def _targets(kin: Kin) -> dict[str, float]:
    shares = {"mean": kin.exponent, "sum": 1.0 - kin.exponent}
    return {target: share for target, share in shares.items() if share > 0}


def _kin(method: str) -> Kin:
    if method not in METHODS:
        raise NotForecastable(
            f"no forecast for the merge method '{method}'; expected one of {', '.join(METHODS)}"
        )
    return METHODS[method]


def _known(features: Mapping[str, float], signal: str) -> bool:
    value = features.get(signal)
    return value is not None and math.isfinite(value)
