"""SIGNALS: every file-tier signal, once. A new one is its function and one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mergeprobe.adapters.regions import KINDS, THIRDS
from mergeprobe.signals import (
    curvature,
    gradient,
    guards,
    representation,
    subspace,
    update,
)
from mergeprobe.signals.panel import EACH, Panel

WHOLE = ("all",)
DEPTH = ("all", *THIRDS)
MODULES = ("all", *THIRDS, *KINDS)
MODULES_AND_MAX = (*MODULES, "max")


@dataclass(frozen=True)
class Signal:
    """One measured quantity.

    kind: "pair" (ordered: what a's update does to b), "adapter" or "set" (an adapter in a set).
    needs: the parts of Probe without which it is null; "meta.x" is an entry of the provenance.
    function: (panel, region) -> (rows, columns) of the panel, (n,) or one value a set row, NaN
    where it was not measured.
    regions: where it is stated; each but "all" is a column of its own, `name_region`. "max" is the
    largest over single modules. diagnostic: explains a row, forecasts nothing.
    """

    family: str
    kind: Literal["pair", "adapter", "set"]
    unit: str
    range: tuple[float | int | None, float | int | None]
    symmetric: bool
    needs: tuple[str, ...]
    source: str
    summary: str
    function: Callable[[Panel, str], Tensor]
    regions: tuple[str, ...] = WHOLE
    diagnostic: bool = False

    def values(self, panel: Panel, region: str) -> Tensor:
        """The signal over one region of the modules ("max": the largest over modules)."""
        if region != "max":
            return self.function(panel, region)
        if self.kind == "pair":  # kept while the modules were visited
            name = self.function.__name__
            return panel.largest.get(name, panel.unmeasured)
        each = self.function(panel, EACH)
        none = each.isnan().all(0)
        return each.nan_to_num(nan=-float("inf")).amax(0).masked_fill(none, float("nan"))


def columns(name: str) -> list[tuple[str, str]]:
    """(column, region) of a signal, in order."""
    signal = SIGNALS[name]
    return [(name if r == "all" else f"{name}_{r}", r) for r in signal.regions]


def of_kind(kind: str) -> dict[str, Signal]:
    return {name: signal for name, signal in SIGNALS.items() if signal.kind == kind}


# fmt: off
def _pair(
    family, function, unit, low, high, needs, source, summary, regions,
    symmetric=True, diagnostic=False,
) -> Signal:
    return Signal(
        family, "pair", unit, (low, high), symmetric, needs, source, summary, function,
        regions, diagnostic,
    )


def _adapter(family, function, unit, low, high, needs, source, summary, regions) -> Signal:
    return Signal(
        family, "adapter", unit, (low, high), False, needs, source, summary, function, regions
    )


def _set(
    family, function, unit, low, high, needs, source, summary, symmetric=False
) -> Signal:
    return Signal(
        family, "set", unit, (low, high), symmetric, needs, source, summary, function
    )


_U = ("updates",)
_MOMENTS = ("updates", "inputs", "outputs")
_TASK_ARITHMETIC, _TIES, _TSV = "arXiv:2212.04089", "arXiv:2306.01708", "arXiv:2412.00081"
_LORA, _KFAC, _REGMEAN = "arXiv:2106.09685", "arXiv:1503.05671", "arXiv:2212.09849"
_PCGRAD, _TAG, _CKA = "arXiv:2001.06782", "arXiv:2109.04617", "arXiv:1905.00414"
_ROY = "Roy & Vetterli 2007"

SIGNALS: dict[str, Signal] = {
    # --- update
    "frobenius_cosine": _pair("update", update.frobenius_cosine, "1", -1, 1, _U, _TASK_ARITHMETIC,
        "cosine of the two updates; below 0 one undoes the other", MODULES_AND_MAX),
    "norm_ratio": _pair("update", update.norm_ratio, "1", 0, None, _U, "ours",
        "‖ΔW_a‖/‖ΔW_b‖; bound to the learning rates early on", MODULES, symmetric=False),
    "amplification": _pair("update", update.amplification, "1", 0, 2, _U, "ours",
        "‖ΔW_a + ΔW_b‖²/(‖ΔW_a‖² + ‖ΔW_b‖²); 1 when orthogonal", MODULES_AND_MAX),
    "spectral_amplification": _pair("update", update.spectral_amplification, "1", 0, 2, _U, "ours",
        "σ1(ΔW_a + ΔW_b) over the larger σ1, energy-weighted", MODULES_AND_MAX),
    "sign_conflict": _pair("update", update.sign_conflict, "1", 0, 1, _U, _TIES,
        "share of Σ|ΔW_a||ΔW_b| at entries of opposite sign, from sampled rows", MODULES_AND_MAX),
    "sign_conflict_error": _pair("update", update.sign_conflict_error, "1", 0, None, _U, "ours",
        "standard error of sign_conflict from the sampling", WHOLE, diagnostic=True),
    "update_norm": _adapter("update", update.update_norm, "weight", 0, None, _U, "ours",
        "‖ΔW‖", MODULES),
    "relative_norm": _adapter("update", update.relative_norm, "1", 0, None,
        ("updates", "weight_norms"), "ours", "‖ΔW‖/‖W‖", MODULES_AND_MAX),
    "stable_rank": _adapter("update", update.stable_rank, "directions", 1, None, _U,
        "arXiv:math/0503442", "‖ΔW‖²/σ1², energy-weighted", MODULES),
    "set_amplification": _set("update", update.set_amplification, "1", 0, None, _U, "ours",
        "‖Σ ΔW‖²/Σ ‖ΔW‖² over the set, exact", symmetric=True),
    "cosine_to_rest": _set("update", update.cosine_to_rest, "1", -1, 1, _U, _TASK_ARITHMETIC,
        "cosine of ΔW_i with the sum of the others, exact"),
    # --- subspace
    "output_overlap": _pair("subspace", subspace.output_overlap, "1", 0, 1, _U, _TSV,
        "cosine of ΔWΔWᵀ: shared output directions, singular-value weighted", MODULES_AND_MAX),
    "input_overlap": _pair("subspace", subspace.input_overlap, "1", 0, 1, _U, "ours",
        "cosine of ΔWᵀΔW: mostly whether A was shared at init", WHOLE, diagnostic=True),
    "principal_cosine": _pair("subspace", subspace.principal_cosine, "1", 0, 1, _U, _LORA,
        "largest cosine between output directions, energy-weighted", MODULES),
    "principal_cosine_mean": _pair("subspace", subspace.principal_cosine_mean, "1", 0, 1, _U,
        _LORA, "mean principal cosine of the outputs, energy-weighted", MODULES),
    "union_rank": _pair("subspace", subspace.union_rank, "1", 0, 1, _U, _ROY,
        "effective rank of both outputs together over the sum of ranks", MODULES),
    "shared_init": _pair("subspace", subspace.shared_init, "0 or 1", 0, 1, ("meta.init_hash",),
        "ours", "whether both runs drew the same A at init", WHOLE, diagnostic=True),
    "effective_rank": _adapter("subspace", subspace.effective_ranks, "directions", 1, None, _U,
        _ROY, "exp of the entropy of σ²/Σσ², energy-weighted", MODULES),
    "set_union_rank": _set("subspace", subspace.set_union_rank, "1", 0, 1, _U, _ROY,
        "effective rank of the set's stacked outputs over the sum of ranks, exact",
        symmetric=True),
    # --- gradient
    "gradient_cosine_base": _pair("gradient", gradient.gradient_cosine_base, "1", -1, 1,
        ("gradient_base",), _PCGRAD, "cosine of full-weight gradients at the base point", MODULES),
    "gradient_cosine": _pair("gradient", gradient.gradient_cosine, "1", -1, 1, ("gradient",),
        _PCGRAD, "cosine of full-weight gradients, each at its snapshot", MODULES),
    "velocity_cosine": _pair("gradient", gradient.velocity_cosine, "1", -1, 1,
        ("updates", "halfway"), "ours", "cosine of the ways travelled since half of the steps",
        MODULES),
    "first_order_transfer": _pair("gradient", gradient.first_order_transfer, "share of loss",
        None, None, ("updates", "gradient_base", "calibration"), _TAG,
        "−⟨G_b, ΔW_a⟩/L_b at the base point; bound to a's norm", MODULES, symmetric=False),
    "first_order_transfer_snapshot": _pair("gradient", gradient.first_order_transfer_snapshot,
        "share of loss", None, None, ("updates", "gradient", "calibration"), _TAG,
        "−⟨G_b, ΔW_a⟩/L_b at b's snapshot; bound to a's norm", MODULES, symmetric=False),
    # --- curvature
    "interference": _pair("curvature", curvature.interference, "nats a token", 0, None, _MOMENTS,
        _KFAC, "tr(ΔW_aᵀ D_b ΔW_a S_b); bound to a's norm", MODULES_AND_MAX, symmetric=False),
    "interference_ratio": _pair("curvature", curvature.interference_ratio, "1", 0, None, _MOMENTS,
        _KFAC, "the interference over the same form of b's own update", MODULES_AND_MAX,
        symmetric=False),
    "fisher_cosine": _pair("curvature", curvature.fisher_cosine, "1", -1, 1, _MOMENTS, _KFAC,
        "cosine of the two updates in b's curvature", MODULES, symmetric=False),
    "data_weighted": _pair("curvature", curvature.data_weighted, "1", 0, None,
        ("updates", "inputs"), _REGMEAN, "E: a's output on b's inputs over b's own",
        MODULES_AND_MAX, symmetric=False),
    "selectivity": _adapter("curvature", curvature.selectivity, "1", 0, None,
        ("updates", "inputs"), "ours", "κ: the update's fit to its own inputs over an even one's",
        MODULES_AND_MAX),
    "capacity": _adapter("curvature", curvature.capacity, "adapters", 1, None,
        ("updates", "inputs"), "ours", "N_max(τ) = 1 + τκ at τ = 0.5", WHOLE),
    "own_curvature": _adapter("curvature", curvature.own_curvature, "nats a token", 0, None,
        _MOMENTS, _KFAC, "tr(ΔWᵀ D ΔW S) of the own update", WHOLE),
    "capacity_load": _set("curvature", curvature.capacity_load, "1", 0, None,
        ("updates", "inputs"), "ours", "Σ E over the others"),
    "joint_interference": _set("curvature", curvature.joint_interference, "nats a token", 0, None,
        _MOMENTS, _KFAC, "tr(TᵀD_i T S_i), T the sum of the others' updates, exact"),
    "joint_interference_ratio": _set("curvature", curvature.joint_interference_ratio, "1", 0,
        None, _MOMENTS, _KFAC, "the joint interference over the same form of the own update"),
    # --- representation
    "drift_norm": _adapter("representation", representation.drift_norm, "state", 0, None,
        ("drift",), "ours", "RMS norm of the hidden-state drift on the probe set", DEPTH),
    "drift_ratio": _pair("representation", representation.drift_ratio, "1", 0, None, ("drift",),
        "ours", "a's drift norm over b's", DEPTH, symmetric=False),
    "drift_cosine": _pair("representation", representation.drift_cosine, "1", -1, 1, ("drift",),
        "ours", "cosine of the two drifts", DEPTH),
    "drift_cka": _pair("representation", representation.drift_cka, "1", 0, 1, ("drift",), _CKA,
        "linear CKA of the two drifts over texts, mean over layers", DEPTH),
    "kl_to_base": _adapter("representation", representation.kl_to_base, "nats", 0, None,
        ("drift",), "textbook", "KL(p ‖ p_base) on the probe set", WHOLE),
    "js_divergence": _pair("representation", representation.js_divergence, "nats", 0, 0.6931472,
        ("drift",), "Lin 1991", "Jensen-Shannon divergence of the two predictions", WHOLE),
    "js_to_kl": _pair("representation", representation.js_to_kl, "1", 0, None, ("drift",), "ours",
        "JS over the smaller KL to base: low = functionally redundant", WHOLE),
    # --- guards
    "own_gain": _adapter("guards", guards.own_gain, "nats a token", None, None, ("calibration",),
        "ours", "calibration loss of the base minus the snapshot's", WHOLE),
    "own_gain_relative": _adapter("guards", guards.own_gain_relative, "1", None, 1,
        ("calibration",), "ours", "own gain over the base's loss", WHOLE),
    "loss_slope": _adapter("guards", guards.loss_slope, "1", None, None, ("meta.losses",), "ours",
        "exponent of the training loss in the step", WHOLE),
    "norm_growth": _adapter("guards", guards.norm_growth, "1", None, None,
        ("updates", "halfway", "meta.halfway_step"), "ours", "exponent of ‖ΔW‖ in the step",
        MODULES),
    "entropy_change": _adapter("guards", guards.entropy_change, "nats", None, None, ("drift",),
        "ours", "output entropy minus the base's on the probe set", WHOLE),
    "entropy_change_open": _adapter("guards", guards.entropy_change_open, "nats", None, None,
        ("drift", "meta.open_positions"), "ours",
        "the same where an open prompt has just ended; far below 0: collapse", WHOLE),
}
# fmt: on


def markdown() -> str:
    """The table as docs/signals.md; a test keeps the file in step with it."""
    lines = [_INTRODUCTION]
    titles = {
        "pair": "Pairs (a, b): what a's update does to b",
        "adapter": "Adapters",
        "set": "Sets: adapter i among the members of S",
    }
    for kind, title in titles.items():
        lines += [f"## {title}", "", _HEADER, "|---|---|---|---|---|---|---|---|"]
        for name, signal in of_kind(kind).items():
            low, high = ("" if bound is None else f"{bound:g}" for bound in signal.range)
            notes = ["symmetric"] * (kind == "pair" and signal.symmetric)
            notes += ["diagnostic only"] * signal.diagnostic
            cells = (
                f"`{name}`",
                signal.summary.replace("|", "\\|") + (f" ({', '.join(notes)})" if notes else ""),
                signal.unit,
                f"{low or '−∞'} … {high or '∞'}",
                ", ".join(signal.needs),
                ", ".join(r for r in signal.regions if r != "all") or "–",
                signal.source,
                signal.family,
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, _DIAGNOSTICS])


_HEADER = "| signal | what | unit | range | needs | also by | source | family |"
_INTRODUCTION = """# Signals (file tier)

Measured from probes alone, without a model. This page is `mergeprobe.signals.markdown()`; a test
keeps the two in step.

A signal is null where a probe lacks what it needs, never a guess: a finished adapter has only
`updates`. *Also by*: further columns `name_early`, `name_middle`, `name_late` (thirds of the
depth), `name_attention`, `name_mlp` (kinds of module) and `name_max` (largest over modules).
A module that only one adapter changes counts in that adapter's norm. A region where either changes
nothing gives null, but what an absent a does to b (interference, E, transfer) is 0. Set rows also
carry the sum, the largest and the smallest of every pair signal over the other members j (value
of j → i): `name_sum`, `name_most`, `name_least`.
"""
_DIAGNOSTICS = """## Diagnostics by name

| asked | answered by |
|---|---|
| Did two runs share their init? | `shared_init`; of finished adapters `mergeprobe doctor`, from A |
| Do two adapters do the same thing? | `js_to_kl`; 0 for equal behaviour |
| How many adapters does one bear? | `selectivity` κ, `capacity_load` Σ E, N_max(τ) = 1 + τκ (1) |
| Does it still answer in many ways? | `entropy_change_open` (2) |
| Was a skill learned, or switched on? | `diagnostics.activation_index(early, final)` (3) |
| Does a merge waver, or harm a task? | `first_token_collapse(tier, name, group)` (4) |

1. `curvature.n_max`; `capacity` is it at τ = 0.5. N counts the adapter itself; it holds where the
   others have its norm and are even over its inputs (within 10 % on synthetic ones).
2. The change of the next token's entropy where an open prompt of the probe set (a letter, a list, a
   summary) has just ended. Null for probes that do not say where, and where a tokenizer needs more
   than 32 tokens for such a prompt.
3. The gain after 3 % of the data over the final gain, from two probes of one run
   (`fraction=(0.03, 1.0)`), on its calibration items. Near 1 the base could do it already.
4. `predict.first_token`; `diagnostics.first_token_share` from token losses. The share of a merge's
   harm that falls on first answer tokens: near 1 the merge cannot tell the tasks apart there, and
   goes on well once the first token is given; near the first tokens' share of all tokens the harm
   is even.
"""
