"""CANDIDATES: the models that the learned predictor chooses from, and MENUS: what they may see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mergeprobe.predict.features import SETTING, TIERS, Tier, columns_of

TAIL = 0.8
"""Retention below which a row counts as a failure."""


@dataclass(frozen=True)
class Candidate:
    """kind: "ridge", "trees" or "mix". menu: a row of MENUS, absent for a mix. parts: of a mix.
    options: penalty of a ridge; rounds, depth, rate, leaf (least weight in one), shrink of trees;
    of both tail (default 0: how much more a failure, ρ < TAIL, weighs than another row) and
    signed (default 1; 0 lets go of the signs of FEATURES); of a ridge by_method (default 0).
    """

    kind: str
    menu: str = ""
    options: Mapping[str, float] = field(default_factory=dict)
    parts: tuple[str, ...] = ()


_DISTURBED = (
    *("own_gain", "disturbance_late", "disturbance_final", "early_retention"),
    *("extrapolated_merge", "gradient_cosine_base"),
)
_PROBED = (
    *("own_gain_early", "gradient_cosine_base", "interference_ratio", "drift_ratio", "js_to_kl"),
    "surrogate",
)
_RULE = ("own_weight", "others_length")
_WEIGHED = (
    *("frobenius_cosine", "frobenius_size", "norm_ratio", "output_overlap", "union_rank"),
    *_RULE,
)
_PARTNER = ("norm_ratio", "other_gain_early", *_RULE)
DEAR = ("spectral_amplification", "sign_conflict")
"""Features that no candidate is offered: a forecast at the file tier that reads them takes a
third to two thirds longer (docs/LOG.md), and on t1 to t5 trees without them have the same R² and
MAE (benchmarks/predictor_attempts.py, "file tier")."""
MENUS: dict[str, Mapping[Tier, tuple[str, ...]]] = {
    "own": dict.fromkeys(TIERS, ("own_gain", "own_gain_early", "own_loss_slope")),
    "few": {
        "weights": _WEIGHED,
        "file": (*_PROBED, "other_gain_early", *_RULE),
        "model": (*_DISTURBED, *_PARTNER),
    },
    "core": dict.fromkeys(TIERS, (*_DISTURBED, *_PROBED, *_WEIGHED)),
    "wide": dict.fromkeys(
        TIERS,
        (
            *_DISTURBED,
            *_PROBED,
            *_WEIGHED,
            *("log_length", "log_length_ratio", "nonadditivity_late", "kl_merge"),
            *("kl_own_other", "js_own_other", "early_transfer", "joint_gradient_cosine"),
            *("own_loss_slope", "own_kl_to_base", "gradient_cosine", "data_weighted"),
            *("first_order_transfer_snapshot", "drift_cosine", "js_divergence"),
            *("own_stable_rank", "own_effective_rank", "amplification", "shared_init"),
        ),
    ),
    "all": {
        tier: tuple(c for c in columns_of(tier) if c not in (*SETTING, *DEAR)) for tier in TIERS
    },
}
"""Features to choose from, small to large, for each tier; those of a higher tier than asked are
left out, and SETTING is always there. "few" are the signals that the pilot's choice took, how large
and how quick to learn the partner is (chosen on t1 to t3: benchmarks/predictor_attempts.py, "the
partner"), and how long the rule makes both (on t1 to t5: "how long the rule
makes each")."""

_SHALLOW = {"rounds": 150, "depth": 3, "rate": 0.05, "leaf": 8, "shrink": 5.0}
_TAIL = {"tail": 2.0}
_DEEP = {"rounds": 200, "depth": 5, "rate": 0.04, "leaf": 12, "shrink": 5.0}
CANDIDATES: dict[str, Candidate] = {
    "ridge, own": Candidate("ridge", "own", {"penalty": 0.05}),
    "ridge, few": Candidate("ridge", "few", {"penalty": 0.05}),
    "ridge, few, by method": Candidate("ridge", "few", {"penalty": 0.05, "by_method": 1}),
    "ridge, core": Candidate("ridge", "core", {"penalty": 0.2}),
    "ridge, wide": Candidate("ridge", "wide", {"penalty": 0.3}),
    "trees, few": Candidate("trees", "few", _SHALLOW),
    "trees, wide": Candidate("trees", "wide", _SHALLOW),
    "trees, all": Candidate("trees", "all", _DEEP),
    "ridge, few, tail": Candidate("ridge", "few", {"penalty": 0.05, **_TAIL}),
    "trees, few, tail": Candidate("trees", "few", {**_SHALLOW, **_TAIL}),
    "mix, few": Candidate("mix", parts=("ridge, few", "trees, few")),
    "mix, wide": Candidate("mix", parts=("ridge, wide", "trees, wide")),
    "mix, few, tail": Candidate("mix", parts=("ridge, few, tail", "trees, few, tail")),
    "mix of four": Candidate(
        "mix", parts=("ridge, few, by method", "ridge, core", "trees, few", "trees, wide")
    ),
}
