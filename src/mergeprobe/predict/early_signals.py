"""What the model tier measures, in one visible table."""

from __future__ import annotations

EARLY_SIGNALS: dict[str, str] = {
    "own_gain": "[L(θ₀) − L(θ₀+U_i)]/L(θ₀) on i's items; guard and baseline; ≤ 1",
    "log_c": "log c*_i, natural; 0 to log 32",
    "log_c_ratio": "mean over the others of log c*_j, minus log c*_i",
    "disturbance_late": "‖h(θ₀+U_j) − h(θ₀)‖/‖h(θ₀+U_i) − h(θ₀)‖ after layer ⌊0.93 L⌉; ≥ 0",
    "disturbance_final": "the same after the final norm",
    "nonadditivity_<method>_late": "‖h(merged) − h(θ₀+U_i)‖/‖h(θ₀+U_i) − h(θ₀)‖; ≥ 0",
    "nonadditivity_<method>_final": "the same after the final norm",
    "kl_merge_<method>": "KL(p_i ‖ p_merged), nats per answer token",
    "kl_base_other": "KL(p_0 ‖ p_j), nats per answer token",
    "kl_own_other": "KL(p_i ‖ p_j), nats per answer token",
    "js_own_other": "JS(p_i, p_j), nats per answer token; 0 to log 2",
    "top1_disagreement": "share of answer tokens where p_0 and p_j have another first choice",
    "early_retention_<method>": "gain retention of the snapshots' own merge; ≤ about 1",
    "early_transfer": "[L_i(θ₀+U_j) − L_i(θ₀)] over i's own gain in nats; below 0 j helps i",
    "extrapolated_merge": "early merge, the others at `reach` times c*, over own dilution; ≤ 1",
    "joint_gradient_cosine": "cosine of G_i and G_j at θ₀ + U_i + U_j; −1 to 1",
}


def markdown() -> str:
    """EARLY_SIGNALS as docs/early-signals.md."""
    rows = "\n".join(f"| `{name}` | {text} |" for name, text in EARLY_SIGNALS.items())
    return (
        "# Early signals (model tier)\n\n"
        "Measured by running snapshots, each scaled to its own best length, on adapter i's own\n"
        "calibration items (U_i = c* ΔW_i; j is the other adapter, or the sum of the others). This "
        "page is\n`mergeprobe.predict.early_signals.markdown()`; a test keeps the two in step.\n\n"
        f"| signal | what, unit, range |\n|---|---|\n{rows}\n"
    )
