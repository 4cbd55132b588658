"""Probe: what was measured on one run at one step, in one safetensors file.

Tensors carry the measurements, the header carries the provenance (JSON) and digests of both,
so damage is found on reading. No pickle. A plain finished adapter is a probe that has
only its update (`Probe.from_adapter`); every other part may be absent, and `has` says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergeprobe.adapters.checkpoint import Adapter, natural, read_adapter
from mergeprobe.artefact import MADE_BY, atomic_file, check_schema
from mergeprobe.capture.sound import refuse_unsound
from mergeprobe.errors import ProbeError
from mergeprobe.lowrank import LowRank

PROBE_SCHEMA = 1


@dataclass(frozen=True, eq=False)
class Moment:
    """A second moment E[v vᵀ] (dim × dim, per token) as F Fᵀ + tail · I.

    factor: F (dim, q), the leading directions scaled by the root of their eigenvalues.
    tail: what is left of the exactly counted trace, spread evenly: (tr − ‖F‖²)/dim ≥ 0.
    """

    factor: Float[Tensor, "dim q"]
    tail: float

    @property
    def trace(self) -> float:
        return float(self.factor.double().square().sum()) + self.tail * self.factor.shape[0]

    def cut(self, rank: int) -> Moment:
        """Its `rank` leading directions; the others' share of the trace goes into the tail."""
        if rank >= self.factor.shape[1]:
            return self
        dropped = float(self.factor[:, rank:].double().square().sum())
        return Moment(self.factor[:, :rank], self.tail + dropped / self.factor.shape[0])

    def quadratic(
        self, left: Float[Tensor, "dim a"], right: Float[Tensor, "dim b"]
    ) -> Float[Tensor, "a b"]:
        """leftᵀ S right in float64, without forming S."""
        left, right, factor = left.double(), right.double(), self.factor.double()
        return (left.T @ factor) @ (factor.T @ right) + self.tail * (left.T @ right)

    def dense(self) -> Float[Tensor, "dim dim"]:
        factor = self.factor.double()
        return factor @ factor.T + self.tail * torch.eye(factor.shape[0], dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Drift:
    """The run on the shared probe set, and the base on the same tokens.

    hidden: (layers + 1, sequences, p) hidden states minus the base's, mean-pooled over each
      sequence, projected to p dimensions by a seed that all runs share; entry 0 is the embedding
      output, the last is after the final norm.
    logprob, index: (positions, 64) the largest next-token log-probabilities (nats) and their ids;
    tail: (positions,) log of the mass outside them. base_*: the same for the base model.
    """

    hidden: Float[Tensor, "layers sequences p"]
    logprob: Float[Tensor, "positions top"]
    index: Int[Tensor, "positions top"]
    tail: Float[Tensor, " positions"]
    base_logprob: Float[Tensor, "positions top"]
    base_index: Int[Tensor, "positions top"]
    base_tail: Float[Tensor, " positions"]


@dataclass(frozen=True, eq=False)
class Calibration:
    """A small batch of the task itself.

    ids: (items, tokens) token ids, right-padded with 0; completion_mask: 1 where a token counts
    in the loss; attention_mask: 1 where it is no padding. base_loss, loss: (items,) mean
    completion loss per item (nats per token) under the base and under the snapshot.
    """

    ids: Int[Tensor, "items tokens"]
    attention_mask: Int[Tensor, "items tokens"]
    completion_mask: Int[Tensor, "items tokens"]
    base_loss: Float[Tensor, " items"]
    loss: Float[Tensor, " items"]


@dataclass(frozen=True, eq=False)
class Probe:
    """What one run looked like at one step. Parts that were not measured are empty or None.

    updates: module -> ΔW at the snapshot. halfway: module -> (k, k) sketch of ΔW at half of the
    steps. gradient_base, gradient: module -> (k, k) sketch of the full-weight gradient of the mean
    token loss, at the base point and at the snapshot. inputs, outputs: module -> second moments of
    the module's input x (all tokens but padding) and of δ, the gradient of the summed token loss
    at its output (completion tokens only: the empirical Fisher's factor), at the snapshot.
    weight_norms: module -> ‖W‖ of the frozen base weight.
    meta: provenance; the keys the readers rely on are in `provenance()`.
    """

    name: str
    updates: dict[str, LowRank]
    halfway: dict[str, Float[Tensor, "k k"]] = field(default_factory=dict)
    gradient_base: dict[str, Float[Tensor, "k k"]] = field(default_factory=dict)
    gradient: dict[str, Float[Tensor, "k k"]] = field(default_factory=dict)
    inputs: dict[str, Moment] = field(default_factory=dict)
    outputs: dict[str, Moment] = field(default_factory=dict)
    weight_norms: dict[str, float] = field(default_factory=dict)
    drift: Drift | None = None
    calibration: Calibration | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @classmethod
    def from_adapter(cls, adapter: Adapter) -> Probe:
        """A finished adapter seen as a probe: its update and nothing else."""
        meta = provenance(base=adapter.base, fingerprint=adapter.fingerprint, finished=True)
        return cls(adapter.name, adapter.modules, meta=meta, path=adapter.path)

    def to_adapter(self) -> Adapter:
        """The snapshot as an adapter."""
        return Adapter(
            self.name,
            self.updates,
            base=self.meta.get("base") or "",
            fingerprint=self.meta.get("base_fingerprint"),
            path=self.path,
        )

    def has(self, part: str) -> bool:
        """Whether a part (a field's name) was measured."""
        return bool(getattr(self, part))

    @property
    def modules(self) -> list[str]:
        return list(self.updates)


def provenance(
    *,
    base: str = "",
    fingerprint: str | None = None,
    step: int | None = None,
    planned_steps: int | None = None,
    finished: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """The metadata every probe carries. Further keys: losses (the training loss of every logged
    step as [step, loss] pairs), lr_curve ([step, learning rate] pairs), peft_type, variant, ranks,
    exact, truncation, truncation_error (`trained.described` explains these five), init_hash (of A
    before the first step, or None), data_tag, seed, versions, warmup_steps, halfway_step,
    open_positions (of the drift's distributions), model_type, layers."""
    return {
        "schema": PROBE_SCHEMA,
        "made_by": MADE_BY,
        "base": base,
        "base_fingerprint": fingerprint,
        "step": step,
        "planned_steps": planned_steps,
        "finished": finished,
        **more,
    }


def write_probe(probe: Probe, path: str | Path, *, force: bool = True) -> Path:
    """Writes the probe atomically. Tensors: updates fp32 with the scaling in the header."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for module, update in probe.updates.items():
        tensors[f"update.A:{module}"] = update.A
        tensors[f"update.B:{module}"] = update.B
    for part in ("halfway", "gradient_base", "gradient"):
        for module, value in getattr(probe, part).items():
            short = value.to(torch.bfloat16)  # where that loses nothing (see compact.py)
            lossless = torch.equal(short.to(value.dtype), value)
            tensors[f"{part}:{module}"] = short if lossless else value
    tails: dict[str, float] = {}
    for part in ("inputs", "outputs"):
        stored: dict[int, str] = {}
        for module, moment in getattr(probe, part).items():
            key = f"{part}:{module}"
            if id(moment.factor) in stored:  # q, k and v read one input: stored once
                shared[key] = stored[id(moment.factor)]
            else:
                stored[id(moment.factor)] = key
                tensors[key] = moment.factor.to(torch.bfloat16)
            tails[key] = moment.tail
    for part in ("drift", "calibration"):
        value = getattr(probe, part)
        if value is not None:
            tensors |= {f"{part}:{field}": tensor for field, tensor in vars(value).items()}
    tensors = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in tensors.items()
    }
    text = json.dumps(
        {
            **probe.meta,
            "schema": PROBE_SCHEMA,
            "name": probe.name,
            "scalings": {m: u.scaling for m, u in probe.updates.items()},
            "weight_norms": probe.weight_norms,
            "shared": shared,
            "tails": tails,
        },
        ensure_ascii=False,
    )
    header = {
        "format": "pt",
        "mergeprobe": text,
        "digest": tensors_digest(tensors.items()),
        "header_digest": _text_digest(text),
    }
    with atomic_file(path, force=force) as temporary:
        save_file(tensors, temporary, metadata=header)
    return Path(path)


def read_probe(path: str | Path) -> Probe:
    """Reads and verifies a probe; ProbeError with one line if damaged, too new or no probe."""
    path = Path(path)
    if not path.is_file():
        raise ProbeError(f"'{path}' is no file; expected a probe written by MergeProbeCallback")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
    except (SafetensorError, OSError, ValueError, RuntimeError) as problem:
        raise ProbeError(f"'{path}' is truncated or damaged: {problem}") from None
    if "mergeprobe" not in header:
        raise ProbeError(f"'{path}' is a safetensors file but no probe (no mergeprobe header)")
    try:
        meta = json.loads(header["mergeprobe"])
        schema = meta.get("schema")
        newer = isinstance(schema, int) and schema > PROBE_SCHEMA  # may be sealed in another way
        if not newer and header.get("header_digest") != _text_digest(header["mergeprobe"]):
            raise ProbeError(f"'{path}' is damaged: its header does not match its digest")
        check_schema(schema, PROBE_SCHEMA, f"probe '{path}'", ProbeError)
        if header.get("digest") != tensors_digest(tensors.items()):
            raise ProbeError(f"'{path}' is damaged: its contents do not match its digest")
        probe = _assemble(meta, tensors, path)
        refuse_unsound(probe)
        return probe
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as problem:
        raise ProbeError(f"'{path}' is damaged: {type(problem).__name__} {problem}") from None


def read_source(path: str | Path, base: Any = None) -> Probe:
    """A probe file, or a PEFT folder as a probe that has its update only.

    base: the base model, for folders whose update depends on it (see `read_adapter`).
    """
    if not Path(path).is_dir():
        return read_probe(path)
    return Probe.from_adapter(read_adapter(path, base))


def _assemble(meta: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> Probe:
    def part(name: str) -> dict[str, Tensor]:
        found = {k.split(":", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{name}:")}
        return {key: found[key] for key in sorted(found, key=natural)}

    def sketches(name: str) -> dict[str, Tensor]:
        found = part(name)
        return {key: v.float() if v.is_floating_point() else v for key, v in found.items()}

    scalings, shared, tails = meta.pop("scalings"), meta.pop("shared"), meta.pop("tails")
    factors_b = part("update.B")
    updates = {m: LowRank(factors_b[m], a, scalings[m]) for m, a in part("update.A").items()}

    factors: dict[str, Tensor] = {}

    def moments(name: str) -> dict[str, Moment]:
        keys = [key for key in tails if key.startswith(f"{name}:")]
        keys.sort(key=natural)
        for key in keys:
            if key not in shared:
                factors[key] = tensors[key].float()
        return {k.split(":", 1)[1]: Moment(factors[shared.get(k, k)], tails[k]) for k in keys}

    drift, calibration = part("drift"), part("calibration")
    return Probe(
        name=meta.pop("name"),
        updates=updates,
        halfway=sketches("halfway"),
        gradient_base=sketches("gradient_base"),
        gradient=sketches("gradient"),
        inputs=moments("inputs"),
        outputs=moments("outputs"),
        weight_norms=meta.pop("weight_norms"),
        drift=Drift(**drift) if drift else None,
        calibration=Calibration(**calibration) if calibration else None,
        meta=meta,
        path=path,
    )


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Names, types, shapes and contents, in the order of the names."""
    total = hashlib.sha256()
    for key, value in sorted(tensors):
        total.update(f"{key}|{value.dtype}|{tuple(value.shape)}|".encode())
        total.update(
            value.flatten().contiguous().view(torch.uint8).numpy().tobytes()
            if value.numel()
            else b""
        )
    return total.hexdigest()
