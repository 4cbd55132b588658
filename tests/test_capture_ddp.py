"""Two processes under DistributedDataParallel (gloo): each measures half of the items."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergeprobe import read_probe
from tests.test_live import PAIRS, loop

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    loop(folder / "other.safetensors", PAIRS[::2])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.capture_ddp", str(folder)]
    both = [
        subprocess.Popen(
            [*command, str(rank), str(port)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=500)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)
    return folder, said


def trained(folder, name):
    files = sorted(folder.glob(f"{name}-*.safetensors"))
    assert len(files) == 2
    assert files[0].stem.split("-")[2] == files[1].stem.split("-")[2], "stopped at one step"
    one, two = (load_file(file) for file in files)
    assert all(torch.equal(one[key], two[key]) for key in one), "the processes agree"
    return one, int(files[0].stem.split("-")[2])


def test_training_is_not_changed(run):
    folder, _ = run
    ours, theirs = trained(folder, "with")[0], trained(folder, "without")[0]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_moments_and_gradients_are_reduced(run):
    """What two processes measured on halves is what one measures on everything."""
    folder, _ = run
    both, alone = read_probe(folder / "both.safetensors"), read_probe(folder / "alone.safetensors")
    assert torch.equal(both.calibration.ids, alone.calibration.ids)
    for name in alone.updates:
        assert torch.equal(both.updates[name].B, alone.updates[name].B)
        for part in ("gradient", "gradient_base"):
            ours, theirs = getattr(both, part)[name], getattr(alone, part)[name]
            assert (ours - theirs).norm() < 1e-5 * theirs.norm()
        for part in ("inputs", "outputs"):
            ours, theirs = getattr(both, part)[name], getattr(alone, part)[name]
            assert (ours.dense() - theirs.dense()).norm() < 1e-2 * theirs.dense().norm()
            assert ours.trace == pytest.approx(theirs.trace, rel=1e-2)  # stored as bf16
    assert torch.allclose(both.calibration.loss, alone.calibration.loss, rtol=1e-5)
    assert torch.allclose(both.calibration.base_loss, alone.calibration.base_loss, rtol=1e-5)
    assert torch.equal(both.drift.logprob, alone.drift.logprob)
    assert both.inputs["model.layers.0.mlp.gate_proj"].factor.data_ptr() == (
        both.inputs["model.layers.0.mlp.up_proj"].factor.data_ptr()
    ), "modules that read one input still share its moment"


def test_one_process_that_cannot_measure_does_not_hang_the_others(run):
    folder, said = run
    assert trained(folder, "broken")[1] == 4, "training went on"
    assert not (folder / "broken.safetensors").exists()
    assert "no probe at step 2" in said[0]
    assert "1 of 2 processes" in said[0]


def test_the_forecast_stops_every_process(run):
    folder, said = run
    assert trained(folder, "stopped")[1] == 2
    assert read_probe(folder / "live.safetensors").meta["step"] == 2
    assert "other" in said[0]
    assert "training stops here" in said[0]
    assert "training stops here" not in said[1]
