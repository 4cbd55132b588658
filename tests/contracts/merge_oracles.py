"""The merge rules again: dense, in float64, by numpy, entry by entry where the papers are.

An oracle takes a stack (T, out, in) of one module's updates, zeros where an adapter lacks it, and
by keyword what its rule needs: `draws`, uniform numbers in the rule's order, one array for each
update, or `inputs` and `outputs`, the dense second moments of each adapter.
"""

import itertools

import numpy as np
import torch


def rank(matrix):
    return np.linalg.matrix_rank(matrix, rtol=1e-6) if matrix.any() else 0


def svd(matrix):
    """Without null directions."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    kept = rank(matrix)
    return u[:, :kept], s[:kept], vh[:kept]


def norms(stack):
    return np.array([np.linalg.norm(one) for one in stack])


def largest(matrix, density):
    """All but the largest entries at zero."""
    kept = np.zeros_like(matrix)
    order = np.argsort(-np.abs(matrix), axis=None)[: max(1, round(density * matrix.size))]
    kept.flat[order] = matrix.flat[order]
    return kept


def agreeing(stack):
    merged = np.zeros(stack.shape[1:])
    for place in itertools.product(*map(range, merged.shape)):
        column = stack[(slice(None), *place)]
        agree = column[np.sign(column) * np.sign(column.sum()) > 0]
        merged[place] = agree.mean() if agree.size else 0.0
    return merged


def norm_preserving(stack):
    mean = stack.mean(axis=0)
    return mean * norms(stack).mean() / np.linalg.norm(mean)


def equal_norm(stack):
    lengths = norms(stack)
    heard = lengths > 0
    scaled = [one * lengths[heard].mean() / n for one, n in zip(stack, lengths, strict=True) if n]
    return sum(scaled, np.zeros_like(stack[0])) / len(stack)


def ties(stack, density=0.2):
    return agreeing(np.stack([largest(one, density) for one in stack]))


def svc(stack, alpha=0.1):
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


def slerp(stack):
    """Half steps along the mean of the logarithms, on the vectors themselves."""
    lengths = norms(stack)
    units = [one / length for one, length in zip(stack, lengths, strict=True) if length > 0]
    if not units:
        return stack.sum(axis=0)
    mean = sum(units) / np.linalg.norm(sum(units))
    for _ in range(400):
        step = np.zeros_like(mean)
        for one in units:
            angle = np.arccos(np.clip((one * mean).sum(), -1, 1))
            across = one - np.cos(angle) * mean
            if np.linalg.norm(across) > 1e-12:
                step += angle * across / np.linalg.norm(across) / len(units)
        mean = mean + 0.5 * step
        mean = mean / np.linalg.norm(mean)
    return mean * lengths.mean()


def breadcrumbs(stack, density=0.09, gamma=0.01):
    merged = np.zeros(stack.shape[1:])
    for one in stack:
        order = np.argsort(-np.abs(one), axis=None)
        middle = order[round(gamma * one.size) : round((density + gamma) * one.size)]
        merged.flat[middle] += one.flat[middle] / len(stack)
    return merged


def dare(stack, draws, density=0.5):
    return np.where(draws < density, stack / density, 0.0)


def della(stack, draws, density=0.5, epsilon=0.15):
    kept = np.zeros_like(stack)
    for t, i in itertools.product(range(len(stack)), range(stack.shape[1])):
        row = np.abs(stack[t, i])
        for j in range(len(row)):
            place = (row < row[j]).sum() / (len(row) - 1)
            chance = density + epsilon * (2 * place - 1)
            kept[t, i, j] = stack[t, i, j] / chance if draws[t, i, j] < chance else 0.0
    return kept


def pcb(stack, density=0.1):
    total, above, below = stack.sum(axis=0), 0.0, 0.0
    for one in stack:
        ordered, size = np.sort(np.abs(one), axis=None), one.size
        ends = ordered[int(size * 1e-4)], ordered[int(size * (1 - 1e-4) - 1)]
        magnitude = np.clip(np.abs(one), *ends)
        spread = np.ptp(magnitude)
        unit = (magnitude - magnitude.min()) / spread if spread else np.zeros_like(magnitude)
        standing = np.exp(len(stack) * unit**2) * np.tanh(one * total)
        low = np.sort(standing, axis=None)[-round(density * size)]
        spread = standing.max() - low
        standing = np.maximum(standing - low, 0) / spread if spread else np.zeros_like(standing)
        above += np.sign(one) * magnitude * standing
        below += standing
    return above / np.maximum(below, 1e-12)


def lora_lego(stack):
    """Units and centroids as vectors; the sign of a unit is chosen anew against each centroid."""
    units = []
    for one in stack:
        u, s, vh = svd(one)
        root = np.sqrt(s)
        sign = np.sign(np.take_along_axis(vh, np.abs(vh).argmax(axis=1)[:, None], axis=1))
        u, vh = u * sign.T, sign * vh
        units += [np.concatenate([root[k] * vh[k], root[k] * u[:, k]]) for k in range(len(s))]
    r = max(rank(one) for one in stack)

    def apart(unit, centre):
        return min(np.linalg.norm(unit - centre), np.linalg.norm(unit + centre))

    centres = [max(units, key=np.linalg.norm)]
    while len(centres) < r:
        centres.append(max(units, key=lambda unit: min(apart(unit, c) for c in centres)))
    for _ in range(50):
        members = [[] for _ in centres]
        for unit in units:
            k = min(range(r), key=lambda k: apart(unit, centres[k]))
            members[k].append(unit if unit @ centres[k] > -1e-6 else -unit)
        centres = [np.mean(group, axis=0) for group in members]
    merged = np.zeros(stack.shape[1:])
    for centre, group in zip(centres, members, strict=True):
        stretched = centre * np.mean([np.linalg.norm(unit) for unit in group])
        stretched /= np.linalg.norm(centre)
        merged += np.outer(stretched[stack.shape[2] :], stretched[: stack.shape[2]])
    return merged


def robust_merge(stack, density=0.2, share=0.2, scale=4.0):
    pruned, totals = [], np.zeros(min(stack.shape[1:]))
    for one in stack:
        u, s, vh = svd(one)
        if len(s) == 0:
            continue
        b, a = u * np.sqrt(s), np.sqrt(s)[:, None] * vh
        b_kept, a_kept = largest(b, density), largest(a, density)
        after = np.abs(a_kept).sum(axis=1)
        made_up = np.abs(a).sum(axis=1) / np.where(after > 0, after, np.inf)
        floor = np.sort(made_up)[min(len(s) - 1, int(len(s) * (1 - share)))]
        made_up = np.maximum(made_up, floor)
        totals[: len(s)] += made_up
        pruned.append((b_kept, made_up, a_kept))
    return scale * sum(b @ np.diag(c / totals[: len(c)]) @ a for b, c, a in pruned)


def polar(columns):
    p, _, qh = svd(columns)
    return p @ qh


def tsv_m(stack):
    kept = max(1, min(stack.shape[1:]) // len(stack))
    parts = [svd(one) for one in stack]
    u = polar(np.concatenate([u[:, :kept] for u, _, _ in parts], axis=1))
    v = polar(np.concatenate([vh[:kept].T for _, _, vh in parts], axis=1))
    return u @ np.diag(np.concatenate([s[:kept] for _, s, _ in parts])) @ v.T


def core_size(stack):
    return min(rank(np.concatenate(stack, axis=1)), rank(np.concatenate(stack, axis=0)))


def iso_c(stack):
    size = core_size(stack)
    u, s, vh = np.linalg.svd(stack.sum(axis=0))
    return s[:size].mean() * u[:, :size] @ vh[:size]


def iso_cts(stack, common=0.8):
    size, count = core_size(stack), len(stack)
    own = round((size - int(size * common)) / count)
    shared = size - own * count
    u, s, vh = np.linalg.svd(stack.sum(axis=0))
    us, ss, vs = [u[:, :shared]], [s[:shared]], [vh[:shared].T]
    for one in stack:
        a, b, c = np.linalg.svd(one - us[0] @ us[0].T @ one)
        us, ss, vs = [*us, a[:, :own]], [*ss, b[:own]], [*vs, c[:own].T]
        if not one.any():  # its vectors are arbitrary, and no part of the merge
            us[-1], vs[-1] = 0 * us[-1], 0 * vs[-1]
    level = np.concatenate(ss).mean()
    return level * polar(np.concatenate(us, axis=1)) @ polar(np.concatenate(vs, axis=1)).T


def pico(stack):
    u, s, _ = svd(np.concatenate(stack, axis=1))
    count = sum(1 for one in stack if one.any())
    damping = 1 / (1 + (count - 1) * s**2 / (s**2).sum())
    calibrated = (np.eye(len(u)) + u @ np.diag(damping - 1) @ u.T) @ stack.mean(axis=0)
    return calibrated * norms(stack).mean() / np.linalg.norm(calibrated)


def wudi(stack, steps=300, learning_rate=1e-5):
    """By autograd and torch's own Adam."""
    updates = torch.tensor(stack)
    merged = updates.sum(dim=0).requires_grad_()
    adam = torch.optim.Adam([merged], lr=learning_rate)
    for _ in range(steps):
        adam.zero_grad()
        parts = [((merged - w) @ w.T).square().sum() / w.square().sum() for w in updates if w.any()]
        torch.stack(parts).sum().backward()
        adam.step()
    return merged.detach().numpy()


def wudi_closed(stack, ridge=0.1):
    """M ΔWᵢᵀ/‖ΔWᵢ‖ = ΔWᵢ ΔWᵢᵀ/‖ΔWᵢ‖ for all i, and √λ M = √λ mean, by least squares."""
    used = [one for one in stack if one.any()]
    sides = np.concatenate([one / np.linalg.norm(one) for one in used])
    wanted = np.concatenate([one / np.linalg.norm(one) @ one.T for one in used])
    root = np.sqrt(ridge * (sides**2).sum() / rank(sides))
    sides = np.concatenate([sides, root * np.eye(stack.shape[2])])
    wanted = np.concatenate([wanted, root * np.mean(used, axis=0).T])
    return np.linalg.lstsq(sides, wanted)[0].T


def ssr(stack, inputs, ridge=1e-4, **_):
    parts = [(*svd(one), s) for one, s in zip(stack, inputs, strict=True) if one.any()]
    if len(parts) == 1:
        return stack.sum(axis=0)
    signals = np.concatenate([vh for _, _, vh, _ in parts])
    outputs = np.concatenate([u * s for u, s, _, _ in parts], axis=1)
    seen = np.stack([signals @ moment @ signals.T for *_, moment in parts])
    gram = seen.sum(axis=0)
    owner = np.concatenate([np.full(len(s), k) for k, (_, s, _, _) in enumerate(parts)])
    guide = sum(np.diag((owner == k).astype(float)) @ one for k, one in enumerate(seen))
    gram = gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    return outputs @ guide @ np.linalg.inv(gram) @ signals


def core_isolation(stack, core=0.01, threshold=0.1):
    masks = np.stack([largest(one, core) != 0 for one in stack])
    merged = slerp(np.where(masks, 0.0, stack))
    group = list(range(len(stack)))
    for i, j in itertools.combinations(range(len(stack)), 2):
        both, either = (masks[i] & masks[j]).sum(), (masks[i] | masks[j]).sum()
        if either and both / either >= threshold:
            group = [group[i] if g == group[j] else g for g in group]
    levels = norms(stack) / np.sqrt(stack[0].size)
    for place in zip(*np.nonzero(masks.any(axis=0)), strict=True):
        owners = [t for t in range(len(stack)) if masks[(t, *place)]]
        winner = group[max(owners, key=lambda t: abs(stack[(t, *place)]) / levels[t])]
        merged[place] = np.mean([stack[(t, *place)] for t in owners if group[t] == winner])
    return merged


def core_isolation_lowrank(stack, components=1):
    cores, rest = [], []
    for one in stack:
        u, s, vh = svd(one)
        kept = [s[k] * np.outer(u[:, k], vh[k]) for k in range(min(components, len(s)))]
        cores += [(np.linalg.norm(c) / np.linalg.norm(one), c) for c in kept]
        rest.append(one - sum(kept) if kept else one)
    merged, taken = np.zeros(stack.shape[1:]), np.zeros((0, stack.shape[2]))
    free = np.eye(stack.shape[2])
    for _, one in sorted(cores, key=lambda part: -part[0]):
        merged += one @ free
        taken = np.concatenate([taken, one])
        free = np.eye(stack.shape[2]) - np.linalg.pinv(taken, rtol=1e-6) @ taken
    return merged + slerp(np.where(np.abs(rest) < 1e-9, 0, rest)) @ free


def known(stack, moments):
    """(weight in the denominator, moment) of each adapter, one without its mean's share spread."""
    count = sum(moment is not None for moment in moments)
    return [(0 if m is None else 1 / count, m) for m in moments]


def fisher(stack, inputs, outputs, floor=1e-6):
    found = []
    for x, delta in zip(inputs, outputs, strict=True):
        whole = None if x is None else np.outer(np.diag(delta), np.diag(x))
        found.append(None if whole is None else np.maximum(whole / whole.mean(), floor))
    up = sum(f * one for f, one in zip(found, stack, strict=True) if f is not None) / len(stack)
    return up / sum(share * f for share, f in known(stack, found) if f is not None)


def regmean(stack, inputs, shrink=0.9, **_):
    rows = [svd(one)[2] for one in stack if one.any()]
    overlap = []
    for one, other in itertools.combinations(rows, 2):
        chance = max(len(one), len(other)) / stack.shape[2]
        found = np.square(one @ other.T).sum() / min(len(one), len(other))
        overlap.append((found - chance) / (1 - chance))
    ridge = 0.1 if overlap and np.mean(overlap) > 0.25 else 0.01
    pairs = known(stack, inputs)
    penalty = ridge * sum(p * np.trace(s) for p, s in pairs if s is not None) / stack.shape[2]
    seen = [
        None if s is None
        else shrink * s + (1 - shrink) * np.diag(np.diag(s)) + penalty * np.eye(len(s))
        for s in inputs
    ]  # fmt: skip
    up = sum(one @ s for one, s in zip(stack, seen, strict=True) if s is not None) / len(stack)
    whole = sum(p * s for (p, _), s in zip(pairs, seen, strict=True) if s is not None)
    return up @ np.linalg.inv(whole)


def osrm(stack, inputs, directions=8, **_):
    merged = np.zeros(stack.shape[1:])
    for k, one in enumerate(stack):
        others = [s for j, s in enumerate(inputs) if j != k and s is not None]
        values, vectors = np.linalg.eigh(sum(others, np.zeros((stack.shape[2],) * 2)))
        used = (values > values[0] + 1e-6 * (values[-1] - values[0])) & (values > 0)
        used[: max(0, len(used) - directions)] = False
        free = vectors[:, ~used]
        merged += one @ free @ free.T / len(stack)
    return merged


ORACLES = {
    "mean": lambda stack: stack.mean(axis=0),
    "linear": lambda stack: stack.mean(axis=0),
    "sum": lambda stack: stack.sum(axis=0),
    "norm_preserving_mean": norm_preserving,
    "equal_norm_mean": equal_norm,
    "ties": ties,
    "svc": svc,
    "slerp": slerp,
    "magnitude_prune": lambda stack: np.mean([largest(one, 0.5) for one in stack], axis=0),
    "breadcrumbs": breadcrumbs,
    "dare_linear": lambda stack, draws: dare(stack, draws).mean(axis=0),
    "dare_ties": lambda stack, draws: agreeing(dare(stack, draws)),
    "della": lambda stack, draws: agreeing(della(stack, draws)),
    "della_linear": lambda stack, draws: della(stack, draws).mean(axis=0),
    "pcb": pcb,
    "lora_lego": lora_lego,
    "robust_merge": robust_merge,
    "tsv_m": tsv_m,
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "pico": pico,
    "wudi": wudi,
    "wudi_closed": wudi_closed,
    "ssr": ssr,
    "core_isolation": core_isolation,
    "core_isolation_lowrank": core_isolation_lowrank,
    "fisher": fisher,
    "regmean": regmean,
    "osrm": osrm,
}
