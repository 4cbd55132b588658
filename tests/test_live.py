"""The forecast inside a training run: logged, printed, able to stop it, and changing nothing."""

import math
import shutil
import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from synthetic_bank import bank
from transformers import Trainer, TrainerCallback, TrainingArguments

from mergeprobe import MergeProbeCallback, MergeProbeError, ProbeRecorder, forecast, read_probe
from mergeprobe.adapters.base import Base, fingerprint
from mergeprobe.capture import write_probe
from mergeprobe.errors import AdapterMismatch, NotForecastable, ProbeError
from mergeprobe.live import forecast_run
from mergeprobe.plan import Action
from mergeprobe.predict.early import open_tier
from mergeprobe.predict.learning import learning_rows
from mergeprobe.predict.menus import CANDIDATES
from mergeprobe.predict.predictor import fit_predictor, load_predictor
from mergeprobe.predict.tier import Guess
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
    """name -> the lower retention of the pair under the best rule, from the files."""
    mine = read_probe(tmp_path / "mine.safetensors")
    theirs = [read_probe(others / f"{name}.safetensors") for name in ("far", "near")]
    asked = forecast([mine, *theirs], model=tier and tier([mine, *theirs]))
    found = {}
    for other in ("near", "far"):
        group = ("mine", other)
        kept = [
            min(asked.forecast(name, group, method).retention for name in group)
            for method in asked.methods(group)
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


# --- who is left out, and who is asked ------------------------------------------------------------
def fewer_gains(folder, others, name="idle"):
    """A run that gained nothing: its losses under base and snapshot are the same."""
    near = read_probe(others / "near.safetensors")
    kept = near.calibration
    idle = replace(
        near,
        name=name,
        gradient={m: -g for m, g in near.gradient.items()},  # its way led uphill
        calibration=replace(kept, loss=kept.base_loss + 0.5),
    )
    write_probe(idle, folder / f"{name}.safetensors")


@pytest.mark.parametrize("budget", [0, 200])
def test_an_other_that_gained_nothing_is_left_out_by_name(budget, tmp_path, others, capsys):
    folder = tmp_path / "others"
    shutil.copytree(others, folder)
    fewer_gains(folder, others)
    (folder / "broken.safetensors").write_bytes(b"no probe")
    near = read_probe(others / "near.safetensors")
    strange = replace(near, name="strange", meta=near.meta | {"base_fingerprint": "0" * 16})
    write_probe(strange, folder / "strange.safetensors")
    board = Board()
    callback = live(tmp_path, folder, budget=budget, stop_below=-9.0, strict=True)
    _, trainer = sft(tmp_path / "a", [board, callback])
    assert trainer.state.global_step == 4, "what is left out has no say in stopping"
    assert {pair.other for pair in callback.forecast.pairs} == {"near", "far"}
    left_out = callback.forecast.left_out
    assert left_out.keys() == {"broken", "strange", "idle"}
    assert "gains nothing" in left_out["idle"]
    assert "0000000000000000" in left_out["strange"]
    said = capsys.readouterr().out
    assert all(f"Left out: '{name}' (" in said for name in left_out)
    logs = next(logs for _, logs in board.logged if "mergeprobe/worst" in logs)
    assert sorted(key for key in logs if "/forecast/" in key) == [
        "mergeprobe/forecast/far",
        "mergeprobe/forecast/near",
    ]
    if not budget:  # and nothing else is different
        assert logs["mergeprobe/worst"] == min(offline(tmp_path, others)[0].values())


def test_where_nobody_is_left_the_reason_is_given(tmp_path, others):
    fewer_gains(tmp_path, others)
    mine = read_probe(others / "far.safetensors")
    with pytest.raises(NotForecastable, match="'idle' gains nothing"):
        forecast_run(mine, [read_probe(tmp_path / "idle.safetensors")])
    with pytest.warns(UserWarning, match=r"no forecast at step 3, training goes on: .*'idle'"):
        sft(tmp_path / "a", [live(tmp_path, tmp_path / "idle.safetensors")])


def test_stop_below_is_strict(tmp_path, others):
    """At the threshold itself a run goes on; a hair above it, it stops."""
    found = live(tmp_path, others)
    sft(tmp_path / "a", [found])
    worst = found.forecast.worst
    for threshold, steps in ((worst, 4), (worst + 1e-6, 3)):
        callback = live(tmp_path, others, stop_below=threshold)
        _, trainer = sft(tmp_path / "b", [callback])
        assert trainer.state.global_step == steps
        assert callback.forecast.worst == worst


def test_two_probe_points_may_each_stop_the_run(tmp_path, others, capsys):
    path = tmp_path / "{point}" / "mine.safetensors"
    callback = MergeProbeCallback(path, at_step=(2, 3), against=others, stop_below=9.0)
    with pytest.warns(UserWarning, match="before the probe point 3"):
        _, trainer = sft(tmp_path / "a", [callback])
    assert trainer.state.global_step == 2
    assert capsys.readouterr().out.count("training stops here") == 1


@pytest.fixture(scope="module")
def small_predictor(tmp_path_factory, others):
    """Fitted on rows around those of these very runs, so that none of them lies far away: retention
    falls by a fixed amount with the Frobenius cosine, and is low throughout."""
    folder = tmp_path_factory.mktemp("predictor")
    sft(folder / "a", [MergeProbeCallback(folder / "mine.safetensors", at_step=3)])
    probes = [read_probe(folder / "mine.safetensors")]
    probes += [read_probe(others / f"{name}.safetensors") for name in ("far", "near")]
    seen = Seen()
    forecast(probes, predictor=seen).plan(min_retention=0.9)
    rows = learning_rows(**bank(cohorts=6, families=12, seed=1).tables())
    draw = np.random.default_rng(0)
    values = np.stack([seen.rows[k % len(seen.rows)] for k in range(len(rows))])
    values = values + 0.05 * draw.normal(size=values.shape)
    target = 0.25 + 0.02 * draw.normal(size=len(rows))
    rows = replace(rows, values=values, target=target)
    few = {"ridge, few": CANDIDATES["ridge, few"]}
    card = {  # of the rows that were put in
        "base_fingerprints": {"tiny": [probes[0].meta["base_fingerprint"]]},
        "methods": ["equal_norm_mean", "mean", "sum"],
    }
    fit_predictor(rows, tiers=("file",), candidates=few, card=card).save(folder / "predictor")
    return folder / "predictor"


class Seen:
    """Keeps the rows that it is asked about, and speaks of none."""

    def __init__(self):
        self.rows = []

    def base_like(self, name, fingerprint):
        return "tiny"

    def knows_method(self, method):
        return True

    def reads(self, name):
        return True

    def in_words(self):
        return "forecast by nobody"

    def predict(self, values, **how):
        self.rows += list(values)
        each = (math.nan, math.nan, math.nan, math.nan, 2.0)
        return Guess(*(np.full(len(values), v) for v in each))


def test_a_fitted_predictor_is_asked(tmp_path, others, small_predictor, capsys):
    board = Board()
    callback = live(tmp_path, others, predictor=small_predictor, stop_below=0.1)
    _, trainer = sft(tmp_path / "a", [board, callback])
    mine = read_probe(tmp_path / "mine.safetensors")
    theirs = [read_probe(others / f"{name}.safetensors") for name in ("far", "near")]
    asked = forecast([mine, *theirs], predictor=load_predictor(small_predictor))
    assert callback.forecast.calibrated
    assert len(callback.forecast.pairs) == 2
    for pair in callback.forecast.pairs:
        group = ("mine", pair.other)
        both = [asked.forecast(name, group, pair.method) for name in group]
        assert [pair.own, pair.theirs] == both
        assert pair.worst == pytest.approx(0.25, abs=0.1), "what it was taught"
        plain = forecast([mine, *theirs]).forecast("mine", group, pair.method)
        assert plain.retention != pytest.approx(pair.own.retention, abs=0.02)
    assert asked.calibrated
    assert "calibrated" in capsys.readouterr().out
    assert trainer.state.global_step == 4
    callback = live(tmp_path, others, predictor=small_predictor, stop_below=0.6)
    _, trainer = sft(tmp_path / "b", [callback])
    assert trainer.state.global_step == 3, "its forecast is what stops the run"


def test_a_damaged_predictor_warns_and_training_goes_on(tmp_path, others):
    (tmp_path / "predictor").mkdir()
    with pytest.warns(UserWarning, match=r"no forecast at step 3.*card.json"):
        _, trainer = sft(tmp_path / "a", [live(tmp_path, others, predictor=tmp_path / "predictor")])
    assert trainer.state.global_step == 4
