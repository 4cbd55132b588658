"""The callback in real training runs: it writes a probe, and changes nothing."""

import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from mergeprobe import MergeProbeCallback, read_probe
from mergeprobe.capture.trained import current_update
from mergeprobe.errors import ProbeError
from tests.tiny_base import tiny_model, tiny_tokenizer

ROWS = [
    {"prompt": f"What is {a} + {b}?", "completion": f" {a + b}."}
    for a in range(6)
    for b in range(5)
]


def sft(tmp_path, callbacks, *, steps=10, dropout=0.0, folder="out", **options):
    torch.manual_seed(1)
    config = LoraConfig(
        r=6, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(tiny_model(), config)
    arguments = {
        "output_dir": str(tmp_path / folder),
        "max_steps": steps,
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
        "seed": 3,
    }
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**(arguments | options)),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )
    return trainer, model


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


class Keep(TrainerCallback):
    """Keeps the update right after one step."""

    def __init__(self, step):
        self.step, self.update = step, None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.update = current_update(model)


def test_sft_run_leaves_a_probe_and_is_not_changed(tmp_path):
    path, keep = tmp_path / "probes" / "math.safetensors", Keep(8)
    trainer, model = sft(tmp_path, [MergeProbeCallback(path), keep], dropout=0.1)
    trainer.train()
    plain, untouched = sft(tmp_path, [], dropout=0.1)
    plain.train()
    ours, theirs = weights(model), weights(untouched)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), "bit-identical"
    probe = read_probe(path)
    assert (probe.name, probe.meta["step"], probe.meta["planned_steps"]) == ("math", 8, 10)
    assert probe.meta["halfway_step"] == 4
    assert probe.meta["init_hash"]
    assert [step for step, _ in probe.meta["losses"]] == list(
        range(1, 8)
    )  # step 8 is logged after the probe
    assert keep.update is not None
    for module, update in keep.update.items():
        assert torch.equal(update.dense(), probe.updates[module].dense())
    assert probe.calibration is not None
    assert len(probe.calibration.loss) == 30
    assert probe.drift is not None
    assert probe.drift.hidden.shape[0] == 4  # three layers and the embeddings
    # only completions count: "What is 1 + 2?" has 14 characters, " 3." and the end 4
    assert probe.calibration.completion_mask.sum(1).tolist() == [4] * 20 + [4] * 10
    assert not list(path.parent.glob(".*"))


def test_plain_trainer_and_own_calibration(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = [tokenizer(row["prompt"] + row["completion"])["input_ids"][:12] for row in ROWS]
    data = [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)} for ids in rows]
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    path = tmp_path / "x.safetensors"
    calibration = [("What is 9 + 9?", " 18."), ("What is 1 + 9?", " 10.")]
    Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=8,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
            per_device_train_batch_size=2,
        ),
        train_dataset=data,
        callbacks=[MergeProbeCallback(path, calibration=calibration, tokenizer=tokenizer)],
    ).train()
    probe = read_probe(path)
    assert probe.modules == [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    assert probe.calibration is not None
    assert probe.calibration.completion_mask.sum(1).tolist() == [5, 5]


def test_resuming_keeps_what_the_first_steps_told(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 6

    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    sft(tmp_path, [MergeProbeCallback(whole)])[0].train()
    saving = {"save_strategy": "steps", "save_steps": 6, "folder": "resumed"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sft(tmp_path, [MergeProbeCallback(parts), Stop()], **saving)[0].train()
        assert not parts.exists()
        trainer, model = sft(tmp_path, [MergeProbeCallback(parts)], **saving)
        trainer.train(resume_from_checkpoint=True)
    plain, untouched = sft(tmp_path, [], folder="plain")
    plain.train()
    ours, theirs = weights(model), weights(untouched)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), "bit-identical"
    one, two = read_probe(whole), read_probe(parts)
    assert one.meta["init_hash"] == two.meta["init_hash"]
    assert one.meta["losses"] == two.meta["losses"]
    for module in one.updates:
        assert torch.allclose(one.halfway[module], two.halfway[module])
        assert torch.allclose(one.gradient[module], two.gradient[module], atol=1e-6)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.filterwarnings("ignore")
def test_resuming_after_the_probe_point_leaves_the_probe_alone(tmp_path):
    path = tmp_path / "x.safetensors"
    saving = {"save_strategy": "steps", "save_steps": 9}
    sft(tmp_path, [MergeProbeCallback(path), StopAt(9)], **saving)[0].train()
    written = path.read_bytes()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="mergeprobe")
        trainer, model = sft(tmp_path, [MergeProbeCallback(path)], **saving)
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 10
    assert path.read_bytes() == written
    assert [file.name for file in tmp_path.glob(".*")] == []
    whole, untouched = sft(tmp_path, [], folder="whole")
    whole.train()
    ours, theirs = weights(model), weights(untouched)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.filterwarnings("ignore")
def test_resuming_after_the_probe_point_without_its_probe_says_so(tmp_path):
    path, saving = tmp_path / "x.safetensors", {"save_strategy": "steps", "save_steps": 9}
    sft(tmp_path, [StopAt(9)], **saving)[0].train()
    trainer, _ = sft(tmp_path, [MergeProbeCallback(path)], **saving)
    with pytest.warns(UserWarning, match=r"past the probe point 8.*x\.safetensors"):
        trainer.train(resume_from_checkpoint=True)
    assert not path.exists()


@pytest.mark.filterwarnings("ignore")
def test_resuming_without_what_the_first_steps_left_says_so(tmp_path):
    path, saving = tmp_path / "x.safetensors", {"save_strategy": "steps", "save_steps": 3}
    sft(tmp_path, [MergeProbeCallback(path), StopAt(3)], **saving)[0].train()
    (left,) = tmp_path.glob(".*.early")
    left.write_bytes(left.read_bytes()[:50])
    trainer, _ = sft(tmp_path, [MergeProbeCallback(path)], **saving)
    with pytest.warns(UserWarning, match="gone or damaged"):
        trainer.train(resume_from_checkpoint=True)
    probe = read_probe(path)
    assert probe.meta["init_hash"] is None
    assert probe.meta["halfway_step"] == 4, "still ahead when the run was resumed"
    assert probe.halfway


def test_several_probe_points_in_one_callback(tmp_path):
    """Each is what a callback of its own measures at that step."""
    several = MergeProbeCallback(
        tmp_path / "{point}" / "math.safetensors", fraction=(0.01, 0.1, 0.9, 1.0)
    )
    alone = MergeProbeCallback(tmp_path / "alone.safetensors", at_step=9)
    trainer, model = sft(tmp_path, [several, alone])
    trainer.train()
    plain, untouched = sft(tmp_path, [])
    plain.train()
    ours, theirs = weights(model), weights(untouched)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    probes = {
        point: read_probe(tmp_path / point / "math.safetensors")
        for point in ("1pct", "10pct", "90pct", "100pct")
    }
    steps = {point: probe.meta["step"] for point, probe in probes.items()}
    assert steps == {"1pct": 8, "10pct": 8, "90pct": 9, "100pct": 10}
    halves = {point: probe.meta["halfway_step"] for point, probe in probes.items()}
    assert halves == {"1pct": 4, "10pct": 4, "90pct": 4, "100pct": 5}
    assert {probe.name for probe in probes.values()} == {"math"}
    one, two = probes["90pct"], read_probe(tmp_path / "alone.safetensors")
    for module in two.updates:
        assert torch.equal(one.updates[module].B, two.updates[module].B)
        for part in ("gradient", "gradient_base", "halfway"):
            assert torch.equal(getattr(one, part)[module], getattr(two, part)[module])
        assert torch.equal(one.inputs[module].factor, two.inputs[module].factor)
    assert one.calibration is not None
    assert two.calibration is not None
    assert torch.equal(one.calibration.base_loss, two.calibration.base_loss)
    assert not list(tmp_path.rglob(".*.early"))


def test_a_probe_that_cannot_be_taken_never_ends_the_run(tmp_path):
    """A disk that fills up: a warning with the reason, the same weights, no half file."""
    folder = tmp_path / "probes"

    class Block(TrainerCallback):
        """Puts a folder where the file is to go."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                (folder / "x.safetensors" / "occupied").mkdir(parents=True)

    trainer, model = sft(tmp_path, [Block(), MergeProbeCallback(folder / "x.safetensors")])
    with pytest.warns(UserWarning, match="no probe at step 8, training goes on: IsADirectory"):
        trainer.train()
    plain, untouched = sft(tmp_path, [])
    plain.train()
    ours, theirs = weights(model), weights(untouched)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [file.name for file in folder.iterdir() if file.name != "x.safetensors"] == [
        ".x.safetensors.early"
    ]
    (folder / "x.safetensors" / "occupied").rmdir()
    (folder / "x.safetensors").rmdir()
    strict = MergeProbeCallback(folder / "x.safetensors", strict=True)
    trainer, _ = sft(tmp_path, [Block(), strict])
    with pytest.raises(IsADirectoryError):
        trainer.train()


def test_stopping_before_the_probe_point_is_said(tmp_path):
    path = tmp_path / "x.safetensors"
    trainer, _ = sft(tmp_path, [MergeProbeCallback(path)], steps=5)
    with pytest.warns(UserWarning, match="before the probe point 8"):
        trainer.train()
    assert not path.exists()


def test_an_exception_in_training_leaves_no_half_file(tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise RuntimeError("out of luck")

    path = tmp_path / "x.safetensors"
    trainer, _ = sft(tmp_path, [MergeProbeCallback(path), Break()])
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.train()
    assert not path.exists()


def test_a_variant_that_cannot_be_probed_is_refused_before_training(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa")
    model = get_peft_model(tiny_model(), config)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to="none", use_cpu=True
    )
    data = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4
    callback = MergeProbeCallback(tmp_path / "x.safetensors")
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback])
    with pytest.raises(ProbeError, match="pissa"):
        trainer.train()
    with pytest.raises(ProbeError, match="fraction"):
        MergeProbeCallback("x", fraction=1.5)
