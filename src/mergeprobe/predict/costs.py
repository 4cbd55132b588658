"""What a deployment holds in memory: adapter parameters, counted from shapes and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergeprobe.errors import PlanError

Shapes = Mapping[str, tuple[int, int]]  # module name -> (out, in)


def resident_parameters(shapes: Shapes, rank: int | Mapping[str, int]) -> int:
    """Parameters of one low-rank adapter: Σ over modules of r · (out + in).

    rank: one for all modules (what a server that takes uniform ranks holds: modules of lower
    rank are padded), or one per module (an exact concatenation).
    """
    if isinstance(rank, int):
        return rank * sum(out + into for out, into in shapes.values())
    if lacking := sorted(shapes.keys() - rank.keys()):
        raise PlanError(f"no rank is given for module '{lacking[0]}' ({len(lacking)} lack one)")
    return sum(rank[module] * (out + into) for module, (out, into) in shapes.items())


def rank_for_budget(adapters: Sequence[Shapes], budget: int) -> int:
    """The largest uniform rank at which all `adapters`, each kept on its own, fit in `budget`.

    At least 1: below that there is no adapter, so the result can exceed a very small budget.
    """
    a_rank = sum(resident_parameters(shapes, 1) for shapes in adapters)
    if a_rank == 0:
        raise PlanError("no adapter has a module, so no rank fits a budget")
    return max(1, budget // a_rank)
