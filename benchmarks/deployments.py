"""Merge, compose logits, or route: retention and cost of each, on trained adapters.

    python benchmarks/deployments.py RUN ... [--rows BANK] [--below 0.8] [--most 3] [--out PAGE]

RUN: the folder of a `mergeprobe demo`, or of a cohort in a bank's work folder. The pairs that are
forecast to conflict most: the best of the rules that a plan offers (mean, sum, equal-norm mean)
below --below for the worse of the two adapters, by the run's own forecast, or the extrapolated
early merge at 10 % of the cohort's training; at most --most of each, and where there is none the
pair with the lowest forecast. For each: measured worst-case retention of every merge rule in
--methods, of composed logits in every mode, and of routing by name; and in one run tokens per
second, latency of one prompt and extra memory of each way to serve the first pair. With --rows, a
folder of a bank's rows, also every pair of its cohorts: what routing by name, which keeps 1 by
definition, keeps more than the merge rule that turned out best.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

import polars as pl
import torch
from trained_run import opened

from mergeprobe.adapters.attach import attached
from mergeprobe.adapters.base import load_base
from mergeprobe.adapters.checkpoint import read_adapter
from mergeprobe.adapters.rows import attached_rows
from mergeprobe.artefact import atomic_file
from mergeprobe.compose import merge
from mergeprobe.compose.logits import MODES, Composition, composed
from mergeprobe.evaluate.retention import retention, set_retention
from mergeprobe.evaluate.score import batch_of, score, score_composed
from mergeprobe.predict.learning import read_tables
from mergeprobe.predict.weighing import WEIGHTED

METHODS = (
    *("mean", "sum", "norm_preserving_mean", "equal_norm_mean", "ties"),
    *("dare_ties", "svc", "tsv_m", "iso_c"),
)


def conflicting(forecast, below, most):
    found = sorted((pair for pair, value in forecast.items() if value < below), key=forecast.get)
    return found[:most] or [min(forecast, key=forecast.get)]


class Pair:
    """One pair's adapters and test items, and what the base and each adapter alone lose on them."""

    def __init__(self, base, run, names):
        self.base, self.names = base, names
        self.adapters = [read_adapter(run.adapters / name) for name in names]
        self.batches = {name: batch_of(base, run.items(name, "test")) for name in names}
        self.zero = {name: score(base, None, batch).loss for name, batch in self.batches.items()}
        self.own = {
            name: score(base, adapter, self.batches[name]).loss
            for name, adapter in zip(names, self.adapters, strict=True)
        }

    def kept(self, losses):
        """(mean, worst, its standard error) of the pair's retention."""
        parts = {n: retention(self.zero[n], self.own[n], losses(n)) for n in self.names}
        found = set_retention(parts)
        return found.mean, found.worst, found.worst_se

    def merged(self, method):
        rank = max(max(adapter.ranks) for adapter in self.adapters)
        adapter = merge(self.adapters, method, rank=rank).adapter
        return self.kept(lambda name: score(self.base, adapter, self.batches[name]).loss)

    def mixed(self, mode):
        how = composition(mode)
        updates = [adapter.modules for adapter in self.adapters]
        return self.kept(
            lambda name: score_composed(self.base, updates, how, self.batches[name]).loss
        )


def composition(mode):
    return Composition((1.0, 1.0) if mode == "sum" else (0.5, 0.5), mode)


def prompts_of(pair, count):
    """Token ids of as many prompts, left-padded by the first token; which adapter each is for."""
    rows, owners = [], []
    for position, name in enumerate(pair.names):
        batch = pair.batches[name]
        for item in range(count // 2):
            wanted = batch.attention_mask[item].bool() & ~batch.completion_mask[item].bool()
            rows.append(batch.ids[item][wanted])
            owners.append(position)
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    mask = torch.stack(
        [torch.cat([row.new_zeros(width - len(row)), torch.ones_like(row)]) for row in rows]
    )
    return ids, mask, owners


def generate(model, ids, mask, tokens):
    with torch.no_grad():
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )


def speeds(pair, batch, tokens, repeats):
    """way -> (tokens a second of a mixed batch, seconds of one prompt's answer)."""
    model = pair.base.model
    updates = [adapter.modules for adapter in pair.adapters]
    one = merge(pair.adapters, "mean", rank=max(pair.adapters[0].ranks)).adapter.modules
    ids, mask, owners = prompts_of(pair, batch)

    def merged(ids, mask, owners):
        with attached(model, one):
            generate(model, ids, mask, tokens)

    def logits(ids, mask, owners):
        with composed(model, updates, composition("mixture")):
            generate(model, ids, mask, tokens)

    def one_batch(ids, mask, owners):
        with attached_rows(model, updates) as rows:
            rows.choose(owners)
            generate(model, ids, mask, tokens)

    def in_turn(ids, mask, owners):
        for position, update in enumerate(updates):
            mine = [row for row, owner in enumerate(owners) if owner == position]
            if mine:
                with attached(model, update):
                    generate(model, ids[mine], mask[mine], tokens)

    ways = {
        "merged adapter": merged,
        "logits composed": logits,
        "routed, one batch": one_batch,
        "routed, in turn": in_turn,
    }
    times = {way: ([], []) for way in ways}
    for _ in range(repeats):  # interleaved: the machine's mood hits all alike
        for way, run in ways.items():
            start = time.perf_counter()
            run(ids, mask, owners)
            times[way][0].append(time.perf_counter() - start)
            start = time.perf_counter()
            run(ids[:1], mask[:1], owners[:1])
            times[way][1].append(time.perf_counter() - start)
    return {
        way: (len(ids) * tokens / min(many), min(single)) for way, (many, single) in times.items()
    }


def pair_table(pair, methods):
    """way -> (mean, worst, its standard error) of the pair's retention; the best merge."""
    rows = {f"merge: {method}": pair.merged(method) for method in methods}
    best = max(rows, key=lambda way: rows[way][1])
    rows |= {f"logits: {mode}": pair.mixed(mode) for mode in MODES}
    rows["routing by name"] = pair.kept(lambda name: pair.own[name])
    return rows, best


def bank_lines(folder, below):
    """Pairs of a bank that are forecast below `below` under every rule that a plan offers."""
    tables = read_tables(folder, points=[0.1])
    best = (
        tables["outcomes"]
        .filter(pl.col("size") == 2, pl.col("method").is_in(METHODS))
        .group_by("cohort", "set", "method")
        .agg(worst=pl.col("gain_retention").min(), known=pl.col("gain_retention").count())
        .filter(pl.col("known") == 2)
        .sort("worst", "method")
        .group_by("cohort", "set", maintain_order=True)
        .last()
    )
    columns = [c for m in WEIGHTED if (c := f"extrapolated_{m}") in tables["pairs"].columns]
    forecast = (
        tables["pairs"]
        .with_columns(set=pl.concat_list("i", "j").list.sort().list.join("+"))
        .group_by("cohort", "set")
        .agg(pl.col(columns).min())
        .with_columns(forecast=pl.max_horizontal(columns).clip(-1.0, 1.2))
    )
    found = best.join(forecast, on=["cohort", "set"]).sort("forecast", "cohort", "set")
    found = found.filter(pl.col("forecast") < below).with_columns(more=1.0 - pl.col("worst"))
    more = found["more"]
    lines = [
        f"{found.height} of {best.height} pairs of {best['cohort'].n_unique()} cohorts are "
        f"forecast below {below}. Routing by name keeps {more.mean():.2f} ± {error(more):.2f} more "
        "than the best merge in the worst case (mean and standard error over pairs; median "
        f"{more.median():.2f}), and at least 0.10 more in {(more >= 0.1).sum()} of them.",
        "",
        "| cohort | pair | forecast | best merge | worst | routing by name, over it |",
        "|---|---|---|---|---|---|",
    ]
    for row in found.to_dicts():
        cells = [row["cohort"], row["set"].replace("+", ", "), f"{row['forecast']:.2f}"]
        cells += [row["method"], f"{row['worst']:.3f}", f"{row['more']:+.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def error(column):
    return column.std() / len(column) ** 0.5


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("--rows", type=Path, help="a folder of a bank's rows")
    parser.add_argument("--below", type=float, default=0.8)
    parser.add_argument("--most", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a Markdown file")
    asked = parser.parse_args()
    base, speed, found = None, None, []
    for path in asked.run:
        run = opened(path)
        base = base or load_base(run.base)
        forecast = run.forecast()
        for names in conflicting(forecast, asked.below, asked.most):
            pair = Pair(base, run, names)
            rows, best = pair_table(pair, asked.methods)
            found.append((run.label, names, forecast[names], rows, best))
            print("\n".join(retention_lines(found[-1])), flush=True)
            if speed is None:
                speed = speed_lines(pair, asked)
                print("\n".join(speed), flush=True)
    if asked.out is not None:
        with atomic_file(asked.out) as temporary:
            temporary.write_text("\n".join(page(found, speed, asked)) + "\n", "utf-8")


def page(found, speed, asked):
    given = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    command = shlex.join(["python", "benchmarks/deployments.py", *given])
    lines = [
        "# Merge, compose logits, or route",
        "",
        f"    {command}",
        "",
        "Pairs whose worse adapter is forecast to keep less than "
        f"{asked.below} under every rule that a plan offers (where a run has none, its lowest); "
        "retention measured on held-out items, one run (seed) an adapter, ± one standard error "
        "over items. *Over the best merge*: worst-case retention less that of the merge rule "
        "that is best for this pair, which is chosen on the same items.",
        "",
        "| pair | forecast | best merge | worst | best logits | worst | over the best merge "
        "| routing by name, over the best merge |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run, names, forecast, rows, best in found:
        logits = max((w for w in rows if w.startswith("logits")), key=lambda w: rows[w][1])
        top, mixed, routed = (rows[way][1] for way in (best, logits, "routing by name"))
        cells = [
            f"{run}: {', '.join(names)}",
            f"{forecast:.2f}",
            best.removeprefix("merge: "),
            f"{top:.3f} ± {rows[best][2]:.3f}",
            logits.removeprefix("logits: "),
            f"{mixed:.3f} ± {rows[logits][2]:.3f}",
            f"{mixed - top:+.3f}",
            f"{routed - top:+.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if asked.rows is not None:
        lines += ["", "## Pairs of the bank", "", *bank_lines(asked.rows, asked.below)]
    lines += ["", "## What they cost", "", *speed, "", "## Every rule", ""]
    for one in found:
        lines += [*retention_lines(one), ""]
    return lines[:-1]


def retention_lines(one):
    run, names, forecast, rows, best = one
    lines = [
        f"**{run}: {' and '.join(names)}**, forecast {forecast:.2f} at best",
        "",
        "| way | mean | worst | over the best merge |",
        "|---|---|---|---|",
    ]
    for way, (mean, worst, error) in rows.items():
        more = worst - rows[best][1]
        lines.append(f"| {way} | {mean:.3f} | {worst:.3f} ± {error:.3f} | {more:+.3f} |")
    return lines


def speed_lines(pair, asked):
    found = speeds(pair, asked.batch, asked.tokens, asked.repeats)
    one = sum(u.B.numel() + u.A.numel() for u in pair.adapters[0].modules.values()) * 4 / 2**20
    memory = {"merged adapter": one}
    cache = {"logits composed": 3}
    fastest = found["merged adapter"]
    lines = [
        f"The pair {' and '.join(pair.names)}: {asked.batch} prompts in one batch, {asked.tokens} "
        f"tokens each, greedy, the fastest of {asked.repeats} interleaved runs in one process; "
        "memory by count, of adapters in float32 and of the key-value cache in prompts.",
        "",
        "| way | tokens/s | against merged | one prompt, s | against merged | adapters, MiB "
        "| key-value cache |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, (speed, latency) in found.items():
        cells = [way, f"{speed:.1f}", f"{speed / fastest[0]:.2f} ×", f"{latency:.2f}"]
        cells += [f"{latency / fastest[1]:.2f} ×", f"{memory.get(way, 2 * one):.1f}"]
        lines.append(f"| {' | '.join([*cells, f'{cache.get(way, 1)} ×'])} |")
    return lines


if __name__ == "__main__":
    main()
