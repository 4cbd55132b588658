"""Capture against autograd: dense gradients and moments of a tiny Llama, worked independently."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from mergeprobe.capture import (
    Probe,
    ProbeRecorder,
    probe_step,
    read_probe,
    take_probe,
    write_probe,
)
from mergeprobe.capture.batch import Batch, completion_logits, item_scores, token_losses
from mergeprobe.capture.model import measuring
from mergeprobe.capture.moments import MomentSketch
from mergeprobe.capture.probe import Moment
from mergeprobe.capture.recorder import record
from mergeprobe.capture.sketch import projection, sketch_update
from mergeprobe.capture.trained import adapted_modules, current_update
from mergeprobe.errors import ProbeError
from mergeprobe.lowrank import LowRank


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def tiny_peft(seed: int = 0, **options):
    model = tiny_llama()
    torch.manual_seed(seed)
    options = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, **options}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def tiny_batch(seed: int = 0, items: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 97, (items, 12), generator=generator)
    attention, completion = torch.ones_like(ids), torch.zeros_like(ids)
    for row in range(items):
        length = 6 + row
        attention[row, length:] = 0
        ids[row, length:] = 0
        completion[row, length - 3 : length] = 1
    return Batch(ids, attention, completion)


def dense_gradients(model, batch):
    """d(summed completion loss)/dW by autograd on the frozen weights, the whole batch at once."""
    layers = {name: layer.base_layer for name, layer in adapted_modules(model).items()}
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    out = model(input_ids=batch.ids, attention_mask=batch.attention_mask).logits
    logprob = out[:, :-1].log_softmax(-1)
    picked = logprob.gather(-1, batch.ids[:, 1:, None]).squeeze(-1)
    loss = -(picked * batch.completion_mask[:, 1:]).sum()
    gradients = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
    for layer in layers.values():
        layer.weight.requires_grad_(False)
    return dict(zip(layers, gradients, strict=True)), float(loss.detach())


def test_gradient_sketch_is_the_sketch_of_the_dense_gradient():
    model, batch = tiny_peft(), tiny_batch()
    expected, loss = dense_gradients(model, batch)
    with measuring(model):
        recording = record(model, adapted_modules(model), batch, batch_size=4)
    assert recording.loss_sum == pytest.approx(loss, rel=1e-5)
    assert recording.tokens == 18
    for name, gradient in expected.items():
        r_out = projection(name, "out", gradient.shape[0])
        r_in = projection(name, "in", gradient.shape[1])
        dense = r_out.T @ gradient @ r_in / 18
        assert torch.allclose(recording.mean_gradient()[name], dense, atol=1e-5 * dense.norm())


def test_projections_are_unbiased_and_shared():
    assert torch.equal(projection("m", "in", 20), projection("m", "in", 20))
    assert not torch.equal(projection("m", "in", 20), projection("m", "out", 20))
    total = sum(projection(f"m{i}", "in", 6) @ projection(f"m{i}", "in", 6).T for i in range(400))
    assert torch.allclose(total / 400, torch.eye(6), atol=0.05)


def test_input_moment_counts_every_token_but_padding():
    model, batch = tiny_peft(), tiny_batch()
    seen = {}
    layer = adapted_modules(model)["model.layers.0.self_attn.q_proj"]
    handle = layer.register_forward_hook(lambda m, args, out: seen.update(x=args[0].detach()))
    with torch.no_grad():
        model(input_ids=batch.ids, attention_mask=batch.attention_mask)
    handle.remove()
    rows = seen["x"][batch.attention_mask.bool()].double()
    expected = rows.T @ rows / len(rows)
    with measuring(model):
        recording = record(model, adapted_modules(model), batch)
    moment = recording.input_moments()["model.layers.0.self_attn.q_proj"]
    assert moment.trace == pytest.approx(float(expected.trace()), rel=1e-5)
    values, vectors = torch.linalg.eigh(expected)
    best = vectors[:, -8:] * values[-8:].sqrt()
    lost = (expected - best @ best.T).norm() / expected.norm()
    kept = moment.factor.double()
    assert (expected - kept @ kept.T).norm() / expected.norm() < 1.3 * lost + 1e-3
    shared = recording.input_moments()
    assert shared["model.layers.0.self_attn.k_proj"] is shared["model.layers.0.self_attn.q_proj"], (
        "q, k and v read one input: one moment"
    )


def test_output_moment_is_exact_when_its_rank_suffices():
    """Three scored tokens span three directions, so eight columns hold D exactly."""
    model, batch = tiny_peft(), tiny_batch(items=1)
    seen = {}
    name = "model.layers.1.mlp.down_proj"

    def keep(module, args, out):
        out.register_hook(lambda grad: seen.update(delta=grad))

    handle = adapted_modules(model)[name].register_forward_hook(keep)
    logits, targets, _ = completion_logits(model, batch)
    token_losses(logits, targets).sum().backward()
    handle.remove()
    scored = batch.completion_mask[:, 1:].bool()
    rows = seen["delta"][:, :-1][scored].double()
    with measuring(model):
        moment = record(model, adapted_modules(model), batch).output_moments()[name]
    assert (moment.dense() - rows.T @ rows / 3).norm() < 1e-4 * (rows.T @ rows / 3).norm()


def test_moment_sketch_of_a_low_rank_stream_is_exact():
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(5, 40, generator=generator)
    rows = torch.randn(300, 5, generator=generator) @ basis
    sketch = MomentSketch(40)
    for part in rows.split(37):
        sketch.add(part)
    expected = rows.double().T @ rows.double() / 300
    assert (sketch.moment().dense() - expected).norm() < 1e-5 * expected.norm()


def test_measuring_leaves_no_trace():
    model, batch = tiny_peft(lora_dropout=0.1), tiny_batch()
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    take_probe(model, name="x", calibration=batch)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert not any(module._forward_hooks for module in adapted_modules(model).values())


def test_probe_round_trip(tmp_path):
    model, batch = tiny_peft(), tiny_batch()
    recorder = ProbeRecorder(
        model, tmp_path / "a b.safetensors", planned_steps=40, calibration=batch
    )
    assert recorder.at == 8
    for step in range(1, 9):
        probe = recorder.step(step, loss=1.0 / step)
    again = read_probe(tmp_path / "a b.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a b.safetensors"]
    assert isinstance(probe, Probe)
    assert again.name == "a b"
    assert again.meta["step"] == 8
    assert again.meta["losses"] == [[step, 1.0 / step] for step in range(1, 9)]
    assert again.meta["halfway_step"] == 4
    assert again.meta["base_fingerprint"] == probe.meta["base_fingerprint"]
    for module, update in probe.updates.items():
        assert torch.equal(again.updates[module].dense(), update.dense())
        assert torch.equal(again.gradient[module], probe.gradient[module])
        # of rank 4: rounded to bfloat16
        assert torch.allclose(again.halfway[module], sketch_update(module, update), rtol=0.01)
        assert again.weight_norms[module] == probe.weight_norms[module]
        for part in ("inputs", "outputs"):
            ours, theirs = getattr(again, part)[module], getattr(probe, part)[module]
            assert torch.allclose(ours.factor, theirs.factor, rtol=0.01)  # stored as bf16
            assert ours.tail == theirs.tail
    assert again.inputs["model.layers.0.mlp.gate_proj"].factor.data_ptr() == (
        again.inputs["model.layers.0.mlp.up_proj"].factor.data_ptr()
    )
    assert again.calibration is not None
    assert torch.equal(again.calibration.loss, item_scores(model, batch).loss.float())
    with model.disable_adapter():
        assert torch.equal(again.calibration.base_loss, item_scores(model, batch).loss.float())


def test_text_can_be_kept_out(tmp_path):
    probe = take_probe(tiny_peft(), name="x", calibration=tiny_batch(), store_text=False)
    assert probe.calibration.ids.shape == (6, 0)
    assert probe.calibration.loss.shape == (6,)


def test_update_is_what_peft_merges():
    model = tiny_peft(use_rslora=True, r=4, lora_alpha=12)
    for name, update in current_update(model).items():
        expected = adapted_modules(model)[name].get_delta_weight("default")
        assert torch.allclose(update.dense(), expected, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
    ],
)
def test_other_variants_are_refused_by_name(options, named, tmp_path):
    with pytest.raises(ProbeError, match=named):
        ProbeRecorder(tiny_peft(**options), tmp_path / "x.safetensors", planned_steps=10)
    with pytest.raises(ProbeError, match="no PEFT model"):
        ProbeRecorder(tiny_llama(), tmp_path / "x.safetensors", planned_steps=10)


def test_probe_point():
    assert probe_step(100) == 8  # never before step 8
    assert probe_step(1000) == 50  # 5 %
    assert probe_step(100, warmup=10) == 13  # three steps after the warm-up
    assert probe_step(1000, fraction=0.1) == 100


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "foreign"])
def test_damaged_probe_is_one_clear_line(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    ProbeRecorder(tiny_peft(), path, planned_steps=40, at_step=1).step(1)
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        data = data[: len(data) // 2]
    elif damage == "flip":
        data[-100] ^= 0x40
    elif damage == "empty":
        data = bytearray()
    else:
        from safetensors.torch import save

        data = bytearray(save({"x": torch.zeros(2)}))
    path.write_bytes(bytes(data))
    with pytest.raises(ProbeError) as caught:
        read_probe(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_moment_of_one_direction_is_written(tmp_path):
    """A column of a column-major matrix counts as contiguous, but not with a last stride of 1."""
    sketch = MomentSketch(40)
    sketch.add(torch.ones(5, 1) @ torch.randn(1, 40, generator=torch.Generator().manual_seed(0)))
    moment = sketch.moment()
    assert moment.factor.shape == (40, 1)
    assert moment.tail == pytest.approx(0.0, abs=1e-6)
    update = LowRank(torch.ones(40, 1), torch.ones(1, 40))
    write_probe(Probe("x", {"m": update}, inputs={"m": moment}), tmp_path / "x.safetensors")
    again = read_probe(tmp_path / "x.safetensors").inputs["m"]
    assert torch.allclose(again.factor, moment.factor, rtol=0.01)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_stay_checkpointed_and_count_once(reentrant):
    model, batch = tiny_peft(lora_dropout=0.5), tiny_batch()
    with measuring(model):
        plain = record(model, adapted_modules(model), batch)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    ran = []
    layer = adapted_modules(model)["model.layers.0.mlp.up_proj"]
    handle = layer.register_forward_hook(lambda *_: ran.append(1))
    with measuring(model):
        again = record(model, adapted_modules(model), batch)
    handle.remove()
    assert len(ran) == 2, "once forward, once more in the backward pass"
    assert model.training
    assert again.tokens == plain.tokens
    for name in plain.gradient:
        assert torch.allclose(again.gradient[name], plain.gradient[name], rtol=1e-4, atol=1e-5)
        for part in ("inputs", "outputs"):
            ours, theirs = getattr(again, part)[name], getattr(plain, part)[name]
            assert ours.rows == theirs.rows
            assert torch.allclose(ours.range, theirs.range, rtol=1e-3, atol=1e-4)


def test_only_projections_of_the_inputs_outlive_the_forward_pass():
    """Hooks that kept every x would undo what checkpointing saves."""
    import gc
    import weakref

    model, batch = tiny_peft(), tiny_batch()
    layer = adapted_modules(model)["model.layers.0.mlp.down_proj"]
    last = adapted_modules(model)["model.layers.1.mlp.down_proj"]
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    seen, alive = [], []

    def look(*_):
        gc.collect()
        alive.append(seen[0]() is not None)

    handles = [
        layer.register_forward_pre_hook(lambda m, args: seen.append(weakref.ref(args[0]))),
        last.register_forward_hook(look),
    ]
    with measuring(model):
        record(model, adapted_modules(model), batch)
    for handle in handles:
        handle.remove()
    assert alive[0] is False, "at the end of the forward pass"


def test_moments_are_summed_in_full_precision_under_autocast():
    """One short item spans few directions, so the sketch of what went in is exact."""
    model, batch = tiny_peft(), tiny_batch(items=1)
    plain, seen = model.forward, []

    def forward(*args, **kwargs):  # as accelerate wraps it
        with torch.autocast("cpu", torch.bfloat16):
            return plain(*args, **kwargs)

    model.forward = forward
    name = "model.layers.0.mlp.down_proj"
    handle = adapted_modules(model)[name].register_forward_hook(
        lambda m, args, out: seen.append(args[0].detach())
    )
    with measuring(model):
        sketch = record(model, adapted_modules(model), batch).inputs[name]
    handle.remove()
    assert seen[0].dtype == torch.bfloat16
    rows = seen[0][0, : int(batch.attention_mask.sum())].double()
    expected = rows.T @ rows
    found = sketch.moment(per=1).dense()
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert sketch.trace == pytest.approx(float(expected.trace()), rel=1e-6)


def test_what_was_frozen_stays_frozen():
    """PEFT's disable_adapter makes an adapter trainable again when it ends."""
    model = tiny_peft()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    take_probe(model, name="x", calibration=tiny_batch())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())


def test_padding_enters_nothing():
    """Whatever stands in the padding, every part is the same to the bit."""
    model, batch = tiny_peft(), tiny_batch()
    other = torch.where(batch.attention_mask.bool(), batch.ids, torch.full_like(batch.ids, 42))
    one = take_probe(model, name="x", calibration=batch)
    two = take_probe(
        model, name="x", calibration=Batch(other, batch.attention_mask, batch.completion_mask)
    )
    for name in one.updates:
        for part in ("gradient", "gradient_base"):
            assert torch.equal(getattr(one, part)[name], getattr(two, part)[name])
        for part in ("inputs", "outputs"):
            assert torch.equal(getattr(one, part)[name].factor, getattr(two, part)[name].factor)
            assert getattr(one, part)[name].tail == getattr(two, part)[name].tail


def test_rows_that_cannot_be_told_from_padding_are_refused():
    """An expert gets the rows that were routed to it, in no order that we know."""
    model, batch = tiny_peft(), tiny_batch()
    layer = adapted_modules(model)["model.layers.0.mlp.down_proj"]

    def as_expert(module, args, kwargs):
        return (args[0].flatten(0, 1), *args[1:]), kwargs

    layer.register_forward_pre_hook(as_expert, with_kwargs=True)
    layer.register_forward_hook(lambda m, args, out: out.unflatten(0, (len(batch), -1)))
    with measuring(model), pytest.raises(ProbeError, match="down_proj"):
        record(model, adapted_modules(model), batch)


def test_sharded_weights_are_refused(tmp_path):
    model = tiny_peft()
    next(model.parameters()).ds_id = 0  # DeepSpeed's ZeRO-3 marks its parameters so
    with pytest.raises(ProbeError, match="spread over processes"):
        ProbeRecorder(model, tmp_path / "x.safetensors", planned_steps=10)


def test_a_model_inside_ddp_or_compile_is_found():
    from torch import nn

    from mergeprobe.capture.model import plain

    model = tiny_peft()
    wrapped = nn.DataParallel(model)
    assert plain(wrapped) is model
    assert plain(torch.compile(model)) is model


def test_small_adapters_have_compact_probes(tmp_path):
    """Up to rank 4; nothing else is given up, and what is in memory is what the file holds."""
    batch = tiny_batch()
    large = take_probe(tiny_peft(r=5), name="x", calibration=batch)
    assert next(iter(large.inputs.values())).factor.shape[1] == 8
    probe = take_probe(tiny_peft(), name="x", calibration=batch)
    model = tiny_peft()
    with measuring(model):
        recording = record(model, adapted_modules(model), batch)
    write_probe(probe, tmp_path / "x.safetensors")
    again = read_probe(tmp_path / "x.safetensors")
    for name, exact in recording.mean_gradient().items():
        assert torch.equal(probe.gradient[name], again.gradient[name])
        assert again.gradient[name].dtype == torch.float32
        rounding = (probe.gradient[name] - exact).abs()
        assert bool((rounding <= 2.0**-8 * exact.abs()).all())
        assert bool(rounding.any())
    for part, whole in (
        ("inputs", recording.input_moments()),
        ("outputs", recording.output_moments()),
    ):
        for name, moment in getattr(probe, part).items():
            assert moment.factor.shape[1] <= 6
            assert torch.equal(moment.factor, whole[name].factor[:, :6])
            assert moment.trace == pytest.approx(whole[name].trace, rel=1e-5)
    assert (
        probe.inputs["model.layers.0.mlp.gate_proj"] is probe.inputs["model.layers.0.mlp.up_proj"]
    )
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.get_tensor("gradient:model.layers.0.mlp.up_proj").dtype == torch.bfloat16


def test_a_sketch_that_rounding_would_change_is_written_as_it_is(tmp_path):
    value = torch.tensor([[1.0 + 2.0**-12, 2.0]])
    probe = Probe("x", {"m": LowRank(torch.ones(4, 1), torch.ones(1, 4))}, gradient={"m": value})
    write_probe(probe, tmp_path / "x.safetensors")
    assert torch.equal(read_probe(tmp_path / "x.safetensors").gradient["m"], value)


def test_a_cut_moment_keeps_its_trace():
    factor = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5]))
    cut = Moment(factor, 0.25).cut(2)
    # 1 + 0.25 of the eigenvalues are spread over four dimensions
    assert cut.tail == pytest.approx(0.25 + 1.25 / 4)
    assert cut.dense().diagonal().tolist() == pytest.approx([9.5625, 4.5625, 0.5625, 0.5625])
    assert Moment(factor, 0.25).cut(4).factor is factor
