"""The forecast inside a training run: at the probe point, against probes of other runs."""

from mergeprobe.capture import ProbeCallback as MergeProbeCallback

__all__ = ["MergeProbeCallback"]
