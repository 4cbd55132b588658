"""What only the first steps of a run can tell, kept beside the probe for a run that is resumed."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, zeros

from mergeprobe.artefact import atomic_file


@dataclass
class FirstSteps:
    """init_hash: of A before the first step. halfway: step -> module -> (k, k) sketch of ΔW."""

    init_hash: str | None = None
    halfway: dict[int, dict[str, Float[Tensor, "k k"]]] = field(default_factory=dict)

    def keep(self, path: Path) -> None:
        tensors = {
            f"{step}:{module}": value
            for step, sketches in self.halfway.items()
            for module, value in sketches.items()
        }
        early = {"init_hash": self.init_hash, "steps": sorted(self.halfway)}
        with atomic_file(path) as temporary:
            save_file(tensors or {"": zeros(1)}, temporary, metadata={"early": json.dumps(early)})


def read_first_steps(path: Path) -> FirstSteps:
    """What `keep` wrote; empty, with a warning, where it is gone or damaged: the probe then lacks
    the half-way sketch and does not say whether the init was shared."""
    try:
        with safe_open(str(path), framework="pt") as file:
            early = json.loads(file.metadata()["early"])
            found = FirstSteps(early["init_hash"], {int(s): {} for s in early["steps"]})
            for key in file.keys():
                step, _, module = key.partition(":")
                if module:
                    found.halfway[int(step)][module] = file.get_tensor(key)
        return found
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        warnings.warn(
            f"mergeprobe: training is resumed but '{path}', which the first steps left, is gone or "
            "damaged; the probe will not know the init, nor perhaps the half-way sketch",
            stacklevel=2,
        )
        return FirstSteps()
