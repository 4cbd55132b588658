"""Arrow: every token, at every adapted layer, picks its own adapters. Carried out by PEFT.

A layer's prototype of an adapter is the direction of its inputs that the update answers most, the
first right singular vector of ΔW. A token's weights are a softmax over |⟨x, prototype⟩| of the
`top` nearest. No prompts, no training; what it keeps is to be measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from mergeprobe.adapters.checkpoint import Adapter, check_same_base, write_adapter
from mergeprobe.compose.merge import merge
from mergeprobe.errors import AdapterMismatch, MergeError


@contextmanager
def arrowed(
    model: nn.Module,
    adapters: Sequence[Adapter],
    *,
    top: int = 3,
    temperature: float = 1.0,
    seed: int = 0,
) -> Iterator[nn.Module]:
    """Within the block `model` (yielded wrapped by PEFT) routes each token among the adapters.

    top: how many adapters a token uses, at most all. Smaller ranks are padded with zeros, which
    changes no update. The model is itself again on any exit. Raises MergeError for fewer than two
    adapters or a `top` or temperature out of range, AdapterMismatch where they adapt other modules
    or belong to other bases. Source: arXiv:2405.11157, as PEFT has it.
    """
    if len(adapters) < 2:
        raise MergeError(f"Arrow chooses between adapters; got {len(adapters)}, expected 2 or more")
    if not (top >= 1 and temperature > 0):
        raise MergeError(
            f"top is {top} and temperature {temperature}; expected 1 or more, and above 0"
        )
    check_same_base(adapters)
    first = adapters[0]
    for other in adapters[1:]:
        if differ := sorted(first.modules.keys() ^ other.modules.keys()):
            raise AdapterMismatch(
                f"'{first.name}' and '{other.name}' do not adapt the same modules ('{differ[0]}' "
                f"and {len(differ) - 1} more): Arrow needs that; compose logits or route by prompt"
            )
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with tempfile.TemporaryDirectory() as scratch:
        wrapped = _wrapped(
            model, adapters, Path(scratch), min(top, len(adapters)), temperature, seed
        )
    try:
        yield wrapped.eval()
    finally:
        wrapped.unload()
        for parameter, want in wanted.items():
            parameter.requires_grad_(want)


def _wrapped(
    model: nn.Module,
    adapters: Sequence[Adapter],
    folder: Path,
    top: int,
    temperature: float,
    seed: int,
) -> Any:
    from peft import ArrowConfig, create_arrow_model

    rank = max(max(adapter.ranks) for adapter in adapters)
    paths = []
    for position, adapter in enumerate(adapters):
        whole = merge([adapter], "mean", rank=rank, name=f"expert-{position}").adapter
        write_adapter(whole, folder / f"expert-{position}")
        paths.append(str(folder / f"expert-{position}"))
    how = ArrowConfig(top_k=top, router_temperature=temperature, rng_seed=seed)
    return create_arrow_model(model, paths, how)  # type: ignore[arg-type]
