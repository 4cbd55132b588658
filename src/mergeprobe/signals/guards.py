"""Guards: how the run itself is doing. They qualify a forecast, and are a hard baseline for it."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mergeprobe.signals.gradient import mean_loss
from mergeprobe.signals.panel import Panel
from mergeprobe.signals.representation import entropy, listed
from mergeprobe.signals.site import ratio

FEWEST_POINTS = 3  # of a loss curve, for a slope


def own_gain(panel: Panel, region: str) -> Float[Tensor, " n"]:
    """Calibration loss of the base minus that of the snapshot, mean over items, nats a token."""
    return mean_loss(panel, "base_loss") - mean_loss(panel, "loss")


def own_gain_relative(panel: Panel, region: str) -> Float[Tensor, " n"]:
    """The own gain over the base's loss."""
    return ratio(own_gain(panel, region), mean_loss(panel, "base_loss"))


def loss_slope(panel: Panel, region: str) -> Float[Tensor, " n"]:
    """d ln(loss) / d ln(step) of the training loss, least squares; −1 halves it when steps double.

    A power law's exponent, so the length of the run and the loss's scale cancel. Points up to the
    probe's step with a positive step and loss; not measured with fewer than three.
    """
    values = [slope(_curve(probe.meta)) for probe in panel.probes]
    return torch.tensor(values, dtype=torch.float64)


def norm_growth(panel: Panel, region: str) -> Float[Tensor, "*g n"]:
    """p in ‖ΔW‖ ∝ stepᵖ, from the sketches at half of the steps and at the snapshot.

    1: each step goes the same way (or the rate is still warming up); 0.5: a random walk;
    0: the update no longer grows.
    """
    grown, half = panel.own("grown", region), panel.own("half", region)
    spans = torch.tensor([_log_span(probe.meta) for probe in panel.probes], dtype=torch.float64)
    ends = torch.where((grown > 0) & (half > 0), grown / half, torch.nan)
    return ends.log() / 2 / spans


def entropy_change(panel: Panel, region: str) -> Float[Tensor, " n"]:
    """Output entropy minus the base's (nats, top 64 and one bucket), mean over positions."""
    values = [
        torch.nan
        if probe.drift is None
        else float((entropy(listed(probe.drift)) - entropy(listed(probe.drift, base=True))).mean())
        for probe in panel.probes
    ]
    return torch.tensor(values, dtype=torch.float64)


def entropy_change_open(panel: Panel, region: str) -> Float[Tensor, " n"]:
    """entropy_change where an open prompt has just ended: what the run does to the first word of
    an answer that could begin in many ways. Far below 0 the run collapses onto one beginning."""
    values = []
    for probe in panel.probes:
        places = probe.meta.get("open_positions")
        if probe.drift is None or not places:
            values.append(torch.nan)
            continue
        change = entropy(listed(probe.drift)) - entropy(listed(probe.drift, base=True))
        values.append(float(change[places].mean()))
    return torch.tensor(values, dtype=torch.float64)


def slope(points: list[tuple[float, float]]) -> float:
    """Least-squares slope in log-log; NaN with fewer than three points or one step only."""
    if len(points) < FEWEST_POINTS:
        return math.nan
    x, y = (torch.tensor(side, dtype=torch.float64).log() for side in zip(*points, strict=True))
    x, y = x - x.mean(), y - y.mean()
    spread = float(x @ x)
    return float(x @ y) / spread if spread > 0 else math.nan


def _curve(meta: dict[str, Any]) -> list[tuple[float, float]]:
    last = meta.get("step")
    points = [(float(step), float(loss)) for step, loss in meta.get("losses") or ()]
    return [
        (step, loss)
        for step, loss in points
        if 0 < step <= (last or math.inf) and 0 < loss < math.inf
    ]


def _log_span(meta: dict[str, Any]) -> float:
    """ln(step / halfway step), NaN where they were not recorded."""
    step, half = meta.get("step"), meta.get("halfway_step")
    return math.log(step / half) if step and half and 0 < half < step else math.nan
