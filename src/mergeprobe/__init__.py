"""Will these LoRA adapters merge, and what should I deploy?

In a training script, one line writes a probe after the first few percent of the steps:
`callbacks=[mergeprobe.MergeProbeCallback("probes/math.safetensors")]`. Then:

    import mergeprobe as mp

    names = ("math", "code", "safety")
    probes = [mp.read_probe(f"probes/{name}.safetensors") for name in names]
    plan = mp.forecast(probes).plan(min_retention=0.9)
    adapters = {name: mp.read_adapter(f"adapters/{name}") for name in names}
    deployment = mp.apply_plan(plan, adapters, "deployment")

`mp.forecast(probes, model=mp.open_tier(mp.load_base("..."), probes))` runs the base model too and
forecasts best. Names are imported on first use, so `import mergeprobe` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mergeprobe.errors import MergeProbeError
from mergeprobe.version import __version__

if TYPE_CHECKING:
    from mergeprobe.adapters.base import load_base
    from mergeprobe.adapters.checkpoint import Adapter, read_adapter, write_adapter
    from mergeprobe.capture import Probe, ProbeRecorder, read_probe
    from mergeprobe.compose import Executor, apply_plan, merge
    from mergeprobe.evaluate.retention import retention
    from mergeprobe.live import MergeProbeCallback
    from mergeprobe.plan import Plan, read_plan, write_plan
    from mergeprobe.predict.early import open_tier
    from mergeprobe.predict.forecast import forecast_probes as forecast

__all__ = [
    "Adapter",
    "Executor",
    "MergeProbeCallback",
    "MergeProbeError",
    "Plan",
    "Probe",
    "ProbeRecorder",
    "__version__",
    "apply_plan",
    "forecast",
    "load_base",
    "merge",
    "open_tier",
    "read_adapter",
    "read_plan",
    "read_probe",
    "retention",
    "write_adapter",
    "write_plan",
]

# name -> (module, its name there); the imports above say the same to editors and type checkers
_WHERE = {
    "Adapter": ("adapters.checkpoint", "Adapter"),
    "Executor": ("compose", "Executor"),
    "MergeProbeCallback": ("live", "MergeProbeCallback"),
    "Plan": ("plan", "Plan"),
    "Probe": ("capture", "Probe"),
    "ProbeRecorder": ("capture", "ProbeRecorder"),
    "apply_plan": ("compose", "apply_plan"),
    "forecast": ("predict.forecast", "forecast_probes"),
    "load_base": ("adapters.base", "load_base"),
    "merge": ("compose", "merge"),
    "open_tier": ("predict.early", "open_tier"),
    "read_adapter": ("adapters.checkpoint", "read_adapter"),
    "read_plan": ("plan", "read_plan"),
    "read_probe": ("capture", "read_probe"),
    "retention": ("evaluate.retention", "retention"),
    "write_adapter": ("adapters.checkpoint", "write_adapter"),
    "write_plan": ("plan", "write_plan"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'mergeprobe' has no attribute '{name}'")
    module, there = _WHERE[name]
    value = getattr(import_module(f"mergeprobe.{module}"), there)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
