"""The whole job on a tiny base: every file is there, and a killed run goes on where it was."""

import os
import signal
import subprocess
import sys
import time

import polars as pl
import pytest
import torch
from peft import PeftModel

from mergeprobe import Executor, read_plan, read_probe
from mergeprobe.adapters.base import load_base
from mergeprobe.bench.demo import run_demo
from mergeprobe.bench.folder import Config, RunFolder
from mergeprobe.bench.outcomes import Outcomes, regret, set_partitions
from mergeprobe.bench.results import report_data
from mergeprobe.compose import read_deployment
from mergeprobe.errors import MergeProbeError, OutputExists
from tests.tiny_base import tiny_model, write_tiny_base

SMALL = {
    "tasks": ("math", "instruction", "safety"),
    "steps": 24,
    "rank": 2,
    "learning_rate": 1e-2,
    "test_items": 8,
    "calibration_items": 8,
    "forecast_items": 4,
}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def finished(base_folder, tmp_path_factory):
    stages = []
    out = tmp_path_factory.mktemp("run") / "demo"
    config = Config(base=str(base_folder), **SMALL)
    folder = run_demo(out, config, notify=lambda stage, **data: stages.append(stage))
    return folder, stages


def test_everything_is_there(finished):
    folder, stages = finished
    for name in SMALL["tasks"]:
        assert read_probe(folder.probe(name)).meta["step"] == 8
    for path in (folder.signals, folder.outcomes, folder.report, folder.plan):
        assert path.stat().st_size > 0
    assert (folder.deployment / "routing.json").exists()
    order = list(dict.fromkeys(stages))
    assert [s for s in order if s in ("train", "planned", "apply", "measured", "done")] == [
        "train",
        "planned",
        "apply",
        "measured",
        "done",
    ]
    assert not folder.checkpoints.exists() or not any(folder.checkpoints.iterdir())


def test_outcomes_are_what_they_say(finished):
    folder, _ = finished
    rows = pl.read_parquet(folder.outcomes)
    # base 3, single 3, deployed 3, by prompt and by mixed logits 6, five whole-set methods 15,
    # truncated 3, and under mean and sum three pairs and one triple: 2 · (6 + 3); truncation to the
    # full rank is a row of its own
    assert len(rows) == 3 + 3 + 3 + 6 + 15 + 3 + 18
    assert rows.select("adapter", "set", "method", "rank").is_duplicated().sum() == 0
    alone = rows.filter((pl.col("set") == pl.col("adapter")) & (pl.col("rank").is_null()))
    singles = alone.filter(pl.col("method") == "mean")
    assert singles["loss"].to_list() == singles["loss_single"].to_list()
    kept = rows.filter(pl.col("gain_retention").is_not_null())
    expected = (pl.col("loss_base") - pl.col("loss")) / (
        pl.col("loss_base") - pl.col("loss_single")
    )
    assert kept.select((pl.col("gain_retention") - expected).abs().max()).item() < 1e-9


def test_strategies_and_regret(finished):
    folder, _ = finished
    outcomes = Outcomes(folder)
    found = {strategy.name: strategy for strategy in outcomes.strategies()}
    routing = found["full routing by name"]
    assert routing.total.worst == routing.total.mean == 1.0
    assert routing.resident_parameters == outcomes.full_parameters()
    mixed, prompted = found["logits of all, mixed"], found["routing by prompt"]
    assert (mixed.passes, prompted.passes, routing.passes) == (4, 1, 1)
    assert mixed.resident_parameters == prompted.resident_parameters == outcomes.full_parameters()
    for name, chosen in outcomes.routed().chosen.items():
        assert len(chosen) == SMALL["test_items"]
        assert set(chosen) <= {None, *SMALL["tasks"]}
        if set(chosen) == {name}:  # every prompt found its own adapter, and lost nothing
            assert prompted.retentions[name].gain == pytest.approx(1.0)
    assert found["mean"].resident_parameters * 3 == routing.resident_parameters
    assert len(outcomes.partitions()) == 5  # Bell(3)
    assert regret(outcomes).plan_parameters == found["plan"].resident_parameters
    (ours,) = [row for row in report_data(folder).partitions if row.chosen]
    assert ours.resident_parameters == found["plan"].resident_parameters


def test_partitions_by_hand():
    found = {frozenset(map(frozenset, p)) for p in set_partitions(["a", "b", "c"])}
    assert len(found) == 5
    assert frozenset({frozenset("ab"), frozenset("c")}) in found
    assert sum(1 for _ in set_partitions(list("abcde"))) == 52  # Bell(5)


def test_the_merged_adapter_in_stock_peft_gives_our_logits(finished, base_folder):
    folder, _ = finished
    deployment = read_deployment(folder.deployment)
    base = load_base(str(base_folder))
    ids = base.tokenizer(["What is 12 + 19?"], return_tensors="pt")["input_ids"]
    executor = Executor(base.model, base.tokenizer, deployment)
    for name in SMALL["tasks"]:
        ours = executor.logits(name, ids)
        group = deployment.entries[name].folder
        stock = PeftModel.from_pretrained(tiny_model(), str(folder.deployment / group)).eval()
        with torch.no_grad():
            theirs = stock(input_ids=ids).logits
        assert (ours - theirs).abs().max() < 1e-4


def test_a_second_run_reuses_everything(finished):
    folder, _ = finished
    stages = []
    before = folder.outcomes.read_bytes()
    start = time.monotonic()
    run_demo(folder.path, folder.config(), notify=lambda stage, **data: stages.append(stage))
    assert time.monotonic() - start < 20
    assert "train" not in stages
    assert "measure" not in stages
    assert folder.outcomes.read_bytes() == before


def test_two_runs_do_not_meet(finished):
    fcntl = pytest.importorskip("fcntl")
    folder, _ = finished
    with open(folder.path / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(MergeProbeError, match="another run is at work in"):
            run_demo(folder.path, folder.config())


def test_other_settings_are_refused_by_name(finished):
    folder, _ = finished
    with pytest.raises(OutputExists, match=r"seed 0 \(asked: 1\)"):
        run_demo(folder.path, folder.config().model_copy(update={"seed": 1}))


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(OutputExists, match="no run of ours"):
            run_demo(tmp_path, Config(), force=force)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_killed_at_any_moment_it_goes_on(finished, base_folder, tmp_path):
    """kill -9 at growing delays until it gets through; then the rows are those of a quiet run."""
    whole, _ = finished
    out = tmp_path / "killed"
    code = (
        "import sys; from mergeprobe.bench.demo import run_demo; "
        "from mergeprobe.bench.folder import Config; "
        f"run_demo(sys.argv[1], Config(base={str(base_folder)!r}, **{SMALL!r}))"
    )
    delay, kills = 12.0, 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(out)], env=dict(os.environ), start_new_session=True
        )
        try:
            status = process.wait(timeout=delay)
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills, delay = kills + 1, delay + 5.0
    assert status == 0
    assert kills >= 1
    columns = ["adapter", "set", "method", "rank", "loss", "gain_retention"]
    ours = pl.read_parquet(RunFolder(out).outcomes).select(columns).sort(columns[:4])
    theirs = pl.read_parquet(whole.outcomes).select(columns).sort(columns[:4])
    same_plan = [g.adapters for g in read_plan(RunFolder(out).plan).groups] == [
        g.adapters for g in read_plan(whole.plan).groups
    ]
    assert same_plan
    assert ours.select(columns[:4]).equals(theirs.select(columns[:4]))
    assert (ours["loss"] - theirs["loss"]).abs().max() < 1e-4
