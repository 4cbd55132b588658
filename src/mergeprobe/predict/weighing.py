"""Merge rules that weigh whole updates: what they do is known from names and norms alone.

A forecast for such a rule needs no merge, so each has the surrogate and every early signal of its
own. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from mergeprobe.errors import NotForecastable

WEIGHTED = ("mean", "sum", "equal_norm_mean")
ALIKE = 1.25
"""Norms within this factor of each other: equal_norm_mean is then left out, as it weighs each
adapter within 12 % of what the mean does (for two; less for more)."""


def weights_of(method: str, norms: Mapping[str, float]) -> dict[str, float]:
    """What each finished update ΔW_a is multiplied by, by name.

    norms: ‖ΔW_a‖ at the end of training, in any unit. mean: 1/T. sum: 1. equal_norm_mean:
    n̄/(T n_a), n̄ the mean norm of those that are not 0, and 0 for an adapter that is; the rule
    itself weighs each module so, which whole norms stand for here. NotForecastable for other rules.
    """
    if method == "sum":
        return dict.fromkeys(norms, 1.0)
    if method == "mean":
        return dict.fromkeys(norms, 1.0 / len(norms))
    if method != "equal_norm_mean":
        raise NotForecastable(f"'{method}' does not weigh whole updates; {', '.join(WEIGHTED)} do")
    heard = [norm for norm in norms.values() if norm > 0]
    share = sum(heard) / len(heard) / len(norms) if heard else 0.0
    return {name: share / norm if norm > 0 else 0.0 for name, norm in norms.items()}


def worth_asking(norms: Mapping[str, float]) -> tuple[str, ...]:
    """The rules of WEIGHTED that differ for updates of these norms."""
    alike = max(norms.values()) <= ALIKE * min(norms.values())
    return tuple(m for m in WEIGHTED if m != "equal_norm_mean" or not alike)
