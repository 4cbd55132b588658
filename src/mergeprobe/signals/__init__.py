"""Probes -> numbers: the file tier of measurement, which needs no model."""

from mergeprobe.signals.rows import (
    adapter_rows,
    layer_rows,
    linear,
    pair_rows,
    quadratic,
    set_rows,
    tables,
)
from mergeprobe.signals.table import SIGNALS, Signal, markdown

__all__ = [
    "SIGNALS",
    "Signal",
    "adapter_rows",
    "layer_rows",
    "linear",
    "markdown",
    "pair_rows",
    "quadratic",
    "set_rows",
    "tables",
]
