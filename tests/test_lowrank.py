"""LowRank against dense float64, under gauge changes, and by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeprobe.errors import AdapterMismatch
from mergeprobe.lowrank import LowRank, concat, factored_svd, inner, norm, pad, spectrum, truncate


def random_update(seed, out=7, into=5, r=3, scaling=1.7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(out, r, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(r, into, generator=generator, dtype=torch.float64).to(dtype),
        scaling,
    )


def oracle(a):
    return a.scaling * (a.B.double() @ a.A.double())


def regauged(a, seed):
    """The same ΔW from other factors: (B G⁻¹, G A) with a well-conditioned G."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(a.r, a.r, generator=generator, dtype=torch.float64)
    g = g + 3 * torch.eye(a.r, dtype=torch.float64)
    return LowRank(a.B.double() @ torch.linalg.inv(g), g @ a.A.double(), a.scaling)


SHAPES = st.tuples(*[st.integers(1, 9)] * 4)  # out, in, r_a, r_b: ranks above the sides too


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 1000), st.sampled_from([-2.5, 1e-6, 1.0, 16.0]))
def test_everything_equals_the_dense_oracle(shape, seed, scaling):
    out, into, ra, rb = shape
    a = random_update(seed, out, into, ra, scaling)
    b = random_update(seed + 1, out, into, rb)
    da, db = oracle(a), oracle(b)
    scale = float(da.norm() * db.norm())
    assert inner(a, b) == pytest.approx(float((da * db).sum()), abs=1e-12 * scale)
    assert norm(a) == pytest.approx(float(da.norm()), rel=1e-12)
    dense = torch.linalg.svdvals(da)
    found = spectrum(a)
    assert len(found) == min(ra, out, into)
    assert torch.allclose(found, dense[: len(found)], atol=1e-10, rtol=0)
    assert float(dense[len(found) :].abs().sum()) < 1e-9
    u, s, vh = factored_svd(a)
    assert torch.allclose(u @ torch.diag(s) @ vh, da, atol=1e-10)
    eye = torch.eye(len(s), dtype=torch.float64)
    assert torch.allclose(u.T @ u, eye, atol=1e-10)
    assert torch.allclose(vh @ vh.T, eye, atol=1e-10)
    both = concat([a, b], [0.5, -2.0])
    assert both.r == ra + rb
    assert torch.allclose(oracle(both), 0.5 * da - 2.0 * db, atol=1e-4)
    padded = pad(a, ra + 2)
    assert padded.r == ra + 2
    # the factors and nothing but zeros: a product of another length may round otherwise
    assert torch.equal(padded.B[:, :ra], a.B)
    assert torch.equal(padded.A[:ra], a.A)
    assert not padded.B[:, ra:].any()
    assert not padded.A[ra:].any()
    assert torch.allclose(oracle(padded), da, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 1000), st.integers(1, 10))
def test_truncation_is_the_best_and_its_certificate_is_its_error(shape, seed, rank):
    out, into, r, _ = shape
    a = random_update(seed, out, into, r, dtype=torch.float64)
    kept, certificate = truncate(a, rank)
    assert kept.r == rank
    assert kept.scaling == 1.0
    da = oracle(a)
    error = float((oracle(kept) - da).norm() / da.norm())
    assert certificate == pytest.approx(error, abs=1e-9)
    best = torch.linalg.svdvals(da)[rank:].norm() / da.norm()  # Eckart–Young
    assert error == pytest.approx(float(best), abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_nothing_depends_on_the_gauge(seed):
    a, b = random_update(seed), random_update(seed + 1)
    c = regauged(a, seed + 2)
    assert inner(a, b) == pytest.approx(inner(c, b), rel=1e-9, abs=1e-9)
    assert norm(a) == pytest.approx(norm(c), rel=1e-9)
    assert torch.allclose(spectrum(a), spectrum(c), atol=1e-9)
    one, two = truncate(a, 2), truncate(c, 2)
    assert one[1] == pytest.approx(two[1], abs=1e-7)
    assert torch.allclose(one[0].dense().double(), two[0].dense().double(), atol=1e-5)


# ΔW = 2 · diag(3, 4) padded with a zero row: singular values 8 and 6, norm 10
DIAGONAL = LowRank(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]), torch.eye(2), scaling=2.0)


def test_values_by_hand():
    assert DIAGONAL.shape == (3, 2)
    assert DIAGONAL.r == 2
    assert DIAGONAL.parameters == 6 + 4
    assert DIAGONAL.dense().tolist() == [[6.0, 0.0], [0.0, 8.0], [0.0, 0.0]]
    assert norm(DIAGONAL) == pytest.approx(10.0)
    assert spectrum(DIAGONAL).tolist() == pytest.approx([8.0, 6.0])
    other = LowRank(torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([[0.5, -1.0]]))
    # <2 diag(3, 4), [[.5, -1]] * 3> = 6 * 0.5 + 8 * -1
    assert inner(DIAGONAL, other) == pytest.approx(-5.0)
    kept, certificate = truncate(DIAGONAL, 1)
    assert certificate == pytest.approx(6 / 10)
    assert torch.allclose(kept.dense(), torch.tensor([[0.0, 0.0], [0.0, 8.0], [0.0, 0.0]]))
    assert truncate(DIAGONAL, 2)[1] == 0.0
    assert (0.5 * DIAGONAL).dense().tolist() == [[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]
    out, into = DIAGONAL.folded()
    assert (out @ into).tolist() == DIAGONAL.dense().tolist()
    assert concat([DIAGONAL, other]).dense().tolist() == [[6.5, -1.0], [0.5, 7.0], [0.5, -1.0]]


def test_a_zero_update():
    zero = LowRank(torch.zeros(4, 2), torch.ones(2, 3))
    assert norm(zero) == 0.0
    assert spectrum(zero).tolist() == [0.0, 0.0]
    kept, certificate = truncate(zero, 3)
    assert certificate == 0.0
    assert kept.r == 3
    assert not kept.dense().any()


def test_an_update_that_cancels_has_norm_zero_not_nan():
    a = random_update(0, 300, 200, 8)
    both = concat([a, a], [1.0, -1.0])
    assert 0.0 <= norm(both) < 1e-6 * norm(a)


def test_half_precision_factors_are_read_as_they_are():
    a = random_update(3, dtype=torch.bfloat16)
    assert a.dense().dtype == torch.float32
    assert norm(a) == pytest.approx(float(oracle(a).norm()), rel=1e-12)
    kept, _ = truncate(a, 3)
    assert kept.B.dtype == torch.float32
    assert torch.allclose(kept.dense(), a.dense(), atol=1e-5)
    assert concat([a, random_update(4, dtype=torch.float64)]).B.dtype == torch.float64


def test_norm_survives_large_and_tiny_weights():
    a = random_update(5)
    for factor in (1e-18, 1e18):
        assert norm(LowRank(a.B * factor, a.A, a.scaling)) == pytest.approx(
            factor * norm(a), rel=1e-6
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LowRank(torch.zeros(3, 2), torch.zeros(1, 4)), r"B is \(3, 2\), A is \(1, 4\)"),
        (lambda: LowRank(torch.zeros(3), torch.zeros(1, 4)), r"expected \(out, r\)"),
        (lambda: inner(DIAGONAL, random_update(0)), r"\(3, 2\) and \(7, 5\)"),
        (lambda: concat([]), "nothing to concatenate"),
        (lambda: concat([DIAGONAL], [1.0, 2.0]), "1 updates but 2 weights"),
        (lambda: concat([DIAGONAL, random_update(0)]), "other shapes"),
        (lambda: truncate(DIAGONAL, 0), "cannot truncate to rank 0"),
        (lambda: pad(DIAGONAL, 1), "cannot pad rank 2 down to 1"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(AdapterMismatch, match=message):
        call()


def test_scaling_by_a_number_keeps_the_factors():
    scaled = DIAGONAL * -0.25
    assert scaled.B is DIAGONAL.B
    assert scaled.scaling == -0.5
    assert norm(scaled) == pytest.approx(2.5)
    assert math.isclose(inner(scaled, DIAGONAL), -25.0)
    assert DIAGONAL.to(torch.float64).B.dtype == torch.float64
