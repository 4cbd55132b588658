"""The table of merge rules. A new rule is its function, one row here, one row in the contract test.

A low-rank rule takes (updates: Sequence[LowRank], weights: Sequence[float], **options) of one
module and returns the exact merge as a LowRank. An entry-wise rule takes a dense float32 stack
(n, out, in) and weights (n,), and returns (out, in). A seeded rule takes `generator` as well, and
one that needs data takes `data`, one ModuleData for each update (compose/merge/data.py). A search
finds weights for a linear merge of whole adapters; it needs the base model and batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mergeprobe.compose.merge.linear import linear, norm_preserving_mean, total
from mergeprobe.compose.merge.sign import ties
from mergeprobe.compose.merge.spectral import svc

# what a rule keeps with its default options; the contract test checks each claim
PERMUTATION = "permutation"  # the order of the adapters does not matter
GAUGE = "gauge"  # (B Q⁻¹, Q A) merges as (B, A)
COPIES = "copies"  # T copies of one adapter merge to that adapter
IDENTITY = "identity"  # one adapter of weight 1 merges to itself
ALL = frozenset({PERMUTATION, GAUGE, COPIES, IDENTITY})


@dataclass(frozen=True)
class Method:
    """One row of METHODS.

    weights: what a caller's weights mean: "fixed" (none are taken), "as given" (their size
    matters) or "ratios" (only their proportions do). uniform: the weights where none are given.
    defaults: the options and their published values. keeps: properties that hold with the
    defaults, each to relative Frobenius error `tolerance`. needs: the data without which it cannot
    be carried out: parts of the adapters' probes, or "batches" of tokens and the base model.
    seeded: it draws at random, from an explicit generator.
    """

    function: Callable[..., Any]
    kind: Literal["lowrank", "entrywise", "search"]
    summary: str
    source: str
    defaults: Mapping[str, float | str] = field(default_factory=dict)
    weights: Literal["fixed", "as given", "ratios"] = "as given"
    uniform: Literal["1/T", "1"] = "1/T"
    keeps: frozenset[str] = ALL
    tolerance: float = 1e-5
    needs: tuple[Literal["inputs", "outputs", "batches"], ...] = ()
    seeded: bool = False


METHODS: dict[str, Method] = {
    "mean": Method(
        linear,
        "lowrank",
        "the average of the updates, (1/T) Σ ΔWᵢ",
        "arXiv:2203.05482",
        weights="fixed",
    ),
    "linear": Method(
        linear,
        "lowrank",
        "Σ wᵢ ΔWᵢ with the weights as given; the mean where none are",
        "arXiv:2212.04089",
    ),
    "sum": Method(
        total,
        "lowrank",
        "task arithmetic, scale · Σ ΔWᵢ",
        "arXiv:2212.04089",
        defaults={"scale": 1.0},
        uniform="1",
        keeps=ALL - {COPIES},  # T copies sum to T times the adapter
    ),
    "norm_preserving_mean": Method(
        norm_preserving_mean,
        "lowrank",
        "the mean, stretched per module to the mean norm of the updates",
        "a baseline; no paper",
        weights="ratios",
    ),
    "ties": Method(
        ties,
        "entrywise",
        "keep the largest entries, elect a sign for each, average those that agree",
        "arXiv:2306.01708",
        defaults={"density": 0.2},
        weights="ratios",
        keeps=frozenset({PERMUTATION, GAUGE}),  # trimming drops entries of a single adapter too
        # exactly tied or nearly tied entries can fall on either side of the trim
        tolerance=1e-3,
    ),
    "svc": Method(
        svc,
        "lowrank",
        "the sum, with directions that several adapters share counted once",
        "arXiv:2602.05536",
        defaults={"alpha": 0.1},
        uniform="1",
    ),
}
