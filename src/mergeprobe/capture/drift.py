"""Drift: what an early update does to representations on a probe set that all runs share."""

from __future__ import annotations

import hashlib
import json
import warnings
from contextlib import AbstractContextManager, nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergeprobe.adapters.base import base_weights
from mergeprobe.adapters.packaged import cache_folder
from mergeprobe.artefact import atomic_file
from mergeprobe.capture.probe import Drift, tensors_digest
from mergeprobe.capture.sketch import projection

TOKENS_PER_TEXT = 32
MAX_TOKENS = 1024
EVERY = 4  # next-token distributions are kept at every fourth position and at the last
TOP = 64
# lines of the probe set that can be answered in many ways: a letter, a list, a summary
OPEN_PROMPTS = (4, 9, 19)
HIDDEN_SKETCH = 64
# what may differ between two configurations of one computation
IRRELEVANT = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype")


def probe_texts() -> list[str]:
    """The shipped texts, about 300 tokens, none from any task of ours."""
    text = files("mergeprobe.capture").joinpath("probe_set.txt").read_text("utf-8")
    return [line.replace("\\n", "\n") for line in text.splitlines() if line.strip()]


def probe_ids(tokenizer: Any) -> list[list[int]]:
    """Token ids of the probe texts: at most 32 each and 1,024 in all."""
    rows = [tokenizer(text)["input_ids"][:TOKENS_PER_TEXT] for text in probe_texts()]
    assert sum(map(len, rows)) <= MAX_TOKENS
    return rows


def open_positions(tokenizer: Any) -> list[int]:
    """Where Drift's distributions say what follows an open prompt: its last position, among all.

    A prompt that was cut at 32 tokens has no end here and is left out.
    """
    found, start = [], 0
    for line, (text, tokens) in enumerate(zip(probe_texts(), probe_ids(tokenizer), strict=True)):
        last = len(tokens) - 1
        start += sum(where % EVERY == EVERY - 1 or where == last for where in range(len(tokens)))
        if line in OPEN_PROMPTS and len(tokenizer(text)["input_ids"]) == len(tokens):
            found.append(start - 1)
    return found


def measure_drift(
    model: Any,
    tokenizer: Any,
    *,
    base: AbstractContextManager[Any] | None = None,
    fingerprint: str | None = None,
) -> Drift:
    """Runs the probe set through `model`, and through the base inside the context `base`.

    base: a context in which `model` is the base. With a fingerprint the base's side is kept in the
    user's cache and computed once per base and setting (`_cache_path` says what counts).
    """
    rows = probe_ids(tokenizer)
    ours, precision = _states(model, rows)
    with base or nullcontext():  # what the name is made of is the base's too
        path = _cache_path(model, rows, fingerprint, precision) if fingerprint else None
        theirs = _cached(path)
        if theirs is None:
            theirs, _ = _states(model, rows)
            if path is not None:
                _keep(theirs, path)
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
def _states(model: Any, rows: list[list[int]]) -> tuple[dict[str, Tensor], str]:
    """What Drift keeps of one model, and the precision that its last layers computed in."""
    device = next(model.parameters()).device
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    ids, mask = ids.to(device), mask.to(device)
    precision = []
    # under autocast the parameters do not say it, nor does the output: accelerate makes it float32
    handle = model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: precision.append(f"{args[0].dtype}-{output.dtype}")
    )
    try:
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    finally:
        handle.remove()
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
    }, ",".join(precision)


def _cache_path(model: Any, rows: list[list[int]], fingerprint: str, precision: str) -> Path:
    """Where the base's side lies, named by everything it depends on.

    The fingerprint is made to be equal across dtypes, and drifts are smaller than the differences
    between them. So the name also holds samples of every weight's value, the configuration, the
    precision of the computation, and the software and device that rounded it.
    """
    total = hashlib.sha256(f"{rows}|{TOP}|{EVERY}|{HIDDEN_SKETCH}|{precision}".encode())
    config = model.config.to_dict()
    told = {key: value for key, value in config.items() if key not in IRRELEVANT}
    total.update(json.dumps(told, sort_keys=True, default=str).encode())
    device = next(model.parameters()).device
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    attention = getattr(model.config, "_attn_implementation", None)
    versions = (torch.__version__, transformers.__version__)
    total.update(f"|{device.type}|{card}|{attention}|{versions}".encode())
    for name, weight in sorted(base_weights(model)):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)].cpu()
        total.update(f"|{name}|{weight.dtype}|".encode())
        total.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return cache_folder() / "probe_set" / f"{fingerprint}-{total.hexdigest()[:16]}.safetensors"


def _cached(path: Path | None) -> dict[str, Tensor] | None:
    """The entry, or None where there is none; a damaged one is computed again."""
    if path is None:
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}
            sealed = (file.metadata() or {}).get("digest")
    except (SafetensorError, OSError):
        return None
    return found if sealed == tensors_digest(found.items()) else None


def _keep(states: dict[str, Tensor], path: Path) -> None:
    try:
        with atomic_file(path) as temporary:
            save_file(states, temporary, metadata={"digest": tensors_digest(states.items())})
    except OSError as problem:
        warnings.warn(
            f"mergeprobe: '{path.parent}' cannot be written ({problem.strerror}), so the base runs "
            "on the probe set for every probe; $MERGEPROBE_CACHE names another folder",
            stacklevel=2,
        )
