"""The servers that are exported to: what each takes, as its own source says.

Read at vLLM 0.32.0 (config/lora.py, lora/peft_helper.py, lora/lora_model.py), SGLang 0.5.23
(lora/lora.py, lora_manager.py, utils/common.py), LoRAX's repository (adapters/lora.py at 03679f3,
its page of modules) and llama.cpp as llama-cpp-python 0.3.36 carries it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mergeprobe.errors import ExportError
from mergeprobe.export import launch

ATTENTION = ("q_proj", "k_proj", "v_proj")
GATED = ("gate_proj", "up_proj")
DENSE = frozenset({*ATTENTION, *GATED, "o_proj", "down_proj", "qkv_proj", "gate_up_proj"})


@dataclass(frozen=True)
class Target:
    """A server, or a tool, and what it takes.

    form: adapters as PEFT folders, GGUF files, or folders with mergekit's recipes.
    ranks: values of its largest-rank setting, ascending; () where any rank will do.
    modules: last names that may be adapted; None where the base alone says.
    together: modules that must be adapted together. every_layer: what is adapted in one layer must
    be in all. suffixes: target_modules are last names. extras: saved modules and biases are taken.
    needs_base: the base's config must be read.
    """

    name: str
    title: str
    form: Literal["folders", "gguf", "recipes"]
    launch: Callable[[launch.Shipment], dict[str, str]]
    ranks: tuple[int, ...] = ()
    modules: frozenset[str] | None = None
    together: tuple[tuple[str, ...], ...] = ()
    every_layer: bool = False
    suffixes: bool = True
    extras: bool = False
    needs_base: bool = False

    def bucket(self, rank: int) -> int:
        """The smallest setting that takes `rank`."""
        return next((allowed for allowed in self.ranks if allowed >= rank), rank)


TARGETS = {
    "peft": Target("peft", "PEFT", "folders", launch.peft, suffixes=False, extras=True),
    "vllm": Target(
        "vllm", "vLLM", "folders", launch.vllm,
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        modules=DENSE,
    ),
    # it stacks q, k, v of a layer and gate, up: with some of them alone its loader fails
    "sglang": Target(
        "sglang", "SGLang", "folders", launch.sglang,
        modules=DENSE | {"lm_head"},
        together=(ATTENTION, GATED),
    ),
    # a module that one layer lacks is left out in all layers, without a word
    "lorax": Target(
        "lorax", "LoRAX", "folders", launch.lorax,
        modules=DENSE | {"lm_head"},
        every_layer=True,
    ),
    "llama.cpp": Target("llama.cpp", "llama.cpp", "gguf", launch.llama_cpp, needs_base=True),
    "mergekit": Target("mergekit", "mergekit", "recipes", launch.mergekit, suffixes=False),
}  # fmt: skip


def target_of(name: str) -> Target:
    if name not in TARGETS:
        raise ExportError(f"unknown target '{name}'; known are {', '.join(TARGETS)}")
    return TARGETS[name]
