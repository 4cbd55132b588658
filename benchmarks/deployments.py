"""Merge, compose logits, or route: retention and cost of each, on trained adapters.

    python benchmarks/deployments.py RUN ... [--below 0.8] [--most 3] [--tokens 32] [--batch 8]

RUN: the folder of a `mergeprobe demo`, or of a cohort in a bank's work folder. The pairs that are
forecast to conflict most: the better of mean and sum below --below, by the run's own forecast, or
the extrapolated early merge at 10 % of the cohort's training; at most --most of each, and where
there is none the pair with the lowest forecast. For each: measured worst-case retention of
every merge rule in --methods, of composed logits in every mode, and of routing by name; and in
one run tokens per second, latency of one prompt and extra memory of each way to serve the pair.
"""

import argparse
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import polars as pl
import torch

from mergeprobe.adapters.attach import attached
from mergeprobe.adapters.base import load_base
from mergeprobe.adapters.checkpoint import read_adapter
from mergeprobe.adapters.rows import attached_rows
from mergeprobe.artefact import read_json
from mergeprobe.bench.bank.folder import CohortFolder, read_spec
from mergeprobe.bench.folder import RunFolder
from mergeprobe.compose import merge
from mergeprobe.compose.logits import MODES, Composition, composed
from mergeprobe.errors import DataError
from mergeprobe.evaluate.retention import retention, set_retention
from mergeprobe.evaluate.score import batch_of, score, score_composed

METHODS = (
    *("mean", "sum", "norm_preserving_mean", "equal_norm_mean", "ties"),
    *("dare_ties", "svc", "tsv_m", "iso_c"),
)


class Opened(NamedTuple):
    """A folder's adapters and tasks. forecast: (a, b) -> retention of the worse adapter under the
    better of mean and sum."""

    base: str
    names: tuple[str, ...]
    adapters: Path
    items: Callable
    forecast: dict


def opened(path):
    if (path / "cohort.json").exists():
        return opened_cohort(path)
    run = RunFolder(path)
    config = run.config()
    rows = pl.read_parquet(run.forecasts).filter(pl.col("method").is_in(["mean", "sum"]))
    table = {(r["adapter"], r["others"], r["method"]): r["retention"] for r in rows.to_dicts()}

    def items(name):
        return run.task(name, config).generate("test", config.test_items, config.seed)

    return Opened(config.base, config.tasks, run.adapters, items, best_merge(table, config.tasks))


def opened_cohort(path):
    folder = CohortFolder(path.parent, read_spec(path / "cohort.json")[0])
    table = {}
    for a, b in combinations(folder.spec.names, 2):
        for row in pair_rows(folder, a, b):
            for method in ("mean", "sum"):
                table[row["i"], row["j"], method] = min(1.2, max(-1.0, row[method]))
    spec = folder.spec
    return Opened(
        spec.base, spec.names, folder.adapters, folder.test_items, best_merge(table, spec.names)
    )


def pair_rows(folder, a, b):
    """The extrapolated early merge of both at 10 %, from what the cohort measured."""
    for i, j in ((a, b), (b, a)):
        row = read_json(folder.early(i, 0.1), DataError)["pairs"][j]
        yield {"i": i, "j": j, **{m: row[f"extrapolated_{m}"] for m in ("mean", "sum")}}


def best_merge(table, names):
    return {
        (a, b): max(min(table[a, b, m], table[b, a, m]) for m in ("mean", "sum"))
        for a, b in combinations(names, 2)
    }


def conflicting(forecast, below, most):
    found = sorted((pair for pair, value in forecast.items() if value < below), key=forecast.get)
    return found[:most] or [min(forecast, key=forecast.get)]


class Pair:
    """One pair's adapters and test items, and what the base and each adapter alone lose on them."""

    def __init__(self, base, run, names):
        self.base, self.names = base, names
        self.adapters = [read_adapter(run.adapters / name) for name in names]
        self.batches = {name: batch_of(base, run.items(name)) for name in names}
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("--below", type=float, default=0.8)
    parser.add_argument("--most", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    base, timed = None, False
    for path in asked.run:
        run = opened(path)
        base = base or load_base(run.base)
        for names in conflicting(run.forecast, asked.below, asked.most):
            pair = Pair(base, run, names)
            print(f"{path.name}: {' and '.join(names)}, forecast {run.forecast[names]:.2f} at best")
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
