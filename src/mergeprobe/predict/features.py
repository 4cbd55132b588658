"""FEATURES: what the learned predictor sees of (adapter i, set S, method m), once.

A feature is a signal of the pair rows (what j does to i), of i or of j alone, brought to one
number a row: over the other members of S by `over`, then by `kind` to a scale on which a step
means about the same everywhere. For a pair "over the others" is the pair's own value, so one
model serves pairs and sets, and no set has to be measured: signals of sets themselves told nothing
more about them (docs/LOG.md). What was not measured is NaN, never a guess; a sum over the others
is NaN as soon as one of them is. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mergeprobe.predict.ridge import METHODS

Tier = Literal["weights", "file", "model"]
TIERS: tuple[Tier, ...] = ("weights", "file", "model")
"""Each holds the ones before it: finished adapters; probes; probes and the base model."""


Kind = Literal["linear", "log", "damage", "magnitude"]


@dataclass(frozen=True)
class Feature:
    """One column that the predictor may use.

    column: in the pair row (own: it starts with i_ or is the same for every j).
    about: "own" (i alone, no cross term), "other" (the others alone), "pair".
    family: of signals, for ablations. over: how the values of several others become one; "harm"
    adds what is missing to a retention of 1. kind: as ridge.TRANSFORMS, without its clipping.
    sign: +1 or −1 where more of the feature surely means more or less retention, else 0.
    method: "shared" by all, or "own": `{}` in the column's name stands for the method; one that has
    no column lies between the mean and the sum, by its exponent. "weight" and "length", of the
    column norm_ratio alone: logs of what the method multiplies i's update by (w_i), and of how long
    the others then are beside it, Σ w_j ‖ΔW_j‖ / (w_i ‖ΔW_i‖).
    """

    column: str
    about: Literal["own", "other", "pair"]
    tier: Tier
    family: str
    over: Literal["first", "sum", "mean", "max", "harm"] = "sum"
    kind: Kind = "linear"
    sign: int = 0
    method: Literal["shared", "own", "weight", "length"] = "shared"


def _own(column: str, tier: Tier, family: str, kind: Kind = "linear", sign: int = 0) -> Feature:
    return Feature(column, "own", tier, family, "first", kind, sign)


def _other(column: str, tier: Tier, family: str, kind: Kind = "linear", sign: int = 0) -> Feature:
    return Feature(column, "other", tier, family, "mean", kind, sign)


# fmt: off
FEATURES: dict[str, Feature] = {
    # --- finished adapters
    "own_relative_norm": _own("i_relative_norm", "weights", "update", "log"),
    "own_stable_rank": _own("i_stable_rank", "weights", "update", "log"),
    "own_effective_rank": _own("i_effective_rank", "weights", "subspace", "log"),
    "other_stable_rank": _other("j_stable_rank", "weights", "update", "log"),
    "frobenius_cosine": Feature("frobenius_cosine", "pair", "weights", "update"),
    "frobenius_size": Feature(
        "frobenius_cosine", "pair", "weights", "update", "max", "magnitude"),
    "frobenius_cosine_late": Feature("frobenius_cosine_late", "pair", "weights", "update"),
    "norm_ratio": Feature("norm_ratio", "pair", "weights", "update", "sum", "log"),
    "own_weight": Feature("norm_ratio", "pair", "weights", "update", method="weight"),
    "others_length": Feature("norm_ratio", "pair", "weights", "update", method="length"),
    "spectral_amplification": Feature(
        "spectral_amplification", "pair", "weights", "update", "max"),
    "sign_conflict": Feature("sign_conflict", "pair", "weights", "update", "max"),
    "output_overlap": Feature("output_overlap", "pair", "weights", "subspace", "sum", "log"),
    "output_overlap_late": Feature(
        "output_overlap_late", "pair", "weights", "subspace", "sum", "log"),
    "principal_cosine": Feature("principal_cosine", "pair", "weights", "subspace", "max"),
    "union_rank": Feature("union_rank", "pair", "weights", "subspace", "mean"),
    "shared_init": Feature("shared_init", "pair", "weights", "init", "mean"),
    "amplification": Feature("amplification", "pair", "weights", "update", "max"),
    # --- probes
    "own_gain_early": _own("i_own_gain_relative", "file", "guards", sign=1),
    "own_loss_slope": _own("i_loss_slope", "file", "guards"),
    "own_norm_growth": _own("i_norm_growth", "file", "guards"),
    "own_entropy_change": _own("i_entropy_change", "file", "guards"),
    "own_kl_to_base": _own("i_kl_to_base", "file", "guards", "log"),
    "own_drift_norm": _own("i_drift_norm", "file", "guards", "log"),
    "own_selectivity": _own("i_selectivity", "file", "guards", "log"),
    "own_curvature": _own("i_own_curvature", "file", "guards", "log"),
    "other_gain_early": _other("j_own_gain_relative", "file", "others"),
    "other_kl_to_base": _other("j_kl_to_base", "file", "others", "log"),
    "gradient_cosine_base": Feature("gradient_cosine_base", "pair", "file", "gradient"),
    "gradient_cosine_base_late": Feature("gradient_cosine_base_late", "pair", "file", "gradient"),
    "gradient_cosine": Feature("gradient_cosine", "pair", "file", "gradient"),
    "velocity_cosine": Feature("velocity_cosine", "pair", "file", "gradient"),
    "first_order_transfer": Feature("first_order_transfer", "pair", "file", "gradient"),
    "first_order_transfer_snapshot": Feature(
        "first_order_transfer_snapshot", "pair", "file", "gradient"),
    "interference": Feature("interference", "pair", "file", "curvature", "sum", "log"),
    "interference_ratio": Feature(
        "interference_ratio", "pair", "file", "curvature", "sum", "log"),
    "fisher_cosine": Feature("fisher_cosine", "pair", "file", "curvature"),
    "data_weighted": Feature("data_weighted", "pair", "file", "curvature", "sum", "log"),
    "drift_ratio": Feature("drift_ratio", "pair", "file", "representation", "sum", "log"),
    "drift_cosine": Feature("drift_cosine", "pair", "file", "representation"),
    "drift_cosine_late": Feature("drift_cosine_late", "pair", "file", "representation"),
    "drift_cka": Feature("drift_cka", "pair", "file", "representation", "mean"),
    "js_divergence": Feature("js_divergence", "pair", "file", "representation", "sum", "log"),
    "js_to_kl": Feature("js_to_kl", "pair", "file", "representation", "sum", "log"),
    "surrogate": Feature(
        "surrogate_{}", "pair", "file", "surrogate", "harm", "damage", 1, "own"),
    # --- a few forward passes
    "own_gain": _own("own_gain", "model", "own gain", sign=1),
    "log_length": _own("log_c", "model", "own gain"),
    "log_length_ratio": Feature("log_c_ratio", "pair", "model", "own gain", "mean"),
    "disturbance_late": Feature(
        "disturbance_late", "pair", "model", "disturbance", "sum", "log", -1),
    "disturbance_final": Feature(
        "disturbance_final", "pair", "model", "disturbance", "sum", "log", -1),
    "nonadditivity_late": Feature(
        "nonadditivity_{}_late", "pair", "model", "disturbance", "sum", "log", -1, "own"),
    "nonadditivity_final": Feature(
        "nonadditivity_{}_final", "pair", "model", "disturbance", "sum", "log", -1, "own"),
    "kl_base_other": Feature("kl_base_other", "pair", "model", "divergence", "sum", "log", -1),
    "kl_own_other": Feature("kl_own_other", "pair", "model", "divergence", "sum", "log", -1),
    "js_own_other": Feature("js_own_other", "pair", "model", "divergence", "sum", "log", -1),
    "top1_disagreement": Feature("top1_disagreement", "pair", "model", "divergence", "sum",
        "linear", -1),
    "kl_merge": Feature(
        "kl_merge_{}", "pair", "model", "divergence", "sum", "log", -1, "own"),
    "early_transfer": Feature("early_transfer", "pair", "model", "early merge", "sum"),
    "early_retention": Feature(
        "early_retention_{}", "pair", "model", "early merge", "harm", "damage", 1, "own"),
    "extrapolated_merge": Feature(
        "extrapolated_{}", "pair", "model", "early merge", "harm", "damage", 1, "own"),
    "joint_gradient_cosine": Feature(
        "joint_gradient_cosine", "pair", "model", "joint point", "sum"),
}
# fmt: on
SETTING = (
    "exponent",
    "log_size",
    "log_progress",
    *(f"method_{m}" for m in METHODS if m != "linear"),
)
"""The weight's exponent (1 for the mean, 0 for the sum), log n, log of the share of training done
(of the pair rows' step and planned_steps, i's own run), the method."""
COLUMNS = (*SETTING, *FEATURES)
SIGNS: dict[str, int] = {name: feature.sign for name, feature in FEATURES.items() if feature.sign}


def columns_of(
    tier: Tier,
    *,
    about: Iterable[str] = ("own", "other", "pair"),
    families: Iterable[str] | None = None,
    without: Iterable[str] = (),
) -> tuple[str, ...]:
    """SETTING and the features up to a tier, of these kinds and families, in the table's order."""
    known = TIERS[: TIERS.index(tier) + 1]
    about, without = set(about), set(without)
    kept = None if families is None else set(families)
    picked = [
        name
        for name, feature in FEATURES.items()
        if feature.tier in known
        and feature.about in about
        and (kept is None or feature.family in kept)
        and feature.family not in without
    ]
    return (*SETTING, *picked)
