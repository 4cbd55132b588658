"""Four families from reasoning-gym (Apache-2.0), an optional extra; none is embedded already.

Its questions are used as they are. Its `codeio` is left out, whose items are other people's code.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from mergeprobe.bench.tasks.items import POOL, Keyed, said
from mergeprobe.bench.tasks.task import Task
from mergeprobe.errors import DataError

VERSION = "0.1.25"
SEED = 0


@dataclass(frozen=True)
class GymPool:
    """The first POOL items of one generator, each question once; the key is the question.

    settings: (name, value) pairs of the generator's own configuration.
    """

    module: str
    generator: str
    settings: tuple[tuple[str, Any], ...]

    def __call__(self) -> Keyed:
        module = _module(self.module)
        config = getattr(module, f"{self.generator}Config")
        dataset = getattr(module, f"{self.generator}Dataset")
        items = dataset(config(seed=SEED, size=POOL, **dict(self.settings)))
        seen = set()
        for k in range(POOL):
            question, answer = items[k]["question"].strip(), items[k]["answer"].strip()
            if question not in seen:
                seen.add(question)
                yield question, said(question, answer)


def _module(name: str) -> ModuleType:
    """One generator's module, without the package's own `__init__`s.

    They import every generator, and so a SAT solver that has no wheel, and plotting. Hollow
    packages stand in for them, and are taken away again, so that anybody else's import is whole.
    """
    found = find_spec("reasoning_gym")
    if found is None or not found.submodule_search_locations:
        raise DataError(
            "this task needs reasoning-gym, which is not installed; "
            f"run: pip install --no-deps reasoning-gym=={VERSION}"
        )
    root = found.submodule_search_locations[0]
    known = {key: value for key, value in sys.modules.items() if _is_gym(key)}
    for key in known:
        del sys.modules[key]
    try:
        for part in ("", name.split(".")[0]):
            hollow = ModuleType(f"reasoning_gym.{part}".rstrip("."))
            hollow.__path__ = [f"{root}/{part}"]
            sys.modules[hollow.__name__] = hollow
        return importlib.import_module(f"reasoning_gym.{name}")
    finally:
        for key in [key for key in sys.modules if _is_gym(key)]:
            del sys.modules[key]
        sys.modules.update(known)


def _is_gym(name: str) -> bool:
    return name.partition(".")[0] == "reasoning_gym"


def _pool(module: str, generator: str, **settings: Any) -> GymPool:
    return GymPool(module, generator, tuple(settings.items()))


GCD = _pool("arithmetic.gcd", "GCD", min_value=10, max_value=200)
FACTORS = _pool(
    "arithmetic.prime_factorization", "PrimeFactorization", min_value=20, max_value=9000
)
FRACTIONS = _pool(
    *("arithmetic.fraction_simplification", "FractionSimplification"),
    **{"min_value": 2, "max_value": 60, "min_factor": 2, "max_factor": 12, "styles": ("plain",)},
)
SEQUENCES = _pool("cognition.number_sequences", "NumberSequence", min_terms=4, max_terms=6)

GYM_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("gym_gcd", "math", "the greatest common divisor", GCD),
        Task("gym_factors", "math", "prime factors", FACTORS),
        Task("gym_fraction", "math", "a fraction in lowest terms", FRACTIONS),
        Task("gym_sequence", "math", "the next term under some rule", SEQUENCES),
    )
}
