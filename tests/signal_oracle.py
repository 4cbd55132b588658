"""Every file-tier signal once more: dense, in float64, one pair and one region at a time.

Written from the definitions, sharing no code with `mergeprobe.signals`. `None` is "not measured".
"""

from __future__ import annotations

import math

import torch

from mergeprobe.capture.sketch import projection


def dense(p, m):
    u = p.updates[m]
    return u.scaling * u.B.double() @ u.A.double()


def here(p, ms):
    return [m for m in ms if m in p.updates]


def energy(p, ms):
    return sum(float(dense(p, m).square().sum()) for m in here(p, ms))


def dot(a, b, ms):
    both = [m for m in ms if m in a.updates and m in b.updates]
    return sum(float((dense(a, m) * dense(b, m)).sum()) for m in both)


def weighted(value, alone):
    """Mean over modules, weighted by the shares of the adapters' own energy."""

    def signal(a, b, ms):
        if not here(a, ms) or not here(b, ms):
            return None
        top = bottom = 0.0
        for m in ms:
            has = [m in p.updates for p in (a, b)]
            if not any(has):
                continue
            share = sum(
                energy(p, [m]) / energy(p, ms) for p, h in zip((a, b), has, strict=True) if h
            )
            top += share * (value(dense(a, m), dense(b, m)) if all(has) else alone)
            bottom += share
        return top / bottom

    return signal


def need_both(function):
    return lambda a, b, ms: function(a, b, ms) if here(a, ms) and here(b, ms) else None


def spectral(x, y):
    s = [float(torch.linalg.matrix_norm(w, 2)) for w in (x + y, x, y)]
    return s[0] / max(s[1:])


def overlap(x, y):
    p, q = x @ x.T, y @ y.T
    return float((p * q).sum() / (p.norm() * q.norm()))


def angles(x, y):
    bases = []
    for w in (x, y):
        u, s, _ = torch.linalg.svd(w)
        bases.append(u[:, : int((s > 1e-9 * s[0]).sum())])
    return torch.linalg.svdvals(bases[0].T @ bases[1])


def entropy_rank(w):
    p = torch.linalg.svdvals(w) ** 2
    p = p[p > 1e-15 * p.max()] / p.sum()
    return math.exp(-float((p * p.log()).sum()))


def union(x, y):
    both = torch.cat([x / x.norm(), y / y.norm()], 1)
    return entropy_rank(both) / (entropy_rank(x) + entropy_rank(y))


def sign_conflict(a, b, ms):
    clash = total = 0.0
    for m in [m for m in ms if m in a.updates and m in b.updates]:
        product = dense(a, m) * dense(b, m)
        clash += float(-product[product < 0].sum())
        total += float(product.abs().sum())
    return clash / total


def sketched(p, m, k):
    out, into = p.updates[m].shape
    left, right = projection(m, "out", out, k).double(), projection(m, "in", into, k).double()
    return left.T @ dense(p, m) @ right


def flat_cosine(a, b, ms, of):
    if not here(a, ms) or not here(b, ms):
        return None
    zero = torch.zeros(8, 8, dtype=torch.float64)
    x, y = (torch.cat([of(p, m) if m in p.updates else zero for m in ms]) for p in (a, b))
    return float((x * y).sum() / (x.norm() * y.norm()))


def transfer(part, loss):
    def signal(a, b, ms):
        if not here(b, ms):
            return None
        both = [m for m in ms if m in a.updates and m in b.updates]
        gain = sum(float((getattr(b, part)[m].double() * sketched(a, m, 8)).sum()) for m in both)
        return -gain / float(getattr(b.calibration, loss).double().mean())

    return signal


def form(i, a, b, ms):
    total = 0.0
    for m in [m for m in ms if all(m in p.updates for p in (i, a, b))]:
        d, s = i.outputs[m].dense(), i.inputs[m].dense()
        total += float(torch.trace(dense(a, m).T @ d @ dense(b, m) @ s))
    return total


def on_inputs(b, a, ms):
    both = [m for m in ms if m in a.updates and m in b.updates]
    return sum(float(torch.trace(dense(a, m) @ b.inputs[m].dense() @ dense(a, m).T)) for m in both)


def measured_on_b(function):
    return lambda a, b, ms: function(a, b, ms) if here(b, ms) else None


def fisher_cosine(a, b, ms):
    norms = math.sqrt(form(b, a, a, ms) * form(b, b, b, ms))
    return form(b, a, b, ms) / norms if norms else 0.0


def states(p, third):
    hidden = p.drift.hidden.double()[1:]
    layers = [x for x in range(len(hidden)) if third in (None, x * 3 // len(hidden))]
    return hidden[layers]


def rms(p, third):
    return math.sqrt(float(states(p, third).norm(dim=-1).square().mean()))


def drift_cosine(a, b, third):
    x, y = states(a, third).flatten(), states(b, third).flatten()
    return float(x @ y / (x.norm() * y.norm()))


def cka(a, b, third):
    """By the Gram matrices of the sequences (HSIC), not the feature covariances."""
    values = []
    for x, y in zip(states(a, third), states(b, third), strict=True):
        n = len(x)
        h = torch.eye(n, dtype=torch.float64) - 1.0 / n
        k, q = h @ x @ x.T @ h, h @ y @ y.T @ h
        values.append(float((k * q).sum() / (k.norm() * q.norm())))
    return sum(values) / len(values)


def distribution(p, *, base=False):
    """The full distribution, for probes whose lists hold the whole vocabulary."""
    d = p.drift
    logprob, index = (d.base_logprob, d.base_index) if base else (d.logprob, d.index)
    out = torch.zeros(logprob.shape, dtype=torch.float64)
    return out.scatter(1, index.long(), logprob.double().exp())


def kl_mean(p, q):
    return float((p * (p / q).log()).sum(1).mean())


def kl_to_base(p):
    return kl_mean(distribution(p), distribution(p, base=True))


def js(a, b):
    p, q = distribution(a), distribution(b)
    return (kl_mean(p, (p + q) / 2) + kl_mean(q, (p + q) / 2)) / 2


PAIRS = {
    "frobenius_cosine": need_both(
        lambda a, b, ms: dot(a, b, ms) / math.sqrt(energy(a, ms) * energy(b, ms))
    ),
    "norm_ratio": need_both(lambda a, b, ms: math.sqrt(energy(a, ms) / energy(b, ms))),
    "amplification": need_both(
        lambda a, b, ms: 1 + 2 * dot(a, b, ms) / (energy(a, ms) + energy(b, ms))
    ),
    "spectral_amplification": weighted(spectral, 1.0),
    "sign_conflict": need_both(sign_conflict),
    "sign_conflict_error": lambda a, b, ms: 0.0,
    "output_overlap": weighted(overlap, 0.0),
    "input_overlap": weighted(lambda x, y: overlap(x.T, y.T), 0.0),
    "principal_cosine": weighted(lambda x, y: float(angles(x, y)[0]), 0.0),
    "principal_cosine_mean": weighted(lambda x, y: float(angles(x, y).mean()), 0.0),
    "union_rank": weighted(union, 1.0),
    "shared_init": lambda a, b, ms: float(a.meta["init_hash"] == b.meta["init_hash"]),
    "gradient_cosine_base": lambda a, b, ms: flat_cosine(
        a, b, ms, lambda p, m: p.gradient_base[m].double()
    ),
    "gradient_cosine": lambda a, b, ms: flat_cosine(a, b, ms, lambda p, m: p.gradient[m].double()),
    "velocity_cosine": lambda a, b, ms: flat_cosine(
        a, b, ms, lambda p, m: sketched(p, m, 8) - p.halfway[m].double()
    ),
    "first_order_transfer": transfer("gradient_base", "base_loss"),
    "first_order_transfer_snapshot": transfer("gradient", "loss"),
    "interference": measured_on_b(lambda a, b, ms: form(b, a, a, ms)),
    "interference_ratio": measured_on_b(lambda a, b, ms: form(b, a, a, ms) / form(b, b, b, ms)),
    "fisher_cosine": measured_on_b(fisher_cosine),
    "data_weighted": measured_on_b(lambda a, b, ms: on_inputs(b, a, ms) / on_inputs(b, b, ms)),
    "js_divergence": lambda a, b, ms: js(a, b),
    "js_to_kl": lambda a, b, ms: js(a, b) / min(kl_to_base(a), kl_to_base(b)),
}
# by depth third (0, 1, 2, or None for all) instead of by modules
DRIFT_PAIRS = {
    "drift_ratio": lambda a, b, third: rms(a, third) / rms(b, third),
    "drift_cosine": drift_cosine,
    "drift_cka": cka,
}


def energy_mean(value):
    return lambda p, ms: (
        sum(energy(p, [m]) * value(dense(p, m)) for m in here(p, ms)) / energy(p, ms)
    )


def kappa(p, ms):
    even = sum(
        energy(p, [m]) * float(torch.trace(p.inputs[m].dense())) / p.updates[m].shape[1]
        for m in here(p, ms)
    )
    return on_inputs(p, p, ms) / even


def growth(p, ms):
    grown = sum(float(sketched(p, m, 8).square().sum()) for m in here(p, ms))
    half = sum(float(p.halfway[m].double().square().sum()) for m in here(p, ms))
    return 0.5 * math.log(grown / half) / math.log(p.meta["step"] / p.meta["halfway_step"])


def mean_entropy(p):
    return float(-(p * p.log()).sum(1).mean())


ADAPTERS = {
    "update_norm": lambda p, ms: math.sqrt(energy(p, ms)),
    "relative_norm": lambda p, ms: math.sqrt(
        energy(p, ms) / sum(p.weight_norms[m] ** 2 for m in here(p, ms))
    ),
    "stable_rank": energy_mean(
        lambda w: float(w.square().sum() / torch.linalg.matrix_norm(w, 2) ** 2)
    ),
    "effective_rank": energy_mean(entropy_rank),
    "selectivity": kappa,
    "capacity": lambda p, ms: 1 + 0.5 * kappa(p, ms),
    "own_curvature": lambda p, ms: form(p, p, p, ms),
    "kl_to_base": lambda p, ms: kl_to_base(p),
    "own_gain": lambda p, ms: float((p.calibration.base_loss - p.calibration.loss).mean()),
    "own_gain_relative": lambda p, ms: (
        1 - float(p.calibration.loss.mean()) / float(p.calibration.base_loss.mean())
    ),
    "loss_slope": lambda p, ms: float(
        torch.linalg.lstsq(
            torch.tensor([[math.log(s), 1.0] for s, _ in p.meta["losses"]]).double(),
            torch.tensor([[math.log(x)] for _, x in p.meta["losses"]]).double(),
        ).solution[0, 0]
    ),
    "norm_growth": growth,
    "entropy_change": lambda p, ms: (
        mean_entropy(distribution(p)) - mean_entropy(distribution(p, base=True))
    ),
    "entropy_change_open": lambda p, ms: (
        mean_entropy(distribution(p)[p.meta["open_positions"]])
        - mean_entropy(distribution(p, base=True)[p.meta["open_positions"]])
    ),
}


def rest(members, i, m):
    parts = [dense(p, m) for p in members if p is not i and m in p.updates]
    return sum(parts) if parts else None


def joint(i, members, ms):
    total = 0.0
    for m in here(i, ms):
        t = rest(members, i, m)
        if t is not None:
            total += float(torch.trace(t.T @ i.outputs[m].dense() @ t @ i.inputs[m].dense()))
    return total


def set_amplification(i, members, ms):
    whole = 0.0
    for m in ms:
        parts = [dense(p, m) for p in members if m in p.updates]
        whole += float(sum(parts).square().sum())
    return whole / sum(energy(p, ms) for p in members)


def cosine_to_rest(i, members, ms):
    product = square = 0.0
    for m in ms:
        t = rest(members, i, m)
        if t is not None:
            square += float(t.square().sum())
            product += float((t * dense(i, m)).sum()) if m in i.updates else 0.0
    return product / math.sqrt(square * energy(i, ms))


def set_union_rank(i, members, ms):
    top = bottom = 0.0
    for m in ms:
        parts = [dense(p, m) for p in members if m in p.updates]
        share = sum(energy(p, [m]) / energy(p, ms) for p in members if m in p.updates)
        stack = torch.cat([w / w.norm() for w in parts], 1)
        top += share * entropy_rank(stack) / sum(entropy_rank(w) for w in parts)
        bottom += share
    return top / bottom


SETS = {
    "set_amplification": set_amplification,
    "cosine_to_rest": cosine_to_rest,
    "set_union_rank": set_union_rank,
    "capacity_load": lambda i, members, ms: sum(
        on_inputs(i, j, ms) / on_inputs(i, i, ms) for j in members if j is not i
    ),
    "joint_interference": joint,
    "joint_interference_ratio": lambda i, members, ms: joint(i, members, ms) / form(i, i, i, ms),
}
