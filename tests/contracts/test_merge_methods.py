"""One contract for every row of METHODS: against a dense oracle, and what it says it keeps."""

import itertools

import numpy as np
import pytest
import torch
from merge_oracles import ORACLES

from mergeprobe.adapters.checkpoint import Adapter
from mergeprobe.capture.probe import Moment, Probe
from mergeprobe.compose.merge import METHODS, merge
from mergeprobe.compose.merge.methods import ALL, COPIES, GAUGE, IDENTITY, PERMUTATION
from mergeprobe.compose.merge.module import module_generator
from mergeprobe.lowrank import LowRank, truncate

# wide enough that tsv_m keeps all of the adapters below
OUT, INTO = 24, 20


def update(seed, r=3, scaling=2.0):
    draw = torch.Generator().manual_seed(seed)
    B, A = torch.randn(OUT, r, generator=draw), torch.randn(r, INTO, generator=draw)
    return LowRank(B, A, scaling)


def adapter(seed, ranks=(3, 2), **kwargs):
    modules = {f"layer.{k}": update(10 * seed + k, r, **kwargs) for k, r in enumerate(ranks)}
    return Adapter(f"adapter-{seed}", modules, base="tiny")


def dense(adapter):
    return {
        m: (u.scaling * u.B.double() @ u.A.double()).numpy() for m, u in adapter.modules.items()
    }


def distance(merged, expected):
    """Relative Frobenius error over all modules; a module that is absent counts as zeros."""
    found = dense(merged.adapter)
    assert found.keys() == expected.keys()
    lost = sum(np.square(found[m] - expected[m]).sum() for m in expected)
    return float(np.sqrt(lost / sum(np.square(e).sum() for e in expected.values())))


def probe(adapter):
    """What a probe of this adapter would know of its data: the same for the same name."""
    sides = {"inputs": {}, "outputs": {}}
    for module in adapter.modules:
        for side, size in (("inputs", INTO), ("outputs", OUT)):
            seed = sum(map(ord, f"{adapter.name} {module} {side}"))
            factor = torch.randn(size, 6, generator=torch.Generator().manual_seed(seed))
            sides[side][module] = Moment(factor, 0.3)
    return Probe(adapter.name, adapter.modules, inputs=sides["inputs"], outputs=sides["outputs"])


def merged_by(name, adapters, **kwargs):
    if METHODS[name].needs:
        kwargs["probes"] = [probe(a) for a in adapters]
    return merge(adapters, name, **kwargs)


def exactly(adapters, name, **kwargs):
    """The rule without truncation: entry-wise results have full rank."""
    rank = OUT if METHODS[name].kind == "entrywise" else None
    return merged_by(name, adapters, rank=rank, **kwargs)


def uniform(name, generator):
    """Numbers in [0, 1), one for each entry, as the rule draws them; DARE's have 16 bits."""
    if not name.startswith("dare"):
        return torch.rand(OUT, INTO, generator=generator).double().numpy()
    words = torch.empty(OUT * INTO // 4, dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)
    return (words.numpy().view(np.int16).reshape(OUT, INTO) + 2.0**15) / 2**16


def expected(adapters, name):
    """The oracle's merge of every module, by the numbers and the data that merge itself gets."""
    parts, row = [dense(a) for a in adapters], METHODS[name]
    zero = np.zeros((OUT, INTO))
    found = {}
    for module in {m for part in parts for m in part}:
        stack = np.stack([part.get(module, zero) for part in parts])
        given = {}
        if row.seeded:
            generator = module_generator(0, module)
            given["draws"] = np.stack([uniform(name, generator) for _ in parts])
        if row.needs:
            data = [probe(a) for a in adapters]
            for side in ("inputs", "outputs"):
                held = [getattr(one, side).get(module) for one in data]
                given[side] = [None if m is None else m.dense().numpy() for m in held]
        found[module] = ORACLES[name](stack, **given)
    return found


# a search finds weights for a linear merge, by a model: tests/test_merge_search.py
RULES = [name for name, row in METHODS.items() if row.kind != "search"]
SEEDED = [name for name in RULES if METHODS[name].seeded]


def claim(keeps):
    return [name for name in RULES if keeps in METHODS[name].keeps]


def test_every_method_has_an_oracle_and_claims_only_known_properties():
    assert ORACLES.keys() == set(RULES)
    assert all(row.keeps <= ALL for row in METHODS.values())


@pytest.mark.parametrize("name", RULES)
def test_unequal_ranks_agree_with_the_dense_rule(name):
    adapters = [adapter(1, (1, 4)), adapter(2, (3, 3), scaling=0.5), adapter(3, (2, 1))]
    merged = exactly(adapters, name)
    assert distance(merged, expected(adapters, name)) < METHODS[name].tolerance
    assert merged.certificate.total < 1e-5


@pytest.mark.parametrize("name", RULES)
def test_a_module_that_only_some_have_is_a_zero_update_elsewhere(name):
    adapters = [adapter(1, (2, 3, 2)), adapter(2, (3,)), adapter(3, (1, 2))]
    merged = exactly(adapters, name)
    assert list(merged.adapter.modules) == ["layer.0", "layer.1", "layer.2"]
    assert distance(merged, expected(adapters, name)) < METHODS[name].tolerance


@pytest.mark.parametrize("name", claim(PERMUTATION))
def test_the_order_of_the_adapters_does_not_matter(name):
    adapters = [adapter(seed) for seed in (1, 2, 3)]
    one = exactly(adapters, name)
    for order in itertools.permutations(adapters):
        assert distance(exactly(order, name), dense(one.adapter)) < METHODS[name].tolerance


@pytest.mark.parametrize("name", claim(GAUGE))
def test_the_factorisation_does_not_matter(name):
    def regauged(a, seed):
        modules = {}
        for module, u in a.modules.items():
            q = torch.randn(u.r, u.r, generator=torch.Generator().manual_seed(seed)).double()
            B, A = u.B.double() @ torch.linalg.inv(q), q @ u.A.double()
            modules[module] = LowRank(3 * B, A, u.scaling / 3)
        return Adapter(a.name, modules, base=a.base)

    adapters = [adapter(1), adapter(2)]
    one = exactly(adapters, name)
    other = exactly([regauged(a, seed) for seed, a in enumerate(adapters)], name)
    assert distance(other, dense(one.adapter)) < METHODS[name].tolerance


@pytest.mark.parametrize("copies", [2, 3, 5])
@pytest.mark.parametrize("name", claim(COPIES))
def test_merging_copies_of_one_adapter_gives_it_back(name, copies):
    one = adapter(1)
    assert distance(exactly([one] * copies, name), dense(one)) < METHODS[name].tolerance


@pytest.mark.parametrize("scaling", [1.0, 16 / 3, 16 / 3**0.5])  # plain, alpha 16, rsLoRA
@pytest.mark.parametrize("name", claim(IDENTITY))
def test_merging_one_adapter_of_weight_one_is_the_identity(name, scaling):
    one = adapter(1, scaling=scaling)
    weights = None if METHODS[name].weights == "fixed" else [1.0]
    merged = merged_by(name, [one], weights=weights)
    assert distance(merged, dense(one)) < METHODS[name].tolerance
    assert merged.adapter.parameters == one.parameters


@pytest.mark.parametrize("name", RULES)
def test_what_a_rule_does_not_keep_it_really_does_not(name):
    one, row = adapter(1), METHODS[name]
    if COPIES not in row.keeps:
        assert distance(exactly([one] * 3, name), dense(one)) > 0.1
    if IDENTITY not in row.keeps:
        assert distance(exactly([one], name), dense(one)) > 0.1


@pytest.mark.parametrize("name", RULES)
def test_bf16_merges_as_its_float32_values_do(name):
    def cast(a, *dtypes):
        modules = a.modules
        for dtype in dtypes:
            modules = {m: u.to(dtype) for m, u in modules.items()}
        return Adapter(a.name, modules, base=a.base)

    adapters = [adapter(1), adapter(2)]
    low = exactly([cast(a, torch.bfloat16) for a in adapters], name)
    wide = exactly([cast(a, torch.bfloat16, torch.float32) for a in adapters], name)
    assert distance(low, dense(wide.adapter)) < 1e-6
    assert all(u.B.dtype == torch.float32 for u in low.adapter.modules.values())


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", RULES)
def test_the_result_repeats_bit_for_bit(name, rank):
    adapters = [adapter(1), adapter(2)]
    one, two = (merged_by(name, adapters, rank=rank).adapter.modules for _ in range(2))
    for module in one:
        assert torch.equal(one[module].B, two[module].B)
        assert torch.equal(one[module].A, two[module].A)


@pytest.mark.parametrize("name", SEEDED)
def test_another_seed_draws_anew_and_the_same_seed_the_same(name):
    adapters = [adapter(1), adapter(2)]
    one, same, other = (dense(exactly(adapters, name, seed=s).adapter) for s in (1, 1, 2))
    for module in one:
        assert (one[module] == same[module]).all()
        assert not np.allclose(one[module], other[module])


# what is linear in the updates, so that the coordinates do not matter
LINEAR = ["mean", "linear", "sum", "norm_preserving_mean", "equal_norm_mean", "slerp"]
# what depends on spectra and inner products alone, which orthonormal coordinates keep
SPECTRAL = ["svc", "pico", "iso_c", "iso_cts", "wudi_closed", "core_isolation_lowrank"]


@pytest.mark.parametrize("space", ["knots", "core"])
@pytest.mark.parametrize("name", LINEAR + SPECTRAL)
def test_rules_without_entries_agree_in_every_space(name, space):
    adapters = [adapter(1, (1, 4)), adapter(2, (3, 3), scaling=0.5), adapter(3, (2,))]
    whole = exactly(adapters, name)
    inside = exactly(adapters, name, space=space)
    assert distance(inside, dense(whole.adapter)) < METHODS[name].tolerance


@pytest.mark.parametrize("space", ["knots", "core"])
@pytest.mark.parametrize("name", [n for n in RULES if not METHODS[n].needs])
def test_every_rule_without_data_runs_in_every_space_whatever_the_factorisation(name, space):
    adapters = [adapter(1), adapter(2, (3, 1))]
    again = []
    for a in adapters:
        modules = {module: truncate(u, u.r)[0] for module, u in a.modules.items()}
        again.append(Adapter(a.name, modules, base=a.base))
    one, other = (exactly(given, name, space=space) for given in (adapters, again))
    assert distance(other, dense(one.adapter)) < 10 * METHODS[name].tolerance


@pytest.mark.parametrize("name", RULES)
def test_the_certificate_is_the_error_of_the_truncation(name):
    adapters = [adapter(1), adapter(2, (4, 1))]
    merged = merged_by(name, adapters, rank=2)
    exact = expected(adapters, name)
    assert {u.r for u in merged.adapter.modules.values()} == {2}
    assert merged.certificate.total == pytest.approx(distance(merged, exact), rel=1e-4)
    for module, error in merged.certificate.modules.items():
        s = np.linalg.svd(exact[module], compute_uv=False)
        # nothing of rank 2 comes closer than this (Eckart–Young)
        best = np.sqrt((s[2:] ** 2).sum() / (s**2).sum())
        assert error == pytest.approx(best, rel=1e-4, abs=1e-6)
