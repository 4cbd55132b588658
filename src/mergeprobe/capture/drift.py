"""Drift: what an early update does to representations on a probe set that all runs share."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergeprobe.adapters.packaged import cache_folder
from mergeprobe.artefact import atomic_file
from mergeprobe.capture.probe import Drift
from mergeprobe.capture.sketch import projection

TOKENS_PER_TEXT = 32
MAX_TOKENS = 1024
EVERY = 4  # next-token distributions are kept at every fourth position and at the last
TOP = 64
HIDDEN_SKETCH = 64


def probe_texts() -> list[str]:
    """The shipped texts, about 300 tokens, none from any task of ours."""
    text = files("mergeprobe.capture").joinpath("probe_set.txt").read_text("utf-8")
    return [line.replace("\\n", "\n") for line in text.splitlines() if line.strip()]


def probe_ids(tokenizer: Any) -> list[list[int]]:
    """Token ids of the probe texts: at most 32 each and 1,024 in all."""
    rows = [tokenizer(text)["input_ids"][:TOKENS_PER_TEXT] for text in probe_texts()]
    assert sum(map(len, rows)) <= MAX_TOKENS
    return rows


def measure_drift(
    model: Any,
    tokenizer: Any,
    *,
    base: AbstractContextManager[Any] | None = None,
    fingerprint: str | None = None,
) -> Drift:
    """Runs the probe set through `model`, and through the base inside the context `base`.

    base: a context in which `model` is the base (PEFT's `disable_adapter()`).
    With a fingerprint the base's side is kept in the cache and computed once per base.
    """
    rows = probe_ids(tokenizer)
    ours = _states(model, rows)
    key = None
    if fingerprint:
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        made = hashlib.sha256(f"{rows}|{TOP}|{EVERY}|{HIDDEN_SKETCH}".encode()).hexdigest()[:12]
        key = cache_folder() / "probe_set" / f"{fingerprint}-{dtype}-{made}.safetensors"
    theirs = _cached(key)
    if theirs is None:
        with base or nullcontext():
            theirs = _states(model, rows)
        if key is not None:
            with atomic_file(key) as temporary:
                save_file(theirs, temporary)
    return Drift(
        hidden=ours["hidden"] - theirs["hidden"],
        logprob=ours["logprob"],
        index=ours["index"],
        tail=ours["tail"],
        base_logprob=theirs["logprob"],
        base_index=theirs["index"],
        base_tail=theirs["tail"],
    )


@torch.no_grad()
def _states(model: Any, rows: list[list[int]]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    ids, mask = ids.to(device), mask.to(device)
    out = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    weights = (mask / mask.sum(1, keepdim=True))[None, :, :, None]
    pooled = torch.stack([(h.float() * weights[0]).sum(1) for h in out.hidden_states])
    sketch = projection("probe set", "hidden", pooled.shape[-1], HIDDEN_SKETCH).to(device)
    lengths = mask.sum(1, keepdim=True)
    where = torch.arange(longest, device=device)[None].expand_as(ids)
    chosen = (where < lengths) & ((where % EVERY == EVERY - 1) | (where == lengths - 1))
    logprob = out.logits[chosen].float().log_softmax(-1)
    top = logprob.topk(min(TOP, logprob.shape[-1]), dim=-1)
    rest = 1.0 - top.values.double().exp().sum(-1)
    return {
        "hidden": (pooled @ sketch).cpu().contiguous(),
        "logprob": top.values.cpu().contiguous(),
        "index": top.indices.to(torch.int32).cpu().contiguous(),
        "tail": rest.clamp(min=1e-12).log().float().cpu().contiguous(),
    }


def _cached(key: Path | None) -> dict[str, Tensor] | None:
    if key is None or not key.exists():
        return None
    try:
        with safe_open(str(key), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError):
        return None  # a damaged cache entry is computed again
