"""All pairs of N adapters: seconds, cost a pair, share of the machine's matrix speed, memory.

    pip install gradience==0.11.0
    python benchmarks/signals_pairs.py --out signals_pairs.json

Synthetic LoRA adapters of SmolLM2-135M's shapes (r = 8, all 210 modules) are written to disk and
compared, in one run on one machine, with
(a) the dense way: form both ΔW of a pair, take the cosine (and for the spectral families their
    SVDs), on --dense-pairs pairs, times the number of pairs;
(b) `gradience`'s merge audit, on --audit-pairs pairs in this process and one pair by its command
    line, times the number of pairs;
(c) the speed of a 2048 × 2048 × 2048 float32 product, best of ten.
Every measurement of ours runs in a process of its own, so that its peak memory is its own. What is
extrapolated says so. The whole run takes about half an hour; `--adapters 8 12` is a smoke test.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, WIDE, KEYS, LAYERS = 576, 1536, 192, 30
MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}
STEPS = ("gram", "sign", "spectral", "sketch", "screen", "add")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--spectral-up-to", type=int, default=200, help="adapters; slow beyond")
    parser.add_argument("--dense-pairs", type=int, default=2)
    parser.add_argument("--audit-pairs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, help="where the adapters lie; default: temporary")
    parser.add_argument("--out", type=Path, help="all figures, as JSON")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.step:
        print(json.dumps(step(asked.step, asked.work, asked.adapters[0])))
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = asked.work or Path(scratch)
        figures = compare(asked, work)
    if asked.out:
        asked.out.write_text(json.dumps(figures, indent=2) + "\n")
    show(figures)


def compare(asked: argparse.Namespace, work: Path) -> dict[str, Any]:
    write_adapters(work, max(asked.adapters), asked.rank, asked.layers)
    figures: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "threads": asked.threads, "torch": torch.__version__},
        "rank": asked.rank,
        "modules": asked.layers * len(MODULES),
        "sgemm_gflops": sgemm_peak(),
        "dense": dense_costs(work, asked.dense_pairs, asked.layers),
        "gradience": audit_costs(work, asked.audit_pairs),
        "ours": [],
    }
    for count in asked.adapters:
        for name in STEPS:
            if name == "spectral" and count > asked.spectral_up_to:
                continue
            found = child(name, work, count, asked.threads)
            figures["ours"].append({"step": name, "adapters": count} | found)
            print(f"{count} adapters, {name}: {found['seconds']:.2f} s", file=sys.stderr)
    return figures


def write_adapters(work: Path, count: int, rank: int, layers: int) -> None:
    """PEFT folders a0, a1, … where they are missing; factors as after some training."""
    for index in range(count):
        folder = work / f"a{index}"
        if (folder / "adapter_config.json").exists():
            continue
        draw = torch.Generator().manual_seed(index)
        tensors = {}
        for layer in range(layers):
            for name, (out, into) in MODULES.items():
                key = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(rank, into, generator=draw) / 24
                tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=draw) / 100
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "smollm2-135m-shapes",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": sorted({name.split(".")[1] for name in MODULES}),
            "bias": "none",
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))


def child(name: str, work: Path, count: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--step", name, "--work", str(work)]
    command += ["--adapters", str(count), "--threads", str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# --- ours, each in a process of its own


def step(name: str, work: Path, count: int) -> dict[str, Any]:
    from mergeprobe.signals.bounds import screening_size
    from mergeprobe.signals.screen import kept_sketches, read_sketch, screen

    pairs = count * (count - 1) // 2
    sketches = work / "sketches"
    if name == "screen":
        files = [sketches / f"a{index}.sketch.safetensors" for index in range(count)]
        seconds, found = timed(lambda: screen([read_sketch(file) for file in files]))
        more = screening_errors(found, work) | {"bound": float(found["bound"].max())}
        return {"seconds": seconds, "pairs": pairs, "mib": peak_memory(), **more}
    reading, probes = timed(lambda: read_probes(work, count))
    if name == "sketch":
        for old in sketches.glob("*"):
            old.unlink()
        seconds, _ = timed(lambda: kept_sketches(probes, sketches))
        more = {"numbers_a_module": screening_size(0.02, len(probes[0].updates))}
    else:
        seconds, more = measured(name, probes, work)
    return {
        "seconds": seconds,
        "reading": reading,
        "pairs": more.pop("pairs", pairs),
        "mib": peak_memory(),
        **more,
    }


def measured(name: str, probes: list, work: Path) -> tuple[float, dict[str, Any]]:
    from mergeprobe.signals import Effort, measure
    from mergeprobe.signals.pair_file import add_pairs, write_pairs
    from mergeprobe.signals.rows import LARGEST

    effort = Effort(("gram",) if name == "add" else (name,), precision="single")
    out = work / f"{name}.parquet"
    if name == "add":
        # one more adapter than a table that is already there
        write_pairs(measure(probes[:-1], effort, largest=LARGEST), out, effort)
        seconds, _ = timed(lambda: add_pairs(out, probes, out))
        return seconds, {"pairs": len(probes) - 1}
    wanted = {key: value for key, value in LARGEST.items() if key in FAMILY_OF[name]}
    seconds, panel = timed(lambda: measure(probes, effort, largest=wanted))
    writing, _ = timed(lambda: write_pairs(panel, out, effort))
    more = {"writing": writing, "gflop": product_gflop(probes, effort)}
    return seconds, more | ({"products": product_speed(probes, effort)} if name == "gram" else {})


FAMILY_OF = {
    "gram": ("frobenius_cosine", "amplification"),
    "sign": ("sign_conflict",),
    "spectral": ("output_overlap", "spectral_amplification"),
}


def read_probes(work: Path, count: int) -> list:
    from mergeprobe.capture.probe import read_source
    from mergeprobe.signals import on_disk

    return [on_disk(read_source(work / f"a{index}")) for index in range(count)]


def product_gflop(probes: list, effort: Any) -> float:
    """Of the matrix products that the gram family takes: tiles on and above the diagonal."""
    total = 0.0
    for module, (out, into) in probes[0].updates.shapes.items():
        rank = probes[0].updates.ranks[module]
        run = effort.side(rank * len(probes)) // rank
        sides = [min(run, len(probes) - start) for start in range(0, len(probes), run)]
        tiles = sum(a * b for i, a in enumerate(sides) for b in sides[i:])
        total += 2.0 * tiles * rank * rank * (out + into)
    return total / 1e9


def product_speed(probes: list, effort: Any, repeats: int = 5) -> float:
    """GFLOP/s of those products by themselves: one tile a size of the modules' sides, best of
    `repeats`, each size weighted by its work."""
    updates = probes[0].updates
    rank = max(updates.ranks.values())
    run = min(effort.side(rank * len(probes)) // rank, len(probes))
    sides = [size for shape in updates.shapes.values() for size in shape]
    work = seconds = 0.0
    for size in set(sides):
        one, two = torch.randn(rank * run, size), torch.randn(rank * run, size)
        best = min(timed(lambda one=one, two=two: one @ two.T)[0] for _ in range(repeats))
        work += sides.count(size) * 2e-9 * (rank * run) ** 2 * size
        seconds += sides.count(size) * best
    return work / seconds


def screening_errors(found: Any, work: Path) -> dict[str, float]:
    """Against the exact cosines of the gram step's file of the same adapters."""
    import polars as pl

    exact = pl.scan_parquet(work / "gram.parquet").select("a", "b", exact="frobenius_cosine")
    both = found.lazy().join(exact, on=["a", "b"])
    off = (pl.col("frobenius_cosine") - pl.col("exact")).abs()
    row = both.select(
        worst=off.max(), beyond=(off > pl.col("bound")).mean(), compared=pl.len()
    ).collect()
    return {"worst_error": row["worst"][0], "beyond_bound": row["beyond"][0]}


def peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- the others


def sgemm_peak(size: int = 2048, repeats: int = 10) -> float:
    one, two = torch.randn(size, size), torch.randn(size, size)
    return max(2e-9 * size**3 / timed(lambda: one @ two)[0] for _ in range(repeats))


def dense_costs(work: Path, pairs: int, layers: int) -> dict[str, float]:
    """Seconds a pair: cosine from dense updates, and overlaps and principal angles by their SVDs.
    The SVDs on one layer of the first pair, times the layers."""
    from mergeprobe.adapters.checkpoint import read_adapter

    def cosine(one: dict, two: dict) -> float:
        sums = [0.0, 0.0, 0.0]
        for module in one:
            x, y = one[module].dense(), two[module].dense()
            for place, value in enumerate(((x * y).sum(), (x * x).sum(), (y * y).sum())):
                sums[place] += float(value)
        return sums[0] / (sums[1] * sums[2]) ** 0.5

    def spectral(one: dict, two: dict) -> None:
        for module in list(one)[: len(MODULES)]:
            rank = one[module].r
            (u, s, _), (v, t, _) = (
                torch.linalg.svd(update.dense(), full_matrices=False)
                for update in (one[module], two[module])
            )
            cross = u[:, :rank].T @ v[:, :rank]
            torch.linalg.svdvals(cross)
            (s[:rank, None] * t[None, :rank] * cross).square().sum()

    chosen = list(islice(combinations(range(pairs + 1), 2), pairs))
    read = {index: read_adapter(work / f"a{index}").modules for pair in chosen for index in pair}
    seconds, _ = timed(lambda: [cosine(read[a], read[b]) for a, b in chosen])
    one, two = (read[index] for index in chosen[0])
    svd, _ = timed(lambda: spectral(one, two))
    return {"gram": seconds / len(chosen), "spectral": svd * layers, "pairs": len(chosen)}


def audit_costs(work: Path, pairs: int) -> dict[str, Any]:
    """Seconds a pair of gradience's merge audit; {} where it is not installed."""
    if importlib.util.find_spec("gradience") is None:
        print("gradience is not installed; its part is left out", file=sys.stderr)
        return {}
    from gradience.vnext.merge import merge_audit  # pyright: ignore[reportMissingImports]

    chosen = list(islice(combinations(range(pairs + 1), 2), pairs))
    seconds, reports = timed(
        lambda: [merge_audit(work / f"a{a}", work / f"a{b}") for a, b in chosen]
    )
    command = [sys.executable, "-m", "gradience", "merge-audit"]
    command += ["--adapter-a", str(work / "a0"), "--adapter-b", str(work / "a1")]
    line, _ = timed(lambda: subprocess.run(command, check=True, capture_output=True))
    return {
        "in_process": seconds / len(chosen),
        "command_line": line,
        "pairs": len(chosen),
        "version": reports[0].gradience_version,
    }


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


# --- what is printed


def show(figures: dict[str, Any]) -> None:
    dense, audit, peak = figures["dense"], figures["gradience"], figures["sgemm_gflops"]
    machine = figures["machine"]
    print(
        f"{machine['cpus']} CPUs, {machine['threads']} threads, torch {machine['torch']}; float32 "
        f"product {peak:.0f} GFLOP/s; {figures['modules']} modules, r = {figures['rank']}"
    )
    print(
        f"dense, a pair: cosine {dense['gram']:.3f} s, spectral {dense['spectral']:.1f} s (one "
        f"layer, extrapolated)"
    )
    if audit:
        print(
            f"gradience {audit['version']}, a pair: {audit['in_process']:.2f} s in process, "
            f"{audit['command_line']:.2f} s by its command line"
        )
    head = ("adapters", "step", "s", "reading s", "µs a pair", "of peak", "× dense", "× gradience",
            "× its CLI", "MiB")  # fmt: skip
    lines = [head]
    for row in figures["ours"]:
        kind = "spectral" if row["step"] == "spectral" else "gram"
        seconds, pairs = row["seconds"], row["pairs"]
        compared = row["step"] in ("gram", "spectral", "screen")
        times = [
            f"{cost * pairs / seconds:.0f}" if compared and cost else "–"
            for cost in (dense[kind], audit.get("in_process"), audit.get("command_line"))
        ]
        share = f"{row['gflop'] / seconds / peak:.0%}" if row["step"] == "gram" else "–"
        reading = f"{row['reading']:.1f}" if "reading" in row else "–"
        lines.append(
            (str(row["adapters"]), row["step"], f"{seconds:.2f}", reading,
             f"{1e6 * seconds / pairs:.0f}", share, *times, f"{row['mib']:.0f}")
        )  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    for row in figures["ours"]:
        if row["step"] == "gram":
            print(
                f"{row['adapters']} adapters: its products by themselves run at "
                f"{row['products'] / peak:.0%} of the float32 product's speed"
            )
        if row["step"] == "screen":
            print(
                f"screening {row['adapters']}: worst error {row['worst_error']:.4f}, largest "
                f"stated bound {row['bound']:.4f}, beyond its bound {row['beyond_bound']:.2%}"
            )
    print("× dense, × gradience and × its CLI: their seconds a pair times all pairs over ours")


if __name__ == "__main__":
    main()
