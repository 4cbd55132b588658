"""How the next token is drawn: greedy, or by temperature and top-p, from a seed of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """temperature: ≥ 0, 0 is greedy. top_p: in (0, 1], the mass of likeliest tokens that is kept.
    seed: None draws another one each time."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None

    def generator(self) -> torch.Generator:
        draw = torch.Generator()
        if self.seed is None:
            draw.seed()
        else:
            draw.manual_seed(self.seed)
        return draw


def next_tokens(
    logits: Float[Tensor, "n vocab"], how: Sequence[Sampling], draws: Sequence[torch.Generator]
) -> list[int]:
    """One token for each row. A row's token depends on its own logits, sampling and generator
    only."""
    found = logits.argmax(-1)
    drawn = [row for row, sampling in enumerate(how) if sampling.temperature > 0]
    if drawn:
        chosen = [how[row] for row in drawn]
        heat = _column([s.temperature for s in chosen], logits)
        share = _column([s.top_p for s in chosen], logits)
        points = [float(torch.rand((), generator=draws[row], dtype=torch.float64)) for row in drawn]
        # the largest is taken off first: a tiny temperature would overflow
        rows = logits[drawn].double()
        chances = ((rows - rows.amax(-1, keepdim=True)) / heat).softmax(-1)
        found[drawn] = _inverse(chances, share, _column(points, logits))
    return found.tolist()


def _column(values: Sequence[float], like: Tensor) -> Float[Tensor, "n 1"]:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _inverse(
    chances: Float[Tensor, "n vocab"], share: Float[Tensor, "n 1"], points: Float[Tensor, "n 1"]
) -> Tensor:
    """The token where the cumulative probability passes a point in [0, 1), of those kept."""
    if bool((share < 1).any()):
        chances = chances.masked_fill(~_nucleus(chances, share), 0)
    summed = chances.cumsum(-1)
    # at least one entry lies above: a point is below 1, and rounding may not lose the last one
    at = torch.searchsorted(summed, points * summed[:, -1:], right=True)
    last = summed.argmax(-1, keepdim=True)  # the first place of the whole sum
    return torch.minimum(at, last)[:, 0]


def _nucleus(
    chances: Float[Tensor, "n vocab"], share: Float[Tensor, "n 1"]
) -> Bool[Tensor, "n vocab"]:
    """The fewest likeliest tokens whose probabilities reach the share (arXiv:1904.09751)."""
    ordered, order = chances.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(chances, dtype=torch.bool).scatter(-1, order, before < share)
