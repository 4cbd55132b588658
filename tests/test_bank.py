"""A tiny cohort from training to rows; and the same rows after any number of kills."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
import torch

from mergeprobe.adapters.base import load_base
from mergeprobe.adapters.checkpoint import read_adapter
from mergeprobe.bench.bank.cohorts import COHORTS, again, chosen, cohort
from mergeprobe.bench.bank.folder import CohortFolder, read_spec, write_spec
from mergeprobe.bench.bank.jobs import KINDS, Job, done, job_from, jobs_of, needs
from mergeprobe.bench.bank.queue import Times, run_cohorts
from mergeprobe.bench.bank.rows import TABLES, collate
from mergeprobe.bench.bank.spec import AdapterSpec, CohortSpec
from mergeprobe.bench.bank.tasks import task_of
from mergeprobe.bench.measure import Measurement, read_measured
from mergeprobe.bench.pool import Pool
from mergeprobe.bench.training import newest_checkpoint
from mergeprobe.capture.probe import read_probe
from mergeprobe.compose import merge
from mergeprobe.errors import DataError, MergeProbeError, OutputExists
from mergeprobe.predict.early import open_tier
from mergeprobe.signals import pair_rows, set_rows
from tests.tiny_base import write_tiny_base

METHODS = ("mean", "sum", "ties")
KEYS = {
    "adapters": ["cohort", "adapter"],
    "pairs": ["cohort", "point", "i", "j"],
    "sets": ["cohort", "point", "adapter", "set"],
    "outcomes": ["cohort", "adapter", "set", "method"],
}
THREE = ("math", "instruction", "safety")
SORTED = tuple(sorted(THREE))


def tiny(base, **changes):
    """Three adapters of rank 2, 3 and 4; the first is longer than a checkpoint's 20 steps."""
    adapters = tuple(
        AdapterSpec(
            name=task, task=task, seed=k, rank=2 + k, steps=(24, 12, 14)[k], learning_rate=1e-2
        )
        for k, task in enumerate(THREE)
    )
    options = {
        "points": (0.25, 1.0),
        "test_items": 8,
        "calibration_items": 8,
        "forecast_items": 4,
        "methods": METHODS,
    }
    return CohortSpec(name="tiny", base=str(base), adapters=adapters, **options | changes)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def finished(base_folder, tmp_path_factory):
    work = tmp_path_factory.mktemp("bank")
    spec = tiny(base_folder, joint=True)
    (rows,) = run_cohorts([spec], work / "work", work / "rows", workers=0)
    return CohortFolder(work / "work", spec), rows


def read(rows):
    return {name: pl.read_parquet(rows / f"{name}.parquet") for name in TABLES}


# --- specs


def six(**changes):
    tasks = ("sort_up", "sort_down", "sql", "redact", "spell", "binary")
    return cohort("six", tasks, seed=3, **changes)


def test_sets_of_a_cohort():
    spec = six()
    sets = spec.sets()
    assert Counter(map(len, sets)) == {2: 15, 3: 8, 5: 2}
    assert len(set(sets)) == len(sets)
    assert all(list(group) == sorted(group) for group in sets)
    # 8 triples are 24 places for 6 adapters: four each
    places = Counter(name for group in sets if len(group) == 3 for name in group)
    assert set(places.values()) == {4}
    assert six().sets() == sets
    every = spec.model_copy(update={"set_sizes": ((2, None), (6, None))})
    assert Counter(map(len, every.sets())) == {2: 15, 6: 1}


def test_configuration_varies_inside_a_cohort_and_between_two():
    one, two = six().adapters, six(turn=4).adapters
    for field in ("learning_rate", "steps", "rank"):
        assert Counter(Counter(getattr(a, field) for a in one).values()) == {2: 3}
    for rate in {a.learning_rate for a in one}:
        mine = [a for a in one if a.learning_rate == rate]
        assert len({a.rank for a in mine}) == len({a.steps for a in mine}) == 2
    for a, b in zip(one, two, strict=True):
        assert (a.learning_rate, a.steps, a.rank) != (b.learning_rate, b.steps, b.rank)
    turns = [a for turn in range(3) for a in six(turn=turn).adapters]
    assert len({(a.learning_rate, a.steps, a.rank) for a in turns}) == 18
    repeated = again(six(), "six again", 9)
    assert repeated.sets() == six().sets()
    assert not {a.seed for a in repeated.adapters} & {a.seed for a in one}
    assert [a.rank for a in repeated.adapters] == [a.rank for a in one]


def test_a_spec_survives_json(tmp_path):
    spec = six(joint=True, points=(0.1, 1.0))
    write_spec(tmp_path / "cohort.json", spec, "somebody 1.0")
    assert read_spec(tmp_path / "cohort.json") == (spec, "somebody 1.0")
    assert CohortSpec.model_validate_json(spec.model_dump_json()) == spec
    value = json.loads((tmp_path / "cohort.json").read_text())
    for change in ({"schema_version": 99}, {"points": [0.5, 0.1]}, {"adapters": []}):
        (tmp_path / "bad.json").write_text(json.dumps(value | change))
        with pytest.raises(DataError):
            read_spec(tmp_path / "bad.json")


def test_joint_adapter_by_hand():
    joint = six().joint_spec()
    assert joint.steps == 2 * (100 + 120 + 160)
    assert joint.rank == 16
    assert joint.learning_rate == 1e-3  # of 5e-4, 5e-4, 1e-3, 1e-3, 2e-3, 2e-3 the upper middle


def test_steps_of_points():
    adapter = AdapterSpec(name="a", task="math", seed=0, steps=120)
    found = [adapter.step_at(point) for point in (0.001, 0.025, 0.05, 0.1, 0.25, 1.0)]
    assert found == [1, 3, 6, 12, 30, 120]


def test_cohorts_can_be_made():
    for spec in COHORTS.values():
        if spec.data:
            continue
        assert len(spec.adapters) == 6
        for adapter in spec.adapters:
            task = task_of(adapter.task, None)
            assert task.size("test") >= spec.test_items
            assert task.size("calibration") >= spec.calibration_items
    seeds = [(a.task, a.seed) for spec in COHORTS.values() for a in spec.adapters]
    assert len(set(seeds)) == len(seeds)
    assert [spec.name for spec in chosen([], with_data=True)] == list(COHORTS)
    with pytest.raises(DataError, match="no cohort 'c99'"):
        chosen(["c99"], with_data=True)


def test_a_task_that_is_too_small_is_met_at_once(base_folder, tmp_path):
    spec = tiny(base_folder, test_items=100_000)
    with pytest.raises(DataError, match=r"has .* test items, 100000 are needed"):
        run_cohorts([spec], tmp_path / "work", tmp_path / "rows", workers=0)


def test_unknown_tasks_are_met_at_once(base_folder, tmp_path):
    adapters = [AdapterSpec(name=name, task=name, seed=0) for name in ("math", "nonsense")]
    spec = CohortSpec(name="bad", base=str(base_folder), adapters=tuple(adapters))
    with pytest.raises(DataError, match="no task 'nonsense'"):
        run_cohorts([spec], tmp_path / "work", tmp_path / "rows", workers=0)


# --- jobs


def test_jobs_come_after_what_they_need(tmp_path):
    folder = CohortFolder(tmp_path, six(joint=True))
    jobs = jobs_of(folder)
    place = {job: k for k, job in enumerate(jobs)}
    assert len(place) == len(jobs) == len({job.label for job in jobs})
    for job in jobs:
        assert all(place[need] < place[job] for need in needs(job, folder))
        assert job_from(json.loads(json.dumps(job.message()))) == job
        assert not done(job, folder)
    # 4 points with 6 lengths, 1 file tier, 6 adapters and 15 pairs; 25 sets by 5 methods, 1 joint
    kinds = Counter(job.kind for job in jobs)
    assert kinds == {
        "train": 6,
        "joint": 1,
        "single": 6,
        "length": 24,
        "files": 4,
        "early": 24,
        "pair": 60,
        "merge": 126,
    }


# --- rows


def test_rows_are_complete_and_unique(finished):
    _, rows = finished
    tables = read(rows)
    # 2 points; 6 ordered pairs; one triple of 3; 3 methods and the joint adapter
    assert {name: len(table) for name, table in tables.items()} == {
        "adapters": 3,
        "pairs": 2 * 6,
        "sets": 2 * 3,
        "outcomes": 3 * (3 * 2 + 3) + 3,
    }
    for name, table in tables.items():
        assert table.select(KEYS[name]).is_duplicated().sum() == 0
        assert table.null_count().row(0).count(0) > 0.9 * table.width
    adapters = tables["adapters"].sort("adapter").to_dicts()
    assert [row["adapter"] for row in adapters] == list(SORTED)
    assert [row["rank"] for row in adapters] == [3, 2, 4]
    assert [row["alpha"] for row in adapters] == [6, 4, 8]
    assert [row["data_items"] for row in adapters] == [12 * 8, 24 * 8, 14 * 8]
    assert all(row["made_by"].startswith("mergeprobe ") for row in adapters)
    ranks = dict(tables["outcomes"].select("set", "rank").unique().iter_rows())
    assert ranks["instruction+math"] == 3  # the largest among the members


def test_probes_are_taken_at_their_points(finished):
    folder, rows = finished
    steps = {row["i"]: row["step"] for row in read(rows)["pairs"].to_dicts() if row["point"] < 1}
    assert steps == {"math": 6, "instruction": 3, "safety": 4}  # 3.5 is rounded to even
    for name in THREE:
        last = read_probe(folder.probe(name, 1.0))
        saved = read_adapter(folder.adapters / name)
        assert last.meta["step"] == folder.spec.adapter(name).steps
        for module, update in saved.modules.items():
            assert torch.allclose(last.updates[module].dense(), update.dense(), atol=1e-6)


def test_outcomes_are_ratios_of_measured_losses(finished):
    folder, rows = finished
    tables = read(rows)
    wanted = Measurement("sum", ("instruction", "math"), 3)
    merged = read_measured(folder.measured, wanted).losses["math"]
    base, single = (
        read_measured(folder.measured, m).losses["math"] for m in folder.singles("math")
    )
    outcomes = tables["outcomes"]
    row = outcomes.row(
        by_predicate=(pl.col("adapter") == "math")
        & (pl.col("set") == "instruction+math")
        & (pl.col("method") == "sum"),
        named=True,
    )
    expected = (base - merged).mean() / (base - single).mean()
    assert row["gain_retention"] == pytest.approx(float(expected))
    odd = (base - merged)[1::2].mean() / (base - single)[1::2].mean()
    assert row["gain_retention_odd"] == pytest.approx(float(odd))
    mine = tables["adapters"].row(by_predicate=pl.col("adapter") == "math", named=True)
    assert mine["own_gain"] == pytest.approx(float((base - single).mean()))
    joint = outcomes.filter(pl.col("method") == "joint")
    assert set(joint["set"]) == {"+".join(SORTED)}
    assert sorted(joint["adapter"]) == list(SORTED)


def test_pair_rows_say_what_j_does_to_i(finished):
    folder, rows = finished
    probes = [read_probe(folder.probe(name, 0.25)) for name in SORTED]
    tier = open_tier(load_base(folder.spec.base), probes, items=4)
    signals = pair_rows(probes)
    pairs = read(rows)["pairs"].filter(pl.col("point") == 0.25)
    adapters = {
        p.name: float((p.calibration.base_loss - p.calibration.loss).mean()) for p in probes
    }
    for i, j in (("math", "safety"), ("safety", "math")):
        row = pairs.row(by_predicate=(pl.col("i") == i) & (pl.col("j") == j), named=True)
        theirs = signals.row(by_predicate=(pl.col("a") == j) & (pl.col("b") == i), named=True)
        for column in ("norm_ratio", "interference", "frobenius_cosine", "first_order_transfer"):
            assert row[column] == pytest.approx(theirs[column], rel=1e-5)
        assert row["i_own_gain"] == pytest.approx(adapters[i], rel=1e-4)
        assert row["j_own_gain"] == pytest.approx(adapters[j], rel=1e-4)
        features = tier.set_features(i, (i, j), "mean") | tier.set_features(i, (i, j), "sum")
        for column, value in features.items():
            assert row[column] == pytest.approx(value, rel=1e-4, abs=1e-5), column
        for method, weight in (("mean", 0.5), ("sum", 1.0)):
            value = tier.extrapolated_merge(i, {i: weight, j: weight})
            assert row[f"extrapolated_{method}"] == pytest.approx(value, rel=1e-4)
        updates = [tier.snapshots[name].update for name in sorted((i, j))]
        trimmed = merge(updates, "ties", rank=folder.spec.rank_of((i, j))).adapter
        kept = tier.early_retention(i, trimmed)
        assert row["early_retention_ties"] == pytest.approx(kept, rel=1e-4, abs=1e-5)
        cosine = tier.joint_gradient_cosine(i, j)
        assert row["joint_gradient_cosine"] == pytest.approx(cosine, rel=1e-4, abs=1e-5)


def test_set_rows_have_both_tiers(finished):
    folder, rows = finished
    probes = [read_probe(folder.probe(name, 1.0)) for name in SORTED]
    signals = set_rows(probes, [SORTED])
    tier = open_tier(load_base(folder.spec.base), probes, items=4)
    table = read(rows)["sets"].filter(pl.col("point") == 1.0)
    assert set(table["set"]) == {"+".join(SORTED)}
    row = table.row(by_predicate=pl.col("adapter") == "safety", named=True)
    theirs = signals.row(by_predicate=pl.col("a") == "safety", named=True)
    assert row["set_amplification"] == pytest.approx(theirs["set_amplification"], rel=1e-5)
    value = tier.set_features("safety", SORTED, "sum")["early_retention_sum"]
    assert row["early_retention_sum"] == pytest.approx(value, rel=1e-4, abs=1e-5)


def test_collating_twice_gives_the_same_bytes(finished, tmp_path):
    folder, rows = finished
    other = collate(folder, tmp_path)
    for file in sorted(rows.iterdir()):
        assert (other / file.name).read_bytes() == file.read_bytes()


def test_a_second_run_does_nothing(finished):
    folder, rows = finished
    stages = []
    before = {file: file.stat().st_mtime_ns for file in rows.iterdir()}
    run_cohorts(
        [folder.spec],
        folder.path.parent,
        rows.parent,
        workers=0,
        notify=lambda stage, **data: stages.append(stage),
    )
    assert stages == ["end"]
    assert {file: file.stat().st_mtime_ns for file in rows.iterdir()} == before


def test_another_cohort_of_that_name_is_refused(finished, tmp_path):
    folder, rows = finished
    other = folder.spec.model_copy(update={"seed": 5, "test_items": 9})
    with pytest.raises(OutputExists, match="with other test_items, seed"):
        run_cohorts([other], tmp_path / "work", rows.parent, workers=0)
    with pytest.raises(OutputExists, match="with other test_items, seed"):
        run_cohorts([other], folder.path.parent, tmp_path / "rows", workers=0)


# --- kills


def test_only_checkpoints_before_a_missing_probe_are_used(tmp_path):
    from safetensors.torch import save_file

    for step in (20, 40, 60):
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        (path / "trainer_state.json").write_text("{}")
        save_file({"x": torch.zeros(1)}, path / "adapter_model.safetensors")
    assert newest_checkpoint(tmp_path).endswith("-60")
    assert newest_checkpoint(tmp_path, before=60).endswith("-40")
    assert newest_checkpoint(tmp_path, before=20) is None
    (tmp_path / "checkpoint-60" / "trainer_state.json").write_text("{")  # a kill while saving
    assert newest_checkpoint(tmp_path).endswith("-40")


def test_what_a_killed_run_was_writing_is_swept(base_folder, tmp_path):
    folder = CohortFolder(tmp_path, tiny(base_folder))
    folder.claim()
    half, whole = folder.path / "measured" / ".mean-a.json.x1.tmp", folder.measured / "mean-a.json"
    half.parent.mkdir()
    (folder.path / "adapters" / ".math.x2.tmp").mkdir(parents=True)
    half.touch()
    whole.touch()
    folder.claim()
    assert [path.name for path in folder.path.rglob("*.tmp")] == []
    assert whole.exists()


def test_two_runs_do_not_meet(base_folder, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "work").mkdir()
    with open(tmp_path / "work" / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(MergeProbeError, match="another run is at work"):
            run_cohorts([tiny(base_folder)], tmp_path / "work", tmp_path / "rows", workers=0)


STUB = """
import json, os, sys
for line in sys.stdin:
    job = json.loads(line)
    if os.path.exists(job["poison"]):
        if not job["always"]:
            os.remove(job["poison"])
        os._exit(9)
    print(json.dumps({"event": "done", "job": job}), flush=True)
"""


def stub_pool(folder):
    pool = Pool("bank", folder, 2)
    pool.command = [sys.executable, "-c", STUB]
    return pool


def test_a_dead_workers_job_is_done_once_more(tmp_path):
    (tmp_path / "poison").touch()
    jobs = [{"job": k, "poison": str(tmp_path / "poison"), "always": False} for k in range(4)]
    events = []
    with stub_pool(tmp_path) as pool:
        pool.run(jobs, events.append, retries=1)
    kinds = Counter(event["event"] for event in events)
    assert (kinds["done"], kinds["died"]) == (4, 1)
    assert {event["job"]["job"] for event in events if event["event"] == "done"} == {0, 1, 2, 3}


def test_a_job_that_kills_two_workers_is_named(tmp_path):
    (tmp_path / "poison").touch()
    jobs = [{"job": "the bad one", "poison": str(tmp_path / "poison"), "always": True}]
    with stub_pool(tmp_path) as pool, pytest.raises(MergeProbeError, match="the bad one"):
        pool.run(jobs, lambda event: None, retries=1)


def test_jobs_wait_until_they_are_ready(tmp_path):
    jobs = [{"job": k, "poison": "", "always": False} for k in range(6)]
    finished = []

    def on_event(event):
        if event["event"] == "done":
            finished.append(event["job"]["job"])

    with stub_pool(tmp_path) as pool:
        # each needs the one after it, so they can only be done backwards
        pool.run(jobs, on_event, ready=lambda job: job["job"] == 5 or job["job"] + 1 in finished)
    assert finished == [5, 4, 3, 2, 1, 0]


def same_rows(ours, theirs):
    """The same keys, and the same numbers up to rounding."""
    for name, columns in KEYS.items():
        a, b = (table[name].sort(columns) for table in (read(ours), read(theirs)))
        assert a.select(columns).equals(b.select(columns)), name
        assert a.columns == b.columns
        for column in a.columns:
            if a[column].dtype.is_float():
                far = (a[column] - b[column]).abs() > 1e-3 + 1e-3 * b[column].abs()
                assert not far.any(), (name, column)
                assert a[column].is_null().equals(b[column].is_null())
            elif column != "note":
                assert a[column].equals(b[column]), (name, column)


@pytest.fixture(scope="module")
def undisturbed(base_folder, tmp_path_factory):
    work = tmp_path_factory.mktemp("quiet")
    (rows,) = run_cohorts([tiny(base_folder)], work / "work", work / "rows", workers=0)
    return rows


def test_killed_twenty_times_the_rows_are_those_of_a_quiet_run(base_folder, undisturbed, tmp_path):
    write_spec(tmp_path / "cohort.json", tiny(base_folder), "")
    places = [str(tmp_path / name) for name in ("cohort.json", "work", "rows")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_loop", *places, "20"],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 20
    same_rows(tmp_path / "rows" / "tiny", undisturbed)


MASTER = """
import sys
from pathlib import Path
from mergeprobe.bench.bank.folder import read_spec
from mergeprobe.bench.bank.queue import Times, run_cohorts
spec, _ = read_spec(Path(sys.argv[1]))
def notify(stage, **data):
    print(stage, data["job"].kind if "job" in data else "", flush=True)
run_cohorts([spec], sys.argv[2], sys.argv[3], workers=2, notify=notify)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc to find the workers")
def test_workers_and_master_may_be_killed(base_folder, undisturbed, tmp_path):
    """A worker is killed in the middle of a job, then the master; the same command goes on."""
    write_spec(tmp_path / "cohort.json", tiny(base_folder), "")
    places = [str(tmp_path / name) for name in ("cohort.json", "work", "rows")]

    def start():
        command = [sys.executable, "-c", MASTER, *places]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def until(master, stage):
        for line in master.stdout:
            if line.startswith(stage):
                return
        pytest.fail(f"the run ended before '{stage}'")

    master = start()
    until(master, "step")
    workers = children(master.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    until(master, "died")
    until(master, "job train")
    workers = children(master.pid)
    os.kill(master.pid, signal.SIGKILL)
    master.wait()
    end = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)
    second = start()
    output = second.communicate(timeout=300)[0]
    assert second.returncode == 0
    assert "died" not in output
    same_rows(tmp_path / "rows" / "tiny", undisturbed)


def test_a_ray_cluster_of_two_workers_one_of_them_killed(base_folder, undisturbed, tmp_path):
    """Two nodes of one core each; the worker is killed in the middle of a job."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    import psutil
    from ray.cluster_utils import Cluster

    killed = []

    def notify(stage, **data):
        if stage == "job" and data["job"].kind == "train" and not killed:
            busy = [p for p in psutil.process_iter(["cmdline"]) if is_ray_job(p)]
            killed.append(busy[0].pid)
            os.kill(busy[0].pid, signal.SIGKILL)
        stages.append(stage)

    stages = []
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        work, out = tmp_path / "work", tmp_path / "rows"
        run_cohorts([tiny(base_folder)], work, out, ray=cluster.address, notify=notify)
    finally:
        cluster.shutdown()
    assert stages.count("died") == 1
    same_rows(tmp_path / "rows" / "tiny", undisturbed)


def is_ray_job(process):
    return "ray::do_job" in (process.info["cmdline"] or [""])[0]


def children(pid):
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1]
        return state.split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_snapshots_may_go_once_the_rows_are_there(base_folder, tmp_path):
    spec = tiny(base_folder, points=(1.0,), methods=("mean",), set_sizes=((2, None),))
    two = spec.model_copy(update={"adapters": spec.adapters[1:]})
    work, out = tmp_path / "work", tmp_path / "rows"
    run_cohorts([two], work, out, workers=0, keep_snapshots=False)
    assert not (work / "tiny" / "probes").exists()
    assert not (work / "tiny" / "adapters").exists()
    stages = []
    run_cohorts([two], work, out, workers=0, notify=lambda stage, **data: stages.append(stage))
    assert stages == ["end"]
    assert len(read(out / "tiny")["pairs"]) == 2


# --- the command


def test_progress_in_a_log(capsys, tmp_path):
    from mergeprobe.cli.bench import Progressing, duration

    assert [duration(s) for s in (5, 150, 3600, 12_345)] == [
        "1 min",
        "2 min",
        "1 h 0 min",
        "3 h 26 min",
    ]
    job = Job("c1", "train", ("math",))
    with Progressing() as notify:
        notify("begin", left=3, seconds=600.0)
        notify("step", cohort="c1", name="math", step=1, steps=9, loss=1.0)
        notify("died", job=job)
        notify("job", job=job, seconds=61.2, left=2, remaining=400.0)
        notify("cohort", name="c1", rows=tmp_path)
        notify("end")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "3 jobs to do, about 10 min",
        "a worker died; once more: c1: train math",
        "c1: train math: 61 s; 1 of 3 jobs, 7 min left",
        f"c1: rows are in '{tmp_path}'",
    ]


def test_time_left_is_judged_by_jobs_of_the_same_kind(tmp_path):
    times = Times(tmp_path / "times.jsonl")
    assert times.of("merge") == KINDS["merge"]
    for seconds in (2.0, 4.0):
        times.add(Job("c", "merge", ("a", "b"), None, "mean", 2), seconds)
    with open(tmp_path / "times.jsonl", "a") as file:
        file.write('{"kind": "mer')  # a kill in the middle of a line
    again = Times(tmp_path / "times.jsonl")
    assert again.of("merge") == 3.0
    assert again.of("pair") == KINDS["pair"]


def test_an_unknown_cohort_is_one_line(capsys):
    from mergeprobe.cli import main

    assert main(["bench", "run", "c99"]) == 1
    assert capsys.readouterr().err.startswith("mergeprobe: no cohort 'c99'; known are t1")
    assert main(["bench", "run", "real"]) == 1
    assert "pass --data FOLDER" in capsys.readouterr().err
