"""The probe of a small adapter, kept near twice the adapter's own size.

Sketches and moments do not grow with the rank, so for small ranks they are most of the file. What
is given up was measured by benchmarks/probe_size.py: rounding sketches moves cosines by 1e-4 (the
sketch itself by some 1/32), two directions fewer in the moments move curvature signals by a few
percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mergeprobe.capture.probe import Moment, Probe

SMALL_RANK = 4
SMALL_MOMENT_RANK = 6


def compacted(probe: Probe) -> Probe:
    """Up to rank 4: sketches rounded to bfloat16 (so written), moments of 6 directions, not 8."""
    if max((update.r for update in probe.updates.values()), default=0) > SMALL_RANK:
        return probe
    return replace(
        probe,
        halfway=_rounded(probe.halfway),
        gradient_base=_rounded(probe.gradient_base),
        gradient=_rounded(probe.gradient),
        inputs=_cut(probe.inputs),
        outputs=_cut(probe.outputs),
    )


def _rounded(sketches: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(torch.bfloat16).float() for name, value in sketches.items()}


def _cut(moments: Mapping[str, Moment]) -> dict[str, Moment]:
    # modules that share one moment share it still
    done = {id(moment): moment.cut(SMALL_MOMENT_RANK) for moment in moments.values()}
    return {name: done[id(moment)] for name, moment in moments.items()}
