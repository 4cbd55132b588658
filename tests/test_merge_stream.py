"""merge_folders: the numbers of merge, from disk to disk, whole or not at all."""

import math
import os
import signal
from importlib import import_module

import pytest
import torch
from builders import tiny_adapter

from mergeprobe.adapters.checkpoint import Adapter, read_adapter, write_adapter
from mergeprobe.compose.merge import METHODS, merge
from mergeprobe.compose.merge.recompress import cut_exactly, recompress
from mergeprobe.compose.merge.stream import LARGEST_SERVED, merge_folders
from mergeprobe.errors import AdapterError, AdapterMismatch, MergeError, OutputExists
from mergeprobe.lowrank import LowRank, truncate

DATA_FREE = [n for n, row in METHODS.items() if not row.needs and row.kind != "search"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    work = tmp_path_factory.mktemp("adapters")
    parts = [tiny_adapter(k, rank=2 + k, name=f"a{k}") for k in range(3)]
    # a module that only some have
    parts[1].modules.pop("model.layers.1.mlp.down_proj")
    return [write_adapter(part, work / part.name) for part in parts]


def same(one, two, tolerance=1e-6):
    assert one.keys() == two.keys()
    for module in one:
        assert torch.allclose(one[module].dense(), two[module].dense(), atol=tolerance), module


@pytest.mark.parametrize("space", ["full", "core"])
@pytest.mark.parametrize("method", DATA_FREE)
def test_folders_merge_as_adapters_in_memory_do(folders, tmp_path, method, space):
    in_memory = merge([read_adapter(f) for f in folders], method, rank=4, space=space, seed=3)
    done = merge_folders(folders, method, out=tmp_path / "out", rank=4, space=space, seed=3)
    back = read_adapter(tmp_path / "out")
    same(back.modules, in_memory.adapter.modules)
    assert (done.rank, back.ranks) == (4, [4])
    assert back.config["lora_alpha"] == back.config["r"] == 4
    assert done.certificate.total == pytest.approx(in_memory.certificate.total, abs=1e-9)
    assert back.card["certificate"]["total"] == done.certificate.total
    assert back.card["merged_from"] == ["a0", "a1", "a2"]


def test_progress_counts_every_module(folders, tmp_path):
    seen = []
    merge_folders(folders, out=tmp_path / "out", progress=lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [(k + 1, 12) for k in range(12)]
    assert seen[0][2] == "model.layers.0.mlp.down_proj"


def test_a_module_draws_the_same_whatever_else_is_merged():
    parts = [tiny_adapter(k) for k in range(2)]
    module = "model.layers.2.self_attn.q_proj"
    alone = [Adapter(p.name, {module: p.modules[module]}, base=p.base) for p in parts]
    whole = merge(parts, "dare_linear", seed=5).adapter.modules[module].dense()
    assert torch.equal(whole, merge(alone, "dare_linear", seed=5).adapter.modules[module].dense())
    assert not torch.equal(whole, merge(parts, "dare_linear").adapter.modules[module].dense())


# ---- weights by part of the model, and scaling


def test_weights_by_part_multiply():
    parts = [tiny_adapter(k, layers=3) for k in range(2)]
    weights = {"all": [1.0, 0.5], "late": [0.0, 2.0], "mlp": [3.0, 1.0]}
    merged = merge(parts, "linear", weights=weights).adapter.modules
    expected = {
        "model.layers.0.self_attn.q_proj": (1.0, 0.5),
        "model.layers.2.self_attn.v_proj": (0.0, 1.0),
        "model.layers.1.mlp.up_proj": (3.0, 0.5),
        "model.layers.2.mlp.down_proj": (0.0, 1.0),
    }
    for module, (first, second) in expected.items():
        one, two = (part.modules[module].dense() for part in parts)
        assert torch.allclose(merged[module].dense(), first * one + second * two, atol=1e-6), module


def test_scaling_multiplies_the_merge():
    parts = [tiny_adapter(k) for k in range(2)]
    once, half = (merge(parts, "ties", scaling=s).adapter.modules for s in (1.0, 0.5))
    for module, update in once.items():
        assert torch.allclose(0.5 * update.dense(), half[module].dense(), atol=1e-6)


# ---- truncation


def exact_error(update, rank):
    s = torch.linalg.svdvals(update.B.double() @ update.A.double() * update.scaling)
    return float(s[rank:].square().sum().sqrt() / s.square().sum().sqrt())


def drawn(out, r, into, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(out, r, generator=draw), torch.randn(r, into, generator=draw), 0.5)


@pytest.mark.parametrize(
    "update",
    [
        drawn(40, 12, 60),
        drawn(60, 12, 40),
        LowRank(drawn(40, 6, 60).B.repeat(1, 2), drawn(40, 12, 60).A),  # dependent columns in B
        LowRank(drawn(40, 12, 60).B, drawn(40, 6, 60).A.repeat(2, 1)),  # and rows in A
        drawn(40, 90, 60),  # longer than the module is wide
        LowRank(torch.zeros(40, 12), torch.ones(12, 60)),
    ],
)
def test_recompression_is_the_best_of_its_rank(update):
    found, error, size = recompress(update, 5)
    best, _ = truncate(update, 5)
    assert found.r == 5
    assert size == pytest.approx(float(update.dense().double().norm()), rel=1e-5)
    assert torch.allclose(found.dense(), best.dense(), atol=1e-5 * max(1.0, size))
    if size:
        assert error == pytest.approx(exact_error(update, 5), abs=1e-6)
        lost = float((found.dense().double() - update.dense().double()).norm()) / size
        assert error == pytest.approx(lost, abs=1e-6)


def test_a_full_svd_is_asked_for_by_name():
    matrix = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    found, error, size = cut_exactly(matrix, 20)
    s = torch.linalg.svdvals(matrix.double())
    assert error == pytest.approx(float(s[20:].norm() / s.norm()), rel=1e-9)
    lost = float((found.dense().double() - matrix.double()).norm()) / size
    assert error == pytest.approx(lost, rel=1e-5)
    update = Adapter("a", {"q": LowRank(matrix, torch.eye(300))}, base="b")
    full, sampled = (
        merge([update], "ties", rank=20, exact_svd=exact).certificate.total
        for exact in (True, False)
    )
    assert full < sampled < 1.05 * full


def test_rounding_counts_in_the_certificate(folders, tmp_path):
    done = merge_folders(folders, "sum", out=tmp_path / "half", dtype=torch.bfloat16)
    exact = merge([read_adapter(f) for f in folders], "sum").adapter.modules
    back = read_adapter(tmp_path / "half").modules
    lost = sum(float((back[m].dense() - exact[m].dense()).square().sum()) for m in exact)
    whole = sum(float(exact[m].dense().square().sum()) for m in exact)
    assert done.certificate.total == pytest.approx(math.sqrt(lost / whole), rel=1e-3)
    assert 1e-4 < done.certificate.total < 1e-2


def test_more_than_servers_take_is_cut_to_what_they_take(tmp_path, monkeypatch):
    assert LARGEST_SERVED == 512
    # `merge` in mergeprobe.compose is the function, so the module is asked for by name
    monkeypatch.setattr(import_module("mergeprobe.compose.merge.stream"), "LARGEST_SERVED", 6)
    parts = [write_adapter(tiny_adapter(k, name=f"a{k}"), tmp_path / f"a{k}") for k in range(2)]
    done = merge_folders(parts, "sum", out=tmp_path / "out")
    assert (done.rank, done.exact_rank) == (6, 8)
    assert done.certificate.total > 0


# ---- what is refused, and what is left behind


@pytest.mark.parametrize(
    ("kwargs", "line"),
    [
        ({"rank": 10, "method": "linear"}, "rank 10 is above the exact rank of this merge, 9"),
        ({"rank": 13, "method": "ties"}, "rank 13 is above the exact rank of this merge, 12"),
        ({"method": "linear", "weights": [1, 2]}, "2 weights for 3 adapters; expected one"),
        ({"method": "linear", "weights": {"late": [1]}}, "1 weights for late for 3 adapters"),
        ({"method": "linear", "weights": {"upper": [1, 1, 1]}}, "no part 'upper' to weight"),
        ({"method": "ties", "weights": {"late": [0, 0, 0]}}, "all weights are 0, but 'ties'"),
        ({"method": "ties", "density": 0.0}, "density is 0.0"),
        ({"method": "ties", "density": 1.01}, "density is 1.01"),
        ({"method": "ties", "sparsity": 0.5}, "'ties' has no option 'sparsity'; it takes density"),
        ({"method": "linear", "space": "moon"}, "unknown space 'moon'; known are full, knots"),
        ({"method": "regmean"}, "'regmean' needs a probe of each adapter"),
        ({"method": "regmean", "space": "core", "probes": []}, "it runs in the full space only"),
        ({"method": "lorahub"}, "'lorahub' finds weights by running the base model"),
        ({"method": "linear", "scaling": math.inf}, "scaling is inf"),
    ],
)  # fmt: skip
def test_refusals_leave_nothing_behind(folders, tmp_path, kwargs, line):
    with pytest.raises(MergeError) as caught:
        merge_folders(folders, out=tmp_path / "new" / "out", **kwargs)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_ratios_that_vanish_on_one_part_are_found(folders, tmp_path):
    weights = {"all": [1, 0, 0], "late": [0, 1, 1]}
    with pytest.raises(MergeError, match=r"all weights of 'model\.layers\.2\..*' are 0"):
        merge_folders(folders, "ties", out=tmp_path / "out", weights=weights)


def test_bad_adapters_are_named(folders, tmp_path):
    broken = tiny_adapter(7, name="broken")
    broken.modules["model.layers.2.mlp.up_proj"].B[0, 0] = math.nan
    naught = tiny_adapter(8, name="naught", scale=0.0)
    for adapter, error, line in (
        (broken, AdapterMismatch, "'broken' has NaN or infinite entries in lora_B of 'model"),
        (naught, AdapterError, "'naught' is zero everywhere"),
    ):
        raw(adapter, tmp_path / adapter.name)
        with pytest.raises(error, match=line):
            merge_folders([folders[0], tmp_path / adapter.name], out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(MergeError, match="two adapters are called 'a0'"):
        merge_folders([folders[0], folders[0]], out=tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(OutputExists):
        merge_folders(folders, out=tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def raw(adapter, path):
    """A PEFT folder of what write_adapter refuses."""
    from safetensors.torch import save_file

    good = tiny_adapter(0, name=adapter.name)
    write_adapter(good, path)
    (path / "mergeprobe.json").unlink()
    prefix = "base_model.model."
    tensors = {}
    for module, update in adapter.modules.items():
        tensors[f"{prefix}{module}.lora_A.weight"] = update.A
        tensors[f"{prefix}{module}.lora_B.weight"] = update.B
    save_file(tensors, path / "adapter_model.safetensors")


@pytest.mark.parametrize("before", [False, True])
def test_killed_in_the_middle_leaves_no_half_written_adapter(folders, tmp_path, before):
    out = tmp_path / "out"
    if before:
        merge_folders(folders, out=out)
    kept = {p.name: p.read_bytes() for p in out.iterdir()} if before else {}
    at_work, report = os.pipe()
    child = os.fork()  # a fresh process would spend its life importing
    if child == 0:
        torch.set_num_threads(1)

        def halfway(done, of, module):
            if done == 5:
                os.write(report, b"5")
                signal.pause()

        try:
            merge_folders(folders, "ties", out=out, force=True, progress=halfway)
        finally:
            os._exit(1)
    os.close(report)
    assert os.read(at_work, 1) == b"5"
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    os.close(at_work)
    assert ({p.name: p.read_bytes() for p in out.iterdir()} if out.exists() else {}) == kept
    # and what it spooled went with it
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.parent != out] == []


def test_killed_while_writing_leaves_no_half_written_adapter(folders, tmp_path, monkeypatch):
    out, writer = tmp_path / "out", import_module("mergeprobe.adapters.write")
    real = writer.sha256

    def interrupted(path):
        assert real(path)  # the weights are on disk, the card is not
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "sha256", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_folders(folders, out=out)
    assert list(tmp_path.iterdir()) == []
