"""Second moments E[v vᵀ] from a stream of rows, kept as a rank-q sketch."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.capture.probe import Moment

MOMENT_RANK = 8
OVERSAMPLE = 4


@lru_cache(maxsize=64)
def _draw(dim: int, columns: int) -> Float[Tensor, "dim columns"]:
    """Gaussian, one draw for all vectors of one length."""
    return torch.randn(dim, columns, generator=torch.Generator().manual_seed(dim))


class MomentSketch:
    """Streams rows v and yields a rank-q Moment: single-pass Nyström with an exact trace.

    Keeps Y = Σ v (vᵀ Ω), Ω (dim, 4q) Gaussian with a seed of its own; at the end
    S ≈ Y (Ωᵀ Y)⁺ Yᵀ, cut to its q largest eigenvalues. Source: arXiv:1706.05736 (fixed-rank
    Nyström). Ours cuts the pseudo-inverse instead of shifting, and adds the rest of the trace,
    spread evenly.
    """

    def __init__(self, dim: int, rank: int = MOMENT_RANK, device: torch.device | None = None):
        self.rank = min(rank, dim)
        columns = min(dim, OVERSAMPLE * rank)
        self.omega = _draw(dim, columns).to(device)
        self.range = torch.zeros(dim, columns, device=device)
        # ‖rows‖² of every batch, on the device: reading them on the way would make a GPU wait
        self.squares: list[Tensor] = []
        self.rows = 0

    @property
    def trace(self) -> float:
        """Σ ‖v‖² over the rows seen, exact."""
        return float(torch.stack(self.squares).cpu().double().sum()) if self.squares else 0.0

    def add(self, rows: Float[Tensor, "rows dim"]) -> None:
        rows = rows.float()
        self.range.addmm_(rows.T, rows @ self.omega)
        self.squares.append(torch.linalg.vector_norm(rows).square())
        self.rows += rows.shape[0]

    def moment(self, per: int | None = None) -> Moment:
        """The sketch, divided by `per` (default: the number of rows seen)."""
        count = max(1, self.rows if per is None else per)
        dim = self.range.shape[0]
        trace = self.trace
        if trace == 0.0:
            return Moment(torch.zeros(dim, self.rank), 0.0)
        y = self.range.double().cpu() / count
        core = self.omega.double().cpu().T @ y
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        # directions below the float32 accumulation error are noise: with fewer rows than
        # columns the core is singular
        sound = values > 1e-5 * values[-1]
        root = vectors[:, sound] / values[sound].sqrt()
        u, s, _ = torch.linalg.svd(y @ root, full_matrices=False)
        values = s[: self.rank].square()
        kept = u[:, : self.rank] * values.sqrt()
        tail = max(0.0, trace / count - float(values.sum())) / dim
        return Moment(kept.float(), tail)
