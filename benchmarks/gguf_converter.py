"""Our GGUF adapters against those of llama.cpp's own converter: same names, same numbers.

    python benchmarks/gguf_converter.py --llama-cpp PATH/TO/llama.cpp

For each architecture of `mergeprobe.export.gguf_adapter`: a tiny config, random LoRA on every
Linear of its layers, written here and by `convert_lora_to_gguf.py`. Needs llama.cpp's sources (the
sdist of llama-cpp-python carries them in vendor/llama.cpp), no build.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM

from mergeprobe.adapters.adapter import Adapter
from mergeprobe.adapters.checkpoint import write_adapter
from mergeprobe.export import export_deployment, unmerged
from mergeprobe.export.gguf_adapter import ARCHITECTURES
from mergeprobe.lowrank import LowRank

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WRAPPERS = ("gemma3",)  # their text model is another row


def base_folder(kind: str, folder: Path) -> Path:
    config = AutoConfig.for_model(kind, **SIZES)
    with torch.device("meta"):
        config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    config.save_pretrained(folder)
    return folder


def adapter_on(base: Path) -> Adapter:
    """Random factors on every Linear but the output layer."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    draw = torch.Generator().manual_seed(0)
    updates = {
        name: LowRank(
            torch.randn(part.out_features, 3, generator=draw),
            torch.randn(3, part.in_features, generator=draw),
        )
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.Linear) and name != "lm_head"
    }
    return Adapter("x", updates, base=str(base))


def theirs(llama_cpp: Path, base: Path, adapter: Adapter, work: Path) -> Path:
    folder, out = write_adapter(adapter, work / "peft"), work / "theirs.gguf"
    command = [sys.executable, str(llama_cpp / "convert_lora_to_gguf.py"), str(folder)]
    command += ["--base", str(base), "--outfile", str(out), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise SystemExit(f"their converter failed: {done.stderr.strip().splitlines()[-1]}")
    return out


def differences(ours: Path, other: Path) -> list[str]:
    """What is not equal, in words; [] where everything is."""
    one, two = GGUFReader(ours), GGUFReader(other)
    found = []
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        values = [reader.fields[key].contents() for reader in (one, two)]
        if values[0] != values[1]:
            found.append(f"{key}: {values}")
    a, b = ({t.name: t for t in reader.tensors} for reader in (one, two))
    found += [f"only one has {name}" for name in sorted(a.keys() ^ b.keys())]
    for name in sorted(a.keys() & b.keys()):
        if a[name].shape.tolist() != b[name].shape.tolist() or (a[name].data != b[name].data).any():
            found.append(f"{name} differs")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-cpp", type=Path, required=True, help="its sources")
    parser.add_argument("--kinds", nargs="*", help="default: all that are known")
    arguments = parser.parse_args()
    bad = 0
    for kind in arguments.kinds or [kind for kind in ARCHITECTURES if kind not in WRAPPERS]:
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            base = base_folder(kind, work / "base")
            adapter = adapter_on(base)
            export_deployment(unmerged({"x": adapter}), "llama.cpp", work / "ours")
            other = theirs(arguments.llama_cpp, base, adapter, work)
            found = differences(work / "ours/adapters/x.gguf", other)
        print(f"{kind}: {len(adapter.modules)} modules, {'; '.join(found[:4]) or 'equal'}")
        bad += bool(found)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
