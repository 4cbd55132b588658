"""Probes -> numbers: the file tier of measurement, which needs no model."""

from mergeprobe.signals.families import FAMILIES, Effort
from mergeprobe.signals.files import in_memory, on_disk
from mergeprobe.signals.rows import (
    adapter_rows,
    layer_rows,
    linear,
    pair_rows,
    quadratic,
    set_rows,
    tables,
)
from mergeprobe.signals.sums import measure
from mergeprobe.signals.table import SIGNALS, Signal, markdown

__all__ = [
    "FAMILIES",
    "SIGNALS",
    "Effort",
    "Signal",
    "adapter_rows",
    "in_memory",
    "layer_rows",
    "linear",
    "markdown",
    "measure",
    "on_disk",
    "pair_rows",
    "quadratic",
    "set_rows",
    "tables",
]
