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

from mergeprobe.compose.merge.balance import pcb
from mergeprobe.compose.merge.drop import dare_linear, dare_ties, della, della_linear
from mergeprobe.compose.merge.fisher import fisher
from mergeprobe.compose.merge.isolation import core_isolation, core_isolation_lowrank
from mergeprobe.compose.merge.linear import equal_norm_mean, linear, norm_preserving_mean, total
from mergeprobe.compose.merge.osrm import osrm
from mergeprobe.compose.merge.regmean import regmean
from mergeprobe.compose.merge.routing import ssr
from mergeprobe.compose.merge.search import adamerging, lorahub
from mergeprobe.compose.merge.sign import ties
from mergeprobe.compose.merge.spectral import iso_c, iso_cts, pico, svc, tsv_m
from mergeprobe.compose.merge.spherical import slerp
from mergeprobe.compose.merge.trim import breadcrumbs, magnitude_prune
from mergeprobe.compose.merge.units import lora_lego, robust_merge
from mergeprobe.compose.merge.wudi import wudi, wudi_closed

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
    "equal_norm_mean": Method(
        equal_norm_mean,
        "lowrank",
        "the mean of the updates, each scaled per module to their mean norm",
        "ours; no paper known",
        weights="ratios",
    ),
    "ties": Method(
        ties,
        "entrywise",
        "keep the largest entries, elect a sign for each, average those that agree",
        "arXiv:2306.01708",
        defaults={"density": 0.2, "normalise": 1},
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
    "slerp": Method(
        slerp,
        "lowrank",
        "the mean direction on the sphere, as long as the mean of the norms",
        "doi:10.1145/325165.325242",
        weights="ratios",
    ),
    "magnitude_prune": Method(
        magnitude_prune,
        "entrywise",
        "the largest entries of each update, added",
        "PEFT",
        defaults={"density": 0.5},
        keeps=frozenset({PERMUTATION, GAUGE}),  # trimmed
        tolerance=1e-3,  # tied entries, as for ties
    ),
    "breadcrumbs": Method(
        breadcrumbs,
        "entrywise",
        "the entries of middling magnitude of each update, added",
        "arXiv:2312.06795",
        defaults={"density": 0.09, "gamma": 0.01},
        keeps=frozenset({PERMUTATION, GAUGE}),  # trimmed
        tolerance=1e-3,  # tied entries, as for ties
    ),
    "dare_linear": Method(
        dare_linear,
        "entrywise",
        "entries dropped at random and the rest rescaled, then added",
        "arXiv:2311.03099",
        defaults={"density": 0.5},
        keeps=frozenset({GAUGE}),  # another order, other draws
        seeded=True,
    ),
    "dare_ties": Method(
        dare_ties,
        "entrywise",
        "entries dropped at random, signs elected, those that agree averaged",
        "arXiv:2311.03099",
        defaults={"density": 0.5, "normalise": 1},
        weights="ratios",
        keeps=frozenset({GAUGE}),  # another order, other draws
        seeded=True,
    ),
    "della": Method(
        della,
        "entrywise",
        "small entries dropped more often, signs elected, those that agree averaged",
        "arXiv:2406.11617",
        defaults={"density": 0.5, "epsilon": 0.15, "normalise": 1},
        weights="ratios",
        keeps=frozenset({GAUGE}),  # another order, other draws
        tolerance=1e-3,  # tied entries, as for ties
        seeded=True,
    ),
    "della_linear": Method(
        della_linear,
        "entrywise",
        "small entries dropped more often and the rest rescaled, then added",
        "arXiv:2406.11617",
        defaults={"density": 0.5, "epsilon": 0.15},
        keeps=frozenset({GAUGE}),  # another order, other draws
        tolerance=1e-3,  # tied entries, as for ties
        seeded=True,
    ),
    "pcb": Method(
        pcb,
        "entrywise",
        "a mean of entries by their standing within and between adapters",
        "arXiv:2410.02396",
        defaults={"density": 0.1},
        uniform="1",
        keeps=frozenset({PERMUTATION, GAUGE}),  # trimmed
        tolerance=1e-4,
    ),
    "lora_lego": Method(
        lora_lego,
        "lowrank",
        "rank-one units of all adapters, clustered into the units of the merge",
        "arXiv:2409.16167",
        defaults={"units": 0},
        weights="ratios",
    ),
    "robust_merge": Method(
        robust_merge,
        "lowrank",
        "rank-one units pruned, what a direction lost made up for, added",
        "arXiv:2502.17159",
        defaults={"density": 0.2, "share": 0.2, "scale": 4.0},
        uniform="1",
        keeps=frozenset({PERMUTATION, GAUGE}),  # trimmed, and 4 times as long
        tolerance=1e-3,  # tied entries, as for ties
    ),
    "tsv_m": Method(
        tsv_m,
        "lowrank",
        "singular vectors of all updates made orthogonal to each other, then summed",
        "arXiv:2412.00081",
        defaults={"scale": 1.0},
        uniform="1",
    ),
    "iso_c": Method(
        iso_c,
        "lowrank",
        "the sum with all singular values equal",
        "arXiv:2502.04959",
        defaults={"scale": 1.0},
        uniform="1",
        keeps=frozenset({PERMUTATION, GAUGE}),  # flattens the spectrum of one adapter too
    ),
    "iso_cts": Method(
        iso_cts,
        "lowrank",
        "directions of the sum and of each adapter alone, all singular values equal",
        "arXiv:2502.04959",
        defaults={"common": 0.8, "scale": 1.0},
        uniform="1",
        keeps=frozenset({PERMUTATION, GAUGE}),  # flattens the spectrum of one adapter too
    ),
    "pico": Method(
        pico,
        "lowrank",
        "the mean after scaling down over-shared output directions, norm restored",
        "arXiv:2604.16826",
        weights="ratios",
        # copies share every direction, the leading ones most: those are scaled down
        keeps=ALL - {COPIES},
    ),
    "wudi": Method(
        wudi,
        "entrywise",
        "the sum, moved by Adam to do on each update's own rows what that update does",
        "arXiv:2503.08099",
        defaults={"steps": 300, "learning_rate": 1e-5},
        weights="fixed",
        uniform="1",
        keeps=ALL - {COPIES},  # the sum of copies moves only 300 small steps towards one
        # Adam divides by the gradient's size: where that is rounding, so is the step
        tolerance=1e-4,
    ),
    "wudi_closed": Method(
        wudi_closed,
        "lowrank",
        "the merge that does best on each update's own rows what that update does",
        "arXiv:2503.08099",
        defaults={"ridge": 0.1},
        weights="ratios",
        tolerance=1e-4,
    ),
    "ssr": Method(
        ssr,
        "lowrank",
        "all adapters side by side, their signals told apart by least squares on task inputs",
        "arXiv:2606.10617",
        defaults={"ridge": 1e-4},
        weights="ratios",
        tolerance=1e-3,  # the ridge pulls copies towards zero
        needs=("inputs",),
    ),
    "core_isolation": Method(
        core_isolation,
        "entrywise",
        "each update's largest entries kept as they are, the rest blended by slerp",
        "arXiv:2508.21741",
        defaults={"core": 0.01, "threshold": 0.1},
        weights="ratios",
        tolerance=1e-3,  # tied entries, as for ties
    ),
    "core_isolation_lowrank": Method(
        core_isolation_lowrank,
        "lowrank",
        "each update's largest component kept as it is, the rest blended and kept off them",
        "a variant of arXiv:2508.21741",
        defaults={"components": 1},
        weights="ratios",
    ),
    "fisher": Method(
        fisher,
        "entrywise",
        "the average of every entry, weighted by how much each adapter's loss minds it",
        "arXiv:2111.09832",
        defaults={"floor": 1e-6, "normalise": 1},
        weights="ratios",
        needs=("inputs", "outputs"),
    ),
    "regmean": Method(
        regmean,
        "lowrank",
        "the update whose outputs are nearest to every adapter's own, on that one's inputs",
        "arXiv:2212.09849",
        defaults={"ridge": 0.01, "shared_ridge": 0.1, "shrink": 0.9},
        weights="ratios",
        needs=("inputs",),
    ),
    "osrm": Method(
        osrm,
        "lowrank",
        "each update kept off the inputs that the others' tasks use most, then added",
        "arXiv:2505.22934",
        defaults={"directions": 8},
        keeps=ALL - {COPIES},  # a copy's inputs are the others' too, and given up
        needs=("inputs",),
    ),
    "lorahub": Method(
        lorahub,
        "search",
        "the weights of a linear merge with the least few-shot loss, without gradients",
        "arXiv:2307.13269",
        defaults={"budget": 40, "bound": 1.5, "penalty": 0.05},
        keeps=frozenset(),  # what it finds depends on the examples
        needs=("batches",),
    ),
    "adamerging": Method(
        adamerging,
        "search",
        "the weights of a linear merge whose predictions on unlabelled text are surest",
        "arXiv:2310.02575",
        defaults={"steps": 500, "rate": 1e-3},
        keeps=frozenset(),  # what it finds depends on the text
        needs=("batches",),
    ),
}
