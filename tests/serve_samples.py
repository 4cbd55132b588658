"""A deployment on a tiny base to serve, and an engine driven without HTTP."""

from __future__ import annotations

import queue
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from tiny_base import CHARACTERS, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from mergeprobe.adapters.base import Base, fingerprint
from mergeprobe.adapters.checkpoint import Adapter, write_adapter
from mergeprobe.compose.deployment import Deployment, Entry, read_deployment, write_deployment
from mergeprobe.lowrank import LowRank
from mergeprobe.plan import Action, Route
from mergeprobe.serve.engine import Engine
from mergeprobe.serve.job import Asked, Failure
from mergeprobe.serve.sampling import Sampling

NAMES = ("math", "code", "law")
GREEDY = Sampling(temperature=0)
TOKENS = 2048


def served_base(seed: int = 0) -> Base:
    """Like tiny_base, with room for long texts, and weights that make greedy answers wander."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=2 + len(CHARACTERS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TOKENS,
        initializer_range=0.3,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return Base("tiny", model, tiny_tokenizer(), fingerprint(model))


def adapter_for(base: Base, seed: int, name: str, rank: int = 2) -> Adapter:
    """Gaussian factors, on other modules for odd seeds."""
    draw = torch.Generator().manual_seed(seed)
    kinds = ("q_proj", "down_proj") if seed % 2 else ("v_proj", "o_proj", "up_proj")
    updates = {}
    for module, part in base.model.named_modules():
        if module.endswith(kinds):
            out, into = part.weight.shape
            b = torch.randn(out, rank, generator=draw) * 0.3
            updates[module] = LowRank(b, torch.randn(rank, into, generator=draw) * 0.3)
    return Adapter(name, updates, base=base.name, fingerprint=base.fingerprint)


def adapters_for(base: Base, names: tuple[str, ...] = NAMES) -> dict[str, Adapter]:
    return {name: adapter_for(base, seed, name, rank=1 + seed) for seed, name in enumerate(names)}


def deployment_of(base: Base, folder: Path) -> Deployment:
    """Three adapters for themselves, and two names that one merged adapter serves."""
    alone = adapters_for(base)
    merged = adapter_for(base, 7, "pair")
    serving = alone | {"left": merged, "right": merged}
    entries = {n: Entry("each", n, Action.route, None, 0.0, 0.0) for n in alone}
    entries |= {n: Entry("pair", "pair", Action.merge, "mean", 0.1, 0.2) for n in ("left", "right")}
    made = Deployment(base.name, base.fingerprint, Route(), serving, entries, 1)
    write_deployment(made, folder, full_routing=1)
    return read_deployment(folder)


def spare(base: Base, folder: Path, seed: int = 9, name: str = "spare") -> Path:
    """One more adapter folder."""
    write_adapter(adapter_for(base, seed, name), folder / name)
    return folder / name


@contextmanager
def running(engine: Engine):
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


class Answer:
    """What came of one request."""

    def __init__(self, engine: Engine, asked: Asked) -> None:
        self.heard: queue.SimpleQueue = queue.SimpleQueue()
        self.pieces = []
        self.job = engine.submit(asked, self.heard.put)

    def next(self):
        piece = self.heard.get(timeout=60)
        self.pieces.append(piece)
        return piece

    def wait(self):
        """The last piece, or the failure."""
        while True:
            piece = self.next()
            if isinstance(piece, Failure) or piece.reason is not None:
                return piece

    @property
    def tokens(self) -> list[int]:
        self.wait()
        return self.job.sequence.tokens[len(self.job.asked.ids) :]


def asked(engine: Engine, text: str, model: str | None = "base", **others) -> Asked:
    ids = others.pop("ids", None) or engine.base.tokenizer(text)["input_ids"]
    target = engine.catalogue.find(model) if model else None
    settings = {"max_tokens": 20, "deadline": time.monotonic() + 60, "sampling": GREEDY}
    return Asked(tuple(ids), target, **settings | {"ignore_eos": True} | others)
