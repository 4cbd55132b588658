"""The command that starts each server on an export: text only, nothing is run here.

Flags as of vLLM 0.32.0, SGLang 0.5.23, LoRAX's launcher at 01ebbb0, and llama.cpp as
llama-cpp-python 0.3.36 carries it.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

from mergeprobe.errors import ExportError

SLOTS = 16  # adapters that one batch may mix; more are swapped in from main memory
SERVE = "serve.sh"


@dataclass(frozen=True)
class Served:
    """name: what a request asks for. path: of its file or folder, relative to the export's."""

    name: str
    path: str


@dataclass(frozen=True)
class Shipment:
    """What a launch command says. base: as the server finds it. rank: the bucket that holds every
    adapter's. modules: the last names of those adapted."""

    base: str
    served: tuple[Served, ...]
    rank: int
    modules: tuple[str, ...]


def vllm(shipment: Shipment) -> dict[str, str]:
    count = len(shipment.served)
    lines = [
        'exec vllm serve "${BASE:-$base}"',
        "--enable-lora",
        f"--max-lora-rank {shipment.rank}",
        f"--max-loras {min(count, SLOTS)}",
        f"--max-cpu-loras {count}",
        "--lora-modules",
        *("  " + _named(one, "name", "path") for one in shipment.served),
    ]
    return _script("vLLM", shipment, lines)


def sglang(shipment: Shipment) -> dict[str, str]:
    count = len(shipment.served)
    lines = [
        'exec python -m sglang.launch_server --model-path "${BASE:-$base}"',
        "--enable-lora",
        f"--max-lora-rank {shipment.rank}",
        f"--lora-target-modules {' '.join(shipment.modules)}",
        f"--max-loras-per-batch {min(count + 1, SLOTS)}",  # the base model counts as one
        "--lora-paths",
        *("  " + _named(one, "lora_name", "lora_path") for one in shipment.served),
    ]
    return _script("SGLang", shipment, lines)


def lorax(shipment: Shipment) -> dict[str, str]:
    lines = [
        'exec lorax-launcher --model-id "${BASE:-$base}"',
        "--adapter-source local",
        *(f'--preloaded-adapter-ids "$PWD"/{shlex.quote(o.path)}' for o in shipment.served),
    ]
    return _script("LoRAX (a request's model or adapter_id is the folder's path)", shipment, lines)


def llama_cpp(shipment: Shipment) -> dict[str, str]:
    for one in shipment.served:
        if "," in one.path or ":" in one.path:
            raise ExportError(
                f"llama.cpp splits file names at ',' and ':'; rename adapter '{one.name}'"
            )
    missing = shlex.quote(f"BASE=FILE.gguf, the base {shipment.base} as GGUF")
    base = '"${BASE:-$base}"' if shipment.base.endswith(".gguf") else f'"${{BASE:?{missing}}}"'
    lines = [
        f"exec llama-server -m {base}",
        "--lora-init-without-apply",
        *(f"--lora {shlex.quote(one.path)}" for one in shipment.served),
    ]
    title = 'llama.cpp (a request says {"lora": [{"id": ID, "scale": 1}]})'
    return _script(title, shipment, lines)


def peft(shipment: Shipment) -> dict[str, str]:
    first, *others = shipment.served
    text = [
        "from pathlib import Path",
        "",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        "here = Path(__file__).parent",
        f"base = AutoModelForCausalLM.from_pretrained({shipment.base!r})",
        f"model = PeftModel.from_pretrained(base, here / {first.path!r}, {_key(first)!r})",
        *(f"model.load_adapter(here / {one.path!r}, {_key(one)!r})" for one in others),
        f"model.set_adapter({_key(first)!r})",
        "",
    ]
    return {"load.py": "\n".join(text)}


def mergekit(shipment: Shipment) -> dict[str, str]:
    lines = [
        "set -e",
        *(
            f"mergekit-yaml {shlex.quote(f'{one.name}.yml')} {shlex.quote(f'merged/{one.name}')} "
            "--lora-merge-cache merged/cache"
            for one in shipment.served
        ),
    ]
    return {SERVE.replace("serve", "merge"): _shell("mergekit", lines)}


def _key(one: Served) -> str:
    return one.name.replace(".", "_")  # a torch module's name has no dots


def _named(one: Served, name: str, path: str) -> str:
    """name=path, or JSON where that would be split elsewhere."""
    if set(one.name + one.path) & set("=,{}"):
        return shlex.quote(json.dumps({name: one.name, path: one.path}, ensure_ascii=False))
    return shlex.quote(f"{one.name}={one.path}")


def _script(title: str, shipment: Shipment, lines: list[str]) -> dict[str, str]:
    head = [f"base={shlex.quote(shipment.base)}", " \\\n  ".join(lines)]
    return {SERVE: _shell(title, head)}


def _shell(title: str, lines: list[str]) -> str:
    start = ["#!/bin/sh", f"# {title}", 'cd "$(dirname "$0")" || exit 1']
    return "\n".join([*start, *lines, ""])
