"""What PEFT's add_weighted_adapter writes, against the exact merge of true updates, and ours.

    python benchmarks/peft_errors.py
    python benchmarks/peft_errors.py --write docs/coming-from-peft.md   # the tables in that page

Relative Frobenius error over all modules, on a tiny Llama with random adapters of rank 4; the true
update of an adapter is merged weight minus base weight, as PEFT itself merges it into the model.
Seconds, on any machine.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import warnings
from pathlib import Path

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from mergeprobe.artefact import atomic_file
from mergeprobe.compose.merge import merge_folders

R = 4
VARIANTS = {
    "LoRA, α = r": {"lora_alpha": R},
    "LoRA, α = 8r": {"lora_alpha": 8 * R},
    "rsLoRA, α = 2r": {"lora_alpha": 2 * R, "use_rslora": True},
    "ranks by pattern": {"lora_alpha": R, "rank_pattern": {"q_proj": 2}},
    "DoRA, α = r": {"lora_alpha": R, "use_dora": True},
}
COMBINATIONS = ("linear", "cat", "svd")
MARKS = ("<!-- measured -->", "<!-- /measured -->")


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=128,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def random_adapter(folder: Path, seed: int, **options) -> Path:
    """Saved by PEFT; B too is random, and DoRA's magnitudes have moved."""
    config = LoraConfig(r=R, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model, draw = get_peft_model(base_model(), config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_A" in name or ".lora_B" in name:
                value.copy_(0.2 * torch.randn(value.shape, generator=draw))
            elif "magnitude" in name:
                value.mul_(1.0 + 0.1 * torch.rand(value.shape, generator=draw))
    model.save_pretrained(str(folder))
    return folder


def weights_of(model) -> dict[str, torch.Tensor]:
    return {k: v.detach().double() for k, v in model.state_dict().items() if "proj" in k}


def true_update(folder: Path) -> dict[str, torch.Tensor]:
    """Merged weight minus base weight."""
    base = weights_of(base_model())
    merged = PeftModel.from_pretrained(base_model(), str(folder)).merge_and_unload()
    return {key: value - base[key] for key, value in weights_of(merged).items()}


def by_peft(folders: list[Path], weights: list[float], combination: str) -> dict[str, torch.Tensor]:
    """The update of what add_weighted_adapter makes, merged into the model by PEFT."""
    model = PeftModel.from_pretrained(base_model(), str(folders[0]), adapter_name="one")
    names = ["one", "two"][: len(folders)]
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(str(folder), adapter_name=name)
    rank = {"svd_rank": R * len(folders)} if combination == "svd" else {}
    model.add_weighted_adapter(names, weights, "merged", combination_type=combination, **rank)
    model.set_adapter("merged")
    base = weights_of(base_model())
    merged = model.merge_and_unload(adapter_names=["merged"])
    return {key: value - base[key] for key, value in weights_of(merged).items()}


def by_us(folders: list[Path], weights: list[float], work: Path) -> dict[str, torch.Tensor]:
    """The update of the folder that merge_folders writes, as stock PEFT loads and merges it."""
    out = work / "merged"
    merge_folders(folders, "linear", weights=weights, out=out, base=base_model(), force=True)
    return true_update(out)


def error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    lost = sum(float((found[key] - exact[key]).square().sum()) for key in exact)
    return (lost / sum(float(value.square().sum()) for value in exact.values())) ** 0.5


def measured(folders: list[Path], weights: list[float], combination: str, exact) -> str:
    try:
        found = error(by_peft(folders, weights, combination), exact)
    except (ValueError, RuntimeError, KeyError, NotImplementedError, TypeError) as problem:
        return f"refused ({type(problem).__name__})"
    return shown(found)


def shown(value: float) -> str:
    return "exact" if value < 1e-5 else f"{value:.2f}"


def tables() -> str:
    lines = [
        f"PEFT {peft.__version__}; relative error of the written update.",
        "",
        "½ΔW₁ + ½ΔW₂ of two adapters:",
        "",
        "| | PEFT `linear` | PEFT `cat` | PEFT `svd` | mergeprobe |",
        "|---|---|---|---|---|",
    ]
    alone = [
        "",
        "One adapter with weight 1, which should be that adapter:",
        "",
        "| | PEFT `linear` | PEFT `cat` | PEFT `svd` | mergeprobe |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for index, (name, options) in enumerate(VARIANTS.items()):
            pair = [
                random_adapter(work / f"{index}{side}", 10 * index + k, **options)
                for k, side in enumerate("ab")
            ]
            updates = [true_update(path) for path in pair]
            half = {key: 0.5 * updates[0][key] + 0.5 * updates[1][key] for key in updates[0]}
            for rows, folders, weights, exact in (
                (lines, pair, [0.5, 0.5], half),
                (alone, pair[:1], [1.0], updates[0]),
            ):
                cells = [measured(folders, weights, how, exact) for how in COMBINATIONS]
                cells.append(shown(error(by_us(folders, weights, work), exact)))
                rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines + alone)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, help="a page whose measured part is replaced")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    found = tables()
    print(found)
    if arguments.write:
        start, end = MARKS
        text = arguments.write.read_text("utf-8")
        filled = re.sub(
            f"{start}.*{end}", lambda _: f"{start}\n{found}\n{end}", text, flags=re.DOTALL
        )
        with atomic_file(arguments.write) as temporary:
            temporary.write_text(filled, "utf-8")


if __name__ == "__main__":
    main()
