"""What a data-assisted rule may know of one module, for one adapter: parts of its probe."""

from __future__ import annotations

from dataclasses import dataclass

from mergeprobe.capture.probe import Moment


@dataclass(frozen=True, eq=False)
class ModuleData:
    """One adapter's data at one module; None where its probe has none.

    inputs: E[xxᵀ] of the module's inputs on the adapter's own task. outputs: E[δδᵀ] of the loss
    gradients at its outputs. Moments are F Fᵀ + tail · I.
    """

    inputs: Moment | None = None
    outputs: Moment | None = None
