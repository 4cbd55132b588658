"""The callback under every setting that training scripts use: it never changes the training, and
what it measures is what dense autograd gives for the same weights and items, outside training."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from mergeprobe import MergeProbeCallback, read_probe
from mergeprobe.capture.batch import Batch
from mergeprobe.capture.sketch import projection
from mergeprobe.capture.trained import adapted_modules
from tests.tiny_base import tiny_model, tiny_tokenizer

ROWS = [
    {"prompt": f"What is {a} + {b}?", "completion": f" {a + b}{'!' * (a % 3)}"}
    for a in range(7)
    for b in range(5)
]
TEXTS = {row["prompt"] + row["completion"] + "<end>" for row in ROWS}
COMMON = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "max_steps": 4,
    "seed": 3,
}
SETTINGS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "bf16 autocast": {"bf16": True},
    "clipping": {"max_grad_norm": 1e-3},
    "packing": {"packing": True, "max_length": 64},
    "wrapped packing": {"packing": True, "packing_strategy": "wrapped", "max_length": 64},
    "padding-free": {"padding_free": True, "max_length": None},
    "epochs": {"max_steps": -1, "num_train_epochs": 0.5},
}


def lora(dropout=0.1):
    torch.manual_seed(1)
    config = LoraConfig(
        r=6, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(tiny_model(), config)


def sft(folder, callbacks, **options):
    model = lora()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder), **(COMMON | options)),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )
    trainer.train()
    return weights(model), trainer


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_identical(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), "bit-identical"


def gradients_of(probe, *, base=False):
    """Dense gradients of the mean token loss at the probe's weights, by autograd in float32."""
    model = lora(dropout=0.0).eval()
    for name, layer in adapted_modules(model).items():
        layer.lora_A.default.weight.data = probe.updates[name].A
        layer.lora_B.default.weight.data = probe.updates[name].B * (not base)
        layer.base_layer.weight.requires_grad_(True)
    kept = probe.calibration
    total, tokens = 0.0, 0
    for ids, real, scored in zip(
        kept.ids, kept.attention_mask, kept.completion_mask, strict=True
    ):  # one item at a time: nothing is padded
        length = int(real.sum())
        logits = model(input_ids=ids[None, :length].long()).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[1:length].long(), reduction="none")
        total = total + loss[scored[1:length].bool()].sum()
        tokens += int(scored.sum())
    layers = adapted_modules(model)
    found = torch.autograd.grad(total / tokens, [la.base_layer.weight for la in layers.values()])
    return dict(zip(layers, found, strict=True))


def assert_measured(probe, tolerance):
    for part, base in (("gradient", False), ("gradient_base", True)):
        for name, gradient in gradients_of(probe, base=base).items():
            r_out = projection(name, "out", gradient.shape[0])
            r_in = projection(name, "in", gradient.shape[1])
            dense = r_out.T @ gradient @ r_in
            error = (getattr(probe, part)[name] - dense).norm() / dense.norm()
            assert error < tolerance, (part, name, float(error))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.filterwarnings("ignore")
def test_a_run_is_not_changed_and_measured_right(setting, tmp_path):
    options, path = SETTINGS[setting], tmp_path / "math.safetensors"
    ours, trainer = sft(tmp_path / "a", [MergeProbeCallback(path, at_step=3)], **options)
    theirs, _ = sft(tmp_path / "b", [], **options)
    assert_identical(ours, theirs)
    assert trainer.state.global_step >= 4
    probe = read_probe(path)
    assert probe.meta["step"] == 3
    assert probe.meta["planned_steps"] == trainer.state.max_steps
    # autocast rounds activations to 8 bits; everything else is exact
    assert_measured(probe, 0.1 if "bf16" in setting else 1e-4)
    if setting != "wrapped packing":  # which cuts where the length is reached
        items = {
            tiny_tokenizer().decode(ids[: int(real.sum())])
            for ids, real in zip(
                probe.calibration.ids, probe.calibration.attention_mask, strict=True
            )
        }
        assert items <= TEXTS, "whole sequences, one an item"
    assert len(probe.calibration.loss) <= 32


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_plain_trainer_with_padding_on_either_side(side, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    pad = DataCollatorWithPadding(tokenizer)

    def collate(rows):
        batch = pad([{"input_ids": row["input_ids"]} for row in rows])
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch

    data = [{"input_ids": tokenizer(row["prompt"] + row["completion"]).input_ids} for row in ROWS]

    def run(folder, callbacks):
        model = lora()
        Trainer(
            model=model,
            args=TrainingArguments(output_dir=str(folder), remove_unused_columns=False, **COMMON),
            train_dataset=data,
            data_collator=collate,
            callbacks=callbacks,
        ).train()
        return weights(model)

    path = tmp_path / "x.safetensors"
    assert_identical(
        run(tmp_path / "a", [MergeProbeCallback(path, at_step=2)]), run(tmp_path / "b", [])
    )
    probe = read_probe(path)
    assert_measured(probe, 1e-4)
    kept = probe.calibration
    lengths = kept.attention_mask.sum(1).tolist()
    assert lengths == [len(data[i * 35 // 32]["input_ids"]) for i in range(32)]
    assert kept.completion_mask.sum(1).tolist() == [length - 1 for length in lengths]


def test_a_stream_without_random_access_says_what_will_be_missing(tmp_path):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]} for _ in range(40)]
    path, model = tmp_path / "x.safetensors", lora()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), **COMMON),
        train_dataset=IterableDataset.from_generator(lambda: iter(rows)),
        callbacks=[MergeProbeCallback(path, at_step=2)],
    )
    with pytest.warns(UserWarning, match="no random access"):
        trainer.train()
    probe = read_probe(path)
    assert not probe.has("gradient")
    assert probe.modules


def test_a_loop_of_ones_own_under_autocast(tmp_path):
    """recorder.step inside the autocast block measures what it measures outside."""
    from mergeprobe import ProbeRecorder

    def run(path, inside):
        model = lora(dropout=0.0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        ids = torch.arange(4, 28).reshape(2, 12)
        batch = Batch(
            ids, torch.ones_like(ids), torch.ones_like(ids).index_fill(1, ids[0, :1] * 0, 0)
        )
        recorder = path and ProbeRecorder(
            model, path, planned_steps=3, at_step=2, calibration=batch, tokenizer=tiny_tokenizer()
        )
        for step in (1, 2, 3):
            with torch.autocast("cpu", torch.bfloat16):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if recorder and inside:
                    recorder.step(step)
            if recorder and not inside:
                recorder.step(step)
        return weights(model)

    inside, outside = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert_identical(run(inside, True), run(None, False))
    assert_identical(run(outside, False), run(None, False))
    one, two = read_probe(inside), read_probe(outside)
    for part in ("halfway", "gradient", "gradient_base"):
        for name, value in getattr(one, part).items():
            assert torch.equal(value, getattr(two, part)[name])
    assert torch.equal(one.drift.hidden, two.drift.hidden)
    assert_measured(one, 1e-4)
