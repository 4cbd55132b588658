"""What the probe costs a training run: two runs in step, one with a recorder and one without.

    python benchmarks/capture_overhead.py                   # SmolLM2-135M, 500 steps: about an hour
    python benchmarks/capture_overhead.py --stop-after 40   # the rest is extrapolated, and said so

Both runs have the same weights, data and seed; they take turns step by step (who goes first
alternates), so what else the machine does falls on both. The probe itself falls on one moment of
one run, so it is taken again between further steps, and the median of its costs in steps counts.
Afterwards the parts of a probe are timed one by one. Wall-clock seconds.
Wanted: whole run ≤ 3 % at 500 steps of 8 × 64 tokens probed at 5 %
with the base's side of the probe set in the cache; a captured pass (forward and backward with our
hooks) ≤ 35 % slower than the same pass without them; the probe file ≤ 2 × the float32 adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from mergeprobe.bench.malloc import malloc_matters, with_malloc_settings

WANTED = {"whole run": 0.03, "captured pass": 0.35, "file": 2.0}
REPEATS = 5
AGAIN, BETWEEN = 4, 4  # further probes, and the steps before each


class Run:
    """One training run by hand: forward, backward, clipping, AdamW, as a trainer does it."""

    def __init__(self, model: Any, learning_rate: float = 1e-3) -> None:
        import torch

        self.model, self.seconds = model, []
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, learning_rate)
        self.recorder: Any = None

    def step(self, step: int, ids: Any) -> None:
        import torch

        started = time.perf_counter()
        out = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.recorder is not None:
            self.recorder.step(step, out.loss)
        _wait(ids.device)
        self.seconds.append(time.perf_counter() - started)


def main() -> None:
    options = _options()
    if malloc_matters() and "MERGEPROBE_REEXECUTED" not in os.environ:
        environment = with_malloc_settings() | {"MERGEPROBE_REEXECUTED": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    print(json.dumps(found, indent=2) if options.json else "\n".join(_told(found)))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model

    from mergeprobe.adapters.base import load_base
    from mergeprobe.capture.batch import Batch
    from mergeprobe.capture.measure import take_probe
    from mergeprobe.capture.run import ProbeRecorder

    base = load_base(options.base, notify=lambda message: print(message, file=sys.stderr))
    os.environ["MERGEPROBE_CACHE"] = str(folder / "cache")
    torch.manual_seed(0)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(base.model, config).train()
    pair = {"without": Run(deepcopy(model)), "with": Run(model)}
    draw = torch.Generator().manual_seed(0)
    shape = (options.rows, options.tokens)
    vocabulary = model.config.vocab_size

    def batch_of(rows: int) -> Any:
        ids = torch.randint(vocabulary, (rows, options.tokens), generator=draw)
        return ids.to(base.device)

    calibration = batch_of(32).cpu()
    scored = torch.ones_like(calibration)
    scored[:, 0] = 0
    calibration = Batch(calibration, torch.ones_like(calibration), scored)
    # the base's side of the probe set, once per base and not part of this run
    primed = _seconds(lambda: take_probe(model, name="prime", tokenizer=base.tokenizer))
    started = time.perf_counter()
    path = folder / "probe.safetensors"
    pair["with"].recorder = recorder = ProbeRecorder(
        model,
        path,
        planned_steps=options.steps,
        fraction=options.fraction,
        calibration=calibration,
        tokenizer=base.tokenizer,
    )
    begun = time.perf_counter() - started
    last = min(options.steps, options.stop_after or options.steps)
    for step in range(1, last + 1):
        ids, order = batch_of(options.rows), ["without", "with"]
        for name in order if step % 2 else reversed(order):
            pair[name].step(step, ids)
    both = zip(pair["with"].weights, pair["without"].weights, strict=True)
    same = all(torch.equal(a, b) for a, b in both)
    points = {point.step: "probe" for point in recorder.points}
    points |= {point.half: "half-way sketch" for point in recorder.points}
    again, parts = [], {}
    if recorder.done:
        again = probe_again(recorder, pair["without"], lambda: batch_of(options.rows))
        parts = time_parts(model, base.tokenizer, calibration, folder)
    model.save_pretrained(str(folder / "adapter"))
    theirs = pair["without"].seconds[:last]
    adapter = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    return {
        "setting": {
            "base": options.base,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "rank": options.rank,
            "batch": list(shape),
            "steps": options.steps,
            "steps run": last,
            "probe steps": [point.step for point in recorder.points],
        },
        "bit-identical": same,
        **overhead(pair["with"].seconds, theirs, begun, points, options.steps, again),
        "base's side, once per base (s)": primed,
        "parts": parts,
        "bytes": {"probe": path.stat().st_size if path.exists() else 0, "adapter": adapter},
    }


def probe_again(recorder: Any, other: Run, draw: Callable[[], Any]) -> list[float]:
    """What a probe costs in steps, AGAIN times: the probe's seconds over the median of the steps
    just before it. The base's pass over the items is made anew each time, as in the run."""
    found = []
    for _ in range(AGAIN):
        started = len(other.seconds)
        for step in range(BETWEEN):
            other.step(step, draw())
        recorder._base = None
        seconds = _seconds(lambda: recorder._capture(recorder.points[:1]))
        found.append(seconds / statistics.median(other.seconds[started:]))
    return found


def overhead(
    ours: list[float],
    theirs: list[float],
    begun: float,
    points: dict[int, str],
    planned: int,
    again: list[float],
) -> dict[str, Any]:
    """Whole-run overhead. Steps that were not run cost a median step each, and nothing of ours.

    again: what the probe cost in steps when it was taken again."""
    typical = statistics.median(theirs)
    extra = begun + sum(ours) - sum(theirs)
    whole = sum(theirs) + (planned - len(theirs)) * typical
    special = {
        f"step {step} ({what})": ours[step - 1] - theirs[step - 1]
        for step, what in sorted(points.items())
        if step <= len(ours)
    }
    others = [
        a - b for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if i + 1 not in points
    ]
    # noise of single steps does not belong to us: the steps at which something is done do
    at_points = begun + sum(special.values())
    probes = [step for step, what in points.items() if what == "probe" and step <= len(ours)]
    costs = [(ours[step - 1] - theirs[step - 1]) / typical for step in probes] + again
    return {
        "median step (s)": typical,
        "extra, all steps (s)": extra,
        "extra, where something is measured (s)": at_points,
        "extra per other step (s, median)": statistics.median(others) if others else 0.0,
        "begin (s)": begun,
        "points (s)": special,
        "a probe, in steps": costs,
        "whole run": (begun / typical + len(probes) * statistics.median(costs)) / planned
        if costs
        else 0.0,
        "whole run, as it went": extra / whole,
        "whole run, as it went, measured steps only": at_points / whole,
    }


def time_parts(model: Any, tokenizer: Any, calibration: Any, folder: Path) -> dict[str, Any]:
    """Seconds of every part of a probe (median of several), and the hooks' share of a pass."""
    from mergeprobe.adapters.base import fingerprint
    from mergeprobe.capture.drift import measure_drift
    from mergeprobe.capture.measure import take_probe
    from mergeprobe.capture.model import as_base, measuring
    from mergeprobe.capture.probe import write_probe
    from mergeprobe.capture.recorder import record
    from mergeprobe.capture.sketch import sketch_update
    from mergeprobe.capture.trained import adapted_modules, current_update, weight_norms

    modules, named = adapted_modules(model), fingerprint(model)
    kept: dict[str, Any] = {}
    passes: dict[str, list[float]] = {"bare": [], "gradient": [], "gradient and moments": []}
    with measuring(model):
        for _ in range(REPEATS):  # in turn, so that the machine's moods fall on all three
            passes["bare"].append(_seconds(lambda: record(model, {}, calibration)))
            passes["gradient"].append(
                _seconds(lambda: record(model, modules, calibration, moments=False))
            )
            passes["gradient and moments"].append(
                _seconds(lambda: kept.update(seen=record(model, modules, calibration)))
            )
        with as_base(model):
            at_base = _seconds(lambda: record(model, modules, calibration, moments=False))

        def drift() -> None:
            measure_drift(model, tokenizer, base=as_base(model), fingerprint=named)

        probe_set = statistics.median(_seconds(drift) for _ in range(REPEATS))
    seen = kept["seen"]
    probe = take_probe(model, name="x")
    update = probe.updates
    pieces: dict[str, Callable[[], object]] = {
        "moments to eigenvectors": lambda: (seen.input_moments(), seen.output_moments()),
        "copy of the update": lambda: current_update(model),
        "half-way sketch": lambda: [sketch_update(n, u) for n, u in update.items()],
        "fingerprint and norms": lambda: (fingerprint(model), weight_norms(model)),
        "file (update only)": lambda: write_probe(probe, folder / "parts.safetensors"),
    }
    seconds = {name: statistics.median(values) for name, values in passes.items()}
    bare = seconds["bare"]
    ratios = {
        name: statistics.median(a / b - 1 for a, b in zip(values, passes["bare"], strict=True))
        for name, values in passes.items()
        if name != "bare"
    }
    return {
        "pass over the calibration items, no hooks (s)": bare,
        "hooks: gradient (s)": seconds["gradient"] - bare,
        "hooks: gradient and moments (s)": seconds["gradient and moments"] - bare,
        "pass at the base, gradient (s)": at_base,
        "probe set, base's side cached (s)": probe_set,
        **{f"{name} (s)": _seconds(what) for name, what in pieces.items()},
        "captured pass": ratios["gradient and moments"],
        "captured pass, gradient only": ratios["gradient"],
    }


def _seconds(what: Callable[[], object]) -> float:
    started = time.perf_counter()
    what()
    return time.perf_counter() - started


def _wait(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def _told(found: dict[str, Any]) -> list[str]:
    setting, parts, size = found["setting"], found["parts"], found["bytes"]
    rows, tokens = setting["batch"]
    lines = [
        f"{setting['base']}, rank {setting['rank']}, {setting['steps']} steps of {rows} x {tokens} "
        f"tokens ({setting['steps run']} were run), probe after step {setting['probe steps']}, "
        f"{setting['threads']} threads, torch {setting['torch']}",
        f"weights with and without: {'bit-identical' if found['bit-identical'] else 'DIFFERENT'}",
        f"a step: {found['median step (s)']:.3f} s (median)",
        f"begin: {found['begin (s)']:.3f} s",
    ]
    for name, extra in found["points (s)"].items():
        steps = extra / found["median step (s)"]
        lines.append(f"{name}: {extra:.3f} s more, as long as {steps:.1f} steps")
    every = found["extra per other step (s, median)"]
    lines.append(f"every other step: {1000 * every:.1f} ms more (median)")
    primed = found["base's side, once per base (s)"]
    lines.append(
        f"not in this run: the base's side of the probe set, once per base: {primed:.2f} s"
    )
    if not found["points (s)"] or not parts:
        return [*lines, "the probe point was not reached: raise --stop-after"]
    lines += ["", "where the time of a probe goes:"]
    lines += [f"  {name:48} {value:8.3f}" for name, value in parts.items() if "(s)" in name]
    ratio = size["probe"] / size["adapter"]
    share = found["whole run"]
    went = found["whole run, as it went"], found["whole run, as it went, measured steps only"]
    costs = ", ".join(f"{cost:.1f}" for cost in found["a probe, in steps"])
    captured, gradient = parts["captured pass"], parts["captured pass, gradient only"]
    lines += [
        "",
        f"a probe costs as much as {costs} steps (in the run, then taken again)",
        f"whole run: {100 * share:.2f} % by the median of these; wanted "
        f"{100 * WANTED['whole run']:.0f} %: {_verdict(share <= WANTED['whole run'])}",
        f"as the one run went: {100 * went[0]:.2f} % ({100 * went[1]:.2f} % counting only steps "
        "where something is measured)",
        f"captured pass: {100 * captured:.0f} % slower than without hooks ({100 * gradient:.0f} % "
        f"for the gradient alone); wanted {100 * WANTED['captured pass']:.0f} %: "
        f"{_verdict(captured <= WANTED['captured pass'])}",
        f"file: {size['probe'] / 1e6:.2f} MB, {ratio:.2f} x the float32 adapter "
        f"({size['adapter'] / 1e6:.2f} MB); wanted {WANTED['file']:g}: "
        f"{_verdict(ratio <= WANTED['file'])}",
    ]
    return lines


def _verdict(holds: bool) -> str:
    return "kept" if holds else "MISSED"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m-instruct-q4")
    parser.add_argument("--steps", type=int, default=500, help="planned steps")
    parser.add_argument("--stop-after", type=int, default=None, help="steps that are run")
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
