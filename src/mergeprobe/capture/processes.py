"""Measuring on several processes at once: each takes a share of the items, the sums are joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from mergeprobe.capture.batch import Batch
from mergeprobe.capture.moments import MomentSketch
from mergeprobe.capture.recorder import Recording
from mergeprobe.errors import ProbeError


@dataclass(frozen=True)
class Processes:
    """rank: which one this is, of size; 0 of 1 without torch.distributed."""

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def share(self, batch: Batch) -> Batch:
        """Every size-th item; all of them where there are fewer items than processes."""
        if not self.shares(batch):
            return batch
        mine = slice(self.rank, None, self.size)
        return Batch(batch.ids[mine], batch.attention_mask[mine], batch.completion_mask[mine])

    def shares(self, batch: Batch) -> bool:
        return 1 < self.size <= len(batch)


ALONE = Processes()


def all_processes() -> Processes:
    """The default group of torch.distributed, or this process alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Processes(dist.get_rank(), dist.get_world_size())


def agree(processes: Processes, problem: Exception | None, device: torch.device) -> None:
    """Raises on every process if one has a problem, so that none waits for another in vain."""
    if processes.size == 1:
        if problem is not None:
            raise problem
        return
    failed = torch.tensor(float(problem is not None), device=_meeting_place(device))
    dist.all_reduce(failed)
    if problem is not None:
        raise problem
    if float(failed):
        raise ProbeError(f"{int(failed)} of {processes.size} processes could not be measured")


def joined(recording: Recording, processes: Processes, batch: Batch) -> Recording:
    """What all processes recorded on their shares of `batch`, as if one had run every item.

    Sums are linear in the items: gradients, the moments' ranges and traces, counts. Every process
    gets the result.
    """
    if not processes.shares(batch):
        return recording
    device = next(iter(recording.gradient.values())).device
    summed = _summed(_parts(recording), _meeting_place(device))
    losses = torch.zeros(len(batch), dtype=torch.float64)
    losses[processes.rank :: processes.size] = recording.item_loss
    losses = _summed({"loss": losses}, _meeting_place(device))["loss"]
    return replace(
        recording,
        gradient={
            key.removeprefix("gradient:"): value
            for key, value in summed.items()
            if key.startswith("gradient:")
        },
        inputs=_sketches("inputs", recording.inputs, summed),
        outputs=_sketches("outputs", recording.outputs, summed),
        tokens=int(summed["tokens"]),
        loss_sum=float(summed["loss_sum"]),
        item_loss=losses,
    )


def _parts(recording: Recording) -> dict[str, Tensor]:
    """Everything that adds up, by name. A sketch that modules share comes under the first."""
    parts = {f"gradient:{name}": value for name, value in recording.gradient.items()}
    for kind in ("inputs", "outputs"):
        seen: set[int] = set()
        for name, sketch in getattr(recording, kind).items():
            if id(sketch) not in seen:
                seen.add(id(sketch))
                counted = torch.tensor([sketch.trace, sketch.rows], dtype=torch.float64)
                parts |= {f"{kind}:{name}": sketch.range, f"{kind} counted:{name}": counted}
    parts["tokens"] = torch.tensor(recording.tokens, dtype=torch.float64)
    parts["loss_sum"] = torch.tensor(recording.loss_sum, dtype=torch.float64)
    return parts


def _summed(parts: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Sums over processes. A part that only some have (an expert that no token reached) counts as
    zero elsewhere."""
    mine = {name: (tuple(part.shape), part.dtype) for name, part in parts.items()}
    known: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(known, mine)
    shapes = {name: shape for theirs in known for name, shape in theirs.items()}
    summed = {}
    for name in sorted(shapes):
        shape, dtype = shapes[name]
        part = parts[name].clone() if name in parts else torch.zeros(shape, dtype=dtype)
        place = part.device
        part = part.to(device)
        dist.all_reduce(part)
        summed[name] = part.to(place)
    return summed


def _sketches(
    kind: str, mine: Mapping[str, MomentSketch], summed: Mapping[str, Tensor]
) -> dict[str, MomentSketch]:
    """The summed sketches; modules that share one here share it still."""
    joined: dict[str, MomentSketch] = {}
    for key, ranges in summed.items():
        if key.startswith(f"{kind}:"):
            name = key.removeprefix(f"{kind}:")
            joined[name] = _sketch(ranges, summed[f"{kind} counted:{name}"])
    first = {id(sketch): name for name, sketch in reversed(list(mine.items()))}
    return {name: joined[first[id(sketch)]] for name, sketch in mine.items()} | {
        name: sketch for name, sketch in joined.items() if name not in mine
    }


def _sketch(ranges: Float[Tensor, "dim columns"], counted: Float[Tensor, " two"]) -> MomentSketch:
    sketch = MomentSketch(ranges.shape[0], device=ranges.device)
    sketch.range, sketch.squares, sketch.rows = ranges, [counted[0]], int(counted[1])
    return sketch


def _meeting_place(device: torch.device) -> torch.device:
    """Where the group's backend can add: NCCL on the GPU, Gloo on the CPU."""
    return device if dist.get_backend() == "nccl" else torch.device("cpu")


def any_of(processes: Processes, value: bool, device: torch.device) -> bool:
    """Whether it holds on any process; the same answer on all, which have to ask together."""
    if processes.size == 1:
        return value
    held = torch.tensor(float(value), device=_meeting_place(device))
    dist.all_reduce(held)
    return bool(held > 0)
