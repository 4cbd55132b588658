"""probe: one early checkpoint, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mergeprobe.cli.options import Force, Json, NeededBase

PROBE = (
    "mergeprobe probe math/checkpoint-40 --base smollm2-135m-instruct-q4 --data math.jsonl "
    "--out probes/math.safetensors",
    "mergeprobe probe math/ --base ./base --data math.jsonl --out math.safetensors --no-text",
    "mergeprobe probe dora/ --base ./base --data math.jsonl --out dora.safetensors --rank 64",
)


def probe(
    adapter: Annotated[
        Path,
        typer.Argument(
            help="An early checkpoint: a PEFT folder of any type, or a fine-tuned model's.",
            show_default=False,
        ),
    ],
    base: NeededBase,
    data: Annotated[
        Path,
        typer.Option(
            help="JSON lines with prompt and completion, items of the task itself; 32 are used.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The probe, NAME.safetensors.", show_default=False)],
    step: Annotated[
        int | None, typer.Option(min=1, help="The optimizer step; default: what the folder says.")
    ] = None,
    planned: Annotated[
        int | None, typer.Option(min=1, help="Steps that the run plans; default as for --step.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cut every module's update to this rank; by default LoRA, AdaLoRA and VeRA keep "
            "theirs, others are cut to 32, and the probe says what that lost.",
            show_default=False,
        ),
    ] = None,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Keep the items' token ids out of the file.")
    ] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Measure one early checkpoint.

    In a training script the callback does it by itself:
    callbacks=(MergeProbeCallback("probes/math.safetensors"),)
    """
    from mergeprobe.adapters.base import load_base
    from mergeprobe.artefact import refuse_existing
    from mergeprobe.capture.checkpoint import check_folder, probe_checkpoint
    from mergeprobe.capture.probe import write_probe
    from mergeprobe.cli import show
    from mergeprobe.evaluate.data import read_examples
    from mergeprobe.plan import check_name

    refuse_existing(out, force=force)
    name = check_name(out.stem)
    examples = read_examples(data)
    check_folder(adapter)  # a folder that cannot be read is found before the model is loaded
    with show.working("probing") as progress:
        loaded = load_base(base, notify=progress)
        progress(f"{name} on {min(32, len(examples))} items")
        taken = probe_checkpoint(
            adapter,
            loaded,
            [(item.prompt, item.completion) for item in examples],
            name=name,
            step=step,
            planned_steps=planned,
            store_text=not no_text,
            rank=rank,
        )
        write_probe(taken, out, force=force)
    assert taken.calibration is not None
    gain = float((taken.calibration.base_loss - taken.calibration.loss).mean())
    facts: dict[str, Any] = {
        "name": name,
        "path": str(out),
        "modules": len(taken.updates),
        "peft_type": taken.meta["peft_type"],
        "exact": taken.meta["exact"],
        "truncation_error": taken.meta["truncation_error"],
        "step": taken.meta.get("step"),
        "planned_steps": taken.meta.get("planned_steps"),
        "base_fingerprint": taken.meta["base_fingerprint"],
        "items": len(taken.calibration.loss),
        "own_gain": gain,
    }
    if json:
        show.emit(facts)
        return
    lost = facts["truncation_error"]
    how = "" if facts["exact"] else f", cut to rank {max(taken.meta['ranks'])} (loses {lost:.1%})"
    at = f" at step {facts['step']}" if facts["step"] else ""
    show.console().print(
        f"'{name}'{at}: {facts['peft_type']} in {facts['modules']} modules{how}, own gain "
        f"{gain:.3f} nats a token on {facts['items']} items; written to '{out}'"
    )
