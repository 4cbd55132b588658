"""Diagnostics that take two measurements of one run, or of one batch; plain numbers come out.

Those that are signals of the table are listed beside these in docs/signals.md.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergeprobe.capture.probe import Probe
from mergeprobe.errors import ProbeError

EARLY_SHARE = 0.03
"""Of the data, after which activation is read: `fraction=(0.03, 1.0)` takes both probes."""


def activation_index(early: Probe, final: Probe) -> float:
    """The gain after the first 3 % of the data over the gain at the end of the same run.

    Unit 1, usually in [0, 1]: near 1 the run only switched on what the base could do already
    (format, register), near 0 it learned something; above 1 it got worse again. Gains are on the
    calibration items, base minus snapshot. Source: ours, after the view of fine-tuning as
    activation (superficial alignment, arXiv:2305.11206). NaN where the run gained nothing.
    Raises ProbeError unless `early` lies before `final`, both on the same items and base.
    """
    one, two = early.calibration, final.calibration
    if one is None or two is None:
        named = early.name if one is None else final.name
        raise ProbeError(f"probe '{named}' holds no calibration losses; capture it again")
    same = one.base_loss.shape == two.base_loss.shape and torch.allclose(
        one.base_loss.float(), two.base_loss.float(), rtol=1e-3
    )
    if not same or early.meta.get("base_fingerprint") != final.meta.get("base_fingerprint"):
        raise ProbeError(
            f"'{early.name}' and '{final.name}' were measured on other items or another base; "
            "expected two probes of one run"
        )
    steps = early.meta.get("step"), final.meta.get("step")
    if None not in steps and not steps[0] < steps[1]:  # type: ignore[operator]
        raise ProbeError(f"the early probe is at step {steps[0]}, the final one at {steps[1]}")
    gain = float((two.base_loss.double() - two.loss.double()).mean())
    if gain <= 0:
        return math.nan
    return float((one.base_loss.double() - one.loss.double()).mean()) / gain


def first_token_share(
    alone: Float[Tensor, " tokens"], merged: Float[Tensor, " tokens"], items: Int[Tensor, " tokens"]
) -> float:
    """First-token collapse: the share of a merge's harm that falls on first answer tokens.

    alone, merged: teacher-forced token losses (nats) of the adapter alone and of the merge; items:
    the item of each token, in order. Harm is what the loss of a token rises by; where it falls,
    none. Unit 1, in [0, 1]. Superposed tasks hold several answers at once, and the first token
    that is given decides between them, after which the model goes on with one task
    (arXiv:2410.05603): near 1 the merge hesitates there and nowhere else, so telling it the task
    (a prefix, a route) mends it; near the first tokens' share of all tokens the harm is even.
    NaN without harm.
    """
    harm = (merged.double() - alone.double()).clamp_min(0.0)
    total = float(harm.sum())
    first = torch.ones_like(items, dtype=torch.bool)
    first[1:] = items[1:] != items[:-1]
    return float(harm[first].sum()) / total if total > 0 else math.nan
