"""Screening: which of a thousand adapters are close or opposed, from one short vector each.

An adapter's sketch holds, for each module, k numbers x_jᵀ ΔW y_j / √k with random signs x_j, y_j
that every adapter shares (seeded by the module's name). Their inner products are unbiased for
⟨ΔW_a, ΔW_b⟩, so all cosines are one matrix product, with the error of `bounds.screening_error`.
Norms are exact: a module's energy is in the file beside its sketch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergeprobe.adapters.checkpoint import natural
from mergeprobe.artefact import MADE_BY, atomic_file, check_schema
from mergeprobe.capture.probe import Probe
from mergeprobe.errors import AdapterMismatch, ProbeError
from mergeprobe.signals.bounds import SURE, UNEVEN, screening_size
from mergeprobe.signals.checks import check_probes
from mergeprobe.signals.families import LARGEST_TILE
from mergeprobe.signals.files import rank_of
from mergeprobe.signals.site import ratio
from mergeprobe.signals.stack import Stack

SCHEMA = 1
SUFFIX = ".sketch.safetensors"
ERROR = 0.02  # of a cosine, at SURE standard errors
CHUNK = 1 << 14  # numbers of each sketch that are multiplied at a time


@dataclass(frozen=True, eq=False)
class Sketch:
    """One adapter for screening.

    modules: in natural order. values (m, k): of each module's update scaled to norm 1, float16.
    energy: ‖ΔW‖² of each module. error: of a cosine, the target its size was chosen for.
    base, fingerprint: as the adapter has them. source: what says whether the adapter changed.
    """

    name: str
    modules: tuple[str, ...]
    values: Float[Tensor, "m k"]
    energy: Float[Tensor, " m"]
    error: float
    base: str = ""
    fingerprint: str | None = None
    source: str = ""

    @property
    def size(self) -> int:
        return self.values.shape[1]


def sketches(
    probes: Sequence[Probe], *, error: float = ERROR, k: int | None = None
) -> list[Sketch]:
    """One for each probe, a module at a time.

    k: numbers a module; by default what `error` needs for as many modules as they have (adapters
    that are screened together need one k). Raises as measure does.
    """
    check_probes(probes)
    probes = tuple(probes)
    modules = sorted({m for probe in probes for m in probe.updates}, key=natural)
    size = k or screening_size(error, len(modules))
    found: list[list[tuple[str, Tensor, Tensor]]] = [[] for _ in probes]
    for module in modules:
        here = [i for i, probe in enumerate(probes) if module in probe.updates]
        width = max(rank_of(probes[i].updates, module) for i in here)
        run = max(1, LARGEST_TILE // width)
        for start in range(0, len(here), run):
            stack = Stack.of([module], probes, here[start : start + run], dtype=torch.float32)
            values = _values(stack, size)
            for row, i in enumerate(stack.where):
                found[i].append((module, values[row], stack.energy[0, row]))
    return [
        Sketch(
            probe.name,
            tuple(module for module, _, _ in parts),
            torch.stack([values for _, values, _ in parts]),
            torch.stack([energy for _, _, energy in parts]),
            error,
            probe.meta.get("base") or "",
            probe.meta.get("base_fingerprint"),
            source_of(probe),
        )
        for probe, parts in zip(probes, found, strict=True)
    ]


def source_of(probe: Probe) -> str:
    """Size and time of the file that a probe was read from; "" for one in memory."""
    path = probe.path
    if path is not None and path.is_dir():
        path = path / "adapter_model.safetensors"
    if path is None or not path.is_file():
        return ""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _values(stack: Stack, k: int) -> Float[Tensor, "p k"]:
    """Of the one module of the stack."""
    left, right = (
        values[0] @ signs(stack.modules[0], side, values.shape[3], k)
        for values, side in ((stack.left, "out"), (stack.right, "in"))
    )
    found = (left * right).sum(0).double() / k**0.5
    return ratio(found, stack.unit[0].sqrt()[:, None], 0.0).half()


@lru_cache(maxsize=2)
def signs(module: str, side: str, size: int, k: int) -> Float[Tensor, "size k"]:
    """Independent ±1, seeded by the arguments; float32."""
    seed = f"mergeprobe screen|{module}|{side}|{size}|{k}".encode()
    # a hash of any length: the same bits with every version of every library
    drawn = np.frombuffer(hashlib.shake_128(seed).digest(-(-size * k // 8)), dtype=np.uint8)
    bits = torch.from_numpy(np.unpackbits(drawn, count=size * k))
    return bits.reshape(size, k).float().mul_(2).sub_(1)


def screen(found: Sequence[Sketch]) -> pl.DataFrame:
    """One row per pair a, b (a before b in input order): frobenius_cosine; bound, SURE of its
    standard errors; norm_ratio, exact; amplification.

    The bound is first order and takes the energies of the sum and of the difference to be spread
    over the modules as the mean of the two adapters'.
    Raises ProbeError for sketches of other sizes, AdapterMismatch for other bases.
    """
    _check(found)
    modules = sorted({m for one in found for m in one.modules}, key=natural)
    place = {module: row for row, module in enumerate(modules)}
    energy = torch.zeros(len(found), len(modules), dtype=torch.float64)
    for row, one in enumerate(found):
        energy[row, [place[m] for m in one.modules]] = one.energy
    total = energy.sum(1)
    share = ratio(energy, total[:, None], 0.0)
    gram = _gram(found, modules, share.sqrt())
    square = gram.diagonal()
    norms = (square[:, None] * square[None, :]).sqrt()
    cosine = ratio(gram, norms, 0.0).clamp(-1.0, 1.0)
    own = share.square().sum(1)
    h = (own[:, None] + own[None, :] + 2 * share @ share.T) / 4
    bound = SURE * (1 - cosine.square()) * (4.5 * h / found[0].size).sqrt()
    a, b = torch.triu_indices(len(found), len(found), offset=1)
    names = pl.Series([one.name for one in found], dtype=pl.String)
    cosine, bound = cosine[a, b], bound[a, b]
    length = total.sqrt()
    shared = 2 * cosine * length[a] * length[b]
    columns = {
        "frobenius_cosine": cosine,
        "bound": bound,
        "norm_ratio": ratio(length[a], length[b]),
        "amplification": 1 + ratio(shared, total[a] + total[b]),
    }
    data = [names.gather(where.numpy()).alias(key) for key, where in (("a", a), ("b", b))]
    data += [pl.Series(k, v.numpy(), nan_to_null=True) for k, v in columns.items()]
    return pl.DataFrame(data)


def _gram(
    found: Sequence[Sketch], modules: list[str], root: Float[Tensor, "n m"]
) -> Float[Tensor, "n n"]:
    """Inner products of the sketches, each scaled to norm 1, some modules at a time."""
    n, k = len(found), found[0].size
    gram = torch.zeros(n, n, dtype=torch.float64)
    run = max(1, CHUNK // k)
    rows = [{module: row for row, module in enumerate(one.modules)} for one in found]
    for start in range(0, len(modules), run):
        some = modules[start : start + run]
        flat = torch.zeros(n, len(some), k)
        for i, (one, at) in enumerate(zip(found, rows, strict=True)):
            there = [(place, at[m]) for place, m in enumerate(some) if m in at]
            if there:
                to, of = (list(side) for side in zip(*there, strict=True))
                flat[i, to] = one.values[of].float()
        flat = (flat * root[:, start : start + run, None].float()).flatten(1)
        half = 256  # rows of a tile; what lies below the diagonal is its mirror
        for top in range(0, n, half):
            gram[top : top + half, top:] += (flat[top : top + half] @ flat[top:].T).double()
    return gram.triu() + gram.triu(1).T


def _check(found: Sequence[Sketch]) -> None:
    if not found:
        raise ProbeError("no sketches to screen; give at least one")
    names: set[str] = set()
    first = found[0]
    for one in found:
        if one.name in names:
            raise ProbeError(f"two sketches are named '{one.name}'; give each its own name")
        names.add(one.name)
        if one.size != first.size:
            raise ProbeError(
                f"the sketch of '{one.name}' has {one.size} numbers a module, that of "
                f"'{first.name}' {first.size}; make them with one target error"
            )
    known: dict[str, str] = {}
    for one in found:
        if one.fingerprint:
            known.setdefault(one.fingerprint, one.name)
    if len(known) > 1:
        (one, name), (two, other) = list(known.items())[:2]
        raise AdapterMismatch(
            f"'{name}' was trained on base {one} but '{other}' on {two}; screen only one base"
        )


def write_sketch(sketch: Sketch, path: str | Path, *, force: bool = True) -> Path:
    """Writes one sketch atomically; its size and error are in the header."""
    facts = {
        "schema": SCHEMA,
        "made_by": MADE_BY,
        "name": sketch.name,
        "base": sketch.base,
        "base_fingerprint": sketch.fingerprint,
        "source": sketch.source,
        "modules": sketch.modules,
        "sketch": "rank-one probes x'Wy with random signs",
        "size": sketch.size,
        "error": sketch.error,
        "error_is": f"of a global cosine, {SURE:g} standard errors, energy as uneven as over "
        f"1/{UNEVEN:g} of the modules",
    }
    text = json.dumps(facts, ensure_ascii=False)
    tensors = {"values": sketch.values.contiguous(), "energy": sketch.energy.contiguous()}
    digest = _digest(text, tensors)
    with atomic_file(path, force=force) as temporary:
        save_file(tensors, temporary, metadata={"mergeprobe_sketch": text, "digest": digest})
    return Path(path)


def read_sketch(path: str | Path) -> Sketch:
    """Reads and verifies one; ProbeError with one line if it is damaged, too new or no sketch."""
    path = Path(path)
    if not path.is_file():
        raise ProbeError(f"'{path}' is no file; expected a sketch of an adapter")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            if "mergeprobe_sketch" not in header:
                raise ProbeError(f"'{path}' holds no sketch of an adapter")
            tensors = {key: file.get_tensor(key).clone() for key in ("values", "energy")}
        facts: dict[str, Any] = json.loads(header["mergeprobe_sketch"])
        if header.get("digest") != _digest(header["mergeprobe_sketch"], tensors):
            raise ProbeError(f"'{path}' is damaged: its contents do not match its digest")
        check_schema(facts.get("schema"), SCHEMA, f"sketch '{path}'", ProbeError)
        return Sketch(
            facts["name"],
            tuple(facts["modules"]),
            tensors["values"],
            tensors["energy"],
            facts["error"],
            facts["base"],
            facts["base_fingerprint"],
            facts["source"],
        )
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as problem:
        raise ProbeError(f"'{path}' is truncated or damaged: {problem}") from None


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256(text.encode())
    for key in sorted(tensors):
        value = tensors[key]
        total.update(f"{key}|{value.dtype}|{tuple(value.shape)}|".encode())
        total.update(value.contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()


def kept_sketches(
    probes: Sequence[Probe], folder: str | Path, *, error: float = ERROR
) -> list[Sketch]:
    """The sketches of `probes` out of `folder`, where those that are missing, of another size or
    older than their adapter are made and written first."""
    folder = Path(folder)
    modules = {m for probe in probes for m in probe.updates}
    size = screening_size(error, len(modules))
    found: dict[str, Sketch] = {}
    for probe in probes:
        path = folder / f"{probe.name}{SUFFIX}"
        if path.exists():
            kept = read_sketch(path)
            if kept.source and kept.source == source_of(probe) and kept.size == size:
                found[probe.name] = kept
    missing = [probe for probe in probes if probe.name not in found]
    for sketch in _made(missing, error, size):
        write_sketch(sketch, folder / f"{sketch.name}{SUFFIX}")
        found[sketch.name] = sketch
    check_probes(probes)
    return [found[probe.name] for probe in probes]


def _made(probes: Sequence[Probe], error: float, size: int) -> Iterable[Sketch]:
    return sketches(probes, error=error, k=size) if probes else ()
