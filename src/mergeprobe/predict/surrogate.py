"""The closed-form forecast: each adapter's loss to second order around its own point.

With θ_i = θ0 + ΔW_i (the snapshot) and D = Σ_a w_a c_a ΔW_a − ΔW_i,

    L_i(θ0 + Σ_a w_a c_a ΔW_a) ≈ L_i(θ_i) + ⟨G_i, D⟩ + ½ ⟨D, F_i D⟩,

G_i the gradient at θ_i, F_i the K-FAC empirical Fisher there. Everything comes from the tables
`linear` and `quadratic` of `mergeprobe.signals`, so a set of any size and weights costs one small
product: no training, no forward pass, no enumeration of subsets. c_a ≥ 1 carries a's update to
the end of its training (`lengths`). Expanding at θ0 instead would miss the loss that single
training reaches (and its gradient is not 0 there). Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import polars as pl
from jaxtyping import Float

from mergeprobe.errors import NotForecastable
from mergeprobe.predict.minimax import smallest_maximum

if TYPE_CHECKING:
    from mergeprobe.capture.probe import Probe

LONGEST = 32.0
"""No update is carried further than this many times its length at the snapshot."""


@dataclass(frozen=True, eq=False)
class QuadraticModel:
    """Losses in nats a token; a value that was not measured is NaN.

    linear [i, a]: ⟨G_i, ΔW_a⟩ at i's snapshot. quadratic [i, a, b]: ⟨ΔW_a, F_i ΔW_b⟩, symmetric
    in a and b. base_loss, loss [i]: of i's calibration items under the base and the snapshot.
    """

    names: tuple[str, ...]
    linear: Float[np.ndarray, "n n"]
    quadratic: Float[np.ndarray, "n n n"]
    base_loss: Float[np.ndarray, " n"]
    loss: Float[np.ndarray, " n"]

    def __post_init__(self) -> None:
        n = len(self.names)
        wanted = {"linear": (n, n), "quadratic": (n, n, n), "base_loss": (n,), "loss": (n,)}
        for part, shape in wanted.items():
            if getattr(self, part).shape != shape:
                raise NotForecastable(
                    f"the surrogate's '{part}' is {getattr(self, part).shape}; "
                    f"{n} adapters need {shape}"
                )

    def where(self, members: Sequence[str]) -> list[int]:
        """Indices of the members; NotForecastable for one that was not measured."""
        unknown = [name for name in members if name not in self.names]
        if unknown or len(set(members)) != len(members):
            raise NotForecastable(
                f"no surrogate for {unknown or list(members)}: expected each once out of "
                f"{list(self.names)}"
            )
        return [self.names.index(name) for name in members]

    def only(self, rows: Sequence[int]) -> QuadraticModel:
        """Of these adapters and no others: what is asked of a few costs nothing for the rest."""
        return QuadraticModel(
            tuple(self.names[row] for row in rows),
            self.linear[np.ix_(rows, rows)],
            self.quadratic[np.ix_(rows, rows, rows)],
            self.base_loss[rows],
            self.loss[rows],
        )


def from_tables(
    quadratic: pl.DataFrame, linear: pl.DataFrame, adapters: pl.DataFrame
) -> QuadraticModel:
    """The model from `signals.quadratic`, `signals.linear` and `adapter_table`.

    Rows that are absent or null become NaN, and are refused by name when a forecast needs them.
    Values of (a, b) and (b, a) are averaged, or either stands for both.
    """
    names = tuple(adapters["adapter"].to_list())
    n = len(names)
    first, second = np.full((n, n), np.nan), np.full((n, n, n), np.nan)
    place = {name: row for row, name in enumerate(names)}
    for i, a, value in linear.select("i", "a", "at_snapshot").iter_rows():
        if i in place and a in place and value is not None:
            first[place[i], place[a]] = value
    for i, a, b, value in quadratic.select("i", "a", "b", "value").iter_rows():
        if i in place and a in place and b in place and value is not None:
            second[place[i], place[a], place[b]] = value
    turned = second.transpose(0, 2, 1)
    second = np.where(np.isnan(second), turned, second)
    second = (second + second.transpose(0, 2, 1)) / 2
    losses = adapters.select(pl.col("base_loss", "loss").cast(pl.Float64).fill_null(math.nan))
    return QuadraticModel(
        names, first, second, losses["base_loss"].to_numpy(), losses["loss"].to_numpy()
    )


def adapter_table(probes: Sequence[Probe], rows: pl.DataFrame) -> pl.DataFrame:
    """One row per probe: adapter, base_loss, loss (mean over its calibration items, null without
    one), step, planned_steps, norm_growth; the last from `rows` = `signals.adapter_rows`."""
    growth = dict(rows.select("a", "norm_growth").iter_rows())
    return pl.DataFrame(
        [
            {
                "adapter": probe.name,
                "base_loss": probe.calibration and float(probe.calibration.base_loss.mean()),
                "loss": probe.calibration and float(probe.calibration.loss.mean()),
                "step": probe.meta.get("step"),
                "planned_steps": probe.meta.get("planned_steps"),
                "norm_growth": growth.get(probe.name),
            }
            for probe in probes
        ],
        schema={
            "adapter": pl.String,
            "base_loss": pl.Float64,
            "loss": pl.Float64,
            "step": pl.Int64,
            "planned_steps": pl.Int64,
            "norm_growth": pl.Float64,
        },
    )


def lengths(model: QuadraticModel, adapters: pl.DataFrame) -> Float[np.ndarray, " n"]:
    """How much longer each update will be when its training ends, in [1, LONGEST].

    (planned steps / step)^p with p the exponent of the update's own norm growth, cut to [0, 1]:
    its direction is taken to stay. Cut again at the length where the adapter's own predicted loss
    is least, and where it would fall below 0: the surrogate must not rise past its minimum on the
    adapter's own ray, as training would not. A run at its last step has length 1.
    Raises NotForecastable for an adapter with steps to go and no norm growth.
    """
    facts = {row["adapter"]: row for row in adapters.iter_rows(named=True)}
    out = np.ones(len(model.names))
    for i, name in enumerate(model.names):
        step, planned, growth = (
            facts.get(name, {}).get(key) for key in ("step", "planned_steps", "norm_growth")
        )
        if not step or not planned or planned <= step:
            continue
        if growth is None or not math.isfinite(growth):
            raise NotForecastable(
                f"'{name}' is at step {step} of {planned} and its norm growth was not measured "
                "(a sketch at half of the steps): no length at the end of training"
            )
        grown = (planned / step) ** min(1.0, max(0.0, growth))
        out[i] = min(grown, _own_limit(model, i), LONGEST)
    return np.maximum(out, 1.0)


def _own_limit(model: QuadraticModel, i: int) -> float:
    """The length at which i's predicted loss along its own ray is least, or reaches 0 before."""
    slope, curvature, loss = model.linear[i, i], model.quadratic[i, i, i], model.loss[i]
    if not np.isfinite([slope, curvature, loss]).all():
        _refuse(model, [i], [i], [i])
    if slope >= 0:
        return 1.0
    least = 1.0 - slope / curvature if curvature > 0 else math.inf
    root = slope * slope - 2.0 * curvature * loss
    if root < 0:
        return least
    # the smaller root of loss + slope·x + ½ curvature·x², written so that curvature 0 is no case
    return min(least, 1.0 + 2.0 * loss / (-slope + math.sqrt(root)))


def surrogate_losses(
    model: QuadraticModel,
    weights: Float[np.ndarray, "*sets n"],
    lengths: Float[np.ndarray, " n"] | None = None,
) -> Float[np.ndarray, "*sets n"]:
    """L_i of every adapter's items at θ0 + Σ_a w_a c_a ΔW_a, for any number of weightings at once.

    Nats a token; not cut at 0. lengths: c, ones where absent. An entry is NaN where a value that
    it needs was not measured; a weight of 0 needs nothing.
    """
    weights = np.asarray(weights, dtype=float)
    scale = np.ones(len(model.names)) if lengths is None else np.asarray(lengths, dtype=float)
    # one row per i: coefficients of D in the ΔW_a
    away = (weights * scale)[..., None, :] - np.eye(len(model.names))
    slope = _known_product(away, model.linear)
    pairs = away[..., :, None] * away[..., None, :]
    bend = _known_product(
        pairs.reshape(*away.shape[:-1], -1), model.quadratic.reshape(len(model.names), -1)
    )
    return model.loss + slope + 0.5 * bend


def retentions(
    model: QuadraticModel,
    weights: Float[np.ndarray, "*sets n"],
    lengths: Float[np.ndarray, " n"] | None = None,
) -> Float[np.ndarray, "*sets n"]:
    """Forecast gain retention [L_i(θ0) − L_i(merged)] / [L_i(θ0) − L_i(own)] of every adapter.

    L_i(θ0) is the measured loss of the base, L_i(own) the surrogate's at the end of i's own ray.
    Unbounded; NaN where something was not measured or the adapter gains nothing by itself.
    """
    return (model.base_loss - surrogate_losses(model, weights, lengths)) / _gains(model, lengths)


def set_retentions(
    model: QuadraticModel,
    members: Sequence[str],
    weights: Mapping[str, float] | float,
    lengths: Float[np.ndarray, " n"] | None = None,
) -> dict[str, float]:
    """Forecast retention of each member of one set, merged as Σ w_a ΔW_a of the finished updates.

    weights: by name, or one for all: 1/T is the mean, 1 the sum.
    Raises NotForecastable naming the triples that are missing, or the adapter without own gain.
    """
    model, lengths = _among(model, members, lengths)
    vector = np.zeros(len(members))
    for row, name in enumerate(members):
        if isinstance(weights, Mapping) and name not in weights:
            raise NotForecastable(f"no weight for '{name}'; got {sorted(weights)}")
        vector[row] = weights[name] if isinstance(weights, Mapping) else weights
    _check(model, lengths)
    got = retentions(model, vector, lengths)
    return dict(zip(members, got.tolist(), strict=True))


def reweight(
    model: QuadraticModel,
    members: Sequence[str],
    objective: Literal["worst", "mean"] = "worst",
    lengths: Float[np.ndarray, " n"] | None = None,
    largest: float = 1.0,
) -> dict[str, float]:
    """Weights in [0, largest] that maximise the smallest (or the mean) forecast retention.

    A convex quadratic program (every F_i is positive semidefinite), solved to 1e-8 in retention;
    deterministic. Weights below 1e-6 are given as 0. They apply to the finished adapters.

    Raises NotForecastable as set_retentions does.
    """
    if objective not in ("worst", "mean"):
        raise NotForecastable(f"no objective '{objective}'; expected worst or mean")
    model, lengths = _among(model, members, lengths)
    _check(model, lengths)
    count = len(members)
    scale = np.ones(count) if lengths is None else np.asarray(lengths, dtype=float)
    # −ρ_i(w) = (½ wᵀH_i w + q_i·w + k_i): i's loss over its gain, in the members' weights
    gain = _gains(model, lengths)
    bend = model.quadratic * (scale[:, None] * scale[None, :]) / gain[:, None, None]
    own = np.stack([model.quadratic[i, i] for i in range(count)])
    slope = (model.linear - own) * scale / gain[:, None]
    level = (surrogate_losses(model, np.zeros((1, count)))[0] - model.base_loss) / gain
    if objective == "mean":
        bend, slope, level = (part.mean(0, keepdims=True) for part in (bend, slope, level))
    found = smallest_maximum(bend, slope, level, largest)
    return {
        name: 0.0 if weight < 1e-6 else float(weight)
        for name, weight in zip(members, found, strict=True)
    }


def _gains(
    model: QuadraticModel, lengths: Float[np.ndarray, " n"] | None
) -> Float[np.ndarray, " n"]:
    """L_i(θ0) less the predicted loss at the end of i's own ray; NaN unless positive."""
    own = np.diagonal(surrogate_losses(model, np.eye(len(model.names)), lengths))
    gain = model.base_loss - own
    return np.where(gain > 0, gain, np.nan)


def _among(
    model: QuadraticModel, members: Sequence[str], lengths: Float[np.ndarray, " n"] | None
) -> tuple[QuadraticModel, Float[np.ndarray, " n"] | None]:
    """The model and lengths of the members, in their order."""
    rows = model.where(members)
    return model.only(rows), None if lengths is None else np.asarray(lengths, dtype=float)[rows]


def _check(model: QuadraticModel, lengths: Float[np.ndarray, " n"] | None) -> None:
    """NotForecastable unless everything is known and each adapter gains by itself."""
    rows = range(len(model.names))
    _refuse(model, rows, rows, rows)
    gain = _gains(model, lengths)
    for i in rows:
        if np.isnan(gain[i]):
            raise NotForecastable(
                f"'{model.names[i]}' gains nothing on its own calibration items "
                f"(loss {model.base_loss[i]:.3f} to {model.loss[i]:.3f} nats): "
                "its retention is undefined"
            )


def _refuse(model: QuadraticModel, of: Sequence[int], a: Sequence[int], b: Sequence[int]) -> None:
    """NotForecastable naming the first values that are missing."""
    names = model.names
    lost = [
        f"{part} loss of '{names[i]}'"
        for part, values in (("base", model.base_loss), ("snapshot", model.loss))
        for i in of
        if np.isnan(values[i])
    ]
    lost += [
        f"⟨G, ΔW⟩ of {_listed(names, i, j)}" for i in of for j in a if _nan(model.linear, i, j)
    ]
    lost += [
        f"⟨ΔW, F ΔW⟩ of {_listed(names, i, j, k)}"
        for i in of
        for j in a
        for k in b
        if j <= k and _nan(model.quadratic, i, j, k)
    ]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise NotForecastable(f"the surrogate lacks {', '.join(lost[:3])}{more}")


def _nan(values: np.ndarray, *place: int) -> bool:
    return bool(np.isnan(values[place]))


def _listed(names: Sequence[str], *place: int) -> str:
    return f"({', '.join(repr(names[k]) for k in place)})"


def _known_product(
    coefficients: Float[np.ndarray, "*sets n k"], values: Float[np.ndarray, "n k"]
) -> Float[np.ndarray, "*sets n"]:
    """Σ_k coefficient · value, where a coefficient of 0 makes an unknown (NaN) value harmless."""
    return np.where(coefficients == 0, 0.0, coefficients * values).sum(-1)
