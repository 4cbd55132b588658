"""A training run -> a probe."""

from mergeprobe.capture.callback import MergeProbeCallback
from mergeprobe.capture.probe import Probe, read_probe, write_probe
from mergeprobe.capture.run import ProbeRecorder, probe_step, take_probe

__all__ = [
    "MergeProbeCallback",
    "Probe",
    "ProbeRecorder",
    "probe_step",
    "read_probe",
    "take_probe",
    "write_probe",
]
