"""The second-order surrogate against losses that are exactly quadratic, in float64."""

import itertools
import math

import numpy as np
import polars as pl
import pytest

from mergeprobe.errors import NotForecastable
from mergeprobe.predict.surrogate import (
    LONGEST,
    QuadraticModel,
    adapter_table,
    from_tables,
    lengths,
    retentions,
    reweight,
    set_retentions,
    surrogate_losses,
)

NAMES = ("math", "code", "safety", "chat")


class World:
    """Losses L_i(x) = least_i + ½ (x − x_i*)ᵀ F_i (x − x_i*) over x in R^d, with θ0 = 0."""

    def __init__(self, n=4, d=12, seed=0, finished=0.4):
        draw = np.random.default_rng(seed)
        roots = draw.normal(size=(n, d, d)) / math.sqrt(d)
        self.fisher = roots @ roots.transpose(0, 2, 1) + 0.05 * np.eye(d)
        self.best = draw.normal(size=(n, d))
        self.least = draw.uniform(0.1, 0.5, size=n)
        self.updates = finished * self.best + 0.05 * draw.normal(size=(n, d))

    def loss(self, i, x):
        away = x - self.best[i]
        return self.least[i] + 0.5 * away @ self.fisher[i] @ away

    def model(self):
        n = len(self.updates)
        at = [self.fisher[i] @ (self.updates[i] - self.best[i]) for i in range(n)]
        return QuadraticModel(
            NAMES[:n],
            np.array([[g @ u for u in self.updates] for g in at]),
            np.array([self.updates @ f @ self.updates.T for f in self.fisher]),
            np.array([self.loss(i, 0 * self.updates[i]) for i in range(n)]),
            np.array([self.loss(i, self.updates[i]) for i in range(n)]),
        )

    def retention(self, i, weights, scale):
        base, own = self.loss(i, 0 * self.best[i]), self.loss(i, scale[i] * self.updates[i])
        return (base - self.loss(i, (weights * scale) @ self.updates)) / (base - own)


def tables(model):
    n, names = len(model.names), model.names
    quadratic = [
        (names[i], names[a], names[b], float(model.quadratic[i, a, b]))
        for i, a, b in itertools.product(range(n), repeat=3)
    ]
    linear = [
        (names[i], names[a], float(model.linear[i, a]), 0.0)
        for i, a in itertools.product(range(n), repeat=2)
    ]
    adapters = pl.DataFrame(
        {"adapter": names, "base_loss": model.base_loss, "loss": model.loss},
    )
    return (
        pl.DataFrame(quadratic, schema=["i", "a", "b", "value"], orient="row"),
        pl.DataFrame(linear, schema=["i", "a", "at_snapshot", "at_base"], orient="row"),
        adapters,
    )


@pytest.mark.parametrize("scale", [np.ones(4), np.array([1.0, 2.0, 1.7, 1.2])])
def test_exact_on_a_quadratic_loss(scale):
    world = World()
    draw = np.random.default_rng(1)
    many = draw.uniform(0, 1, size=(3, 5, 4))  # any leading shape
    losses, got = (
        surrogate_losses(world.model(), many, scale),
        retentions(world.model(), many, scale),
    )
    for where in itertools.product(range(3), range(5), range(4)):
        weights, i = many[where[:2]], where[2]
        assert losses[where] == pytest.approx(
            world.loss(i, (weights * scale) @ world.updates), abs=1e-10
        )
        assert got[where] == pytest.approx(world.retention(i, weights, scale), abs=1e-10)


def test_alone_nothing_is_lost_and_at_zero_all():
    model = World().model()
    assert np.diagonal(retentions(model, np.eye(4))) == pytest.approx(np.ones(4), abs=1e-12)
    assert retentions(model, np.zeros(4)) == pytest.approx(np.zeros(4), abs=1e-12)


def test_two_adapters_by_hand():
    # L_0 = ½(x − 1)², L_1 = ½(y − 1)² + ½x²; ΔW_0 = (1, 0), ΔW_1 = (0, 1), both at their best
    quadratic = np.array([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    model = QuadraticModel(
        ("a", "b"), np.zeros((2, 2)), quadratic, np.array([0.5, 0.5]), np.zeros(2)
    )
    assert set_retentions(model, ["a", "b"], 1.0) == {"a": 1.0, "b": 0.0}
    assert set_retentions(model, ["a", "b"], 0.5) == {"a": 0.75, "b": 0.5}
    # worst case: b is best at w_b = 1, then 1 − (1 − w)² = 1 − w² gives w_a = ½
    assert reweight(model, ["a", "b"]) == pytest.approx({"a": 0.5, "b": 1.0}, abs=1e-4)
    # mean: 2w − w² + 1 − w² is largest at w = ½ too
    assert reweight(model, ["a", "b"], "mean") == pytest.approx({"a": 0.5, "b": 1.0}, abs=1e-4)


def test_from_tables_is_the_model():
    model = World().model()
    quadratic, linear, adapters = tables(model)
    again = from_tables(quadratic.sample(fraction=1.0, shuffle=True, seed=3), linear, adapters)
    for part in ("linear", "quadratic", "base_loss", "loss"):
        assert np.allclose(getattr(again, part), getattr(model, part), rtol=0, atol=1e-14)
    half = quadratic.filter(pl.col("a") <= pl.col("b"))  # either of (a, b), (b, a) is enough
    assert np.allclose(from_tables(half, linear, adapters).quadratic, model.quadratic)


def test_missing_triples_are_named():
    quadratic, linear, adapters = tables(World().model())
    gone = (pl.col("i") == "math") & pl.concat_list("a", "b").list.sort().eq(["chat", "code"])
    lacking = quadratic.with_columns(value=pl.when(gone).then(None).otherwise(pl.col("value")))
    model = from_tables(lacking, linear, adapters)
    with pytest.raises(NotForecastable, match=r"lacks ⟨ΔW, F ΔW⟩ of \('math', 'code', 'chat'\)$"):
        set_retentions(model, ["math", "code", "chat"], 0.5)
    assert set(set_retentions(model, ["math", "code"], 0.5)) == {"math", "code"}  # not needed
    with pytest.raises(NotForecastable, match="math"):
        reweight(model, list(NAMES))
    model = from_tables(quadratic, linear.filter(pl.col("i") != "code"), adapters)
    with pytest.raises(NotForecastable, match=r"⟨G, ΔW⟩ of \('code', 'math'\).* and 1 more"):
        set_retentions(model, ["math", "code", "safety", "chat"], 0.5)
    with pytest.raises(NotForecastable, match=r"no surrogate for \['poetry'\]"):
        set_retentions(model, ["math", "poetry"], 0.5)


def test_an_adapter_without_gain_is_refused():
    model = World().model()
    flat = QuadraticModel(
        model.names, model.linear, model.quadratic, model.base_loss.copy(), model.loss
    )
    flat.base_loss[2] = flat.loss[2] - 0.01
    with pytest.raises(NotForecastable, match="'safety' gains nothing"):
        set_retentions(flat, NAMES, 0.25)
    assert np.isnan(retentions(flat, np.full(4, 0.25))[2])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("objective", ["worst", "mean"])
def test_reweight_beats_a_grid(objective, seed):
    world = World(seed=seed)
    model, scale = world.model(), np.array([1.5, 1.0, 2.0, 1.0])
    members = ["safety", "math", "code"]  # not in table order
    found = reweight(model, members, objective, scale)
    axis = np.linspace(0, 1, 21)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    wide = np.zeros((len(grid), 4))
    wide[:, model.where(members)] = grid
    rows = model.where(members)
    summary = {"worst": np.min, "mean": np.mean}[objective]
    scored = summary(retentions(model, wide, scale)[:, rows], axis=1)
    ours = summary(list(set_retentions(model, members, found, scale).values()))
    assert ours >= scored.max() - 1e-7
    assert ours <= scored.max() + 0.05  # the grid is that fine
    assert all(0 <= weight <= 1 for weight in found.values())
    assert found == reweight(model, members, objective, scale)


def test_reweight_of_twenty_is_quick_and_at_least_as_good_as_uniform():
    draw = np.random.default_rng(5)
    n, d = 20, 30
    roots = draw.normal(size=(n, d, 4))
    fisher, updates = roots @ roots.transpose(0, 2, 1) / 10, draw.normal(size=(n, d))
    quadratic = np.einsum("ad,ide,be->iab", updates, fisher, updates)
    own = np.array([quadratic[i, i, i] for i in range(n)])
    names = tuple(f"t{i}" for i in range(n))
    model = QuadraticModel(names, np.zeros((n, n)), quadratic, 0.1 + own / 2, np.full(n, 0.1))
    found = reweight(model, names)
    worst = min(set_retentions(model, names, found).values())
    for uniform in np.linspace(0, 1, 41):
        assert worst >= min(set_retentions(model, names, uniform).values()) - 1e-7


def facts(**more):
    row = {"adapter": ["a"], "step": [8], "planned_steps": [128], "norm_growth": [0.5]}
    return pl.DataFrame(row | {key: [value] for key, value in more.items()})


def ray(slope, curvature, loss=2.0):
    return QuadraticModel(
        ("a",),
        np.array([[slope]]),
        np.array([[[curvature]]]),
        np.array([loss + 1]),
        np.array([loss]),
    )


def test_lengths_by_hand():
    assert lengths(ray(-0.01, 1e-6), facts()) == pytest.approx([4.0])  # (128/8)^½
    assert lengths(ray(-0.01, 1e-6), facts(norm_growth=3.0)) == pytest.approx([16.0])
    assert lengths(ray(-0.001, 1e-9), facts(norm_growth=1.0, step=1)) == [LONGEST]
    assert lengths(ray(-0.5, 0.5), facts()) == pytest.approx([2.0])  # least at 1 + 0.5/0.5
    assert lengths(ray(-1.0, 0.0), facts()) == pytest.approx([3.0])  # 2 − x = 0 at x = 2
    assert lengths(ray(0.3, 0.5), facts()) == [1.0]  # already past its minimum
    assert lengths(ray(-0.5, 0.5), facts(step=128)) == [1.0]
    with pytest.raises(NotForecastable, match="'a' is at step 8 of 128 and its norm growth"):
        lengths(ray(-0.5, 0.5), facts(norm_growth=None))
    with pytest.raises(NotForecastable, match="lacks"):
        lengths(ray(math.nan, 0.5), facts())


def test_own_loss_never_rises_along_its_ray():
    model = World().model()
    table = pl.DataFrame(
        {"adapter": NAMES, "step": [5] * 4, "planned_steps": [100] * 4, "norm_growth": [1.0] * 4}
    )
    best = lengths(model, table)
    for share in np.linspace(0, 0.95, 20):
        shorter = np.diagonal(surrogate_losses(model, np.eye(4), 1 + share * (best - 1)))
        assert (np.diagonal(surrogate_losses(model, np.eye(4), best)) <= shorter + 1e-12).all()


def test_from_probes():
    import torch

    from mergeprobe import signals
    from mergeprobe.capture.probe import Calibration, Moment, Probe
    from mergeprobe.lowrank import LowRank

    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def probe(name, base, loss):
        ids = torch.zeros(2, 3, dtype=torch.long)
        return Probe(
            name,
            {"m": LowRank(normal(5, 2), normal(2, 6))},
            inputs={"m": Moment(normal(6, 3), 0.1)},
            outputs={"m": Moment(normal(5, 3), 0.2)},
            calibration=Calibration(ids, ids, ids, torch.tensor(base), torch.tensor(loss)),
            meta={"step": 60, "planned_steps": 60},
        )

    probes = [probe("a", [3.0, 2.0], [1.0, 1.0]), probe("b", [4.0, 4.0], [2.0, 3.0])]
    table = adapter_table(probes, signals.adapter_rows(probes))
    assert table["base_loss"].to_list() == [2.5, 4.0]
    assert table["loss"].to_list() == [1.0, 2.5]
    model = from_tables(signals.quadratic(probes), signals.linear(probes), table)
    dense = [p.updates["m"].dense().double() for p in probes]
    i = probes[1]
    oracle = ((dense[0].T @ i.outputs["m"].dense() @ dense[1]) @ i.inputs["m"].dense()).trace()
    assert model.quadratic[1, 0, 1] == pytest.approx(float(oracle), rel=1e-5)
    assert lengths(model, table).tolist() == [1.0, 1.0]
    with pytest.raises(NotForecastable, match="⟨G, ΔW⟩"):  # no gradient was captured
        set_retentions(model, ["a", "b"], 0.5)
