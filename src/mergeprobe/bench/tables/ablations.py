"""Which signals carry the forecast: each family and each tier alone, and all but one."""

from __future__ import annotations

import numpy as np

from mergeprobe.bench.tables.bank import Bank, near
from mergeprobe.bench.tables.forecasters import fitted, forecast_by, plain
from mergeprobe.bench.tables.page import Needs, Page, Part, Table, estimate, number, percent
from mergeprobe.bench.tables.resample import resampled
from mergeprobe.bench.tables.skill import POINTS, Options
from mergeprobe.predict.baselines import Fitter
from mergeprobe.predict.features import FEATURES, TIERS, Tier, columns_of
from mergeprobe.predict.splits import Fold

ALL = "all signals"
METRICS = ("Spearman", "within partners", "R2", "MAE")
COLUMNS = (
    *("signals", "features", "Spearman", "within partners", "R²", "MAE"),
    *("Spearman − all", "within partners − all", "R² − all", "MAE − all"),
)
WORDS = {
    "weights": "finished or half-finished weights",
    "file": "what probes add",
    "model": "what forward passes add",
}


def ablations_page(bank: Bank, options: Options) -> Page:
    title = "Ablations"
    fold = bank.held_out_fold()
    if fold is None:
        return Page("ablations.md", title, "", [Needs(title, "held-out cohorts (h…)")])
    intro = (
        "The fixed mix of ridge and trees, fitted anew for every line on pairs of the training "
        "cohorts, tested on held-out pairs. *Alone*: only these signals, with the setting (method, "
        "size, share of training). *Without*: all others. A family whose loss costs nothing is "
        "carried by others, not useless."
    )
    parts: list[Part] = [by_tier(bank, fold, options)]
    parts += [by_family(bank, fold, tier, options) for tier in ("model", "file")]
    return Page("ablations.md", title, intro, parts)


def by_tier(bank: Bank, fold: Fold, options: Options) -> Table:
    mine = {tier: [n for n, f in FEATURES.items() if f.tier == tier] for tier in TIERS}
    fitters: dict[str, tuple[Fitter, int]] = {ALL: _fitter("model", (), options)}
    for tier in TIERS:
        others = [name for other, names in mine.items() if other != tier for name in names]
        fitters[f"{WORDS[tier]}, alone"] = _fitter("model", others, options)
        fitters[f"without {WORDS[tier]}"] = _fitter("model", mine[tier], options)
    fitters["file tier (weights and probes)"] = _fitter("file", (), options)
    return _table("Each tier alone, and all but one", bank, fold, fitters, options)


def by_family(bank: Bank, fold: Fold, tier: Tier, options: Options) -> Table:
    names = [name for name in columns_of(tier) if name in FEATURES]
    families = dict.fromkeys(FEATURES[name].family for name in names)
    fitters = {ALL: _fitter(tier, (), options)}
    for family in families:
        mine = [name for name in names if FEATURES[name].family == family]
        rest = [name for name in names if FEATURES[name].family != family]
        fitters[f"{family}, alone"] = _fitter(tier, rest, options)
        fitters[f"without {family}"] = _fitter(tier, mine, options)
    title = f"Each family of signals, {tier} tier"
    return _table(title, bank, fold, fitters, options)


def _fitter(tier: Tier, without, options: Options) -> tuple[Fitter, int]:
    """The fitter, and how many features it may see."""
    seen = [n for n in columns_of(tier) if n in FEATURES and n not in set(without)]
    return plain(tier, without=without, seed=options.seed), len(seen)


def _table(
    title: str,
    bank: Bank,
    fold: Fold,
    fitters: dict[str, tuple[Fitter, int]],
    options: Options,
) -> Table:
    rows = bank.rows
    early = np.any([near(rows, p) for p in POINTS], axis=0) & (rows.size == 2)
    part = Fold(fold.name, fold.train & early, fold.test & early)
    found = fitted(rows, part, {name: fitter for name, (fitter, _) in fitters.items()})
    scores = resampled(forecast_by(rows, part.test, found), runs=options.runs, seed=options.seed)
    out = []
    for name, each in scores.items():
        values = [number(each.value[metric]) for metric in METRICS]
        against = [
            "" if name == ALL else estimate(each.estimate(metric, against=scores[ALL]))
            for metric in METRICS
        ]
        out.append([name, str(fitters[name][1]), *values, *against])
    caption = (
        f"`{options.command}`, seed {options.seed}. {bank.said('Pairs, both tasks unseen')}; "
        f"{' and '.join(map(percent, POINTS))} of training and all methods together, "
        f"{int(part.test.sum())} rows. Differences are paired, with 90 % intervals of "
        f"{options.runs} bootstrap samples over families; no SD or SE."
    )
    return Table(title, caption, COLUMNS, out)
