"""What a probe's file takes, and what smaller moments would cost its signals.

    python benchmarks/probe_size.py            # SmolLM2-135M, some minutes
    python benchmarks/probe_size.py --layers 29 --steps 4

First the bytes of a probe of SmolLM2-135M's shape by LoRA rank, part by part, over the float32
adapter's. Then two tasks are trained for a few steps on some layers; their moments are taken whole
(every direction) and as the probe keeps them, cut to q directions, and the curvature signals of the
pair are compared: |value / exact − 1|, the largest over both orders. Sketches rounded to bfloat16
likewise, against the difference that the sketch itself makes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

RANKS, DIRECTIONS = (1, 2, 4, 8, 16), (2, 3, 4, 5, 6, 8)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CURVATURE = ("interference", "interference_ratio", "data_weighted", "fisher_cosine")
GRADIENT = ("gradient_cosine", "gradient_cosine_base", "first_order_transfer")


def pairs(task: str) -> list[tuple[str, str]]:
    numbers = [(a, b) for a in range(11, 43, 2) for b in (3, 14)]
    if task == "sums":
        return [(f"What is {a} plus {b}?", f" {a} plus {b} is {a + b}.") for a, b in numbers]
    return [
        (f"How many grams are {a} kg and {b} g?", f" {1000 * a + b} grams.") for a, b in numbers
    ]


def sizes(base: Any, folder: Path) -> list[str]:
    """Bytes by part for every rank, from a probe with all parts and random contents."""
    import torch

    from mergeprobe.capture.compact import compacted
    from mergeprobe.capture.drift import measure_drift
    from mergeprobe.capture.moments import MOMENT_RANK
    from mergeprobe.capture.probe import Moment, Probe, write_probe
    from mergeprobe.capture.sketch import SKETCH_SIZE
    from mergeprobe.lowrank import LowRank

    shapes = {
        name: tuple(module.weight.shape)
        for name, module in base.model.named_modules()
        if type(module).__name__ == "Linear" and name != "lm_head"
    }
    inputs: dict[str, Any] = {}
    for name, (_, into) in shapes.items():
        first = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
        first = first.replace("up_proj", "gate_proj")
        inputs[name] = inputs.get(first) or Moment(torch.randn(into, MOMENT_RANK), 0.1)
    outputs = {
        name: Moment(torch.randn(out, MOMENT_RANK), 0.1) for name, (out, _) in shapes.items()
    }
    drift = measure_drift(base.model, base.tokenizer)
    square = {name: torch.randn(SKETCH_SIZE, SKETCH_SIZE) for name in shapes}
    lines = []
    for rank in RANKS:
        updates = {
            name: LowRank(torch.randn(out, rank), torch.randn(rank, into))
            for name, (out, into) in shapes.items()
        }
        adapter = sum(4 * update.parameters for update in updates.values())
        sketches = {"halfway": square, "gradient": square, "gradient_base": square}

        def size(**parts: Any) -> int:
            probe = compacted(Probe("x", updates, **parts))  # noqa: B023
            return write_probe(probe, folder / "x.safetensors").stat().st_size

        bare = size()
        told = {
            "update": bare,
            "sketches": size(**sketches) - bare,
            "moments": size(inputs=inputs, outputs=outputs) - bare,
            "drift": size(drift=drift) - bare,
        }
        told["all"] = size(**sketches, inputs=inputs, outputs=outputs, drift=drift)
        shares = ", ".join(f"{name} {value / adapter:.2f}" for name, value in told.items())
        lines.append(f"rank {rank:2}: adapter {adapter / 1e6:.2f} MB; over it: {shares}")
    return lines


def probes(base: Any, layers: list[int], rank: int, steps: int) -> dict[str, tuple[Any, Any]]:
    """task -> (the probe as it is kept, the same with whole moments)."""
    import torch
    from peft import LoraConfig, get_peft_model

    from mergeprobe.capture import compact, recorder
    from mergeprobe.capture.batch import encode
    from mergeprobe.capture.measure import take_probe
    from mergeprobe.capture.moments import MomentSketch

    found = {}
    compact.SMALL_RANK = 0  # q = 8 and unrounded, to be cut and rounded below
    for task in ("sums", "grams"):
        torch.manual_seed(0)
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=LINEARS, layers_to_transform=layers
        )
        model: Any = get_peft_model(base.model, config)
        batch = encode(base.tokenizer, pairs(task))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
        for step in range(steps):
            part = batch.rows(4 * step % 32, 4 * step % 32 + 4)
            labels = part.ids.masked_fill(part.completion_mask == 0, -100)
            model(part.ids, attention_mask=part.attention_mask, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        kept = take_probe(model, name=task, calibration=batch)
        recorder.MomentSketch = partial(MomentSketch, rank=4096)  # type: ignore[assignment]
        whole = take_probe(model, name=task, calibration=batch)
        recorder.MomentSketch = MomentSketch
        found[task] = kept, whole
        model.unload()
    return found


def compare(found: dict[str, tuple[Any, Any]]) -> list[str]:
    import torch

    from mergeprobe.signals import adapter_rows, pair_rows

    kept, whole = ([both[k] for both in found.values()] for k in (0, 1))
    exact, own = pair_rows(whole), adapter_rows(whole)["selectivity"].to_numpy()

    def changed(change: Callable[[Any], Any], names: tuple[str, ...], truth: Any) -> str:
        rows = pair_rows([change(probe) for probe in kept])
        return ", ".join(
            f"{name} {abs(rows[name].to_numpy() / truth[name].to_numpy() - 1).max():.4f}"
            for name in names
        )

    lines = []
    for q in DIRECTIONS:

        def cut(probe: Any, q: int = q) -> Any:
            sides = {
                part: {name: moment.cut(q) for name, moment in getattr(probe, part).items()}
                for part in ("inputs", "outputs")
            }
            return replace(probe, **sides)

        kappa = adapter_rows([cut(probe) for probe in kept])["selectivity"].to_numpy()
        error = abs(kappa / own - 1).max()
        lines.append(f"q = {q}: {changed(cut, CURVATURE, exact)}, selectivity {error:.4f}")

    def rounded(probe: Any) -> Any:
        parts = {
            part: {n: v.to(torch.bfloat16).float() for n, v in getattr(probe, part).items()}
            for part in ("gradient", "gradient_base")
        }
        return replace(probe, **parts)

    lines.append(f"sketches in bfloat16: {changed(rounded, GRADIENT, pair_rows(kept))}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m-instruct-q4")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 12, 22, 29])
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    from mergeprobe.adapters.base import load_base

    base = load_base(options.base)
    with tempfile.TemporaryDirectory() as folder:
        print(*sizes(base, Path(folder)), sep="\n")
    print(*compare(probes(base, options.layers, options.rank, options.steps)), sep="\n")


if __name__ == "__main__":
    main()
