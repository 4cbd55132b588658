"""Splits that a forecast has to survive: what is tested was never seen, by family of tasks.

Near-duplicate tasks share a family. A *block* is a set of families that are left out together:
rows whose families all lie in the block are tested, rows that hold none of them are trained on,
and rows that hold some are dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from mergeprobe.errors import NotForecastable
from mergeprobe.predict.learning import Rows

FEWEST_COHORTS = 4
"""With fewer the blocks are pairs of families instead of cohorts."""
MOST_PAIRS = 30


@dataclass(frozen=True, eq=False)
class Fold:
    """name: what is unseen. train, test: masks over the rows; rows in neither are dropped."""

    name: str
    train: Bool[np.ndarray, " rows"]
    test: Bool[np.ndarray, " rows"]


def unseen_cohorts(
    rows: Rows,
    groups: Iterable[Sequence[str]] | None = None,
    among: Iterable[str] | None = None,
) -> list[Fold]:
    """Each group of cohorts (default: each cohort) is tested by rows of other cohorts that share
    no family with it, in any role: all tasks of a tested set are unseen. among: the cohorts that
    may be trained on, when some are frozen as held out."""
    names, held = rows.holds()
    cohorts = rows.cohort
    groups = [(c,) for c in sorted(set(cohorts.tolist()))] if groups is None else groups
    allowed = np.ones(len(rows), bool) if among is None else np.isin(cohorts, list(among))
    folds = []
    for group in groups:
        test = np.isin(cohorts, list(group))
        block = held[test].any(0)
        folds.append(Fold("+".join(group), allowed & ~test & ~held[:, block].any(1), test))
    return _usable(folds, f"no cohort is unlike the others in all of {len(names)} families")


def unseen_families(rows: Rows, size: int = 2) -> list[Fold]:
    """Every block of `size` families. A row within fewer families is in several folds."""
    names, held = rows.holds()
    if len(names) <= size:
        raise NotForecastable(
            f"leaving {size} families out needs more than {size}; got {', '.join(names)}"
        )
    folds = []
    for block in itertools.combinations(range(len(names)), size):
        inside = held[:, block].sum(1) == held.sum(1)
        touched = np.any(held[:, block], axis=1)
        folds.append(Fold("+".join(names[k] for k in block), ~touched, inside))
    return _usable(folds, "no set lies within the left-out families")


def unseen_groups(rows: Rows, count: int, seed: int = 0) -> list[Fold]:
    """`count` random groups of families, each two groups one block: count (count + 1) / 2 folds
    at most, cheaper than every pair of families. A row within one group is in several folds."""
    names, held = rows.holds()
    count = min(count, len(names))
    order = np.random.default_rng(seed).permutation(len(names))
    groups = [order[k::count] for k in range(count)]
    folds = []
    for pair in itertools.combinations(range(count), 2):
        block = np.concatenate([groups[k] for k in pair])
        inside = held[:, block].sum(1) == held.sum(1)
        touched = np.any(held[:, block], axis=1)
        folds.append(Fold(f"groups {pair[0]} and {pair[1]}", ~touched, inside))
    return _usable(folds, "no set lies within two groups of families")


def one_unseen(rows: Rows) -> list[Fold]:
    """Each family left out of training and tested in sets of which all the rest was seen."""
    names, held = rows.holds()
    folds = []
    for k, name in enumerate(names):
        train = ~held[:, k]
        seen = np.any(held[train], axis=0)
        seen[k] = True
        test = held[:, k] & (held.sum(1) > 1) & ~held[:, ~seen].any(1)
        folds.append(Fold(name, train, test))
    return _usable(folds, "every set lies within one family")


def unseen_bases(rows: Rows, *, families_too: bool = True) -> list[Fold]:
    """Each base model is tested by the others; families_too drops its families from training."""
    bases = rows.table["base"].to_numpy()
    held = rows.holds()[1]
    folds = []
    for base in sorted(set(bases.tolist())):
        test = bases == base
        train = ~test
        if families_too:
            train &= ~held[:, held[test].any(0)].any(1)
        folds.append(Fold(base, train, test))
    return _usable(folds, "all rows are of one base model")


def unseen_values(rows: Rows, column: str, *, families_too: bool = False) -> list[Fold]:
    """Each learning rate, rank, number of steps or domain (`column`: a list column of Rows.table)
    left out of training in any role; tested where i itself has it. families_too drops i's own
    family as well (a domain holds its families anyway)."""
    values, held = rows.holds(column)
    own = np.array([row[0] for row in rows.table[column].to_list()])
    names, families = rows.holds()
    folds = []
    for k, value in enumerate(values):
        test, train = own == value, ~held[:, k]
        if not families_too:
            folds.append(Fold(f"{column} {value}", train, test))
            continue
        for f, name in enumerate(names):  # one family at a time: few rows are lost
            mine = test & (rows.family == name)
            folds.append(Fold(f"{column} {value}, {name}", train & ~families[:, f], mine))
    return _usable(folds, f"all rows have one value of {column}")


def unseen_sizes(rows: Rows, trained: int = 2) -> list[Fold]:
    """Larger sets of unseen families, from rows of at most `trained` adapters."""
    small = rows.size <= trained
    folds = [Fold(f.name, f.train & small, f.test & ~small) for f in unseen_all(rows)]
    return _usable(folds, f"no set is larger than {trained}")


def unseen_all(rows: Rows, *, most: int = 12, seed: int = 0) -> list[Fold]:
    """The split by which models are chosen and intervals made: by cohort where there are
    FEWEST_COHORTS (in at most `most` groups), else by two families (up to MOST_PAIRS folds) or
    two groups of them."""
    cohorts = sorted(set(rows.cohort.tolist()))
    if len(cohorts) >= FEWEST_COHORTS:
        count = min(most, len(cohorts))
        order = np.random.default_rng(seed).permutation(len(cohorts))
        groups = [[cohorts[c] for c in sorted(order[k::count])] for k in range(count)]
        try:
            return unseen_cohorts(rows, groups)
        except NotForecastable:
            pass  # every family is in every cohort: fall back on families
    families = len(rows.holds()[0])
    if families * (families - 1) // 2 <= MOST_PAIRS:
        return unseen_families(rows, 2)
    count = next(k for k in range(families, 2, -1) if k == 3 or k * (k - 1) // 2 <= MOST_PAIRS)
    return unseen_groups(rows, count, seed)


def leaks(rows: Rows, fold: Fold) -> set[str]:
    """Families on both sides of a fold; empty where both tasks are unseen."""
    names, held = rows.holds()
    both = np.any(held[fold.train], axis=0) & np.any(held[fold.test], axis=0)
    return {name for name, shared in zip(names, both, strict=True) if shared}


Splitter = Callable[[Rows], list[Fold]]
REGIMES: dict[str, Splitter] = {
    "all unseen": unseen_all,
    "one unseen": one_unseen,
    "unseen base": unseen_bases,
    "unseen learning rate": lambda rows: unseen_values(rows, "learning_rates"),
    "unseen rank": lambda rows: unseen_values(rows, "ranks"),
    "unseen horizon": lambda rows: unseen_values(rows, "steps"),
    "unseen domain": lambda rows: unseen_values(rows, "domains"),
    "unseen set size": unseen_sizes,
}


def _usable(folds: list[Fold], otherwise: str) -> list[Fold]:
    """The folds with rows on both sides; NotForecastable if there are none."""
    kept = [fold for fold in folds if fold.train.any() and fold.test.any()]
    if not kept:
        raise NotForecastable(f"no split leaves rows on both sides: {otherwise}")
    return kept
