"""Exports: what each server takes, what is lowered and at what cost, and the files themselves."""

import json
import shlex
import subprocess
from dataclasses import replace

import pytest
import torch
import yaml
from builders import tiny_adapter
from compose_samples import peft_folder, tiny_llama, tokens
from gguf import GGUFReader
from peft import PeftModel
from tiny_base import write_tiny_base
from typer.testing import CliRunner

from mergeprobe.adapters.attach import attached
from mergeprobe.adapters.base import load_base
from mergeprobe.adapters.checkpoint import CONFIG, Adapter, read_adapter, read_tensors
from mergeprobe.cli.app import app
from mergeprobe.compose import apply_plan, merge_folders
from mergeprobe.compose.deployment import LogitGroup
from mergeprobe.compose.mergekit import read_mergekit
from mergeprobe.errors import AdapterMismatch, BaseModelError, ExportError, OutputExists
from mergeprobe.evaluate.data import Example
from mergeprobe.export import TARGETS, export_deployment, unmerged
from mergeprobe.export.base_shape import BaseShape, base_shape, gguf_shape
from mergeprobe.export.check import check_folder
from mergeprobe.export.fit import written_error
from mergeprobe.export.gguf_adapter import halved, interleaved, read_gguf, tensor_names
from mergeprobe.lowrank import LowRank, truncate
from mergeprobe.plan import Action, AdapterRef, Group, Plan, Route

SERVERS = ("vllm", "sglang", "lorax")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base and three stock PEFT adapters: of rank 4, of rank 2 on q alone, and rsLoRA."""
    folder = tmp_path_factory.mktemp("export")
    tiny_llama().save_pretrained(folder / "base")
    peft_folder(folder / "adapters/a", 0)
    peft_folder(folder / "adapters/b", 1, r=2, alpha=8, targets=("q_proj",))
    peft_folder(folder / "adapters/c", 2, use_rslora=True)
    return folder


@pytest.fixture(scope="module")
def adapters(root):
    return {name: read_adapter(root / "adapters" / name) for name in "abc"}


@pytest.fixture(scope="module")
def deployment(root, adapters):
    """a and c merged to rank 8 as 'pair', b for itself."""
    plan = Plan(
        base=str(root / "base"),
        adapters=tuple(AdapterRef(name=name) for name in adapters),
        groups=(
            Group(name="pair", adapters=("a", "c"), action=Action.merge, method="mean"),
            Group(name="alone", adapters=("b",), action=Action.route),
        ),
    )
    return apply_plan(plan, adapters, root / "deployment")


def only(adapter, **kwargs):
    return unmerged({adapter.name: replace(adapter, base="base", **kwargs)})


# ---- every target


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_written_is_the_deployments_update(root, deployment, target, tmp_path):
    done = export_deployment(deployment, target, tmp_path / "out", base=root / "base")
    assert [one.name for one in done.adapters] == ["pair", "b"]
    for one in done.adapters:
        assert one.worst_error < 1e-12
        assert (tmp_path / "out" / one.path).exists()
        assert all(check.ok for check in one.checks)
    data = json.loads((tmp_path / "out/export.json").read_text())
    assert data["target"] == target
    assert data["names"].keys() == {"a", "b", "c"}
    assert set(data["files"]) <= {path.name for path in (tmp_path / "out").iterdir()}
    page = (tmp_path / "out/README.md").read_text()
    assert "NO" not in page
    assert "| pair |" in page or "pair" in done.names["a"]


@pytest.mark.parametrize("target", ["peft", *SERVERS])
def test_a_folder_comes_back_as_the_same_adapter(root, deployment, target, tmp_path):
    export_deployment(deployment, target, tmp_path / "out", base=root / "base")
    for name, adapter in deployment.folders().items():
        back = read_adapter(tmp_path / "out/adapters" / name)
        assert back.base == str(root / "base")
        for module, update in back.modules.items():
            assert update.scaling == 1.0
            if module in adapter.modules:
                assert torch.equal(update.dense(), adapter.modules[module].dense())
            else:
                assert not update.dense().any()


@torch.no_grad()
@pytest.mark.parametrize("target", ["peft", *SERVERS])
def test_stock_peft_runs_every_folder_as_the_deployment_does(root, adapters, target, tmp_path):
    export_deployment(unmerged(adapters), target, tmp_path / "out", base=root / "base")
    for name, adapter in adapters.items():
        with attached(tiny_llama(), adapter.modules) as model:
            expected = model(tokens()).logits
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out/adapters" / name)
        assert (loaded(tokens()).logits - expected).abs().max() < 1e-4


@torch.no_grad()
def test_the_script_for_peft_runs(root, adapters, tmp_path):
    export_deployment(unmerged(adapters), "peft", tmp_path / "out", base=root / "base")
    script, found = tmp_path / "out/load.py", {"__file__": str(tmp_path / "out/load.py")}
    exec(compile(script.read_text(), str(script), "exec"), found)
    with attached(tiny_llama(), adapters["b"].modules) as model:
        expected = model(tokens()).logits
    found["model"].set_adapter("b")
    assert (found["model"](tokens()).logits - expected).abs().max() < 1e-4


def test_an_output_that_is_there_is_kept(deployment, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("kept")
    with pytest.raises(OutputExists):
        export_deployment(deployment, "vllm", tmp_path / "out")
    assert (tmp_path / "out/mine").read_text() == "kept"


def test_an_unknown_target_is_refused_by_name(deployment, tmp_path):
    with pytest.raises(ExportError, match="unknown target 'tgi'; known are peft, vllm"):
        export_deployment(deployment, "tgi", tmp_path / "out")
    with pytest.raises(ExportError, match="names no base"):
        export_deployment(replace(deployment, base=""), "vllm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- what cannot be said


def test_composed_logits_are_refused_until_their_loss_is_accepted(adapters, tmp_path):
    given = replace(unmerged(adapters), compositions={"both": LogitGroup(("a", "c"), (1.0, 1.0))})
    with pytest.raises(ExportError, match="'both' composes the logits of a, c, which vllm cannot"):
        export_deployment(given, "vllm", tmp_path / "out", base="base/model")
    assert not (tmp_path / "out").exists()


def test_routing_by_prompt_is_refused_until_its_loss_is_accepted(root, adapters, tmp_path):
    given = replace(unmerged(adapters), route=Route(by="prompt"))
    for target in TARGETS:
        with pytest.raises(ExportError, match=r"prompts are routed.*--lower"):
            export_deployment(given, target, tmp_path / target, base=root / "base")
    done = export_deployment(given, "vllm", tmp_path / "out", base=root / "base", lower=True)
    assert done.lowered == ("prompts are routed, which vllm cannot; the caller names the adapter",)
    assert done.lowered[0] in (tmp_path / "out/README.md").read_text()


def test_saved_modules_go_to_peft_only(tmp_path):
    adapter = replace(tiny_adapter(0), extras={"model.norm.weight": torch.ones(12)})
    given = only(adapter)
    with pytest.raises(ExportError, match=r"also trained 'model\.norm\.weight', which vllm"):
        export_deployment(given, "vllm", tmp_path / "out")
    export_deployment(given, "peft", tmp_path / "out")
    kept = read_adapter(tmp_path / "out/adapters/a0", extras=True).extras
    assert torch.equal(kept["model.norm.weight"], torch.ones(12))


def test_a_module_that_a_server_does_not_take_is_named(tmp_path):
    draw = torch.Generator().manual_seed(0)
    head = LowRank(torch.randn(9, 2, generator=draw), torch.randn(2, 12, generator=draw))
    given = only(Adapter("h", {"lm_head": head}))
    with pytest.raises(ExportError, match="'h' adapts 'lm_head', which vllm takes no LoRA on"):
        export_deployment(given, "vllm", tmp_path / "out")
    assert export_deployment(given, "sglang", tmp_path / "out").adapters[0].error < 1e-12


# ---- what is lowered


def test_scaling_is_folded_and_ranks_are_made_one(tmp_path):
    adapter = tiny_adapter(0, rank=3, scaling=2.5)
    small = {m: truncate(u, 1)[0] * 2.5 for m, u in adapter.modules.items() if "down" in m}
    given = only(replace(adapter, modules=adapter.modules | small))
    done = export_deployment(given, "vllm", tmp_path / "out")
    assert done.adapters[0].lowered == (
        "scaling folded into B (it was 2.5)",
        "padded with zeros to one rank (ranks were 1 to 3)",
    )
    assert 0 < done.adapters[0].worst_error < 1e-6  # 2.5 B is rounded in float32
    config = json.loads((tmp_path / "out/adapters/a0" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 3, {})
    assert config["target_modules"] == ["down_proj", "q_proj", "up_proj", "v_proj"]
    shapes = {tuple(t.shape) for t in read_tensors(
        tmp_path / "out/adapters/a0/adapter_model.safetensors").values()}  # fmt: skip
    assert {min(shape) for shape in shapes} == {3}


def test_truncation_states_its_true_error_by_hand(tmp_path):
    """diag(3, 2, 1) cut to rank 1 loses √(2² + 1²) of √(3² + 2² + 1²)."""
    update = LowRank(torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.eye(3))
    name = "model.layers.0.mlp.down_proj"
    done = export_deployment(only(Adapter("d", {name: update})), "vllm", tmp_path / "o", max_rank=1)
    assert done.adapters[0].error == pytest.approx((5 / 14) ** 0.5, rel=1e-6)
    assert done.adapters[0].lowered == ("truncated from rank 3 to 1",)
    assert done.rank == 1
    back = read_adapter(tmp_path / "o/adapters/d").modules[name].dense()
    assert torch.allclose(back, torch.diag(torch.tensor([3.0, 0.0, 0.0])), atol=1e-6)


def test_a_rank_above_the_largest_bucket_needs_a_word(tmp_path):
    draw = torch.Generator().manual_seed(0)
    wide = LowRank(torch.randn(600, 520, generator=draw), torch.randn(520, 600, generator=draw))
    given = only(Adapter("w", {"model.layers.0.mlp.down_proj": wide}))
    with pytest.raises(ExportError, match="has rank 520, but vllm takes 512 at most; --max-rank"):
        export_deployment(given, "vllm", tmp_path / "out")
    done = export_deployment(given, "vllm", tmp_path / "out", max_rank=512)
    assert (done.rank, done.adapters[0].rank) == (512, 512)
    assert 0 < done.adapters[0].error < 0.05


@pytest.mark.parametrize(("rank", "bucket"), [(1, 1), (2, 8), (8, 8), (65, 128), (300, 320)])
def test_the_bucket_is_the_smallest_that_holds_the_rank(rank, bucket):
    assert TARGETS["vllm"].bucket(rank) == bucket
    assert TARGETS["sglang"].bucket(rank) == rank


def test_bfloat16_costs_what_it_costs(root, adapters, tmp_path):
    done = export_deployment(
        unmerged(adapters), "vllm", tmp_path / "out", base=root / "base", dtype=torch.bfloat16
    )
    for one in done.adapters:
        assert 1e-4 < one.error < 2**-8  # half a unit of 8 bits in each factor, at most
    kept = read_tensors(tmp_path / "out/adapters/a/adapter_model.safetensors")
    assert {t.dtype for t in kept.values()} == {torch.bfloat16}


def test_sglang_gets_q_k_v_and_gate_up_whole(root, adapters, tmp_path):
    """Its loader stacks them and fails where v is missing, or up stands without gate."""
    done = export_deployment(unmerged(adapters), "sglang", tmp_path / "out", base=root / "base")
    shapes = base_shape(root / "base").modules
    back = read_adapter(tmp_path / "out/adapters/b").modules
    assert sorted(back) == sorted(
        f"model.layers.{n}.self_attn.{p}_proj" for n in range(2) for p in "kqv"
    )
    assert {m: u.shape for m, u in back.items()} == {m: shapes[m] for m in back}
    assert "4 modules of zeros added" in done.adapters[1].lowered[1]
    assert done.adapters[1].error < 1e-12


def test_zeros_of_an_unknown_shape_are_not_guessed(adapters, tmp_path):
    with pytest.raises(ExportError, match=r"needs '.*k_proj'.* shape is not known; .*--base"):
        export_deployment(only(adapters["b"]), "sglang", tmp_path / "out")


def test_lorax_gets_every_layer_or_it_would_drop_the_module(root, adapters, tmp_path):
    one = {m: u for m, u in adapters["a"].modules.items() if ".1." in m}
    given = only(replace(adapters["a"], modules=one))
    done = export_deployment(given, "lorax", tmp_path / "out", base=root / "base")
    back = read_adapter(tmp_path / "out/adapters/a").modules
    assert back.keys() == adapters["a"].modules.keys()
    assert not any(u.dense().any() for m, u in back.items() if ".0." in m)
    assert done.adapters[0].error < 1e-12
    # without the base nobody knows how many layers there are, and the report says so
    done = export_deployment(given, "lorax", tmp_path / "blind")
    told = {check.name: check.ok for check in done.adapters[0].checks}
    assert told["complete"] is None
    assert "not told" in (tmp_path / "blind/README.md").read_text()


def test_an_adapter_of_another_base_is_refused(root, tmp_path):
    with pytest.raises(ExportError, match="fits the base"):
        export_deployment(only(tiny_adapter(0)), "vllm", tmp_path / "out", base=root / "base")
    assert not (tmp_path / "out").exists()


def test_the_checks_can_fail(adapters, root, tmp_path):
    """A stock rsLoRA folder with a rank pattern, as it is, for each reason by name."""
    target = TARGETS["sglang"]
    found = {c.name: c for c in check_folder(root / "adapters/c", target, None)}
    assert (found["plain LoRA"].ok, found["plain LoRA"].said) == (False, "rsLoRA")
    assert found["complete"].ok is False  # q and v without k
    assert found["fits the base"].ok is None
    folder = tmp_path / "pattern"
    peft_folder(folder, 3, rank_pattern={"q_proj": 2})
    found = {c.name: c for c in check_folder(folder, TARGETS["vllm"], None)}
    assert found["one rank"].said == "tensors have ranks [2, 4], the config says 4"
    assert "rank pattern" in found["plain LoRA"].said
    wrong = base_shape(root / "base")
    wrong = replace(wrong, modules=dict.fromkeys(wrong.modules, (7, 7)))
    assert {c.name: c for c in check_folder(folder, target, wrong)}["fits the base"].ok is False


def test_the_error_of_what_was_written_by_hand():
    one, two = LowRank(torch.eye(2), torch.eye(2)), LowRank(torch.eye(2), torch.eye(2), 1.5)
    assert written_error({"m": one}, {"m": one}) == (0.0, 0.0)
    assert written_error({"m": one}, {"m": two}) == pytest.approx((0.5, 0.5))
    # m keeps √2 of norm, n of the same norm is lost: √(2 / 4) of the whole
    assert written_error({"m": one, "n": one}, {"m": one}) == pytest.approx((0.5**0.5, 1.0))
    assert written_error({"m": one}, {"m": one, "n": one})[0] == pytest.approx(1.0)


# ---- launch commands


def command(folder):
    """The words that the script would run, with `exec` made an echo of its arguments."""
    text = (folder / "serve.sh").read_text().replace("exec ", "printf '%s\\n' ")
    done = subprocess.run(["sh", "-s"], input=text.replace('cd "$(dirname "$0")"', f"cd {folder}"),
                          capture_output=True, text=True, check=True)  # fmt: skip
    return done.stdout.splitlines()


def test_vllm_is_started_with_names_bucket_and_slots(root, deployment, tmp_path):
    export_deployment(deployment, "vllm", tmp_path / "out", base=root / "base")
    assert command(tmp_path / "out") == [
        "vllm", "serve", str(root / "base"), "--enable-lora", "--max-lora-rank", "8",
        "--max-loras", "2", "--max-cpu-loras", "2",
        "--lora-modules", "pair=adapters/pair", "b=adapters/b",
    ]  # fmt: skip


def test_every_adapter_name_can_be_a_model_of_its_own(root, deployment, tmp_path):
    done = export_deployment(
        replace(deployment, base="org/base"), "vllm", tmp_path / "out", every_name=True
    )
    assert done.names == {"a": "a", "c": "c", "b": "b"}
    said = command(tmp_path / "out")
    assert said[2] == "org/base"
    assert said[-3:] == ["a=adapters/pair", "c=adapters/pair", "b=adapters/b"]


def test_names_that_a_shell_or_server_would_split_are_quoted(adapters, tmp_path):
    given = unmerged({"a b=c, $HOME": replace(adapters["a"], base="it's")})
    export_deployment(given, "vllm", tmp_path / "out")
    said = command(tmp_path / "out")
    assert said[2] == "it's"
    assert json.loads(said[-1]) == {"name": "a b=c, $HOME", "path": "adapters/a b=c, $HOME"}
    with pytest.raises(ExportError, match="splits file names"):
        TARGETS["llama.cpp"].launch(replace(shipment(), served=shipment("a,b").served))


def shipment(name="a"):
    from mergeprobe.export.launch import Served, Shipment

    return Shipment("base", (Served(name, f"adapters/{name}"),), 8, ("q_proj",))


def test_sglang_and_lorax_are_started_with_their_own_words(root, adapters, tmp_path):
    given = unmerged({"a": adapters["a"]})
    export_deployment(given, "sglang", tmp_path / "s", base=root / "base")
    said = " ".join(command(tmp_path / "s"))
    assert f"sglang.launch_server --model-path {root / 'base'} --enable-lora" in said
    targets = "down_proj gate_proj k_proj q_proj up_proj v_proj"
    assert f"--max-lora-rank 4 --lora-target-modules {targets} --max-loras-per-batch 2" in said
    assert said.endswith("--lora-paths a=adapters/a")
    export_deployment(given, "lorax", tmp_path / "l", base=root / "base")
    said = " ".join(command(tmp_path / "l"))
    assert said == (
        f"lorax-launcher --model-id {root / 'base'} --adapter-source local "
        f"--preloaded-adapter-ids {tmp_path / 'l/adapters/a'}"
    )


def test_llama_cpp_loads_its_files_by_order(root, adapters, tmp_path):
    done = export_deployment(unmerged(adapters), "llama.cpp", tmp_path / "g", base=root / "base")
    text = (tmp_path / "g/serve.sh").read_text()
    files = [shlex.split(line.strip(" \\"))[1] for line in text.splitlines() if "--lora " in line]
    assert files == [f"adapters/{name}.gguf" for name in "abc"]
    assert done.names["c"] == "lora id 2 (adapters/c.gguf)"
    # the base is a folder, so somebody must say where its GGUF is
    failed = subprocess.run(["sh", tmp_path / "g/serve.sh"], capture_output=True, text=True)
    assert failed.returncode != 0
    assert "BASE=FILE.gguf" in failed.stderr


# ---- GGUF


def test_rows_of_a_head_alternate_between_its_halves_by_hand():
    rows = torch.arange(8.0)[:, None]
    assert interleaved(rows, 1)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(halved(interleaved(rows, 2), 2), rows)


def test_a_gguf_adapter_holds_what_llama_cpp_reads(tmp_path):
    """Two heads of four rows for q, one for k: worked by hand, tensor by tensor."""
    shape = BaseShape("b", "llama", layers=1, heads=2, kv_heads=1, modules={
        "model.layers.0.self_attn.q_proj": (8, 3), "model.layers.0.self_attn.k_proj": (4, 3),
        "model.layers.0.mlp.down_proj": (2, 3)})  # fmt: skip
    count = {"q_proj": 8, "k_proj": 4}
    modules = {
        f"model.layers.0.self_attn.{name}": LowRank(
            torch.arange(float(rows))[:, None], torch.tensor([[1.0, 2.0, 3.0]]), 2.0
        )
        for name, rows in count.items()
    }
    modules["model.layers.0.mlp.down_proj"] = LowRank(torch.eye(2), torch.ones(2, 3))
    from mergeprobe.export.gguf_adapter import write_gguf

    write_gguf(Adapter("x", modules, base="org/base"), tmp_path / "x.gguf", shape, torch.float32)
    reader = GGUFReader(tmp_path / "x.gguf")
    stated = {key: reader.fields[key].contents() for key in (
        "general.type", "general.architecture", "adapter.type", "adapter.lora.alpha",
        "general.base_model.0.name")}  # fmt: skip
    assert list(stated.values()) == ["adapter", "llama", "lora", 2.0, "org/base"]
    tensors = {t.name: t for t in reader.tensors}
    assert tensors.keys() == {
        f"blk.0.{part}.weight.lora_{side}"
        for part in ("attn_q", "attn_k", "ffn_down") for side in "ab"
    }  # fmt: skip
    # ggml counts the other way round: ne[0] of a is the input, of b the rank
    assert tensors["blk.0.attn_q.weight.lora_a"].shape.tolist() == [3, 2]
    assert tensors["blk.0.attn_q.weight.lora_b"].shape.tolist() == [2, 8]
    q = tensors["blk.0.attn_q.weight.lora_b"].data.reshape(8, 2)
    assert q[:, 0].tolist() == [0, 4, 2, 6, 8, 12, 10, 14]  # 2 × (0 2 1 3 4 6 5 7)
    assert q[:, 1].tolist() == [0] * 8  # padded to down_proj's rank
    k = tensors["blk.0.attn_k.weight.lora_b"].data.reshape(4, 2)
    assert k[:, 0].tolist() == [0, 4, 2, 6]
    assert tensors["blk.0.ffn_down.weight.lora_b"].data.reshape(2, 2).tolist() == [[1, 0], [0, 1]]
    back = read_gguf(tmp_path / "x.gguf", shape, modules)
    assert written_error(modules, back) == pytest.approx((0.0, 0.0), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gguf_adapter_comes_back(root, adapters, dtype, tmp_path):
    done = export_deployment(
        unmerged(adapters), "llama.cpp", tmp_path / "out", base=root / "base", dtype=dtype
    )
    bound = {torch.float32: 1e-12, torch.float16: 1e-3, torch.bfloat16: 2**-8}[dtype]
    assert all(one.error < bound for one in done.adapters)
    shape = base_shape(root / "base")
    back = read_gguf(tmp_path / "out/adapters/a.gguf", shape, adapters["a"].modules)
    kept = {m: u.dense() for m, u in adapters["a"].modules.items()}
    assert all(torch.allclose(back[m].dense(), kept[m], atol=0.02) for m in kept)


def test_what_llama_cpp_has_no_tensor_for_is_refused(root):
    head = {"lm_head": LowRank(torch.ones(4, 1), torch.ones(1, 4))}
    odd = {"model.layers.0.extra_proj": LowRank(torch.ones(4, 1), torch.ones(1, 4))}
    shape = BaseShape("b", "llama", 1, 2, 2, tied=True)
    with pytest.raises(ExportError, match="'lm_head': its output layer is the embedding"):
        tensor_names(head, shape)
    assert tensor_names(head, replace(shape, tied=False)) == {"lm_head": "output.weight"}
    with pytest.raises(ExportError, match="a llama has no such tensor"):
        tensor_names(odd, shape)
    with pytest.raises(ExportError, match="is a mamba, whose layout"):
        tensor_names(odd, replace(shape, kind="mamba"))
    with pytest.raises(AdapterMismatch, match=r"is \(8, 8\) in base 'b'"):
        tensor_names(head, replace(shape, tied=False, modules={"lm_head": (8, 8)}))


def test_a_base_that_is_no_gguf_is_refused(adapters, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    for name in ("broken.gguf", "absent.gguf"):
        with pytest.raises(BaseModelError, match=name):
            gguf_shape(tmp_path / name, name)


# ---- mergekit


def test_a_recipe_adds_a_folders_update_as_it_is(root, deployment, tmp_path):
    export_deployment(deployment, "mergekit", tmp_path / "out", base=root / "base")
    recipe = yaml.safe_load((tmp_path / "out/pair.yml").read_text())
    assert recipe["models"] == [
        {"model": f"{root / 'base'}+./adapters/pair", "parameters": {"weight": 1.0}}
    ]
    read = read_mergekit(tmp_path / "out/pair.yml")
    assert (read.folders, read.method, read.weights) == (("./adapters/pair",), "linear", (1.0,))
    assert "mergekit-yaml pair.yml merged/pair" in (tmp_path / "out/merge.sh").read_text()


@pytest.mark.parametrize(
    ("method", "options", "weights"),
    [
        ("mean", {}, None),
        ("linear", {}, {"a": 0.7, "c": 0.2}),
        ("sum", {"scale": 0.4}, None),
        ("ties", {"density": 0.4}, {"a": 2.0, "c": 1.0}),
        ("breadcrumbs", {"density": 0.8, "gamma": 0.1}, None),
    ],
)
def test_a_recipe_of_the_rule_gives_the_same_merge(
    root, adapters, method, options, weights, tmp_path
):
    """Written, read back by our reader of mergekit's YAML, and carried out: the same update."""
    plan = Plan(
        base=str(root / "base"),
        adapters=(AdapterRef(name="a"), AdapterRef(name="c")),
        groups=(Group(name="g", adapters=("a", "c"), action=Action.merge, method=method,
                      options=options, weights=weights),),
    )  # fmt: skip
    made = apply_plan(plan, adapters, tmp_path / "d")
    originals = {name: root / "adapters" / name for name in "ac"}
    export_deployment(made, "mergekit", tmp_path / "out", base=root / "base", originals=originals)
    read = read_mergekit(tmp_path / "out/g.yml")
    again = merge_folders(
        read.folders, read.method, out=tmp_path / "again", weights=read.weights,
        scaling=read.scaling, **read.options,
    )  # fmt: skip
    assert written_error(made.serving["a"].modules, read_adapter(again.path).modules)[0] < 1e-5


def test_a_rule_that_mergekit_lacks_is_refused(root, adapters, tmp_path):
    plan = Plan(
        base=str(root / "base"),
        adapters=(AdapterRef(name="a"), AdapterRef(name="c")),
        groups=(Group(name="g", adapters=("a", "c"), action=Action.merge, method="tsv_m"),),
    )
    made = apply_plan(plan, adapters, tmp_path / "d")
    given = {name: root / "adapters" / name for name in "ac"}
    with pytest.raises(ExportError, match=r"mergekit has no rule 'tsv_m'.*leave --adapters out"):
        export_deployment(made, "mergekit", tmp_path / "out", originals=given)
    with pytest.raises(ExportError, match="merged from"):
        export_deployment(made, "mergekit", tmp_path / "out", originals={"a": given["a"]})
    export_deployment(made, "mergekit", tmp_path / "out")
    with pytest.raises(ExportError, match=r"reads the '\+'"):
        export_deployment(replace(made, base="org/base+x"), "mergekit", tmp_path / "plus")


# ---- loss, and the command line


def test_the_cost_in_loss_is_that_of_what_was_lowered(tmp_path):
    """Composed logits served by name: the difference is that of the two losses."""
    base = load_base(write_tiny_base(tmp_path / "base"), device="cpu")
    parts = {}
    for seed, name in enumerate("ab"):
        draw = torch.Generator().manual_seed(seed)
        parts[name] = Adapter(name, {
            f"model.layers.{n}.mlp.down_proj": LowRank(
                0.3 * torch.randn(48, 2, generator=draw), torch.randn(2, 96, generator=draw)
            ) for n in range(3)
        }, base=str(tmp_path / "base"))  # fmt: skip
    given = unmerged(parts)
    entries = {n: replace(e, group="both", action=Action.logits) for n, e in given.entries.items()}
    mixed = LogitGroup(("a", "b"), (1.0, 1.0))
    given = replace(given, entries=entries, compositions={"both": mixed})
    items = [Example(f"{n} + {n} =", f" {2 * n}") for n in range(6)]
    common = {"base": tmp_path / "base", "loaded": base, "examples": {"a": items}, "lower": True}
    done = export_deployment(given, "vllm", tmp_path / "out", **common)
    from mergeprobe.evaluate.score import batch_of, score, score_deployed

    batch = batch_of(base, items)
    before = score_deployed(base, given, "a", batch).loss.mean()
    after = score(base, parts["a"], batch).loss.mean()
    loss = done.losses["a"]
    assert (loss.deployed, loss.exported) == pytest.approx((float(before), float(after)), abs=1e-5)
    assert loss.difference == pytest.approx(float(after - before), abs=1e-5)
    assert abs(loss.difference) > 1e-3
    assert f"{loss.difference:+.4f}" in (tmp_path / "out/README.md").read_text()


def run(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_the_command_writes_and_says_what_it_wrote(root, deployment, tmp_path):
    done = run(root / "deployment", "--to", "vllm", "--out", tmp_path / "out", "--max-rank", 2)
    assert done.exit_code == 0, done.output
    assert "truncated from rank 8 to 2" in done.output
    assert "start with serve.sh" in done.output
    told = run(root / "deployment", "--to", "sglang", "--out", tmp_path / "s", "--json",
               "--base", root / "base")  # fmt: skip
    assert json.loads(told.output)["names"] == {"a": "pair", "c": "pair", "b": "b"}


def test_the_command_takes_adapters_as_they_are(root, tmp_path):
    done = run(
        root / "adapters",
        "--to",
        "vllm",
        "--out",
        tmp_path / "out",
        "--json",
        "--base",
        root / "base",
    )
    assert done.exit_code == 0, done.exception
    told = json.loads(done.output)
    assert told["names"] == {"a": "a", "b": "b", "c": "c"}
    lowered = {one["name"]: one["lowered"] for one in told["adapters"]}
    assert lowered == {
        "a": [],
        "b": ["scaling folded into B (it was 4)"],
        "c": ["scaling folded into B (it was 2)"],
    }


def test_the_command_refuses_what_it_cannot_do(root, tmp_path):
    done = run(root / "deployment", "--to", "vllm", "--out", tmp_path / "o", "--adapters", root)
    assert done.exit_code == 2
    done = run(root / "deployment", "--to", "vllm", "--out", tmp_path / "o", "--dtype", "int8")
    assert done.exit_code == 2
    done = run(tmp_path / "absent", "--to", "vllm", "--out", tmp_path / "o")
    assert isinstance(done.exception, ExportError)
