"""The smallest maximum of convex quadratics over a box: the program behind *reweight*.

Up to a few dozen variables, so each Newton step is one small dense system; no solver library.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

GAP = 1e-9
"""The barrier's distance to the optimum at which it stops."""


def smallest_maximum(
    bend: Float[np.ndarray, "m n n"],
    slope: Float[np.ndarray, "m n"],
    level: Float[np.ndarray, " m"],
    largest: float,
) -> Float[np.ndarray, " n"]:
    """argmin over w in [0, largest]ⁿ of max_k f_k(w), f_k = ½ wᵀH_k w + q_k·w + l_k.

    bend: H, symmetric positive semidefinite; slope: q; level: l. The maximum is within about 1e-8
    of the least, a weight within about 1e-4 where the maximum is flat; deterministic.

    Interior point (Boyd & Vandenberghe, Convex Optimization, ch. 11): over z = (w, t), minimise
    s·t − Σ log(t − f_k(w)) − Σ log w − Σ log(largest − w) for growing s. At each s the gap to
    the optimum is (m + 2n)/s.
    """
    m, n = slope.shape

    def values(w: Float[np.ndarray, " n"]) -> Float[np.ndarray, " m"]:
        return 0.5 * np.einsum("kab,a,b->k", bend, w, w) + slope @ w + level

    def barrier(z: Float[np.ndarray, " n1"], sharp: float) -> float:
        room = np.concatenate([z[n] - values(z[:n]), z[:n], largest - z[:n]])
        return sharp * float(z[n]) - float(np.log(room).sum()) if (room > 0).all() else math.inf

    def step(z: Float[np.ndarray, " n1"], sharp: float) -> tuple[np.ndarray, float]:
        """The Newton step and how much it promises to lower the barrier (negative)."""
        w, gap = z[:n], z[n] - values(z[:n])
        lean = np.concatenate([-(bend @ w + slope), np.ones((m, 1))], 1)  # of t − f_k, by (w, t)
        gradient = -(lean / gap[:, None]).sum(0)
        gradient[:n] += 1 / (largest - w) - 1 / w
        gradient[n] += sharp
        hessian = (lean / gap[:, None] ** 2).T @ lean
        hessian[:n, :n] += np.einsum("k,kab->ab", 1 / gap, bend)
        hessian[:n, :n] += np.diag(1 / w**2 + 1 / (largest - w) ** 2)
        move = -np.linalg.solve(hessian, gradient)
        return move, float(gradient @ move)

    start = np.full(n, largest / 2)
    z = np.append(start, values(start).max() + 1.0)
    sharp = 1.0
    while (m + 2 * n) / sharp > GAP:
        for _ in range(60):
            move, promise = step(z, sharp)
            size, here = 1.0, barrier(z, sharp)
            while size > 1e-9 and barrier(z + size * move, sharp) > here + 0.1 * size * promise:
                size /= 2
            if promise > -1e-10 or size <= 1e-9:  # there, or as near as rounding lets it
                break
            z = z + size * move
        sharp *= 8.0
    return z[:n]
