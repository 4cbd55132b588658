"""Trained adapters: full-weight gradients tell tasks apart whichever way A was initialised; what
lies on A's side tells inits apart (the init-confounding table)."""

import random
from itertools import permutations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_base import tiny_model, tiny_tokenizer

from mergeprobe.capture import take_probe
from mergeprobe.capture.batch import encode
from mergeprobe.signals import pair_rows

TOKENIZER = tiny_tokenizer()
# task, seed of A, seed of the data: every kind of pair occurs
RUNS = [("letters", 1, 1), ("letters", 1, 2), ("letters", 2, 3), ("digits", 1, 4), ("digits", 2, 5)]


def items(task: str, seed: int, count: int) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    if task == "letters":
        words = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(count)]
        return [(f"copy {word}:", f" {word}.") for word in words]
    pairs = [(draw.randint(10, 99), draw.randint(10, 99)) for _ in range(count)]
    return [(f"{a}+{b}=", f"{a + b}!") for a, b in pairs]


def trained(task: str, init: int, seed: int):
    base = tiny_model()
    torch.manual_seed(init)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    model.train()
    batch = encode(TOKENIZER, items(task, seed, 12))
    labels = batch.ids.masked_fill(batch.completion_mask == 0, -100)
    for _ in range(5):
        model(
            input_ids=batch.ids, attention_mask=batch.attention_mask, labels=labels
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    name = f"{task}-{init}-{seed}"
    return take_probe(
        model, name=name, calibration=encode(TOKENIZER, items(task, 100 + seed, 12)), init_hash=init
    )


@pytest.fixture(scope="module")
def table():
    """(a, b) -> (same task?, same init?, signals)."""
    probes = {run: trained(*run) for run in RUNS}
    rows = {(row["a"], row["b"]): row for row in pair_rows(list(probes.values())).to_dicts()}
    return [
        (one[0] == two[0], one[1] == two[1], rows[probes[one].name, probes[two].name])
        for one, two in permutations(RUNS, 2)
    ]


def values(table, column, *, task, init=None):
    return [row[column] for t, i, row in table if t == task and init in (None, i)]


@pytest.mark.parametrize("column", ["gradient_cosine_base", "gradient_cosine"])
def test_gradients_separate_tasks_whatever_the_init(table, column):
    same, unrelated = (values(table, column, task=task) for task in (True, False))
    assert min(same) - max(unrelated) >= 0.5
    for init in (True, False):
        gap = min(values(table, column, task=True, init=init)) - max(
            values(table, column, task=False, init=init)
        )
        assert gap >= 0.5


def test_the_input_side_separates_inits_and_not_tasks(table):
    overlap = {
        (task, init): values(table, "input_overlap", task=task, init=init)
        for task in (True, False)
        for init in (True, False)
    }
    # unrelated tasks that share A overlap far more than one task with two inits
    assert min(overlap[False, True]) > 0.4
    assert max(overlap[True, False]) < 0.2
    assert min(values(table, "input_overlap", task=True)) < max(
        values(table, "input_overlap", task=False)
    )
    # and one task with two inits looks unrelated by its weights
    assert max(map(abs, values(table, "frobenius_cosine", task=True, init=False))) < 0.15
    shared = {row["shared_init"] for _, init, row in table if init}
    assert shared == {1.0}


def test_the_output_side_tells_tasks_apart_too(table):
    same, unrelated = (values(table, "output_overlap", task=task) for task in (True, False))
    assert min(same) > 2 * max(unrelated)
