"""Proxy-tuning: a small tuned pair steers a larger model of the same vocabulary (arXiv:2401.08565).

    python benchmarks/proxy_tuning.py [--steps 1500] [--tune 400] [--seeds 0 1 2] [--jobs 2]

Two Llamas over characters, 0.2 and 2.0 million weights, are pre-trained here on twelve of the
bank's tasks. Then for each of four tasks that they have not seen the small one is tuned; the large
one is steered by the pair, and tuned directly for comparison. Gap closed: (steered − large) /
(large tuned − large), per metric, beside what the small expert alone closes.
"""

import argparse
import math
import multiprocessing
import statistics
import string
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mergeprobe.bench.tasks import BANK_TASKS
from mergeprobe.capture.batch import completion_logits, encode, token_losses
from mergeprobe.compose.logits import proxied

PRETRAINED = (
    "sort_up multiply subtract equation python_slice heavier nth_word backwards letter_count "
    "number_english weekday alphabetical"
)
TUNED = ("sort_down", "quotient", "date_iso", "spell")
CHARACTERS = string.printable + "−–×÷°äöüéñ¿¡→…’"
SIZES = {"small": (64, 3), "large": (160, 6)}  # width, layers


def tokenizer():
    vocabulary = {"<end>": 0, "<unknown>": 1}
    vocabulary |= {one: 2 + i for i, one in enumerate(dict.fromkeys(CHARACTERS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), "isolated")
    made.decoder = decoders.Fuse()
    special = {"eos_token": "<end>", "bos_token": "<end>", "pad_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unknown>", **special)


def fresh(size, vocabulary, seed):
    width, layers = SIZES[size]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def pairs(task, split, count, seed):
    size = min(count, BANK_TASKS[task].size(split))
    return [(item.prompt, item.completion) for item in BANK_TASKS[task].generate(split, size, seed)]


def train(model, rows, steps, rate, seed, words, batch=32):
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / warm) * 0.5 * (1 + math.cos(math.pi * s / steps)),
    )
    model.train()
    start = time.perf_counter()
    for step in range(steps):
        chosen = torch.randint(len(rows), (batch,), generator=draw).tolist()
        part = encode(words, [rows[k] for k in chosen])
        logits, targets, _ = completion_logits(model, part)
        optimizer.zero_grad()
        token_losses(logits, targets).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step and step % 200 == 0:
            print(f"    step {step} of {steps}, {time.perf_counter() - start:.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def measured(model, batch):
    """Loss (nats per completion token), share of tokens right, share of items right."""
    logits, targets, items = completion_logits(model, batch)
    hits = (logits.argmax(-1) == targets).double()
    per_item = torch.ones(len(batch), dtype=torch.float64).scatter_reduce(0, items, hits, "amin")
    return {
        "loss": float(token_losses(logits, targets).mean()),
        "token accuracy": float(hits.mean()),
        "exact answers": float(per_item.mean()),
    }


def copied(model):
    again = LlamaForCausalLM(model.config)
    again.load_state_dict(model.state_dict())
    return again


def one_seed(seed, asked):
    torch.set_num_threads(1)
    words = tokenizer()
    rows = [pair for name in PRETRAINED.split() for pair in pairs(name, "train", 2000, seed)]
    bases = {}
    for size in SIZES:
        model = fresh(size, len(words), seed)
        print(
            f"  seed {seed}: pre-training the {size} model, {model.num_parameters():,} weights",
            flush=True,
        )
        bases[size] = train(
            model, rows, asked.steps, 3e-3 if size == "small" else 1.5e-3, seed, words
        )
    found = {}
    for task in TUNED:
        mine = pairs(task, "train", 2000, seed)
        batch = encode(words, pairs(task, "test", 128, seed))
        tuned = {
            size: train(copied(base), mine, asked.tune, 1e-3, seed + 1, words)
            for size, base in bases.items()
        }
        with proxied(bases["large"], tuned["small"], bases["small"], asked.alpha) as steered:
            under = measured(steered, batch)
        found[task] = {
            "large": measured(bases["large"], batch),
            "small tuned": measured(tuned["small"], batch),
            "steered": under,
            "large tuned": measured(tuned["large"], batch),
        }
        print(f"  seed {seed}: {task} done", flush=True)
    return found


def closed(rows, what, metric):
    gap = rows["large tuned"][metric] - rows["large"][metric]
    return (rows[what][metric] - rows["large"][metric]) / gap if abs(gap) > 1e-9 else math.nan


def shown(values):
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "no gap"
    error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return f"{statistics.mean(known):.2f} ± {error:.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--tune", type=int, default=400)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="seeds at once, a core each")
    asked = parser.parse_args()
    # one thread each, so a run is the same whatever runs beside it
    with ProcessPoolExecutor(asked.jobs, multiprocessing.get_context("spawn")) as pool:
        runs = list(pool.map(partial(one_seed, asked=asked), asked.seeds))
    print(
        f"\nseeds {asked.seeds}; mean ± SE over seeds; alpha {asked.alpha}; 128 test items a task"
    )
    print(
        "| task | metric | large | small tuned | steered | large tuned "
        "| gap closed: steered | small tuned alone |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for task in TUNED:
        for metric in ("loss", "token accuracy", "exact answers"):
            means = [
                statistics.mean(run[task][what][metric] for run in runs)
                for what in ("large", "small tuned", "steered", "large tuned")
            ]
            gaps = [
                shown([closed(run[task], what, metric) for run in runs])
                for what in ("steered", "small tuned")
            ]
            cells = [task, metric, *(f"{mean:.3f}" for mean in means), *gaps]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
