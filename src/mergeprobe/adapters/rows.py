"""Several updates attached to one model, one chosen for each row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mergeprobe.adapters.attach import placed
from mergeprobe.errors import AdapterMismatch
from mergeprobe.lowrank import LowRank

NONE = -1  # a row of the base model itself


class Rows:
    """Which of the attached updates each row of the next forward passes runs with.

    index: (rows,) positions in the sequence given to `attached_rows`; NONE for the base model.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.index: Int[Tensor, " rows"] | None = None

    def choose(self, index: Sequence[int] | Int[Tensor, " rows"]) -> None:
        """Sets the choice for the batches to come; AdapterMismatch for one that is not there."""
        chosen = torch.as_tensor(index, dtype=torch.long)
        if chosen.numel() and not (int(chosen.min()) >= NONE and int(chosen.max()) < self.count):
            raise AdapterMismatch(
                f"rows choose {chosen.tolist()}; there are {self.count} updates, {NONE} for none"
            )
        self.index = chosen


@contextmanager
def attached_rows(model: nn.Module, updates: Sequence[Mapping[str, LowRank]]) -> Iterator[Rows]:
    """Within the block each row of a batch runs with the update that `Rows.choose` gave it.

    updates: module name -> ΔW, one mapping for each adapter; ranks and modules may differ. One
    forward pass serves all of them: every adapted module adds two products, padded with zeros to
    the largest rank, and the row's choice picks the factors. The hooks go on any exit.
    Raises AdapterMismatch, with the model untouched, for an update that does not fit.
    """
    rows = Rows(len(updates))
    ready = [placed(model, update) for update in updates]
    modules = dict(model.named_modules(remove_duplicate=False))
    names = dict.fromkeys(name for update in ready for name in update)
    handles = []
    try:
        for name in names:
            down, up = _stacked([update.get(name) for update in ready])
            handles.append(modules[name].register_forward_hook(_adding(name, rows, down, up)))
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def _stacked(
    updates: Sequence[LowRank | None],
) -> tuple[Float[Tensor, "in n r"], Float[Tensor, "n r out"]]:
    """Aᵀ and Bᵀ of every update; zeros where one is None, and a last entry of zeros for NONE."""
    held = [update for update in updates if update is not None]
    width, (out, into) = max(update.r for update in held), held[0].shape
    down = held[0].A.new_zeros(into, len(updates) + 1, width)
    up = held[0].B.new_zeros(len(updates) + 1, width, out)
    for position, update in enumerate(updates):
        if update is not None:
            down[:, position, : update.r] = update.A.T
            up[position, : update.r] = update.B.T
    return down, up


def _adding(
    name: str, rows: Rows, down: Float[Tensor, "in n r"], up: Float[Tensor, "n r out"]
) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    owners = torch.arange(up.shape[0], device=up.device).repeat_interleave(up.shape[1])

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        x, index = args[0], rows.index
        if index is None:
            raise AdapterMismatch("no row has chosen its update; call Rows.choose before the model")
        if x.ndim != 3 or x.shape[0] != len(index):
            raise AdapterMismatch(
                f"'{name}' got a batch of shape {tuple(x.shape)}; expected ({len(index)} rows, "
                "tokens, width), one row for each choice"
            )
        index = index.to(x.device)
        if x.shape[1] == 1 and len(index) >= rows.count:
            # one token a row: a copy of each row's factors would cost more than the products, so
            # all updates are multiplied at once and each row keeps its own
            inner = x[:, 0].to(down.dtype) @ down.flatten(1)
            own = inner.masked_fill(owners != index[:, None], 0)
            added = (own @ up.flatten(0, 1))[:, None]
        else:
            picked = down[:, index].transpose(0, 1)
            added = torch.bmm(torch.bmm(x.to(down.dtype), picked), up[index])
        return output + added.to(output.dtype)

    return hook
