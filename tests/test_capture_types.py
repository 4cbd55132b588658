"""Every PEFT type in a real training run: not changed, and measured as its checkpoint says."""

import peft
import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from mergeprobe import MergeProbeCallback, read_probe
from mergeprobe.adapters.base import Base, fingerprint
from mergeprobe.adapters.checkpoint import read_adapter
from mergeprobe.adapters.variants import PEFT_TYPES
from mergeprobe.capture import ProbeRecorder
from mergeprobe.capture.batch import Batch
from mergeprobe.capture.checkpoint import probe_checkpoint
from mergeprobe.capture.sketch import projection
from mergeprobe.capture.trained import FULL, init_hash, snapshot
from mergeprobe.errors import ProbeError
from tests.tiny_base import tiny_model, tiny_tokenizer

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADALORA = {"init_r": 4, "target_r": 2, "total_step": 10}
# id -> (PEFT config, its options, row of PEFT_TYPES, whether it is exact by default)
TYPES = {
    "lora": ("LoraConfig", {"r": 3}, "LORA", True),
    "rslora": ("LoraConfig", {"r": 4, "use_rslora": True}, "LORA", True),
    "lora-saved": ("LoraConfig", {"r": 3, "modules_to_save": ["lm_head"]}, "LORA", False),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True}, "DORA", False),
    "adalora": ("AdaLoraConfig", ADALORA, "ADALORA", True),
    "loha": ("LoHaConfig", {"r": 3, "alpha": 5}, "LOHA", True),
    "loha-wide": ("LoHaConfig", {"r": 6, "alpha": 5}, "LOHA", False),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 5}, "LOKR", True),
    "vera": ("VeraConfig", {"r": 3}, "VERA", True),
    "vera-from-seed": ("VeraConfig", {"r": 3, "save_projection": False}, "VERA", True),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}, "IA3", False),
    "oft": ("OFTConfig", {"oft_block_size": 4}, "OFT", False),
    "full": (None, {}, None, False),
}
FULL_MODULES = ("layers.0.mlp.up_proj", "layers.2.self_attn.q_proj", "lm_head")
TEXTS = [f"What is {a} + {b}? {a + b}." for a in range(4) for b in range(3)]


def model_of(kind, seed=1):
    config, options, _, _ = TYPES[kind]
    torch.manual_seed(seed)
    base = tiny_model()
    if config is None:
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name.removesuffix(".weight").endswith(FULL_MODULES))
        return base
    torch.manual_seed(seed)
    options = {"target_modules": LINEARS, "task_type": "CAUSAL_LM"} | options
    return get_peft_model(base, getattr(peft, config)(**options))


def items():
    tokenizer = tiny_tokenizer()
    return [tokenizer(text)["input_ids"][:14] for text in TEXTS]


def run(kind, folder, *, probe=True, **options):
    """A training loop of one's own: four steps, a probe and a checkpoint after the third."""
    model = model_of(kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
    ids = torch.tensor([row[:13] for row in items()])
    mask = torch.ones_like(ids)
    recorder = probe and ProbeRecorder(
        model,
        folder / "x.safetensors",
        planned_steps=4,
        at_step=3,
        calibration=Batch(ids, mask, mask.clone().index_fill_(1, torch.tensor([0]), 0)),
        tokenizer=tiny_tokenizer(),
        **options,
    )
    for step in (1, 2, 3, 4):
        part = ids[step::4]
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
        if kind == "adalora":
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        if recorder:
            recorder.step(step)
        if recorder and step == 3:
            model.save_pretrained(folder / "checkpoint")
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.fixture(scope="module", params=TYPES)
def probed(request, tmp_path_factory):
    """(kind, weights with a probe, weights without, the probe, the checkpoint of its step)."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    ours, theirs = run(kind, folder), run(kind, folder / "other", probe=False)
    return kind, ours, theirs, read_probe(folder / "x.safetensors"), folder / "checkpoint"


def test_training_is_not_changed(probed):
    _, ours, theirs, _, _ = probed
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), "bit-identical"


def difference(one, two):
    return float(torch.linalg.vector_norm(one.dense().double() - two.dense().double()))


def test_the_snapshot_is_the_update_of_the_checkpoint(probed):
    _, _, _, probe, checkpoint = probed
    saved = read_adapter(checkpoint, tiny_model())
    assert probe.updates.keys() == saved.modules.keys()
    whole = 0.0
    for module, update in saved.modules.items():
        size = float(torch.linalg.vector_norm(update.dense().double()))
        assert size > 0
        gap, stated = difference(update, probe.updates[module]), probe.meta["truncation"]
        assert gap <= (stated.get(module, 0.0) + 1e-5) * size
        assert gap >= (stated.get(module, 0.0) - 1e-5) * size
        whole += gap**2
    assert probe.meta["truncation_error"] == pytest.approx(whole**0.5 / saved.norm(), abs=1e-5)


def test_it_says_what_it_is(probed):
    kind, _, _, probe, _ = probed
    _, _, row, exact = TYPES[kind]
    assert probe.meta["peft_type"] == (PEFT_TYPES[row].name if row else FULL)
    assert probe.meta["exact"] is exact
    assert probe.meta["variant"] == {"lora-saved": "lora", "full": "full"}.get(
        kind, kind if kind == "rslora" else kind.split("-")[0]
    )
    assert max(probe.meta["ranks"]) <= 32
    assert probe.meta["base_fingerprint"] == fingerprint(tiny_model())
    assert not list(probe.path.parent.glob(".*"))


def dense_gradients(updates, calibration):
    """d(mean completion loss)/dW at W + ΔW, by autograd on a plain model."""
    model = tiny_model().requires_grad_(False)
    weights = {name: model.get_submodule(name).weight for name in updates}
    for name, weight in weights.items():
        weight.data = weight.data + updates[name]
        weight.requires_grad_(True)
    total, tokens = 0.0, 0
    for ids, real, scored in zip(
        calibration.ids, calibration.attention_mask, calibration.completion_mask, strict=True
    ):
        length = int(real.sum())
        logits = model(input_ids=ids[None, :length].long()).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[1:length].long(), reduction="none")
        total = total + loss[scored[1:length].bool()].sum()
        tokens += int(scored.sum())
    found = torch.autograd.grad(total / tokens, list(weights.values()))
    return dict(zip(weights, found, strict=True))


def test_gradients_are_those_of_the_whole_weight(probed):
    """With respect to W + ΔW, wherever inside its layer the type has its own weights."""
    _, _, _, probe, checkpoint = probed
    exact = {n: u.dense() for n, u in read_adapter(checkpoint, tiny_model()).modules.items()}
    nothing = {name: torch.zeros_like(update) for name, update in exact.items()}
    for part, updates in (("gradient", exact), ("gradient_base", nothing)):
        for name, gradient in dense_gradients(updates, probe.calibration).items():
            r_out = projection(name, "out", gradient.shape[0])
            r_in = projection(name, "in", gradient.shape[1])
            dense = r_out.T @ gradient @ r_in
            error = (getattr(probe, part)[name] - dense).norm() / dense.norm()
            # up to rank 4 sketches are rounded to bfloat16 (compact.py)
            assert error < (2e-4 if max(probe.meta["ranks"]) > 4 else 4e-3), (part, name)


def test_the_rank_option_cuts_and_a_large_one_is_exact(tmp_path):
    for rank, exact in ((2, False), (96, True)):
        run("dora", tmp_path / str(rank), rank=rank)
        probe = read_probe(tmp_path / str(rank) / "x.safetensors")
        saved = read_adapter(tmp_path / str(rank) / "checkpoint", tiny_model())
        assert probe.meta["exact"] is exact
        if exact:
            assert all(
                difference(u, probe.updates[m]) <= 1e-5 * u.dense().norm()
                for m, u in saved.modules.items()
            )
        else:
            assert probe.meta["ranks"] == [2]
    with pytest.raises(ProbeError, match="rank is 0"):
        MergeProbeCallback(tmp_path / "x.safetensors", rank=0)


@pytest.mark.parametrize("kind", ["dora", "adalora", "full"])
def test_the_callback_in_a_trainer(kind, tmp_path):
    """The Trainer's own checkpoint of the same step holds the same update."""

    def train(folder, callbacks):
        data = [{"input_ids": row, "labels": row} for row in items()]
        model = model_of(kind)
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=3,
            per_device_train_batch_size=1,
            learning_rate=2e-2,
            save_steps=2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=3,
        )
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks).train()
        return {name: value.detach().clone() for name, value in model.named_parameters()}

    path = tmp_path / "x.safetensors"
    callback = MergeProbeCallback(path, at_step=2, rank=96, tokenizer=tiny_tokenizer())
    ours, theirs = train(tmp_path / "a", [callback]), train(tmp_path / "b", [])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), "bit-identical"
    probe = read_probe(path)
    saved = read_adapter(tmp_path / "a" / "checkpoint-2", tiny_model())
    assert probe.updates.keys() == saved.modules.keys()
    for module, update in saved.modules.items():
        gap = difference(update, probe.updates[module])
        assert gap <= 1e-5 * float(update.dense().norm()), module
    assert not list(tmp_path.glob(".*"))


def resumed(folder, **options):
    model = model_of("full")
    with torch.no_grad():  # as a checkpoint's weights would be
        model.lm_head.weight.add_(0.01)
    return model, ProbeRecorder(
        model, folder / "x.safetensors", planned_steps=9, at_step=5, start_step=3, **options
    )


def test_full_fine_tuning_resumes_with_the_weights_it_began_from(tmp_path):
    before = model_of("full")
    ProbeRecorder(before, tmp_path / "x.safetensors", planned_steps=9, at_step=5)
    assert (tmp_path / ".x.safetensors.start").exists()
    model, recorder = resumed(tmp_path, rank=96)
    probe = recorder.step(5)
    assert list(probe.updates) == sorted(
        n.removesuffix(".weight") for n, p in model.named_parameters() if p.requires_grad
    )
    dense = probe.updates["lm_head"].dense()
    assert torch.allclose(dense, torch.full_like(dense, 0.01), atol=1e-6)
    assert not probe.updates["model.layers.0.mlp.up_proj"].dense().any()
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ProbeError, match="weights that it began from, is gone"):
        resumed(tmp_path)


REFUSED = {
    "pissa": ({"init_lora_weights": "pissa"}, "init 'pissa' changed the base weights"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "adapted Embedding"),
    "saved norm": ({"modules_to_save": ["input_layernorm"]}, "modules_to_save"),
    "biases": ({"bias": "all"}, "bias"),
    "tokens": ({"trainable_token_indices": {"embed_tokens": [1]}}, "trainable_token_indices"),
    "aLoRA": ({"alora_invocation_tokens": [3]}, "activated LoRA"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_no_update_shows_is_refused_by_name(what, tmp_path):
    options, named = REFUSED[what]
    options = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "r": 2} | options
    model = get_peft_model(tiny_model(), peft.LoraConfig(**options))
    with pytest.raises(ProbeError, match=named):
        ProbeRecorder(model, tmp_path / "x.safetensors", planned_steps=10)


def test_further_refusals(tmp_path):
    path = tmp_path / "x.safetensors"
    model = get_peft_model(
        tiny_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ProbeError, match="PEFT type is PROMPT_TUNING"):
        ProbeRecorder(model, path, planned_steps=10)
    model = model_of("dora")
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ProbeError, match=r"trains .*model.norm.weight' beside the adapter"):
        ProbeRecorder(model, path, planned_steps=10)
    plain = tiny_model()
    with pytest.raises(ProbeError, match=r"embed_tokens.weight', which is no Linear's weight"):
        ProbeRecorder(plain, path, planned_steps=10)
    with pytest.raises(ProbeError, match="trains no weight of its own"):
        ProbeRecorder(plain.requires_grad_(False), path, planned_steps=10)
    assert not list(tmp_path.iterdir()), "refused before anything was written"


@pytest.mark.parametrize("kind", ["dora", "loha-wide"])
def test_a_diverged_run_is_said_to_have_diverged(kind):
    model = model_of(kind)
    name, first = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        first[0] = torch.nan
    assert name.startswith("base_model.model.model.layers.0.")
    with pytest.raises(ProbeError, match=r"layers\.0\..* has NaN or infinite entries"):
        snapshot(model)


def test_inits_are_told_apart():
    for kind in ("lora", "dora", "adalora", "loha", "vera-from-seed"):
        one, again, other = (init_hash(model_of(kind, seed)) for seed in (1, 1, 2))
        assert one == again
        assert (one == other) is (kind == "vera-from-seed"), "its seed is in the config"


@pytest.mark.parametrize("kind", ["dora", "lora-saved", "vera", "full"])
def test_a_checkpoint_is_probed_as_the_callback_would(kind, tmp_path):
    run(kind, tmp_path)
    live = read_probe(tmp_path / "x.safetensors")
    model = tiny_model().requires_grad_(False)
    base = Base("tiny", model, tiny_tokenizer(), fingerprint(model))
    before = {name: value.clone() for name, value in model.named_parameters()}
    pairs = [("What is 1 + 2?", " 3."), ("What is 2 + 2?", " 4.")]
    probe = probe_checkpoint(tmp_path / "checkpoint", base, pairs, step=3)
    for key in ("peft_type", "exact", "variant", "base_fingerprint"):
        assert probe.meta[key] == live.meta[key]
    assert probe.updates.keys() == live.updates.keys()
    for module, update in live.updates.items():
        size = float(update.dense().norm())
        assert difference(update, probe.updates[module]) < 1e-3 * size + 1e-6
    assert probe.gradient.keys() == probe.inputs.keys() == live.updates.keys()
    assert torch.equal(probe.drift.base_index, live.drift.base_index)
    assert torch.allclose(probe.drift.hidden, live.drift.hidden, atol=1e-4)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items()), "given back"
