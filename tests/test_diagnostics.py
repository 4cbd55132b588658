"""The diagnostics by name: values worked by hand, and what they say of synthetic adapters."""

import math
from dataclasses import replace

import pytest
import torch

from mergeprobe.capture.drift import EVERY, OPEN_PROMPTS, open_positions, probe_ids, probe_texts
from mergeprobe.capture.probe import Calibration, Drift, Moment, Probe, provenance
from mergeprobe.errors import ProbeError
from mergeprobe.lowrank import LowRank
from mergeprobe.predict.early import open_tier
from mergeprobe.predict.first_token import first_token_collapse
from mergeprobe.signals import adapter_rows, pair_rows, set_rows
from mergeprobe.signals.curvature import n_max
from mergeprobe.signals.diagnostics import activation_index, first_token_share
from tests.test_early import base, probes  # noqa: F401, the fixtures

M = "model.layers.0.mlp.up_proj"


# --- capacity -----------------------------------------------------------------------------------
def synthetic(name, rows, *, norm=1.0, inputs=None, seed=0):
    """An update of that norm with these rows of A; outputs are random."""
    draw = torch.Generator().manual_seed(seed)
    b = torch.linalg.qr(torch.randn(200, len(rows), generator=draw)).Q
    update = LowRank(b, rows, norm / float(torch.linalg.vector_norm(b @ rows)))
    return Probe(name, {M: update}, inputs={} if inputs is None else {M: inputs})


@pytest.fixture(scope="module")
def crowd():
    """One adapter that fits its own inputs, and others of its norm, even over all inputs."""
    draw = torch.Generator().manual_seed(1)
    width, rank = 256, 8
    basis = torch.linalg.qr(torch.randn(width, width, generator=draw)).Q
    # the task's inputs: eight directions of variance 3 to 10 over an even rest of 0.02
    moment = Moment(basis[:, :rank] * torch.linspace(3.0, 10.0, rank).sqrt(), 0.02)
    one = synthetic("one", basis[:, :rank].T.contiguous(), inputs=moment)
    return one, [
        synthetic(f"o{k}", torch.randn(rank, width, generator=draw), seed=k) for k in range(66)
    ]


def test_selectivity_by_hand(crowd):
    row = adapter_rows([crowd[0]]).row(0, named=True)
    kappa = 6.52 / ((52 + 0.02 * 256) / 256)
    assert row["selectivity"] == pytest.approx(kappa, rel=1e-3)
    assert row["capacity"] == pytest.approx(1 + 0.5 * kappa, rel=1e-3)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_n_max_holds_within_a_tenth_for_a_growing_set(tau, crowd):
    """A set of 0.9 N_max keeps the load below τ, one of 1.1 N_max does not."""
    one, others = crowd
    most = float(n_max(torch.tensor(adapter_rows([one])["selectivity"][0]), tau))
    assert 10 < most < 60
    names = ["one", *(other.name for other in others)]
    sizes = [math.floor(0.9 * most), math.ceil(1.1 * most)]
    rows = set_rows([one, *others[: sizes[1]]], [names[:size] for size in sizes]).to_dicts()
    load = {len(row["set"]): row["capacity_load"] for row in rows if row["a"] == "one"}
    assert load[sizes[0]] < tau < load[sizes[1]]


# --- redundancy ---------------------------------------------------------------------------------
def predicting(name, *distributions):
    """A run that moved the base's even choice between two tokens, position by position."""
    ids = torch.tensor([[0, 1]] * len(distributions))
    tail = torch.full((len(distributions),), math.log(1e-12))
    even = torch.full((len(distributions), 2), math.log(0.5))
    drift = Drift(
        torch.zeros(2, 1, 1), torch.tensor(distributions).log(), ids, tail, even, ids, tail
    )
    meta = provenance(open_positions=[1])
    return Probe(name, {M: LowRank(torch.ones(2, 1), torch.ones(1, 2))}, drift=drift, meta=meta)


def test_redundancy_by_hand():
    same = [predicting("a", [0.8, 0.2]), predicting("b", [0.8, 0.2])]
    assert pair_rows(same)["js_to_kl"][0] == pytest.approx(0.0, abs=1e-7)
    row = pair_rows([predicting("a", [0.8, 0.2]), predicting("b", [0.2, 0.8])]).row(0, named=True)
    moved = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    # the middle of opposite moves is the base itself, so JS is each one's KL to it
    assert row["js_to_kl"] == pytest.approx(1.0)
    assert row["js_divergence"] == pytest.approx(moved)
    far = pair_rows([predicting("a", [0.8, 0.2]), predicting("b", [0.6, 0.4])]).row(0, named=True)
    small = 0.6 * math.log(1.2) + 0.4 * math.log(0.8)
    js = sum(
        p * math.log(p / m) / 2
        for one in ((0.8, 0.2), (0.6, 0.4))
        for p, m in zip(one, (0.7, 0.3), strict=True)
    )
    assert far["js_to_kl"] == pytest.approx(js / small, rel=1e-5)


# --- entropy on open prompts --------------------------------------------------------------------
def test_entropy_change_on_open_prompts_by_hand():
    run = predicting("a", [0.5, 0.5], [0.9, 0.1], [0.5, 0.5])
    row = adapter_rows([run]).row(0, named=True)
    change = -0.9 * math.log(0.9) - 0.1 * math.log(0.1) - math.log(2)
    assert row["entropy_change_open"] == pytest.approx(change, abs=1e-6)
    assert row["entropy_change"] == pytest.approx(change / 3, abs=1e-6)
    old = replace(run, meta=provenance())
    assert adapter_rows([old])["entropy_change_open"][0] is None


class Words:
    """A tokenizer of one token a word."""

    def __call__(self, text):
        return {"input_ids": list(range(len(text.split())))}


def test_open_positions_are_the_last_of_each_open_prompt():
    told = [probe_texts()[line] for line in OPEN_PROMPTS]
    assert [text.split()[0] for text in told] == ["Please", "List", "Summarise"]
    found = open_positions(Words())
    kept = [
        (line, where)
        for line, tokens in enumerate(probe_ids(Words()))
        for where in range(len(tokens))
        if where % EVERY == EVERY - 1 or where == len(tokens) - 1
    ]
    lengths = [len(text.split()) for text in told]
    ends = [(line, n - 1) for line, n in zip(OPEN_PROMPTS, lengths, strict=True)]
    assert [kept[place] for place in found] == ends

    class Letters:
        def __call__(self, text):
            return {"input_ids": list(text)}

    assert open_positions(Letters()) == [], "every prompt is cut before its end"


# --- activation ---------------------------------------------------------------------------------
def measured(step, losses, base_losses=(3.0, 5.0)):
    ids = torch.ones(2, 1, dtype=torch.long)
    kept = Calibration(ids, ids, ids, torch.tensor(base_losses), torch.tensor(losses))
    return Probe("run", {}, calibration=kept, meta=provenance(fingerprint="f" * 16, step=step))


def test_activation_index_by_hand():
    early, final = measured(3, [2.5, 4.5]), measured(100, [1.0, 3.0])
    assert activation_index(early, final) == pytest.approx(0.5 / 2.0)
    assert math.isnan(activation_index(early, measured(100, [3.0, 5.0])))
    with pytest.raises(ProbeError, match="the early probe is at step 100"):
        activation_index(final, early)
    with pytest.raises(ProbeError, match="other items"):
        activation_index(early, measured(100, [1.0, 3.0], (3.0, 4.0)))
    with pytest.raises(ProbeError, match="no calibration losses"):
        activation_index(early, Probe("x", {}))


# --- first-token collapse -----------------------------------------------------------------------
def test_first_token_share_by_hand():
    items = torch.tensor([0, 0, 0, 1, 1])
    alone = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0])
    merged = torch.tensor([3.0, 0.5, 2.0, 2.0, 5.0])
    # harm 2, none, 1 | 0, 3: two of six on first tokens
    assert first_token_share(alone, merged, items) == pytest.approx(2 / 6)
    assert math.isnan(first_token_share(alone, alone, items))
    wavering = torch.tensor([3.0, 1.0, 1.0, 4.0, 2.0])
    assert first_token_share(alone, wavering, items) == 1.0


def test_first_token_collapse_on_a_model(base, probes):  # noqa: F811
    tier = open_tier(base, probes)
    before = tier.spent
    found = first_token_collapse(tier, "sums", ("sums", "words"))
    assert tier.spent == before + 2
    own, other = (tier.snapshots[name].update.modules for name in ("sums", "words"))
    batch, harm = tier.snapshots["sums"].batch, []
    for ids, real, scored in zip(
        batch.ids, batch.attention_mask, batch.completion_mask, strict=True
    ):
        length, losses = int(real.sum()), []
        for parts in ((own,), (own, other)):
            model = type(base.model)(base.model.config).eval()
            model.load_state_dict(base.model.state_dict())
            with torch.no_grad():
                for part in parts:
                    for module, update in part.items():
                        model.get_submodule(module).weight += update.dense()
                logits = model(input_ids=ids[None, :length]).logits[0, :-1]
            losses.append(
                torch.nn.functional.cross_entropy(logits, ids[1:length], reduction="none")
            )
        harm.append((losses[1] - losses[0]).clamp_min(0)[scored[1:length].bool()])
    first, total = sum(float(h[0]) for h in harm), sum(float(h.sum()) for h in harm)
    assert found == pytest.approx(first / total, abs=1e-4)
