"""A training run -> a probe."""

from mergeprobe.capture.callback import ProbeCallback
from mergeprobe.capture.measure import take_probe
from mergeprobe.capture.points import probe_step
from mergeprobe.capture.probe import Probe, read_probe, write_probe
from mergeprobe.capture.run import ProbeRecorder

__all__ = [
    "Probe",
    "ProbeCallback",
    "ProbeRecorder",
    "probe_step",
    "read_probe",
    "take_probe",
    "write_probe",
]
