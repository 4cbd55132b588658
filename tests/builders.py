"""Small synthetic adapters and probes, complete and seeded, for tests of everything above them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mergeprobe.adapters.checkpoint import Adapter
from mergeprobe.capture.probe import Calibration, Drift, Moment, Probe, provenance
from mergeprobe.capture.sketch import projection
from mergeprobe.lowrank import LowRank

HIDDEN, WIDE, LAYERS = 12, 20, 3
# name within a layer -> (out, in)
MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (6, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}


def tiny_shapes(layers: int = LAYERS) -> dict[str, tuple[int, int]]:
    """Module name -> (out, in) of a tiny Llama."""
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(layers)
        for name, shape in MODULES.items()
    }


def tiny_adapter(
    seed: int,
    *,
    rank: int = 4,
    layers: int = LAYERS,
    name: str | None = None,
    modules: list[str] | None = None,
    scale: float = 0.1,
    scaling: float = 2.0,
    base: str = "tiny-llama",
    fingerprint: str | None = None,
) -> Adapter:
    """Gaussian factors; `modules` limits it to module names that contain one of the texts."""
    draw = torch.Generator().manual_seed(seed)
    updates = {}
    for module, (out, into) in tiny_shapes(layers).items():
        b = scale * torch.randn(out, rank, generator=draw)
        a = torch.randn(rank, into, generator=draw) / into**0.5
        if modules is None or any(text in module for text in modules):
            updates[module] = LowRank(b, a, scaling)
    return Adapter(name or f"a{seed}", updates, base=base, fingerprint=fingerprint)


def tiny_probe(
    seed: int,
    *,
    name: str | None = None,
    k: int = 8,
    q: int = 3,
    items: int = 4,
    top: int = 6,
    vocabulary: int = 24,
    base_seed: int = 1000,
    **adapter,
) -> Probe:
    """Every part filled in. Further arguments are those of tiny_adapter.

    Probes of one `base_seed`, `vocabulary` and `top` share the base's predictions.
    """
    snapshot = tiny_adapter(seed, name=name, **{"fingerprint": "f" * 16} | adapter)
    draw = torch.Generator().manual_seed(10_000 + seed)
    halfway, base, gradient, inputs, outputs, norms = {}, {}, {}, {}, {}, {}
    for module, update in snapshot.modules.items():
        out, into = update.shape
        half = 0.6 * update.dense() + 0.02 * torch.randn(out, into, generator=draw)
        halfway[module] = sketch(module, half, k)
        base[module] = sketch(module, torch.randn(out, into, generator=draw), k)
        gradient[module] = sketch(module, torch.randn(out, into, generator=draw), k)
        inputs[module] = Moment(torch.randn(into, q, generator=draw), 0.3)
        outputs[module] = Moment(0.1 * torch.randn(out, q, generator=draw), 0.002)
        norms[module] = float(torch.rand((), generator=draw)) + 3.0
    layers = adapter.get("layers", LAYERS)
    loss = 2.0 + torch.rand(items, generator=draw)
    meta = provenance(
        base=snapshot.base,
        fingerprint=snapshot.fingerprint,
        step=10,
        planned_steps=200,
        halfway_step=5,
        losses=[[step, 4.0 * step**-0.3 + 0.01 * (seed % 7) * step] for step in range(1, 11)],
        init_hash=f"init-{seed % 2}",
        seed=seed,
        layers=layers,
        open_positions=[1, 4],
    )
    return Probe(
        name=snapshot.name,
        updates=snapshot.modules,
        halfway=halfway,
        gradient_base=base,
        gradient=gradient,
        inputs=inputs,
        outputs=outputs,
        weight_norms=norms,
        drift=tiny_drift(draw, base_seed, layers=layers, top=top, vocabulary=vocabulary),
        calibration=Calibration(
            ids=torch.randint(1, 9, (items, 5), generator=draw),
            attention_mask=torch.ones(items, 5, dtype=torch.long),
            completion_mask=torch.tensor([[0, 0, 1, 1, 1]] * items),
            base_loss=loss + 1.0,
            loss=loss,
        ),
        meta=meta,
    )


def tiny_drift(
    draw: torch.Generator, base_seed: int, *, layers: int, top: int, vocabulary: int
) -> Drift:
    base = torch.randn(7, vocabulary, generator=torch.Generator().manual_seed(base_seed))
    ours = base + 0.5 * torch.randn(7, vocabulary, generator=draw)
    logprob, index, tail = top_list(ours.log_softmax(-1), top)
    base_logprob, base_index, base_tail = top_list(base.log_softmax(-1), top)
    return Drift(
        hidden=torch.randn(layers + 1, 5, 8, generator=draw),
        logprob=logprob,
        index=index,
        tail=tail,
        base_logprob=base_logprob,
        base_index=base_index,
        base_tail=base_tail,
    )


def top_list(logprob: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """(largest log-probabilities, their ids, log of the mass outside), as Drift keeps them."""
    kept = logprob.topk(top, dim=-1)
    rest = (1.0 - kept.values.double().exp().sum(-1)).clamp(min=1e-12).log().float()
    return kept.values, kept.indices.to(torch.int32), rest


def sketch(module: str, dense: Tensor, k: int) -> Tensor:
    out, into = dense.shape
    return projection(module, "out", out, k).T @ dense.float() @ projection(module, "in", into, k)


def regauged(probe: Probe, seed: int = 0) -> Probe:
    """The same adapter with other factors: (B Q⁻¹, Q A), Q invertible and far from orthogonal."""
    draw = torch.Generator().manual_seed(seed)
    updates = {}
    for module, update in probe.updates.items():
        mix = torch.randn(update.r, update.r, generator=draw, dtype=torch.float64)
        mix = mix + 2.0 * torch.eye(update.r, dtype=torch.float64)
        b = torch.linalg.solve(mix.T, update.B.double().T).T
        updates[module] = LowRank(b, mix @ update.A.double(), update.scaling)
    return replace(probe, updates=updates)


def reordered(probe: Probe, seed: int = 0) -> Probe:
    """The same adapter with its rank components in another order."""
    draw = torch.Generator().manual_seed(seed)
    updates = {}
    for module, update in probe.updates.items():
        order = torch.randperm(update.r, generator=draw)
        updates[module] = LowRank(update.B[:, order], update.A[order], update.scaling)
    return replace(probe, updates=updates)


def renamed(probe: Probe, name: str) -> Probe:
    return replace(probe, name=name)


def rescaled(probe: Probe, factor: float) -> Probe:
    """The probe with its update multiplied by `factor`, everything else as it was."""
    return replace(probe, updates={m: u * factor for m, u in probe.updates.items()})
