"""How well a probe approximates updates without a low rank, and what taking it costs.

    python benchmarks/probe_types.py           # SmolLM2-135M, 12 steps of 4 items a type: minutes

Every type is trained for a few steps (AdamW) on one task; then its whole update is cut to several
ranks. Printed: the relative Frobenius error ‖ΔW − ΔW_R‖/‖ΔW‖ over all modules, seconds for the
probe's own snapshot (rank 32), bytes of a probe's update over those of PEFT's file.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

RANKS = (8, 32, 128)
TYPES: dict[str, tuple[str, dict[str, Any], float]] = {
    "DoRA": ("LoraConfig", {"r": 8, "use_dora": True}, 1e-3),
    "LoHa": ("LoHaConfig", {"r": 8, "alpha": 8}, 1e-3),
    "LoKr": ("LoKrConfig", {"r": 8, "alpha": 8}, 1e-3),
    "IA3": ("IA3Config", {"feedforward_modules": ["down_proj"]}, 1e-2),
    "OFT": ("OFTConfig", {"oft_block_size": 32}, 1e-3),
    "full": ("", {}, 1e-5),
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trained(base: Any, kind: str, steps: int) -> tuple[Any, Any, int]:
    """(model after training, the weights it began from or None, bytes of PEFT's own file)."""
    import peft
    import torch

    from mergeprobe.capture.batch import encode
    from mergeprobe.capture.start import start_weights

    name, options, rate = TYPES[kind]
    torch.manual_seed(0)
    model, start = base.model, None
    if name:
        config = getattr(peft, name)(target_modules=LINEARS, task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(model, config)
    else:
        for parameter, value in model.named_parameters():
            value.requires_grad_(parameter.split(".")[-2] in LINEARS)
        start = start_weights(model)
    numbers = [(a, b) for a in range(16) for b in (3, 7)]
    texts = [(f"What is {a} plus {b}?", f" {a} plus {b} is {a + b}.") for a, b in numbers]
    batch = encode(base.tokenizer, texts)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, rate)
    for step in range(steps):
        part = batch.rows(4 * step % 32, 4 * step % 32 + 4)
        labels = part.ids.masked_fill(part.completion_mask == 0, -100)
        model(part.ids, attention_mask=part.attention_mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, start, sum(4 * weight.numel() for weight in weights)


def errors(model: Any, start: Any) -> dict[int, float]:
    from mergeprobe.capture.trained import snapshot
    from mergeprobe.lowrank import factor, norm

    whole = snapshot(model, rank=10**6, start=start).modules
    total = sum(norm(update) ** 2 for update in whole.values())
    lost = dict.fromkeys(RANKS, 0.0)
    for update in whole.values():
        dense, size = update.dense(), norm(update)
        for rank in RANKS:
            lost[rank] += (factor(dense, rank)[1] * size) ** 2
    return {rank: (value / total) ** 0.5 for rank, value in lost.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m-instruct-q4")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=list(TYPES))
    options = parser.parse_args()
    from mergeprobe.adapters.base import load_base
    from mergeprobe.capture.probe import Probe, write_probe
    from mergeprobe.capture.trained import snapshot

    for kind in options.types:
        base = load_base(options.base)
        model, start, bytes_ = trained(base, kind, options.steps)
        started = time.perf_counter()
        adapter = snapshot(model, start=start)
        seconds = time.perf_counter() - started
        with tempfile.TemporaryDirectory() as folder:
            path = write_probe(Probe("x", adapter.modules), Path(folder) / "x.safetensors")
            ratio = path.stat().st_size / bytes_
        lost = ", ".join(f"rank {r}: {e:.3f}" for r, e in errors(model, start).items())
        print(f"{kind:5} {lost}; snapshot {seconds:.1f} s, {ratio:.2f} x the file", flush=True)


if __name__ == "__main__":
    main()
