"""The forecast inside a training run: logged, printed, able to stop it, and changing nothing."""

import warnings
from itertools import pairwise

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from mergeprobe import MergeProbeCallback, MergeProbeError, ProbeRecorder, forecast, read_probe
from mergeprobe.adapters.base import Base, fingerprint
from mergeprobe.errors import AdapterMismatch, ProbeError
from mergeprobe.live import forecast_run
from mergeprobe.plan import Action
from mergeprobe.predict.early import open_tier
from tests.test_capture_settings import (
    COMMON,
    ROWS,
    assert_identical,
    lora,
    sft,
)
from tests.tiny_base import tiny_model, tiny_tokenizer

PAIRS = [(row["prompt"], row["completion"]) for row in ROWS]


def loop(path, pairs):
    """A training loop of one's own: three steps, a probe after the third."""
    model, tokenizer = lora(dropout=0.0), tiny_tokenizer()
    recorder = ProbeRecorder(
        model, path, planned_steps=4, at_step=3, calibration=pairs, tokenizer=tokenizer
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    batch = recorder.batch
    labels = batch.ids.masked_fill(batch.completion_mask == 0, -100)
    probe = None
    for step in (1, 2, 3):
        out = model(input_ids=batch.ids, attention_mask=batch.attention_mask, labels=labels)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        probe = recorder.step(step, out.loss)
    return probe


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Probes of two other runs on the same base: "near" has this task's items, "far" has not."""
    folder = tmp_path_factory.mktemp("others")
    loop(folder / "near.safetensors", PAIRS[::2])
    loop(folder / "far.safetensors", [("Sing!", " La la."), ("Sing?", " Lo.")])
    return folder


class Board(TrainerCallback):
    """What a reporter (TensorBoard, W&B, trackio) is given."""

    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append((state.global_step, dict(logs)))


def live(tmp_path, against, **options):
    return MergeProbeCallback(tmp_path / "mine.safetensors", at_step=3, against=against, **options)


def offline(tmp_path, others, tier=None):
    """name -> the lower retention of the pair under the better rule, from the files."""
    mine = read_probe(tmp_path / "mine.safetensors")
    theirs = [read_probe(others / f"{name}.safetensors") for name in ("far", "near")]
    asked = forecast([mine, *theirs], model=tier and tier([mine, *theirs]))
    found = {}
    for other in ("near", "far"):
        group = ("mine", other)
        kept = [
            min(asked.forecast(name, group, method).retention for name in group)
            for method in ("mean", "sum")
        ]
        found[other] = max(kept)
    return found, asked.plan(min_retention=0.9).group_of("mine").action


def check_logged(board, expected, action):
    entries = [(step, logs) for step, logs in board.logged if "mergeprobe/worst" in logs]
    assert [step for step, _ in entries] == [3]
    logs = entries[0][1]
    assert logs["mergeprobe/forecast/near"] == expected["near"]
    assert logs["mergeprobe/forecast/far"] == expected["far"]
    assert logs["mergeprobe/worst"] == min(expected.values())
    assert list(Action)[int(logs["mergeprobe/action"])] is action
    assert all(isinstance(value, int | float) for value in logs.values()), "boards draw numbers"


def test_sft_logs_prints_and_is_not_changed(tmp_path, others, capsys):
    board, plain = Board(), Board()
    ours, trainer = sft(tmp_path / "a", [board, live(tmp_path, others)])
    theirs, _ = sft(tmp_path / "b", [plain])
    assert_identical(ours, theirs)
    expected, action = offline(tmp_path, others)
    check_logged(board, expected, action)
    said = [ln for ln in capsys.readouterr().out.splitlines() if ln.startswith("mergeprobe")]
    assert len(said) == 1, "one paragraph"
    assert "step 3 of 4" in said[0]
    assert "'near'" in said[0]
    assert "'far'" in said[0]
    assert any("mergeprobe/worst" in entry for entry in trainer.state.log_history)
    # the step's own entries are what they are without us: nothing lost, nothing averaged apart
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    kept = [
        (step, {key: value for key, value in logs.items() if key not in timed})
        for step, logs in board.logged
        if "mergeprobe/worst" not in logs
    ]
    assert kept == [
        (step, {key: value for key, value in logs.items() if key not in timed})
        for step, logs in plain.logged
    ]
    assert "mean_token_accuracy" in kept[2][1]


def test_plain_trainer_stops_when_asked_to(tmp_path, others, capsys):
    tokenizer, board = tiny_tokenizer(), Board()
    ids = [tokenizer(prompt + answer)["input_ids"][:12] for prompt, answer in PAIRS]
    data = [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in ids]
    callback = live(
        tmp_path, [others / "near.safetensors", others / "far.safetensors"], stop_below=9.0
    )
    callback.capture.tokenizer = tokenizer
    trainer = Trainer(
        model=lora(),
        args=TrainingArguments(output_dir=str(tmp_path), **COMMON),
        train_dataset=data,
        callbacks=[board, callback],
    )
    trainer.train()
    assert trainer.state.global_step == 3
    check_logged(board, *offline(tmp_path, others))
    assert "training stops here" in capsys.readouterr().out
    steps = [step for step, logs in board.logged if "loss" in logs]
    assert steps == [1, 2, 3], "the step's own loss is logged still"


def test_a_run_goes_on_above_the_threshold(tmp_path, others):
    callback = live(tmp_path, others, stop_below=-9.0)
    _, trainer = sft(tmp_path / "a", [callback])
    assert trainer.state.global_step == 4
    assert [one.worst <= two.worst for one, two in pairwise(callback.forecast.pairs)] == [True]


def test_the_model_tier_runs_on_the_model_in_training(tmp_path, others):
    callback = live(tmp_path, others, budget=200)
    ours, _ = sft(tmp_path / "a", [callback])
    theirs, _ = sft(tmp_path / "b", [])
    assert_identical(ours, theirs)
    assert callback.forecast.tier == "model"
    model = tiny_model().requires_grad_(False)
    base = Base("tiny", model, tiny_tokenizer(), fingerprint(model))
    expected, action = offline(tmp_path, others, lambda probes: open_tier(base, probes, budget=200))
    for pair in callback.forecast.pairs:
        assert pair.worst == pytest.approx(expected[pair.other], abs=1e-4)
    assert callback.forecast.group.action is action


def test_a_folder_is_read_at_the_probe_point_without_this_runs_own_file(tmp_path, others):
    """Probes may arrive while this run trains; its own, in the same folder, is left out."""

    class Arrive(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                data = (others / "near.safetensors").read_bytes()
                (tmp_path / "near.safetensors").write_bytes(data)

    callback = live(tmp_path, tmp_path)
    sft(tmp_path / "a", [Arrive(), callback])
    assert [pair.other for pair in callback.forecast.pairs] == ["near"]


def test_what_cannot_be_forecast_is_said_and_training_goes_on(tmp_path, others):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.safetensors").write_bytes(b"no probe")
    for against, said in (
        (tmp_path / "empty", "no other probe"),
        (tmp_path / "bad.safetensors", "damaged"),
    ):
        with pytest.warns(UserWarning, match=said):
            _, trainer = sft(tmp_path / "a", [live(tmp_path, against)])
        assert trainer.state.global_step == 4
        assert (tmp_path / "mine.safetensors").exists()
    with pytest.raises(ProbeError, match="damaged"):
        sft(tmp_path / "a", [live(tmp_path, tmp_path / "bad.safetensors", strict=True)])
    near = read_probe(others / "near.safetensors")
    with pytest.raises(ProbeError, match="name of this run"):
        forecast_run(near, [near])


def test_other_bases_are_refused(others):
    from dataclasses import replace

    near = read_probe(others / "near.safetensors")
    other = replace(near, name="other", meta=near.meta | {"base_fingerprint": "0" * 16})
    with pytest.raises(AdapterMismatch):
        forecast_run(near, [other])


def test_a_hand_written_loop_asks_by_itself(tmp_path, others):
    probe = loop(tmp_path / "mine.safetensors", PAIRS)
    assert probe is not None
    found = forecast_run(probe, [read_probe(others / "far.safetensors")])
    assert found.scalars().keys() == {
        "mergeprobe/forecast/far",
        "mergeprobe/worst",
        "mergeprobe/action",
    }
    assert "'far'" in found.advice()


def test_wrong_options_are_refused_before_training(tmp_path):
    with pytest.raises(ProbeError, match="against="):
        MergeProbeCallback(tmp_path / "x.safetensors", stop_below=0.3)
    with pytest.raises(MergeProbeError, match="does not exist"):
        live(tmp_path, tmp_path / "nowhere")
    with pytest.raises(ProbeError, match="budget"):
        live(tmp_path, tmp_path, budget=-1)
    with pytest.raises(ProbeError, match="stop_below"):
        live(tmp_path, tmp_path, stop_below=float("nan"))


def test_without_against_nothing_is_logged(tmp_path):
    board = Board()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sft(tmp_path / "a", [board, MergeProbeCallback(tmp_path / "x.safetensors", at_step=3)])
    assert not any("mergeprobe" in key for _, logs in board.logged for key in logs)
