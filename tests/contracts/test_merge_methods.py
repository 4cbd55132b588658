"""One contract for every row of METHODS: against a dense oracle, and what it says it keeps."""

import itertools

import numpy as np
import pytest
import torch

from mergeprobe.adapters.checkpoint import Adapter
from mergeprobe.compose.merge import METHODS, merge
from mergeprobe.compose.merge.methods import ALL, COPIES, GAUGE, IDENTITY, PERMUTATION
from mergeprobe.lowrank import LowRank

OUT, INTO = 12, 10


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


def exactly(adapters, name, **kwargs):
    """The rule without truncation: entry-wise results have full rank."""
    return merge(adapters, name, rank=OUT if METHODS[name].kind == "entrywise" else None, **kwargs)


# ---- the rules again, dense, in float64, entry by entry where that is what the paper says


def oracle_norm_preserving(stack):
    mean = stack.mean(axis=0)
    return mean * np.mean([np.linalg.norm(w) for w in stack]) / np.linalg.norm(mean)


def oracle_ties(stack, density=0.2):
    trimmed = np.zeros_like(stack)
    for kept, whole in zip(trimmed, stack, strict=True):
        order = np.argsort(-np.abs(whole), axis=None)[: round(density * whole.size)]
        kept.flat[order] = whole.flat[order]
    merged = np.zeros(stack.shape[1:])
    for place in itertools.product(*map(range, merged.shape)):
        column = trimmed[(slice(None), *place)]
        agree = column[np.sign(column) * np.sign(column.sum()) > 0]
        merged[place] = agree.mean() if agree.size else 0.0
    return merged


def oracle_svc(stack, alpha=0.1):
    u, s, vh = np.linalg.svd(stack.sum(axis=0), full_matrices=False)
    for r in range(len(s)):
        whole = u[:, r] @ stack.sum(axis=0)
        counted = 0.0
        for one in stack:
            response = u[:, r] @ one
            size = response @ response
            counted += max(alpha, whole @ response / size if size > 1e-12 else 0.0)
        s[r] *= len(stack) / counted
    return u @ np.diag(s) @ vh


ORACLES = {
    "mean": lambda stack: stack.mean(axis=0),
    "linear": lambda stack: stack.mean(axis=0),
    "sum": lambda stack: stack.sum(axis=0),
    "norm_preserving_mean": oracle_norm_preserving,
    "ties": oracle_ties,
    "svc": oracle_svc,
}


def expected(adapters, name):
    parts = [dense(a) for a in adapters]
    zero = np.zeros((OUT, INTO))
    modules = {m for part in parts for m in part}
    return {m: ORACLES[name](np.stack([p.get(m, zero) for p in parts])) for m in modules}


def claim(keeps):
    return [name for name, row in METHODS.items() if keeps in row.keeps]


def test_every_method_has_an_oracle_and_claims_only_known_properties():
    assert ORACLES.keys() == METHODS.keys()
    assert all(row.keeps <= ALL for row in METHODS.values())


@pytest.mark.parametrize("name", METHODS)
def test_unequal_ranks_agree_with_the_dense_rule(name):
    adapters = [adapter(1, (1, 4)), adapter(2, (3, 3), scaling=0.5), adapter(3, (2, 1))]
    merged = exactly(adapters, name)
    assert distance(merged, expected(adapters, name)) < METHODS[name].tolerance
    assert merged.certificate.total < 1e-5


@pytest.mark.parametrize("name", METHODS)
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
    merged = exactly([one], name, weights=weights)
    assert distance(merged, dense(one)) < METHODS[name].tolerance
    assert merged.adapter.parameters == one.parameters


@pytest.mark.parametrize("name", METHODS)
def test_what_a_rule_does_not_keep_it_really_does_not(name):
    one, row = adapter(1), METHODS[name]
    if COPIES not in row.keeps:
        assert distance(exactly([one] * 3, name), dense(one)) > 0.1
    if IDENTITY not in row.keeps:
        assert distance(exactly([one], name), dense(one)) > 0.1


@pytest.mark.parametrize("name", METHODS)
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
@pytest.mark.parametrize("name", METHODS)
def test_the_result_repeats_bit_for_bit(name, rank):
    adapters = [adapter(1), adapter(2)]
    one, two = (merge(adapters, name, rank=rank).adapter.modules for _ in range(2))
    for module in one:
        assert torch.equal(one[module].B, two[module].B)
        assert torch.equal(one[module].A, two[module].A)


@pytest.mark.parametrize("name", METHODS)
def test_the_certificate_is_the_error_of_the_truncation(name):
    adapters = [adapter(1), adapter(2, (4, 1))]
    merged = merge(adapters, name, rank=2)
    exact = expected(adapters, name)
    assert {u.r for u in merged.adapter.modules.values()} == {2}
    assert merged.certificate.total == pytest.approx(distance(merged, exact), rel=1e-4)
    for module, error in merged.certificate.modules.items():
        s = np.linalg.svd(exact[module], compute_uv=False)
        # nothing of rank 2 comes closer than this (Eckart–Young)
        best = np.sqrt((s[2:] ** 2).sum() / (s**2).sum())
        assert error == pytest.approx(best, rel=1e-4, abs=1e-6)
