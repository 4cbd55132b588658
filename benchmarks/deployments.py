"""Merge, compose logits, or route: retention and cost of each, on a demo run's adapters.

    python benchmarks/deployments.py RUN [--below 0.8] [--tokens 32] [--batch 8]

Pairs that the run's own forecast calls conflicting (best merge by mean or sum below --below), and
if there are none the pair with the lowest forecast. For each: measured worst-case retention of
every merge rule in --methods, of composed logits in every mode, and of routing by name; and in
one run tokens per second, latency of one prompt and extra memory of each way to serve the pair.
"""

import argparse
import time
from itertools import combinations
from pathlib import Path

import polars as pl
import torch

from mergeprobe.adapters.attach import attached
from mergeprobe.adapters.base import load_base
from mergeprobe.adapters.checkpoint import read_adapter
from mergeprobe.adapters.rows import attached_rows
from mergeprobe.bench.folder import RunFolder
from mergeprobe.compose import merge
from mergeprobe.compose.logits import MODES, Composition, composed
from mergeprobe.evaluate.retention import retention, set_retention
from mergeprobe.evaluate.score import batch_of, score, score_composed

METHODS = ("mean", "sum", "norm_preserving_mean", "ties", "dare_ties", "svc", "tsv_m", "iso_c")


def conflicting(run, names, below):
    """Pairs by the run's forecasts: the better of mean and sum, the worse of the two adapters."""
    rows = pl.read_parquet(run.forecasts).filter(pl.col("method").is_in(["mean", "sum"]))
    forecast = {}
    for a, b in combinations(names, 2):
        pair = rows.filter(
            ((pl.col("adapter") == a) & (pl.col("others") == b))
            | ((pl.col("adapter") == b) & (pl.col("others") == a))
        )
        worst = pair.group_by("method").agg(pl.col("retention").min())
        forecast[a, b] = float(worst["retention"].max())
    found = [pair for pair, value in forecast.items() if value < below]
    return {pair: forecast[pair] for pair in found or [min(forecast, key=forecast.get)]}


class Pair:
    """One pair's adapters and test items, and what the base and each adapter alone lose on them."""

    def __init__(self, base, run, config, names):
        self.base, self.names = base, names
        self.adapters = [read_adapter(run.adapters / name) for name in names]
        self.batches = {
            name: batch_of(
                base, run.task(name, config).generate("test", config.test_items, config.seed)
            )
            for name in names
        }
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("--below", type=float, default=0.8)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    base, timed = None, False
    for path in asked.run:
        run = RunFolder(path)
        config = run.config()
        base = base or load_base(config.base)
        for names, forecast in conflicting(run, config.tasks, asked.below).items():
            pair = Pair(base, run, config, names)
            print(f"{path.name}: {' and '.join(names)}, forecast {forecast:.2f} at best")
            rows = {f"merge: {method}": pair.merged(method) for method in asked.methods}
            best = max(rows, key=lambda way: rows[way][1])
            rows |= {f"logits: {mode}": pair.mixed(mode) for mode in MODES}
            rows["routing by name"] = pair.kept(lambda name, pair=pair: pair.own[name])
            for way, (mean, worst, error) in rows.items():
                more = worst - rows[best][1]
                print(f"  {way:30} mean {mean:6.3f}  worst {worst:6.3f} ± {error:.3f}  {more:+.3f}")
            print(f"  (last: against the best merge, {best.split(': ')[1]}; ± one SE over items)")
            if not timed:
                report(pair, speeds(pair, asked.batch, asked.tokens, asked.repeats), asked)
                timed = True


def report(pair, found, asked):
    one = sum(u.B.numel() + u.A.numel() for u in pair.adapters[0].modules.values()) * 4 / 2**20
    memory = {
        "merged adapter": one,
        "logits composed": 2 * one,
        "routed, one batch": 2 * one,
        "routed, in turn": 2 * one,
    }
    cache = {"logits composed": 3}
    fastest = found["merged adapter"]
    print(f"  {asked.batch} prompts, {asked.tokens} tokens each, greedy, best of {asked.repeats}:")
    for way, (speed, latency) in found.items():
        print(
            f"  {way:20} {speed:7.1f} tokens/s ({speed / fastest[0]:.2f}×)  one prompt "
            f"{latency:.2f} s ({latency / fastest[1]:.2f}×)  adapters {memory[way]:.1f} MiB, "
            f"{cache.get(way, 1)}× key-value cache"
        )


if __name__ == "__main__":
    main()
