"""Merging time and memory: ours from folder to folder, PEFT's add_weighted_adapter, mergekit.

    python benchmarks/merge.py
    python benchmarks/merge.py --layers 4 --many 20      # a quick look
    python benchmarks/merge.py --mergekit PATH/TO/python  # with mergekit in an environment

Adapters shaped as SmolLM2-135M's (hidden 576, MLP 1536, 30 layers), r = 16 on all linear layers,
random. Every figure is a process of its own, which merges three times (or once, if that takes more
than 20 s): seconds of the fastest (ours with reading and writing, PEFT's with neither, mergekit's
command as a whole), and the extra memory at the first one's peak, which is anonymous memory above
what the process held before; memory-mapped files are not in it. All processes run with the malloc
settings of mergeprobe.bench.malloc.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mergeprobe.bench.malloc import with_malloc_settings

HIDDEN, WIDE, HEADS, KEYS = 576, 1536, 9, 3
SMALL = HIDDEN // HEADS * KEYS
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (SMALL, HIDDEN),
    "self_attn.v_proj": (SMALL, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}
R, OUT_RANK, DENSITY = 16, 32, 0.2
REPEATS, LONG = 3, 20.0
# ours -> PEFT's name and the speed-up that is asked for
RIVALS = {
    "linear": ("svd", 20.0),
    "ties": ("ties_svd", 4.0),
    "dare_linear": ("dare_linear_svd", 4.0),
    "dare_ties": ("dare_ties_svd", 4.0),
}


class Peak:
    """The most anonymous memory (MiB) above the start, looked at every two milliseconds."""

    def __enter__(self) -> Peak:
        self.start = self.most = anonymous()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.002):
            self.most = max(self.most, anonymous())

    def __exit__(self, *exception: object) -> None:
        self.over.set()
        self.thread.join()
        self.extra = max(self.most, anonymous()) - self.start


def anonymous() -> float:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def make_adapters(folder: Path, count: int, layers: int, modules: int = len(SHAPES)) -> list[Path]:
    """PEFT folders, without a card of ours, so that no checksum is taken on reading."""
    import torch

    from mergeprobe.adapters.checkpoint import CARD, Adapter, write_adapter
    from mergeprobe.lowrank import LowRank

    made = []
    for index in range(count):
        draw, updates = torch.Generator().manual_seed(index), {}
        for layer in range(layers):
            for name, (out, into) in list(SHAPES.items())[:modules]:
                b = 0.02 * torch.randn(out, R, generator=draw)
                a = torch.randn(R, into, generator=draw) / into**0.5
                updates[f"model.layers.{layer}.{name}"] = LowRank(b, a)
        path = write_adapter(Adapter(f"a{index}", updates, base="smol"), folder / f"a{index}")
        (path / CARD).unlink()
        made.append(path)
    os.sync()  # or merges that write their result safely would wait for these files
    return made


def base_model(layers: int):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=layers, vocab_size=64,
        num_attention_heads=HEADS, num_key_value_heads=KEYS, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def timed(merge: Callable[[], object]) -> dict:
    with Peak() as peak:
        start = time.perf_counter()
        merge()
        seconds = [time.perf_counter() - start]
    while len(seconds) < REPEATS and seconds[0] < LONG:
        start = time.perf_counter()
        merge()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "mib": peak.extra}


def ours(folders: list[Path], method: str, out: Path, options: dict) -> dict:
    from mergeprobe.compose.merge.stream import merge_folders

    return timed(
        lambda: merge_folders(folders, method, out=out, rank=OUT_RANK, force=True, **options)
    )


def peft(folders: list[Path], kind: str, layers: int, options: dict) -> dict:
    from peft import PeftModel

    model = PeftModel.from_pretrained(base_model(layers), str(folders[0]), adapter_name="a0")
    for folder in folders[1:]:
        model.load_adapter(str(folder), adapter_name=folder.name)
    names, count = [folder.name for folder in folders], len(folders)
    numbers = iter(range(REPEATS))
    return timed(
        lambda: model.add_weighted_adapter(
            names, [1 / count] * count, f"merged{next(numbers)}", combination_type=kind,
            svd_rank=OUT_RANK, **options,
        )
    )  # fmt: skip


def one(work: Path, task: dict) -> dict:
    """In a process of its own; `task` says what."""
    folders = [work / f"a{index}" for index in range(task["adapters"])]
    if task["who"] == "ours":
        return ours(folders, task["method"], work / "merged", task["options"])
    return peft(folders, task["method"], task["layers"], task["options"])


def in_own_process(work: Path, threads: int, **task) -> dict:
    command = [sys.executable, __file__, "--one", json.dumps(task), "--work", str(work)]
    environment = with_malloc_settings() | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{task} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def mergekit_ties(python: str, work: Path, layers: int, count: int, threads: int) -> float:
    """Seconds of mergekit's TIES over full models of the same adapters, as its command line."""
    from peft import PeftModel

    base_model(layers).save_pretrained(work / "base")
    models = []
    for index in range(count):
        model = PeftModel.from_pretrained(base_model(layers), str(work / f"a{index}"))
        model.merge_and_unload().save_pretrained(work / f"full{index}")  # type: ignore[operator]
        models.append({"model": str(work / f"full{index}"), "parameters": {"density": DENSITY}})
    config = {
        "models": models, "merge_method": "ties", "base_model": str(work / "base"),
        "parameters": {"weight": 1.0, "normalize": True}, "dtype": "float32",
    }  # fmt: skip
    (work / "mergekit.yaml").write_text(json.dumps(config))  # JSON is YAML
    start = time.perf_counter()
    subprocess.run(
        [python, "-m", "mergekit.scripts.run_yaml", str(work / "mergekit.yaml"),
         str(work / "mergekit"), "--no-copy-tokenizer", "--allow-crimes"],
        check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
    )  # fmt: skip
    return time.perf_counter() - start


def compare(work: Path, arguments: argparse.Namespace) -> None:
    shared = {"adapters": arguments.adapters, "layers": arguments.layers}
    print(f"{arguments.adapters} adapters, {arguments.layers} layers, r {R} to {OUT_RANK}")
    print("| rule | ours s | ours MiB | PEFT s | PEFT MiB | faster | asked | memory |")
    print("|---|---|---|---|---|---|---|---|")
    for method, (kind, asked) in RIVALS.items():
        options = {} if method == "linear" else {"density": DENSITY}
        us = in_own_process(
            work, arguments.threads, who="ours", method=method, options=options, **shared
        )
        them = in_own_process(
            work, arguments.threads, who="peft", method=kind, options=options, **shared
        )
        print(
            f"| {method} | {us['seconds']:.2f} | {us['mib']:.0f} | {them['seconds']:.2f} "
            f"| {them['mib']:.0f} | {them['seconds'] / us['seconds']:.1f} × | {asked:.0f} × "
            f"| {us['mib'] / max(them['mib'], 1e-9):.2f} of PEFT's |",
            flush=True,
        )


def growth(work: Path, arguments: argparse.Namespace) -> None:
    """Seconds by the number of adapters and of layers; linear if the last columns stay level."""
    print("\n| adapters | layers | rule | s | ms an adapter and module |")
    print("|---|---|---|---|---|")
    counts = sorted({2, 5, 10, 20, arguments.many})
    for count in [count for count in counts if count <= arguments.many]:
        for method in ("linear", "ties"):
            if method == "ties" and count > 10:
                continue  # minutes, and no news
            show_one(work, arguments, method, count, arguments.layers)
    for share in (1, 2):
        layers = max(1, arguments.layers * share // 3)
        inner = work / f"layers{layers}"
        make_adapters(inner, arguments.adapters, layers)
        for method in ("linear", "ties"):
            show_one(inner, arguments, method, arguments.adapters, layers)


def show_one(work: Path, arguments: argparse.Namespace, method: str, count: int, layers: int):
    options = {} if method == "linear" else {"density": DENSITY}
    found = in_own_process(
        work, arguments.threads, who="ours", method=method, options=options, adapters=count,
        layers=layers,
    )  # fmt: skip
    each = 1000 * found["seconds"] / (count * layers * len(SHAPES))
    print(f"| {count} | {layers} | {method} | {found['seconds']:.2f} | {each:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--adapters", type=int, default=5)
    parser.add_argument("--many", type=int, default=100)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--mergekit", help="a python that has mergekit")
    parser.add_argument("--work", type=Path, help="a folder for the adapters; default temporary")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.work, json.loads(arguments.one))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work = Path(folder)
        make_adapters(work, max(arguments.adapters, arguments.many), arguments.layers)
        compare(work, arguments)
        if arguments.mergekit:
            seconds = mergekit_ties(
                arguments.mergekit, work, arguments.layers, arguments.adapters, arguments.threads
            )
            print(f"\nmergekit's TIES over full models, the whole command: {seconds:.1f} s")
        growth(work, arguments)


if __name__ == "__main__":
    main()
