"""A router as one safetensors file, and from texts or probes to a router."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mergeprobe.adapters.base import Base
from mergeprobe.artefact import MADE_BY, atomic_file, check_schema
from mergeprobe.capture.probe import Probe
from mergeprobe.compose.classifier import Classifier
from mergeprobe.compose.router import (
    Choice,
    Router,
    Whitening,
    fit_router,
    prompt_states,
    prompts_of,
    router_layer,
)
from mergeprobe.errors import BaseModelError, DataError, DeploymentError

ROUTER = "router.safetensors"
ROUTER_SCHEMA = 1
TENSORS = ("spread", "basis", "within", "centroids", "thresholds", "separation")
TRAINED = ("weight", "bias")  # of a classifier, where there is one


def make_router(
    base: Base, prompts: Mapping[str, Sequence[str]], *, trained: bool = False
) -> Router:
    """From example prompts of every task, at least eight each, better 32; see `fit_router`."""
    layer = router_layer(base.model)
    states = {
        name: prompt_states(base.model, *tokenised(base, texts), layer=layer)
        for name, texts in prompts.items()
    }
    return fit_router(states, layer=layer, fingerprint=base.fingerprint, trained=trained)


def router_from_probes(base: Base, probes: Sequence[Probe], *, trained: bool = False) -> Router:
    """From the prompts of the probes' calibration items. DataError for a probe without any."""
    layer = router_layer(base.model)
    states = {}
    for probe in probes:
        kept = probe.calibration
        if kept is None or kept.ids.shape[1] == 0:
            raise DataError(
                f"probe '{probe.name}' holds no calibration items (store_text=False, or none were "
                "given); give example prompts instead"
            )
        ids, mask = prompts_of(kept)
        states[probe.name] = prompt_states(base.model, ids.long(), mask, layer=layer)
    return fit_router(states, layer=layer, fingerprint=base.fingerprint, trained=trained)


def route(router: Router, base: Base, prompts: Sequence[str]) -> list[Choice]:
    """Where each prompt goes. BaseModelError for another base than the router was made with."""
    if router.base_fingerprint and router.base_fingerprint != base.fingerprint:
        raise BaseModelError(
            f"the router was made on base {router.base_fingerprint}, but the base given is "
            f"{base.fingerprint} ({base.name}); make it again on this one"
        )
    return router.choose(prompt_states(base.model, *tokenised(base, prompts), layer=router.layer))


def tokenised(base: Base, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of texts, right-padded. DataError for one without tokens."""
    rows = [base.tokenizer(prompt)["input_ids"] for prompt in prompts]
    if not rows or [] in rows:
        what = f"prompt {rows.index([])} has no tokens" if rows else "no prompts"
        raise DataError(f"{what}; expected some text")
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for position, row in enumerate(rows):
        ids[position, : len(row)] = torch.tensor(row)
        mask[position, : len(row)] = 1
    return ids, mask


def write_router(router: Router, path: str | Path, *, force: bool = True) -> None:
    whitening = router.whitening
    tensors = {
        "spread": whitening.spread,
        "basis": whitening.basis,
        "within": whitening.within,
        "centroids": router.centroids,
        "thresholds": router.thresholds,
        "separation": router.separation,
    }
    if router.classifier is not None:
        tensors |= {"weight": router.classifier.weight, "bias": router.classifier.bias}
    header = {
        "schema": ROUTER_SCHEMA,
        "made_by": MADE_BY,
        "names": router.names,
        "layer": router.layer,
        "base_fingerprint": router.base_fingerprint,
    }
    # single precision: distances need no more
    stored = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path, force=force) as temporary:
        save_file(stored, str(temporary), metadata={"router": json.dumps(header)})


def read_router(path: str | Path) -> Router:
    """DeploymentError with one line if the file is missing, damaged or too new."""
    path = Path(path)
    if not path.is_file():
        raise DeploymentError(f"'{path}' is no file; expected a router, as `write_router` makes")
    try:
        with safe_open(str(path), framework="pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {})["router"])
            there = [name for name in TRAINED if name in file.keys()]
            names = [*TENSORS, *(TRAINED if there else ())]
            tensors = {name: file.get_tensor(name).double() for name in names}
        check_schema(header.get("schema"), ROUTER_SCHEMA, f"'{path}'", DeploymentError)
        names, layer = tuple(map(str, header["names"])), int(header["layer"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise DeploymentError(f"'{path}' is no sound router: {reason}; make it again") from None
    _check_shapes(path, tensors, len(names))
    whitening = Whitening(tensors["spread"], tensors["basis"], tensors["within"])
    return Router(
        names,
        layer,
        whitening,
        tensors["centroids"],
        tensors["thresholds"],
        tensors["separation"],
        header.get("base_fingerprint"),
        Classifier(tensors["weight"], tensors["bias"]) if "weight" in tensors else None,
    )


def _check_shapes(path: Path, tensors: Mapping[str, torch.Tensor], count: int) -> None:
    dim, inside = tensors["spread"].numel(), tensors["within"].numel()
    expected = {
        "spread": (dim,),
        "basis": (inside, dim),
        "within": (inside,),
        "centroids": (count, dim),
        "thresholds": (count,),
        "separation": (count, count),
        "weight": (count, dim),
        "bias": (count,),
    }
    for name in tensors:
        shape = expected[name]
        found = tuple(tensors[name].shape)
        if found != shape or not tensors[name].isfinite().all():
            raise DeploymentError(
                f"'{path}' is no sound router: '{name}' is {found}, expected {shape} finite "
                "numbers; make it again"
            )
