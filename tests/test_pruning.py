"""Which modules and components a plan drops: against brute force on dense second-order losses."""

from dataclasses import replace

import numpy as np
import pytest
from builders import tiny_probe

from mergeprobe.capture.sketch import projection
from mergeprobe.compose import prune
from mergeprobe.predict.pruning import harmful, harmful_components, harmful_modules


def change(probe, module, update, at_base):
    """⟨G, M⟩ + ½ tr(Mᵀ D M S), with the dense gradient that the sketch stands for."""
    sketch = (probe.gradient_base if at_base else probe.gradient)[module].double().numpy()
    out, into = update.shape
    left = projection(module, "out", out, len(sketch)).double().numpy()
    right = projection(module, "in", into, len(sketch)).double().numpy()
    gradient = left @ sketch @ right.T
    D, S = (part[module].dense().numpy() for part in (probe.outputs, probe.inputs))
    return (gradient * update).sum() + 0.5 * np.trace(update.T @ D @ update @ S)


def brute_force(probe, others, module):
    """Components dropped one at a time: the one whose harm exceeds its own gain the most."""
    whole = probe.updates[module].dense().double().numpy()
    u, s, vh = np.linalg.svd(whole, full_matrices=False)
    parts = [s[k] * np.outer(u[:, k], vh[k]) for k in range(len(s)) if s[k] > 1e-6 * s[0]]
    kept = list(range(len(parts)))
    while kept:
        now = sum(parts[k] for k in kept)
        excess = {}
        for k in kept:
            without = now - parts[k]
            harm = max(
                change(o, module, now, False) - change(o, module, without, False) for o in others
            )
            gain = change(probe, module, without, True) - change(probe, module, now, True)
            excess[k] = harm - max(0.0, gain)
        worst = max(excess, key=lambda k: excess[k])
        if excess[worst] <= 0:
            break
        kept.remove(worst)
    return tuple(k for k in range(len(parts)) if k not in kept)


@pytest.fixture(scope="module")
def probes():
    """Of finished runs, so that what is dropped are components."""
    found = [tiny_probe(seed, scale=0.5) for seed in (1, 2, 3)]
    return [replace(p, meta={**p.meta, "step": 200}) for p in found]


def test_components_are_those_that_brute_force_drops(probes):
    mine, *others = probes
    pruned = harmful_components(mine, others)
    assert not pruned.modules
    expected = {module: brute_force(mine, others, module) for module in mine.updates}
    assert pruned.components == {module: gone for module, gone in expected.items() if gone}
    counts = {len(gone) for gone in expected.values()}
    assert len(counts) > 1  # the choice differs from module to module


def test_what_is_dropped_lowers_the_harm_by_more_than_the_gain(probes):
    mine, other, _ = probes
    left = prune(mine.to_adapter(), harmful_components(mine, [other]))

    def total(probe, adapter, at_base):
        return sum(
            change(probe, module, update.dense().double().numpy(), at_base)
            for module, update in adapter.modules.items()
        )

    whole = mine.to_adapter()
    harm = total(other, whole, False) - total(other, left, False)
    gain = total(mine, left, True) - total(mine, whole, True)
    assert harm > max(0.0, gain)


def test_modules_are_those_whose_harm_exceeds_their_gain(probes):
    mine, *others = probes
    expected = []
    for module, update in mine.updates.items():
        whole = update.dense().double().numpy()
        harm = max(change(other, module, whole, False) for other in others)
        if harm > max(0.0, -change(mine, module, whole, True)):
            expected.append(module)
    assert harmful_modules(mine, others).modules == tuple(expected)
    assert 0 < len(expected) < len(mine.updates)


def test_early_probes_lose_modules_and_finished_ones_components(probes):
    mine, *others = probes
    early = replace(mine, meta={**mine.meta, "step": 10})
    assert harmful(early, others) == harmful_modules(mine, others)
    assert harmful(mine, others) == harmful_components(mine, others)


def test_without_measurements_nothing_is_dropped(probes):
    mine, other, _ = probes
    for part in ("gradient_base", "inputs", "outputs"):
        bare = replace(mine, **{part: {}})
        assert harmful_components(bare, [other]).components == {}
    assert harmful_components(mine, []).components == {}
    assert harmful_components(mine, [replace(other, gradient={})]).components == {}


def test_an_adapter_keeps_one_component(probes):
    mine, other, _ = probes
    # no own gain, harm from everything
    hopeless = replace(mine, gradient_base={m: 0 * g for m, g in mine.gradient_base.items()})
    steep = replace(other, gradient={m: 0 * g for m, g in other.gradient.items()})
    dropped = harmful_components(hopeless, [steep]).components
    total = sum(len(gone) for gone in dropped.values())
    assert total == sum(min(u.r, *u.shape) for u in mine.updates.values()) - 1
    assert len(prune(mine.to_adapter(), harmful_components(hopeless, [steep])).modules) == 1
