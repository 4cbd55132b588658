"""The bank's queue: whatever is killed, the same command ends with the same rows."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from mergeprobe.bench.bank.folder import CohortFolder, write_spec
from mergeprobe.bench.bank.queue import run_cohorts
from mergeprobe.bench.pool import Pool
from mergeprobe.bench.training import newest_checkpoint
from mergeprobe.errors import MergeProbeError
from tests.bank_samples import read, same_rows, tiny
from tests.tiny_base import write_tiny_base


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


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
