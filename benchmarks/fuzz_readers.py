"""Damages adapter folders and probe files and reads them: only our own errors may come out.

    python benchmarks/fuzz_readers.py --files 10000000 --seed 1

Prints, for every kind of file, how many were read, refused and failed (status 1 if any failed, with
the seed and number that repeat it), and how much the resident memory grew. CI runs the same code on
100,000 files (tests/test_fuzz_readers.py).
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from mergeprobe.adapters.adapter import CARD, CONFIG, PREFIX, WEIGHTS, Adapter
from mergeprobe.adapters.checkpoint import read_adapter, write_adapter
from mergeprobe.capture.probe import (
    Calibration,
    Drift,
    Moment,
    Probe,
    provenance,
    read_probe,
    write_probe,
)
from mergeprobe.errors import MergeProbeError
from mergeprobe.lowrank import LowRank

MODULE, OUT, IN, RANK = "layers.0.proj", 6, 4, 2
HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 1.5, -0.0, 2**31, 2**63, 2**64, 10**400, 1e308, float("nan")),
    *(float("inf"), "", "x", "1", "²", "a\nb", "\x00", "x" * 5000, "(a+", "a{99999999999}", [], {}),
    *([1, "a", None], [[]], [0] * 100, {"q": 1}, {"layers.0.proj": 3}, {"(": 2}, {"": None}),
]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"]
DTYPES += ["F4", "C64", "U64", "X9", "", "f32"]


class Base(nn.Module):
    """One Linear under the name that the samples adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(IN, OUT)})])


@dataclass
class Sample:
    """A sound file set, what reads it, and whether the base is given."""

    name: str
    files: dict[str, bytes]
    read: Callable[[Path], Any]


@dataclass
class Outcome:
    """counts: by "read" or the class of our error. failures: (sample, number, what came out)."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, int, str]] = field(default_factory=list)
    grown: int = 0


# --- sound files ------------------------------------------------------------------------------


def samples() -> list[Sample]:
    """One of every PEFT type, a folder of ours with its card, a model folder, and a full probe."""
    torch.manual_seed(0)
    base = Base().requires_grad_(False)
    one = torch.randn
    lora = {"lora_A.weight": one(RANK, IN), "lora_B.weight": one(OUT, RANK)}
    plain: dict[str, Any] = {"r": RANK, "lora_alpha": 4, "bias": "none", "rank_pattern": {}}
    plain |= {"alpha_pattern": {"proj": 3}, "modules_to_save": None, "target_modules": ["proj"]}
    kinds: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
        "LORA": (plain, lora),
        "DORA": ({**plain, "use_dora": True}, {**lora, "lora_magnitude_vector": one(OUT)}),
        "ADALORA": (
            {"init_r": 3, "lora_alpha": 4, "rank_pattern": {f"{MODULE}.lora_E": [True, False]}},
            {"lora_A": one(RANK, IN), "lora_B": one(OUT, RANK), "lora_E": one(RANK, 1)},
        ),
        "LOHA": (
            {"r": RANK, "alpha": 4},
            {f"hada_w{k}_a": one(OUT, RANK) for k in "12"}
            | {f"hada_w{k}_b": one(RANK, IN) for k in "12"},
        ),
        "LOKR": (
            {"r": RANK, "alpha": 4},
            {"lokr_w1": one(2, 2), "lokr_w2_a": one(3, 1), "lokr_w2_b": one(1, 2)},
        ),
        "VERA": (
            {"r": RANK, "projection_prng_key": 0, "save_projection": False},
            {"vera_lambda_b": one(OUT), "vera_lambda_d": one(RANK)},
        ),
        "IA3": ({}, {"ia3_l": one(1, IN)}),
        "OFT": (
            {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "peft_version": "0.21.2"},
            {"oft_R.weight": one(2, 1)},
        ),
    }
    found = []
    for kind, (config, parts) in kinds.items():
        named = {"peft_type": "LORA" if kind == "DORA" else kind, "base_model_name_or_path": "b"}
        tensors = {f"{PREFIX}{MODULE}.{part}": value for part, value in parts.items()}
        files = {CONFIG: json.dumps(named | config).encode(), WEIGHTS: save(tensors)}
        needs = kind in ("DORA", "VERA", "IA3", "OFT")
        found.append(Sample(kind, files, _reader(base if needs else None)))
    saved = {f"{PREFIX}{MODULE}.{part}": value for part, value in lora.items()}
    saved |= {f"{PREFIX}norm.weight": one(IN), f"{PREFIX}tok.lora_embedding_A": one(RANK, 5)}
    saved |= {f"{PREFIX}tok.lora_embedding_B": one(IN, RANK)}
    saved |= {f"{PREFIX}tok.base_layer.weight": one(5, IN)}
    config = {"peft_type": "LORA", **plain, "modules_to_save": ["norm"], "target_modules": None}
    files = {CONFIG: json.dumps(config).encode(), WEIGHTS: save(saved)}
    found.append(Sample("extras", files, lambda folder: read_adapter(folder, extras=True)))
    update = LowRank(one(OUT, RANK), one(RANK, IN))
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_adapter(Adapter("a", {MODULE: update}, "b", "f" * 16), Path(temporary) / "a")
        files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS, CARD)}
        found.append(Sample("ours", files, _reader(None)))
        path = write_probe(_probe(update), Path(temporary) / "p.safetensors")
        found.append(Sample("probe", {path.name: path.read_bytes()}, _read_probe))
    weights = {f"{MODULE}.weight": one(OUT, IN)}
    files = {"config.json": b"{}", "model.safetensors": save(weights)}
    found.append(Sample("model", files, _reader(base)))
    return found


def _reader(base: nn.Module | None) -> Callable[[Path], Any]:
    return lambda folder: read_adapter(folder, base)


def _read_probe(folder: Path) -> Probe:
    return read_probe(folder / "p.safetensors")


def _probe(update: LowRank) -> Probe:
    one = torch.randn
    top = {"logprob": one(3, 2), "index": torch.ones(3, 2, dtype=torch.int32), "tail": one(3)}
    ids = torch.ones(2, 5, dtype=torch.int64)
    return Probe(
        "p",
        {MODULE: update},
        halfway={MODULE: one(2, 2)},
        gradient_base={MODULE: one(2, 2)},
        gradient={MODULE: one(2, 2)},
        inputs={MODULE: Moment(one(IN, 2), 0.1)},
        outputs={MODULE: Moment(one(OUT, 2), 0.1)},
        weight_norms={MODULE: 1.0},
        drift=Drift(one(2, 3, 4), **top, **{f"base_{key}": v for key, v in top.items()}),
        calibration=Calibration(ids, ids, ids, torch.ones(2), torch.ones(2)),
        meta=provenance(base="b", step=3, planned_steps=60),
    )


# --- damage -----------------------------------------------------------------------------------


def damaged(files: dict[str, bytes], draw: random.Random) -> tuple[str, bytes]:
    """One of the files, changed: (its name, its new bytes)."""
    name = draw.choice(list(files))
    whole = files[name]
    ways = [_bytes, _cut] + ([_header, _header] if name.endswith(".safetensors") else [_json] * 4)
    if name == "p.safetensors":
        ways += [_resealed] * 4
    return name, draw.choice(ways)(whole, draw)


def _bytes(whole: bytes, draw: random.Random) -> bytes:
    changed = bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 8))):
        # a header is worth more than the numbers behind it
        limit = len(changed) if draw.random() < 0.3 else min(len(changed), 400)
        changed[draw.randrange(limit)] = draw.randrange(256)
    return bytes(changed)


def _cut(whole: bytes, draw: random.Random) -> bytes:
    way = draw.randrange(4)
    if way == 0:
        return whole[: draw.randrange(len(whole))]
    if way == 1:
        return whole + draw.randbytes(draw.randrange(1, 64))
    start = draw.randrange(len(whole))
    stop = min(len(whole), start + draw.randrange(1, 64))
    return whole[:start] + (b"" if way == 2 else whole[start:stop] * 2) + whole[stop:]


def _json(whole: bytes, draw: random.Random) -> bytes:
    """Valid JSON with something else in it; now and then nested beyond reason."""
    if draw.random() < 0.005:
        return b'{"peft_type": ' + b"[" * 20_000
    return _dumped(_changed(json.loads(whole), draw))


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _changed(value: Any, draw: random.Random) -> Any:
    """A copy with one entry, at any depth, replaced, renamed, removed or doubled."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        value = dict(value)
        key = draw.choice(list(value))
        way = draw.random()
        if way < 0.1:
            del value[key]
        elif way < 0.2:
            value[str(draw.choice(HOSTILE))] = value.pop(key)
        elif way < 0.3:
            value[key + draw.choice(("²", ".x", "\n", "", "."))] = value[key]
        else:
            value[key] = _changed(value[key], draw)
        return value
    if isinstance(value, list) and value and draw.random() < 0.7:
        value = list(value)
        value[draw.randrange(len(value))] = draw.choice(HOSTILE)
        return value
    if isinstance(value, int) and draw.random() < 0.5:
        return value + draw.choice((-2, -1, 1, 2, 1000))
    return draw.choice(HOSTILE)


def _header(whole: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header says something else, in sound JSON of the right length.

    Half of the time the offsets and the data follow the header, so that it is a valid file of
    other shapes.
    """
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    data = whole[8 + length :]
    keys = [key for key in header if key != "__metadata__"]
    entry = header[draw.choice(keys)] = dict(header[draw.choice(keys)])
    way = draw.random()
    if way < 0.3:
        entry["dtype"] = draw.choice(DTYPES)
    elif way < 0.7:
        sides = (0, 1, 2, 3, 4, 6, 7, 10**6, 2**31, 2**40, 2**62, 2**64, -1, 1.5, "2", None)
        entry["shape"] = [draw.choice(sides) for _ in range(draw.choice((0, 1, 2, 2, 2, 3)))]
    else:
        header = _changed(header, draw)
    if draw.random() < 0.6:
        data = _fitted(header, data)
    text = _dumped(header)
    return struct.pack("<Q", len(text)) + text + data


def _fitted(header: Any, data: bytes) -> bytes:
    """Sets the offsets of every entry that has a size, end to end; the data repeated to fit."""
    sizes = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
    end = 0
    for key, entry in header.items() if isinstance(header, dict) else ():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if key == "__metadata__" or not isinstance(shape, list):
            continue
        if not all(type(side) is int and 0 <= side < 2**63 for side in shape):
            continue
        count = sizes.get(str(entry.get("dtype")), 1)
        for side in shape:
            count *= side
        if count <= 1 << 16:  # a file of the size that it declares, while that is small
            entry["data_offsets"] = [end, end + count]
            end += count
    return (data * (end // max(1, len(data)) + 1))[:end]


def _resealed(whole: bytes, draw: random.Random) -> bytes:
    """A probe whose provenance says something else, under digests that fit: damage by design."""
    from mergeprobe.capture.probe import _text_digest, tensors_digest

    if draw.random() < 0.5:
        whole = _header(whole, draw)
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    meta = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(meta, dict) or not isinstance(meta.get("mergeprobe"), str):
        return whole
    try:
        text = _dumped(_changed(json.loads(meta["mergeprobe"]), draw)).decode()
        from safetensors.torch import load

        meta["digest"] = tensors_digest(load(whole).items())
    except Exception:  # whatever makes this file unreadable, its reader is asked next
        return whole
    meta["mergeprobe"], meta["header_digest"] = text, _text_digest(text)
    if draw.random() < 0.005:
        meta["mergeprobe"] = "[" * 20_000
        meta["header_digest"] = _text_digest(meta["mergeprobe"])
    packed = _dumped(header)
    return struct.pack("<Q", len(packed)) + packed + whole[8 + length :]


# --- the run ----------------------------------------------------------------------------------


def fuzz(sample: Sample, count: int, seed: int, folder: Path) -> Outcome:
    """Reads `count` damaged copies of one sample, written into `folder` (best on a tmpfs)."""
    outcome = Outcome()
    for name, whole in sample.files.items():
        (folder / name).write_bytes(whole)
    sample.read(folder)  # sound, or the run would test nothing
    before = _resident()
    for number in range(count):
        draw = random.Random(f"{sample.name}:{seed}:{number}")
        name, changed = damaged(sample.files, draw)
        (folder / name).write_bytes(changed)
        try:
            sample.read(folder)
            outcome.counts["read"] += 1
        except MergeProbeError as problem:
            outcome.counts[type(problem).__name__] += 1
            if "\n" in str(problem):
                outcome.failures.append((sample.name, number, f"two lines: {problem!r:.200}"))
        except BaseException as problem:
            if isinstance(problem, KeyboardInterrupt):
                raise
            outcome.failures.append((sample.name, number, f"{problem!r:.200}"))
        (folder / name).write_bytes(sample.files[name])
    outcome.grown = _resident() - before
    return outcome


def _resident() -> int:
    """The largest resident size so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def fast_folder() -> Path:
    """A new folder, in memory where the system has such a place."""
    memory = Path("/dev/shm")
    return Path(
        tempfile.mkdtemp(dir=memory if memory.is_dir() else None, prefix="mergeprobe-fuzz-")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Damage files, read them, count what comes out.")
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one sample's name")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [s for s in samples() if arguments.only in (None, s.name)]
    folder = fast_folder()
    failed = 0
    try:
        for sample in chosen:
            (folder / sample.name).mkdir()
            start = time.perf_counter()
            count = arguments.files // len(chosen)
            outcome = fuzz(sample, count, arguments.seed, folder / sample.name)
            rate = count / max(1e-9, time.perf_counter() - start)
            counts = ", ".join(f"{what} {n}" for what, n in outcome.counts.most_common())
            print(f"{sample.name}: {count} files, {rate:.0f}/s, memory +{outcome.grown >> 20} MiB")
            print(f"  {counts}, failed {len(outcome.failures)}")
            for _, number, what in outcome.failures[:10]:
                print(f"  number {number}: {what}")
            failed += len(outcome.failures)
    finally:
        shutil.rmtree(folder)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
