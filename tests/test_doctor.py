"""The doctor on adapters that are sound, odd, or broken; folders are written by hand."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

from mergeprobe.adapters.checkpoint import CARD, CONFIG, WEIGHTS, read_adapter
from mergeprobe.adapters.doctor import Fault, examine, inspect, variant
from mergeprobe.adapters.inits import init_of, input_overlap, input_overlaps

IN, RANK = 64, 4
MODULES = {f"model.layers.{k}.{m}": (32, IN) for k in range(3) for m in ("q_proj", "up_proj")}


def factors(init=0, run=0, modules=MODULES, rank=RANK, drift=0.3):
    """As training leaves them: A at its draw plus `drift` of it, B grown from zero."""
    draws, steps = (torch.Generator().manual_seed(s) for s in (init, 1000 + run))
    tensors = {}
    for module, (out, into) in modules.items():
        start = torch.rand(rank, into, generator=draws) * 2 - 1
        a = start + drift * torch.randn(rank, into, generator=steps) * 3**-0.5
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = 0.1 * torch.randn(
            out, rank, generator=steps
        )
    return tensors


def write(folder, tensors=None, *, rank=RANK, fingerprint=None, **config):
    folder.mkdir(parents=True)
    tensors = factors(rank=rank) if tensors is None else tensors
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "base_model_name_or_path": "tiny",
    } | config
    (folder / CONFIG).write_text(json.dumps(config), "utf-8")
    save_file(tensors, folder / WEIGHTS)
    if fingerprint:
        card = {"schema": 1, "base_fingerprint": fingerprint}
        (folder / CARD).write_text(json.dumps(card), "utf-8")
    return folder


def key(module, side):
    return f"base_model.model.{module}.lora_{side}.weight"


FIRST, LAST = next(iter(MODULES)), list(MODULES)[-1]


def test_a_sound_adapter(tmp_path):
    finding, adapter = inspect(write(tmp_path / "math"))
    assert adapter is not None
    assert (finding.name, finding.readable, finding.problem) == ("math", True, None)
    assert finding.mergeable
    assert finding.variant == "LoRA"
    assert finding.modules == 6
    assert finding.parameters == 6 * (32 + 64) * 4
    assert (finding.ranks, finding.scalings, finding.dtypes) == ([4], [2.0, 2.0], ["float32"])
    assert (finding.base, finding.fingerprint, finding.verified) == ("tiny", None, False)
    assert finding.norm == pytest.approx(adapter.norm())
    assert not finding.untrained
    assert finding.faults == []
    assert examine([tmp_path / "math"]).verdicts == [
        "'math' is sound; a merge needs at least one more adapter"
    ]


def test_scalings_ranks_and_dtypes(tmp_path):
    tensors = {k: v.bfloat16() for k, v in factors(rank=4).items()}
    tensors[key(FIRST, "A")] = torch.ones(9, IN)
    tensors[key(FIRST, "B")] = torch.ones(32, 9)
    write(
        tmp_path / "a",
        tensors,
        use_rslora=True,
        rank_pattern={"layers.0.q_proj": 9},
        alpha_pattern={"up_proj": 3},
    )
    finding, _ = inspect(tmp_path / "a")
    assert finding.variant == "rsLoRA, rank pattern, alpha pattern"
    assert finding.ranks == [4, 9]
    # alpha 8 on q_proj: 8/√9 for the first, 8/√4 for the others; alpha 3 on up_proj: 3/√4
    assert finding.scalings == pytest.approx([1.5, 4.0])
    assert finding.dtypes == ["bfloat16", "float32"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"peft_type": "LORA"}, "LoRA"),
        ({"peft_type": "LORA", "init_lora_weights": True}, "LoRA"),
        ({"peft_type": "LORA", "init_lora_weights": "gaussian"}, "LoRA"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, "LoRA, pissa init"),
        ({"peft_type": "LORA", "use_dora": True, "use_rslora": True}, "DoRA, rsLoRA"),
        ({"peft_type": "LORA", "modules_to_save": ["lm_head"]}, "LoRA, saved modules"),
        ({"peft_type": "LORA", "bias": "all"}, "LoRA, trained biases"),
        ({"peft_type": "VERA"}, "VERA"),
        ({}, "unknown"),
    ],
    ids=str,
)
def test_variants_in_words(config, expected):
    assert variant(config) == expected


def break_at(tensors, module, side, value, count=1):
    tensors[key(module, side)].view(-1)[:count] = value
    return tensors


def test_nan_infinite_and_zero_weights_are_found_where_they_are(tmp_path):
    tensors = break_at(factors(), FIRST, "A", float("nan"), 3)
    break_at(tensors, LAST, "B", float("inf"), 2)
    tensors[key("model.layers.1.q_proj", "B")].zero_()
    finding, _ = inspect(write(tmp_path / "bad", tensors))
    assert {(f.module, f.side, f.kind, f.count) for f in finding.faults} == {
        (FIRST, "A", "nan", 3),
        (LAST, "B", "infinite", 2),
        ("model.layers.1.q_proj", "BA", "zero", 32 * 64),
    }
    assert finding.readable
    assert not finding.mergeable
    assert finding.norm is None
    assert finding.problem is not None
    assert "NaN or infinite entries in 2 of 6 modules" in finding.problem
    assert f"lora_A of '{FIRST}'" in finding.problem


def test_untrained_and_partly_zero(tmp_path):
    tensors = {k: v * ("lora_A" in k) for k, v in factors().items()}
    finding, _ = inspect(write(tmp_path / "new", tensors))
    assert finding.untrained
    assert finding.problem == (
        "its update is zero everywhere: never trained, or saved before training"
    )
    assert finding.norm == 0.0
    tensors = factors()
    tensors[key(FIRST, "A")].zero_()
    finding, _ = inspect(write(tmp_path / "part", tensors))
    assert finding.mergeable
    assert not finding.untrained
    assert finding.faults == [Fault(FIRST, "BA", "zero", 32 * 64)]
    write(tmp_path / "ok", factors(1, 1))
    assert f"'part' has 1 of 6 modules at zero, such as '{FIRST}'" in (
        examine([tmp_path / "part", tmp_path / "ok"]).verdicts
    )


def test_one_bad_folder_never_hides_the_others(tmp_path):
    write(tmp_path / "good one")
    write(tmp_path / "dora", use_dora=True)
    write(tmp_path / "saved", modules_to_save=["lm_head"])
    write(tmp_path / "cut")
    whole = (tmp_path / "cut" / WEIGHTS).read_bytes()
    (tmp_path / "cut" / WEIGHTS).write_bytes(whole[:-100])
    write(tmp_path / "nan", break_at(factors(), FIRST, "B", float("nan")))
    write(tmp_path / "ünïcode", factors(1, 1), use_rslora=True)
    (tmp_path / "empty").mkdir()
    names = ["good one", "dora", "saved", "cut", "nan", "ünïcode", "empty", "gone"]
    found = examine([tmp_path / name for name in names])
    assert [f.name for f in found.findings] == names
    assert [f.readable for f in found.findings] == [True, *[False] * 3, True, True, False, False]
    assert [f.mergeable for f in found.findings] == [
        name in ("good one", "ünïcode") for name in names
    ]
    assert [f.variant for f in found.findings] == [
        *("LoRA", "DoRA", "LoRA, saved modules", "LoRA", "LoRA", "rsLoRA"),
        *("unknown", "unknown"),
    ]
    assert found.groups == [["good one", "ünïcode"]]
    assert found.verdicts[0] == (
        "'good one', 'ünïcode' can be merged (base unverified; independent init)"
    )
    for name, word in [
        ("dora", "DoRA"),
        ("saved", "modules_to_save"),
        ("cut", "truncated"),
        ("nan", "NaN"),
        ("empty", "does not exist"),
        ("gone", "is not a folder"),
    ]:
        lines = [
            line for line in found.verdicts if line.startswith(f"'{name}' merges with nothing")
        ]
        assert len(lines) == 1
        assert word in lines[0]
        assert "\n" not in lines[0]
    json.dumps(asdict(found))


def test_bases_verified_unverified_and_different(tmp_path):
    write(tmp_path / "a", factors(0, 0), fingerprint="f1")
    write(tmp_path / "b", factors(1, 1), fingerprint="f1", base_model_name_or_path="elsewhere")
    write(tmp_path / "c", factors(2, 2))
    write(tmp_path / "d", factors(3, 3), base_model_name_or_path="other")
    write(tmp_path / "e", factors(4, 4), fingerprint="f2")
    found = examine([tmp_path / name for name in "abcde"])
    pairs = {pair.a + pair.b: pair for pair in found.pairs}
    assert pairs["ab"].problem is None
    assert pairs["ab"].verified
    assert pairs["ac"].problem is None
    assert not pairs["ac"].verified
    for two in ("ad", "cd", "ae", "be"):
        assert pairs[two].problem is not None
    assert "trained on base f1" in str(pairs["ae"].problem)
    assert "names base 'other'" in str(pairs["ad"].problem)
    assert [f.verified for f in found.findings] == [True, True, False, False, True]
    assert not any("verified" in line and "'d'" in line for line in found.verdicts)
    for group in found.groups:
        assert not {"a", "d"} <= set(group)
        assert not {"a", "e"} <= set(group)
    assert sum(" does not merge with " in line for line in found.verdicts) >= 2


def test_other_shapes_other_modules_and_unequal_ranks(tmp_path):
    halves = list(MODULES)
    write(tmp_path / "all", factors(0, 0))
    write(tmp_path / "half", factors(1, 1, {m: MODULES[m] for m in halves[:3]}))
    write(tmp_path / "rest", factors(2, 2, {m: MODULES[m] for m in halves[3:]}))
    write(tmp_path / "wide", factors(3, 3, dict.fromkeys(MODULES, (48, IN))))
    write(tmp_path / "rank8", factors(4, 4, rank=8), rank=8)
    found = examine([tmp_path / name for name in ("all", "half", "rest", "wide", "rank8")])
    pairs = {(pair.a, pair.b): pair for pair in found.pairs}
    assert (pairs["all", "half"].common, pairs["all", "half"].only_a) == (3, 3)
    assert pairs["all", "half"].problem is None
    assert "no module in common" in str(pairs["half", "rest"].problem)
    assert pairs["half", "rest"].overlap is None
    assert pairs["half", "rest"].init is None
    assert "(32, 64)" in str(pairs["all", "wide"].problem)
    assert pairs["all", "rank8"].problem is None
    assert found.groups[0] == ["all", "half", "rank8"]
    assert "unequal ranks [4, 8]" in found.verdicts[0]
    assert "2 of 3 pairs adapt different sets of modules" in found.verdicts[0]


def test_two_folders_of_one_name_are_told_apart(tmp_path):
    paths = [write(tmp_path / "one" / "adapter"), write(tmp_path / "two" / "adapter")]
    found = examine(paths)
    assert [finding.name for finding in found.findings] == [str(path) for path in paths]
    assert len(found.groups[0]) == 2


def test_nothing_to_examine():
    found = examine([])
    assert (found.findings, found.pairs, found.groups, found.verdicts) == ([], [], [], [])


# --- shared or independent init ------------------------------------------------------------


def test_overlap_by_hand():
    a = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert input_overlap(a, a) == pytest.approx(1.0)
    assert input_overlap(a, torch.tensor([[0.0, 0.0, 5.0]])) == pytest.approx(0.0)
    assert input_overlap(a, torch.tensor([[3.0, 0.0, 0.0]])) == pytest.approx(1.0)
    # at 45 degrees the squared cosine is a half
    assert input_overlap(a[:1], torch.tensor([[1.0, 0.0, 1.0]])) == pytest.approx(0.5)
    # one direction shared, the other orthogonal
    b = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert input_overlap(a, b) == pytest.approx(0.5)


def test_overlap_does_not_depend_on_the_gauge():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 64, generator=generator) for _ in range(2))
    g = torch.randn(4, 4, generator=generator) + 3 * torch.eye(4)
    assert input_overlap(g @ a, b) == pytest.approx(input_overlap(a, b), abs=1e-5)


def test_chance_is_the_larger_rank_over_the_width():
    generator = torch.Generator().manual_seed(0)
    found = [
        input_overlap(
            torch.randn(4, 64, generator=generator), torch.randn(8, 64, generator=generator)
        )
        for _ in range(300)
    ]
    assert sum(found) / len(found) == pytest.approx(8 / 64, abs=0.01)


@pytest.mark.parametrize("drift", [0.0, 0.1, 0.3, 0.5])
def test_shared_and_independent_inits_are_told_apart(tmp_path, drift):
    write(tmp_path / "a", factors(0, 0, drift=drift))
    write(tmp_path / "b", factors(0, 1, drift=drift))
    write(tmp_path / "c", factors(7, 2, drift=drift))
    found = examine([tmp_path / name for name in "abc"])
    assert {pair.a + pair.b: pair.init for pair in found.pairs} == {
        "ab": "shared",
        "ac": "independent",
        "bc": "independent",
    }
    assert "inits shared by some only" in found.verdicts[0]


def test_zero_modules_and_full_rank_say_nothing_about_the_init(tmp_path):
    tensors = {k: v * ("lora_A" in k or "q_proj" in k) for k, v in factors(0, 0).items()}
    a = read_adapter(write(tmp_path / "a", tensors))
    b = read_adapter(write(tmp_path / "b", factors(0, 1)))
    overlap = input_overlaps([a, b])[0, 1]
    assert overlap is not None
    assert init_of(overlap) == "shared"
    square = {"m": (5, 4)}
    wide = [read_adapter(write(tmp_path / f"w{k}", factors(k, k, square))) for k in range(2)]
    assert input_overlaps(wide) == {(0, 1): None}  # 4 rows of width 4 always overlap
    assert init_of(0.3) == "unclear"
