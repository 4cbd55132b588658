"""The router by prompt: right on held-out prompts, silent on unknown tasks, honest on equal ones.

    python benchmarks/router.py [--run RUN] [--examples 32] [--held-out 24]

Known: 16 tasks of the bank whose prompts differ; unknown: 8 others; the same prompts: the bank's
planted conflicts. With --run, a folder of `mergeprobe demo` or of a cohort in a bank's work folder,
also what routing by prompt costs in retention against routing by name, with that run's adapters,
and what Arrow keeps, which routes by token without prompts. On SmolLM2-135M unless --base.
"""

import argparse
from itertools import combinations
from pathlib import Path

from trained_run import opened

from mergeprobe.adapters.base import load_base
from mergeprobe.adapters.checkpoint import read_adapter
from mergeprobe.bench.tasks import BANK_TASKS
from mergeprobe.bench.tasks.bank import RELATIONS
from mergeprobe.capture.batch import item_scores
from mergeprobe.compose.arrow import arrowed
from mergeprobe.compose.router_file import make_router, route
from mergeprobe.evaluate.retention import retention, set_retention
from mergeprobe.evaluate.score import batch_of, score, score_each

KNOWN = (
    *("sort_up", "multiply", "equation", "python_slice", "sql", "python_range"),
    *("molar_mass", "heavier", "odd_one_out", "nth_word", "backwards", "letter_count"),
    *("access", "age_limit", "date_iso", "number_english"),
)
UNKNOWN = (
    *("later_time", "phrase_french", "injection", "quotient"),
    *("snake_case", "complement", "redact", "alphabetical"),
)


def prompts(task, split, count):
    return [item.prompt for item in BANK_TASKS[task].generate(split, count, 0)]


def routed(base, examples, held_out):
    router = make_router(base, {name: prompts(name, "calibration", examples) for name in KNOWN})
    right = total = sure = 0
    for name in KNOWN:
        for choice in route(router, base, prompts(name, "test", held_out)):
            total += 1
            right += choice.name == name
            sure += choice.certain
    left = [
        choice.name is None
        for name in UNKNOWN
        for choice in route(router, base, prompts(name, "test", held_out))
    ]
    print(f"{len(KNOWN)} tasks, {examples} example prompts each:")
    print(f"  held-out prompts routed right: {right}/{total} = {right / total:.1%}")
    print(f"  of them certain: {sure}/{total}")
    share = sum(left) / len(left)
    print(f"  prompts of {len(UNKNOWN)} unknown tasks left to the base: {sum(left)} = {share:.1%}")
    least = min(
        (float(router.separation[a, b]), router.names[a], router.names[b])
        for a, b in combinations(range(len(router.names)), 2)
    )
    print(f"  least separable: {least[1]} and {least[2]}, AUC {least[0]:.3f}")


def same_prompts(base, examples, held_out):
    pairs = [(r.one, r.two) for r in RELATIONS if r.kind == "conflict"]
    promised = []
    for pair in pairs:
        router = make_router(base, {n: prompts(n, "calibration", examples) for n in pair})
        for name in pair:
            for choice in route(router, base, prompts(name, "test", held_out)):
                if choice.name is not None and choice.certain:
                    promised.append((*pair, float(router.separation[0, 1])))
    total = 2 * len(pairs) * held_out
    print(f"{len(pairs)} pairs with the same prompts and other answers:")
    print(f"  prompts of which a certain choice was made: {len(promised)}/{total}")
    for one, two, auc in sorted(set(promised)):
        print(f"    {one} and {two} (AUC {auc:.3f}): their prompts do differ somewhere")


def regret(base, run):
    adapters = {name: read_adapter(run.adapters / name) for name in run.names}
    router = make_router(
        base, {name: [item.prompt for item in run.items(name, "calibration")] for name in run.names}
    )
    print(f"run {run.label}: {', '.join(run.names)}")
    kept = {"by prompt": {}, "Arrow": {}}
    wrong = total = 0
    for name in run.names:
        items = run.items(name, "test")
        batch = batch_of(base, items)
        without, alone = (score(base, one, batch).loss for one in (None, adapters[name]))
        with arrowed(base.model, [*adapters.values()]) as model:
            kept["Arrow"][name] = retention(without, alone, item_scores(model, batch).loss)
        if rivals := router.rivals(name):
            print(f"  '{name}' is not promised: its prompts look like those of {', '.join(rivals)}")
            continue
        chosen = [choice.name for choice in route(router, base, [item.prompt for item in items])]
        losses = score_each(base, adapters, chosen, batch).loss
        kept["by prompt"][name] = retention(without, alone, losses)
        wrong += sum(one != name for one in chosen)
        total += len(chosen)
    print(f"  of the others, prompts sent elsewhere than to their adapter: {wrong}/{total}")
    for way, parts in kept.items():
        if parts:
            found = set_retention(parts)
            print(
                f"  retention {way}: mean {found.mean:.3f}, worst {found.worst:.3f} "
                f"('{found.worst_adapter}'); regret against routing by name {1 - found.mean:.1%}"
            )


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m-instruct-q4")
    parser.add_argument("--run", type=Path, action="append", default=[])
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=24)
    asked = parser.parse_args()
    base = load_base(asked.base)
    routed(base, asked.examples, asked.held_out)
    same_prompts(base, asked.examples, asked.held_out)
    for path in asked.run:
        regret(base, opened(path))


if __name__ == "__main__":
    main()
