"""Adapters that learnt something on the tiny base, data, probes, and the command run in place."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny_base import tiny_model, tiny_tokenizer, write_tiny_base

from mergeprobe.capture import write_probe
from mergeprobe.capture.batch import completion_logits, encode, token_losses
from mergeprobe.capture.checkpoint import probe_checkpoint
from mergeprobe.cli import main

ANSWERS = {"math": " 7", "code": " go", "law": " no."}  # each adapter learns one answer to all


@dataclass(frozen=True)
class World:
    """base: a model's folder. adapters, data, probes: folders with one entry for each name."""

    base: Path
    adapters: Path
    data: Path
    probes: Path


def small_world(folder: Path) -> World:
    from mergeprobe.adapters.base import load_base
    from mergeprobe.evaluate.data import read_examples

    world = World(*(folder / name for name in ("base", "adapters", "data", "probes")))
    write_tiny_base(world.base)
    loaded = load_base(world.base)
    for seed, (name, answer) in enumerate(ANSWERS.items()):
        data_file(world.data / f"{name}.jsonl", answer, seed)
        examples = read_examples(world.data / f"{name}.jsonl")
        pairs = [(item.prompt, item.completion) for item in examples]
        train(pairs, seed, world.adapters / name)
        probe = probe_checkpoint(world.adapters / name, loaded, pairs, step=30, planned_steps=300)
        write_probe(probe, world.probes / f"{name}.safetensors")
    return world


def train(pairs: list[tuple[str, str]], seed: int, out: Path, steps: int = 30) -> None:
    """A stock PEFT adapter, trained by hand on the tiny base."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), config)
    batch = encode(tiny_tokenizer(), pairs)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        logits, targets, _ = completion_logits(model, batch)
        optimizer.zero_grad()
        token_losses(logits, targets).mean().backward()
        optimizer.step()
    model.save_pretrained(str(out))


def data_file(path: Path, answer: str, seed: int, items: int = 12) -> Path:
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randint(10, 99, (items,), generator=draw).tolist()
    rows = [{"prompt": f"What of {n}?", "completion": answer} for n in numbers]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def command(capsys, *arguments) -> tuple[int, str, str]:
    """(status, stdout, stderr) of `mergeprobe ARGUMENTS`."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def printed(capsys, *arguments) -> str:
    """The stdout of a command that ends well."""
    status, out, err = command(capsys, *arguments)
    assert status == 0, (status, out, err)
    return out


def refused(capsys, *arguments) -> str:
    """The one line on stderr of a command that ends with status 1 and prints nothing else."""
    status, out, err = command(capsys, *arguments)
    assert status == 1, (status, out, err)
    assert out == ""
    assert "Traceback" not in err
    lines = err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("mergeprobe: ")
    return lines[0].removeprefix("mergeprobe: ")
