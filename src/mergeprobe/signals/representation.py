"""Signals from the shared probe set: what each snapshot does to hidden states and predictions.

Drifts are states minus the base's on the same tokens (raw states saturate near similarity 1 for
any fine-tune). Predictions are kept as the 64 largest log-probabilities and the mass outside, so
two lists are compared over the union of their ids, with everything else in one bucket.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mergeprobe.adapters.regions import THIRDS
from mergeprobe.capture.probe import Drift
from mergeprobe.errors import ProbeError
from mergeprobe.signals.panel import Panel
from mergeprobe.signals.site import cosine, ratio

FLOOR = 1e-12  # the smallest probability, so that an exactly empty tail gives no infinity
AT_ONCE = 64  # lists of predictions that are compared in one go
STILL = 1e-9  # nats; a prediction closer to the base than this has not moved


def drift_norm(panel: Panel, region: str) -> Float[Tensor, " n"]:
    """Root mean square over sequences and layers of the drift's norm (a third, or all layers)."""
    states = _drifts(panel, region)
    values = [torch.nan if s is None else float(s.square().sum(-1).mean().sqrt()) for s in states]
    return torch.tensor(values, dtype=torch.float64)


def drift_ratio(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """a's drift norm over b's."""
    return ratio(*panel.sides(panel.once(f"drift {region}", lambda: drift_norm(panel, region))))


def drift_cosine(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """Cosine of the two drifts over layers, sequences and (projected) directions together."""

    def flat() -> Tensor | None:
        return _stacked([None if s is None else s.flatten() for s in _drifts(panel, region)])

    vectors = panel.once(f"drift_cosine {region}", flat)
    return panel.unmeasured if vectors is None else _flat_cosine(panel, vectors)


def drift_cka(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """Linear CKA of the two drifts over sequences, mean over layers.

    ‖YᵀX‖²/(‖XᵀX‖ ‖YᵀY‖) with the mean over sequences taken off: what both do to every text
    alike (format) does not count, unlike in drift_cosine. 0 for a drift that is constant.
    Taken as the cosine of the (sequences, sequences) matrices XXᵀ and YYᵀ, which is the same.
    """

    def kernels() -> list[Tensor] | None:
        states = _drifts(panel, region)
        known = [state for state in states if state is not None]
        if not known or any(state.shape[1] < 2 for state in known):
            return None
        centred = [None if s is None else s - s.mean(1, keepdim=True) for s in states]
        grams = _stacked([None if s is None else (s @ s.mT).flatten(1) for s in centred])
        return None if grams is None else list(grams.transpose(0, 1))  # one a layer

    layers = panel.once(f"drift_cka {region}", kernels)
    if layers is None:
        return panel.unmeasured
    return torch.stack([_flat_cosine(panel, one).clamp_min(0.0) for one in layers]).mean(0)


def _flat_cosine(panel: Panel, vectors: Float[Tensor, "n size"]) -> Float[Tensor, "a b"]:
    rows, columns = vectors[list(panel.rows)], vectors[list(panel.columns)]
    # both ways: some matrix products round ⟨a, b⟩ and ⟨b, a⟩ apart
    dot = (rows @ columns.mT + (columns @ rows.mT).mT) / 2
    return cosine(dot, rows.square().sum(-1), columns.square().sum(-1))


def _stacked(parts: list[Tensor | None]) -> Float[Tensor, "n ..."] | None:
    """One row a probe, NaN for those that have none; None where nobody has one."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    missing = torch.full_like(known[0], torch.nan)
    return torch.stack([missing if part is None else part for part in parts])


def kl_to_base(panel: Panel, region: str) -> Float[Tensor, " n"]:
    """KL(p ‖ p_base) in nats, mean over positions."""
    values = []
    for probe in panel.probes:
        if probe.drift is None:
            values.append(torch.nan)
        else:
            p, q = aligned(listed(probe.drift), listed(probe.drift, base=True))
            values.append(float(kl(p, q).mean()))
    return torch.tensor(values, dtype=torch.float64)


def js_divergence(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """Jensen-Shannon divergence of the two snapshots' predictions, mean over positions."""
    _comparable(panel)
    whole = panel.once(
        "listed", lambda: [None if p.drift is None else listed(p.drift) for p in panel.probes]
    )
    out = panel.unmeasured
    wanted = [(column, whole[i]) for column, i in enumerate(panel.columns) if whole[i] is not None]
    for start in range(0, len(wanted), AT_ONCE):
        some = wanted[start : start + AT_ONCE]
        there = [column for column, _ in some]
        prob, ids, tail = (torch.cat(p) for p in zip(*(v for _, v in some), strict=True))
        for row, i in enumerate(panel.rows):
            if whole[i] is not None:
                out[row, there] = _divergences(whole[i], (prob, ids, tail), len(some))
    return out


def _divergences(one: Listed, many: Listed, count: int) -> Float[Tensor, " count"]:
    """Mean JS over positions, of one list of predictions with each of `count` in one tensor."""
    repeated = one[0].repeat(count, 1), one[1].repeat(count, 1), one[2].repeat(count)
    p, q = aligned(repeated, many)
    middle = (p + q) / 2
    js = (kl(p, middle) + kl(q, middle)) / 2
    return js.reshape(count, -1).mean(-1)


def js_to_kl(panel: Panel, region: str) -> Float[Tensor, "a b"]:
    """JS(p_a, p_b) / min(KL(p_a ‖ p_0), KL(p_b ‖ p_0)): functional redundancy, low = redundant."""
    moved = kl_to_base(panel, region)
    a, b = panel.sides(torch.where(moved < STILL, torch.nan, moved))
    return js_divergence(panel, region) / torch.minimum(a, b)


Listed = tuple[
    Float[Tensor, "positions top"], Int[Tensor, "positions top"], Float[Tensor, " positions"]
]


def listed(drift: Drift, *, base: bool = False) -> Listed:
    """(probabilities sorted by id, ids, tail mass)."""
    prefix = "base_" if base else ""
    logprob, index, tail = (
        getattr(drift, f"{prefix}{field}") for field in ("logprob", "index", "tail")
    )
    ids, order = index.long().sort(dim=-1)
    return logprob.double().gather(-1, order).exp(), ids, tail.double().exp()


def aligned(
    a: Listed, b: Listed
) -> tuple[Float[Tensor, "positions buckets"], Float[Tensor, "positions buckets"]]:
    """Two top-64 lists as distributions over the union of their ids and one bucket for the rest.

    What a list says nothing about is only known to share its tail mass, and to be no likelier
    than its least listed token. So its tail is spread evenly over the ids that only the other
    list names and the rest, an id's part capped at the least listed probability. That is the
    least surprising reading: divergences come out too small rather than too large.
    """
    in_b, from_b = _find(a[1], b[1])
    in_a, _ = _find(b[1], a[1])
    guess_a, rest_a = _spread(a, ~in_a)
    guess_b, rest_b = _spread(b, ~in_b)
    p_b = torch.where(in_b, b[0].gather(-1, from_b), guess_b[:, None])
    only_b = torch.where(in_a, 0.0, b[0])
    p = torch.cat([a[0], torch.where(in_a, 0.0, guess_a[:, None]), rest_a[:, None]], -1)
    q = torch.cat([p_b, only_b, rest_b[:, None]], -1)
    return p, q


def _find(
    ids: Int[Tensor, "positions one"], among: Int[Tensor, "positions two"]
) -> tuple[Bool[Tensor, "positions one"], Int[Tensor, "positions one"]]:
    """Whether each id stands in the other (sorted) list of its position, and where."""
    place = torch.searchsorted(among, ids).clamp(max=among.shape[-1] - 1)
    return among.gather(-1, place) == ids, place


def _spread(
    own: Listed, unknown: Bool[Tensor, "positions other"]
) -> tuple[Float[Tensor, " positions"], Float[Tensor, " positions"]]:
    """(probability given to each unknown id, what is left for the rest)."""
    count = unknown.sum(-1)
    guess = torch.minimum(own[2] / (count + 1), own[0].min(-1).values)
    return guess, own[2] - count * guess


def kl(
    p: Float[Tensor, "positions buckets"], q: Float[Tensor, "positions buckets"]
) -> Float[Tensor, " positions"]:
    """Σ p log(p/q) in nats, with probabilities no smaller than FLOOR where p is not 0."""
    terms = p * (p.clamp_min(FLOOR).log() - q.clamp_min(FLOOR).log())
    return terms.sum(-1).clamp_min(0.0)


def entropy(listed: Listed) -> Float[Tensor, " positions"]:
    """Entropy in nats of a top-64 list, its tail as one bucket."""
    whole = torch.cat([listed[0], listed[2][:, None]], -1)
    return torch.special.entr(whole).sum(-1)


def _drifts(panel: Panel, region: str) -> list[Float[Tensor, "layers sequences p"] | None]:
    """Hidden drifts of a depth third ("all": every layer), the embedding output left out; None
    where a probe has no drift, or the model no layer in that third."""
    _comparable(panel)
    found = []
    for probe in panel.probes:
        if probe.drift is None:
            found.append(None)
            continue
        states = probe.drift.hidden.double()[1:]
        third = torch.arange(len(states)) * 3 // len(states)
        states = states if region == "all" else states[third == THIRDS.index(region)]
        found.append(states if len(states) else None)
    return found


def _comparable(panel: Panel) -> None:
    first = None
    for probe in panel.probes:
        if probe.drift is None:
            continue
        first = first or probe
        assert first.drift is not None
        for field in ("hidden", "base_index"):
            one, two = (tuple(getattr(d, field).shape) for d in (first.drift, probe.drift))
            if one != two:
                raise ProbeError(
                    f"the probe sets differ: {field} is {one} in '{first.name}' and {two} in "
                    f"'{probe.name}'; capture both with one version of mergeprobe"
                )
