"""How far a sketched number may be from the exact one, and the size that a target error needs.

Every bound is a standard error: the root of the mean squared error over draws of the sketch, for
the worst updates of their norms; "first order" where it is that of a ratio, linearised. `h` is
the concentration of the energy over modules, Σ share²: 1/m for m modules of equal energy, 1 when
one module holds everything. c is the cosine. Derived here; the method is textbook (moments of
Gaussian forms; Isserlis 1918). tests/test_signals_sketches.py draws sketches and compares.

Two-sided sketch R_outᵀ M R_in, k a side (gradients, velocity, growth; capture/sketch.py):
    Var ⟨sk M, sk N⟩ = (‖MᵀN‖² + ‖MNᵀ‖² + tr (MᵀN)² + tr (MNᵀ)²)/k
                       + (‖M‖²‖N‖² + ⟨M, N⟩² + ‖MᵀN‖² + ‖MNᵀ‖²)/k² ≤ (4/k + 4/k²) ‖M‖²‖N‖²,
    reached by copies of one rank-one matrix.
Rank-one probes xᵀ M y, k of them (screening sketches; screen.py): a fourth moment is at most 9,
    so Var ⟨sk M, sk N⟩ ≤ 8 ‖M‖²‖N‖²/k, and of a cosine (first order) 4.5 h (1 − c²)²/k.
One-sided projection to p dimensions (drifts): Var ≤ 2 ‖x‖²‖y‖²/p.
Moments F Fᵀ + tail · I are no sketch of a product: what was cut is in the tail, exactly counted.
Sampled rows (sign_conflict): the standard error is estimated pair by pair, sign_conflict_error.
"""

from __future__ import annotations

import math
from typing import Any

SURE = 3.0
"""Standard errors in a stated bound: beyond it lies 1 pair in 370 of the worst kind; it is 6.4
standard errors for unrelated updates without a common direction."""
UNEVEN = 2.0
"""What sizes allow for: energy as if spread evenly over 1/UNEVEN of the modules. m h was 1.5 to
1.9 for seven adapters of SmolLM2-135M trained on our tasks."""


def product_error(k: int, h: float = 1.0) -> float:
    """Standard error of ⟨M, N⟩/(‖M‖ ‖N‖) from two-sided sketches, at most."""
    return math.sqrt((4 / k + 4 / k**2) * h)


def cosine_error(k: int, h: float, c: float = 0.0) -> float:
    """Standard error of a cosine normalised by the sketches' own norms, at most; first order.

    c = p² − q² over p² + q² for p, q the sum and the difference, whose sketched squares err by
    product_error each; so copies and opposites come out exact.
    """
    return (1 - c * c) * product_error(k, h)


def screening_error(k: int, h: float, c: float = 0.0) -> float:
    """Standard error of a cosine from k rank-one probes a module, at most; first order."""
    return (1 - c * c) * math.sqrt(4.5 * h / k)


def screening_size(error: float, modules: int) -> int:
    """Probes a module so that SURE standard errors stay within `error` whatever the updates are,
    with energy no less even than h = UNEVEN/modules; a multiple of 16."""
    return 16 * math.ceil(SURE**2 * 4.5 * UNEVEN / (error**2 * modules) / 16)


def gradient_size(error: float, modules: int) -> int:
    """The smallest k of two-sided sketches for this standard error of a gradient cosine."""
    k = 1
    while cosine_error(k, 1 / modules) > error:
        k += 1
    return k


def stated(k: int | None, modules: int, sign_rows: int | None) -> dict[str, Any]:
    """What a table of pairs says of its sketched columns, for its file."""
    signs = (
        {"exact": True}
        if sign_rows is None
        else {"rows": sign_rows, "standard_error": "column sign_conflict_error"}
    )
    found: dict[str, Any] = {"sign_conflict": signs}
    if k is not None:
        found["gradient_cosine, gradient_cosine_base, velocity_cosine"] = {
            "sketch_size": k,
            "standard_error_at_most": cosine_error(k, 1 / modules),
            "if": f"energy spread evenly over {modules} modules; (1 − c²) times this at cosine c",
        }
        found["first_order_transfer, first_order_transfer_snapshot"] = {
            "sketch_size": k,
            "standard_error_at_most": f"{product_error(k, 1 / modules):.4f} ‖G_b‖ ‖ΔW_a‖ / L_b",
        }
    return found
