"""The engine: a mixed batch gives what each request gets alone, and adapters come and go."""

import copy
import time
from dataclasses import replace

import pytest
import torch
from serve_samples import NAMES, Answer, asked, deployment_of, running, served_base, spare
from transformers import GenerationConfig

from mergeprobe.adapters.attach import attached
from mergeprobe.adapters.checkpoint import WEIGHTS
from mergeprobe.compose.deployment import (
    Entry,
    LogitGroup,
    read_deployment,
    write_deployment,
)
from mergeprobe.compose.executor import Executor
from mergeprobe.compose.logits import Composition, composed
from mergeprobe.compose.router_file import make_router
from mergeprobe.errors import AdapterError, AdapterMismatch, BaseModelError, DeploymentError
from mergeprobe.plan import Action, Route
from mergeprobe.serve.batch import check_decoder
from mergeprobe.serve.catalogue import Catalogue, Source, Target, catalogue_of
from mergeprobe.serve.engine import Engine, Limits
from mergeprobe.serve.job import Failure, Piece
from mergeprobe.serve.resident import Resident
from mergeprobe.serve.sampling import Sampling, next_tokens
from mergeprobe.serve.server import make_engine
from mergeprobe.serve.text import Text

PROMPTS = ["one and two", "a", "what is 3 + 4? " * 6, "Hello!"]


@pytest.fixture(scope="module")
def base():
    return served_base()


@pytest.fixture(scope="module")
def deployment(base, tmp_path_factory):
    return deployment_of(base, tmp_path_factory.mktemp("served") / "deployment")


def engine_of(base, deployment, **options):
    limits = Limits(**{"tokens": 400} | options.pop("limits", {}))
    return Engine(catalogue_of(base, deployment), limits, **options)


@pytest.fixture(scope="module")
def alone(base, deployment):
    """What each gets alone, by transformers' own generate, on a model of its own."""
    model = copy.deepcopy(base.model)
    known = {}

    def found(prompt, name, tokens=20):
        if len(known.get((prompt, name), ())) < tokens:
            updates = deployment.serving[name].modules if name != "base" else {}
            with attached(model, updates):
                known[prompt, name] = generated(model, base.tokenizer, prompt, tokens)
        return known[prompt, name][:tokens]

    return found


def generated(model, tokenizer, prompt, tokens=20):
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    # without an end token, so that all answers are of one length
    config = GenerationConfig(do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    model.generation_config = config
    return model.generate(ids)[0, ids.shape[1] :].tolist()


def words(base, tokens):
    return base.tokenizer.decode(tokens, skip_special_tokens=True)


# ---- one batch


def test_a_mixed_batch_gives_what_each_gets_alone(base, deployment, alone):
    models = ["base", *deployment.entries]
    wanted = {(p, m): alone(p, m) for p in PROMPTS for m in models}
    assert len({tuple(tokens) for tokens in wanted.values()}) > len(wanted) * 0.8
    engine = engine_of(base, deployment, limits={"rows": 7})
    with running(engine):
        answers = {key: Answer(engine, asked(engine, *key)) for key in wanted}
        found = {key: answer.tokens for key, answer in answers.items()}
    assert found == wanted
    assert engine.batch.rows == []
    assert engine.metrics.registry.get_sample_value("mergeprobe_adapter_loads") == 4


def test_requests_join_while_others_run_and_of_other_lengths(base, deployment, alone):
    engine = engine_of(base, deployment, limits={"rows": 3, "tokens": 700})
    with running(engine):
        first = Answer(engine, asked(engine, PROMPTS[0], "math", max_tokens=120))
        assert first.next().reason is None  # it runs
        others = [
            Answer(engine, asked(engine, p, NAMES[k % 3], max_tokens=5 + 7 * k))
            for k, p in enumerate(PROMPTS)
        ]
        for k, (prompt, other) in enumerate(zip(PROMPTS, others, strict=True)):
            assert other.tokens == alone(prompt, NAMES[k % 3], 5 + 7 * k)
        assert first.tokens == alone(PROMPTS[0], "math", 120)


@pytest.mark.parametrize("mode", ["sum", "mixture"])
def test_a_composition_runs_in_the_same_batch(base, deployment, mode, alone):
    how = Composition((0.7, 0.3), mode, plausibility=0.01)
    members = [deployment.serving[name] for name in ("math", "code")]
    targets = catalogue_of(base, deployment).targets
    sources = tuple(targets[name].sources[0] for name in ("math", "code"))
    targets["both"] = Target("both", sources, how)
    del targets["base"]
    engine = Engine(Catalogue(base, targets), Limits(rows=6, tokens=400))
    models = ("both", "math", "both", "base")
    with running(engine):
        jobs = [Answer(engine, asked(engine, *pair)) for pair in zip(PROMPTS, models, strict=True)]
        found = [job.tokens for job in jobs]
    for prompt, model, tokens in zip(PROMPTS, models, found, strict=True):
        if model == "both":
            with composed(base.model, [m.modules for m in members], how):
                assert tokens == generated(base.model, base.tokenizer, prompt)
        else:
            assert tokens == alone(prompt, model)


def test_an_answer_ends_at_the_end_token_or_the_length(base, deployment, alone):
    whole = alone(PROMPTS[0], "law", 30)
    engine = engine_of(base, deployment)
    engine.ends = (whole[12],)
    first = whole.index(whole[12])
    with running(engine):
        answer = Answer(engine, asked(engine, PROMPTS[0], "law", max_tokens=30, ignore_eos=False))
        last = answer.wait()
        assert (last.reason, last.tokens) == ("stop", first + 1)
        assert "".join(p.text for p in answer.pieces) == words(base, whole[:first])
        short = Answer(engine, asked(engine, PROMPTS[0], "law", max_tokens=3))
        assert (short.wait().reason, short.job.answered) == ("length", 3)


def test_stop_strings_are_cut_off(base, deployment, alone):
    text = words(base, alone(PROMPTS[0], "code", 30))
    stop = text[7:10]
    engine = engine_of(base, deployment)
    with running(engine):
        answer = Answer(
            engine, asked(engine, PROMPTS[0], "code", max_tokens=30, stops=("<none>", stop))
        )
        assert answer.wait().reason == "stop"
    assert "".join(p.text for p in answer.pieces) == text[: text.index(stop)]


# ---- the router


def test_auto_asks_the_router(base, deployment, alone):
    prompts = {
        "math": [f"{a} + {a * 3 % 7} = ?" for a in range(16)],
        "code": [f"print('{word}')" for word in "abcdefghijklmnop"],
    }
    router = make_router(base, prompts)
    engine = engine_of(base, deployment, router=router)
    with running(engine):
        for name, texts in prompts.items():
            ids = tuple(base.tokenizer(texts[5])["input_ids"])
            answer = Answer(engine, asked(engine, texts[5], None, routed_by=ids))
            last = answer.wait()
            assert (last.model, last.routed.model) == (name, name)
            assert last.routed.certain == (not router.rivals(name))
            assert answer.job.sequence.tokens[len(ids) :] == alone(texts[5], name)
        engine.unload("code")
        failed = Answer(engine, asked(engine, texts[5], None, routed_by=ids)).wait()
        assert (failed.status, "'code' is not served" in failed.message) == (503, True)


@pytest.mark.parametrize("gated", [False, True])
def test_a_deployment_that_composes_and_routes(base, deployment, gated, tmp_path):
    """Against the executor, on a model of its own."""
    prompts = {
        "math": [f"{a} + {a * 3 % 7} = ?" for a in range(12)],
        "code": [f"print('{word}')" for word in "abcdefghijkl"],
        "law": [f"Is it {word} to Do so" for word in "abcdefghijkl"],
    }
    group = LogitGroup(("math", "code"), (0.6, 0.4), "mixture", gated=gated)
    logits = {n: Entry("both", n, Action.logits, "mixture", 0.0, 0.0) for n in group.adapters}
    made = replace(
        deployment,
        route=Route(by="prompt"),
        serving={name: deployment.serving[name] for name in NAMES},
        entries=logits | {"law": deployment.entries["law"]},
        compositions={"both": group},
        router=make_router(base, prompts),
    )
    write_deployment(made, tmp_path / "deployment", full_routing=1)
    found = read_deployment(tmp_path / "deployment")
    other = copy.deepcopy(base.model)
    other.generation_config = GenerationConfig(do_sample=False, max_new_tokens=15, pad_token_id=0)
    executor = Executor(other, base.tokenizer, found)
    texts = [texts[3] for texts in prompts.values()]
    engine = make_engine(base, found, Limits(tokens=400, rows=5))
    assert list(engine.catalogue.targets) == ["base", "both", "math", "code", "law"]
    with running(engine):
        answers = {}
        for name in ("both", "math", "law", "auto"):
            for text in texts:
                model = None if name == "auto" else name
                ask = asked(engine, text, model, max_tokens=15)
                answers[name, text] = Answer(engine, ask)
        for (name, text), answer in answers.items():
            assert answer.wait().tokens == 15
            wanted = executor.generate(name, [text])
            assert ["".join(piece.text for piece in answer.pieces)] == wanted
    assert {answers["auto", text].job.routed.model for text in texts} >= {"math", "law"}


# ---- residency


def test_the_least_recently_used_adapter_leaves(base, deployment, alone):
    engine = engine_of(base, deployment, limits={"adapters": 2}, pinned=("math",))

    def names():
        return [source.name for source in engine.resident.held]

    with running(engine):
        assert names() == ["math"]
        for model, left in (("code", "code"), ("law", "law"), ("base", "law"), ("left", "pair")):
            answer = Answer(engine, asked(engine, PROMPTS[0], model))
            assert answer.tokens == alone(PROMPTS[0], model)
            assert sorted(names()) == sorted(["math", left])
    assert (engine.resident.loads, engine.resident.evictions) == (4, 2)


def test_more_adapters_than_room_all_get_their_turn(base, deployment, alone):
    engine = engine_of(base, deployment, limits={"adapters": 1, "rows": 4})
    with running(engine):
        jobs = [
            Answer(engine, asked(engine, p, name)) for p in PROMPTS for name in (*NAMES, "base")
        ]
        found = [job.tokens for job in jobs]
    assert found == [alone(p, n) for p in PROMPTS for n in (*NAMES, "base")]


def test_what_can_never_be_resident_is_refused_at_once(base, deployment):
    with pytest.raises(DeploymentError, match="2 are pinned, but at most 2 can be; use --max-ada"):
        engine_of(base, deployment, limits={"adapters": 2}, pinned=("math", "left"))
    targets = {"both": Target("both", (Source("a", None), Source("b", None)), Composition((1, 1)))}
    with pytest.raises(DeploymentError, match="takes 3 rows of the batch, but there are 2"):
        Engine(Catalogue(base, targets), Limits(rows=2))


def test_loading_and_unloading_while_it_runs(base, deployment, tmp_path, alone):
    folder = spare(base, tmp_path / "root")
    engine = Engine(catalogue_of(base, deployment, root=tmp_path / "root"), Limits(tokens=400))
    with running(engine):
        before = Answer(engine, asked(engine, PROMPTS[0], "math", max_tokens=90))
        before.next()
        engine.load("late", engine.catalogue.inside("spare"))
        late = Answer(engine, asked(engine, PROMPTS[0], "late"))
        first = late.tokens
        engine.unload("late")
        with pytest.raises(DeploymentError, match="'late' is not served"):
            engine.catalogue.find("late")
        (folder / WEIGHTS).unlink()
        spare(base, tmp_path / "other", seed=11)
        (tmp_path / "other" / "spare").rename(tmp_path / "root" / "new")
        engine.load("late", engine.catalogue.inside(str(tmp_path / "root" / "new")))
        assert Answer(engine, asked(engine, PROMPTS[0], "late")).tokens != first
        assert before.tokens == alone(PROMPTS[0], "math", 90)
        assert [s.name for s in engine.resident.held] == ["math", "late"]


@pytest.mark.parametrize(
    ("name", "path", "problem"),
    [
        ("x", "../deployment/math", "no folder"),
        ("x", "/etc", "no folder"),
        ("x", ".", "no folder"),
        ("x", "link", "no folder"),
        ("x", "spare\n", "no folder"),
        ("x", "missing", "no folder"),
        ("x", "x" * 900, "no folder"),
        ("x", "a\0b", "no folder"),
        ("x", "bare", "does not exist"),
        ("../x", "spare", "cannot name a group or adapter"),
        ("math", "spare", "is served already"),
        ("base", "spare", "is served already"),
        ("auto", "spare", "is served already"),
        ("x", "foreign", "is for base"),
    ],
)
def test_loads_that_are_refused(base, deployment, tmp_path, name, path, problem):
    spare(base, tmp_path)
    (tmp_path / "link").symlink_to(deployment.path / "math")
    other = served_base(seed=1)
    spare(other, tmp_path, name="foreign")
    (tmp_path / "bare").mkdir()
    catalogue = catalogue_of(base, deployment, root=tmp_path)
    with pytest.raises((DeploymentError, AdapterError, AdapterMismatch), match=problem):
        catalogue.load(name, catalogue.inside(path))
    assert "x" not in catalogue.targets


def test_an_adapter_that_goes_missing_fails_its_own_requests_only(base, tmp_path, alone):
    deployment = deployment_of(base, tmp_path / "deployment")
    engine = engine_of(base, deployment)
    (tmp_path / "deployment" / "law" / WEIGHTS).unlink()
    with running(engine):
        other = Answer(engine, asked(engine, PROMPTS[0], "math"))
        failed = Answer(engine, asked(engine, PROMPTS[0], "law")).wait()
        assert (failed.status, failed.message) == (500, "'law' cannot be loaded any more")
        assert other.tokens == alone(PROMPTS[0], "math")


# ---- queue, time, ends


def test_a_full_queue_says_so(base, deployment):
    engine = engine_of(base, deployment, limits={"rows": 1, "queue": 2})
    with running(engine):
        running_one = Answer(engine, asked(engine, "a", max_tokens=300))
        running_one.next()
        waiting = [Answer(engine, asked(engine, "a", max_tokens=2)) for _ in range(2)]
        refused = Answer(engine, asked(engine, "a", max_tokens=2)).wait()
        assert (refused.status, refused.retry_after >= 1) == (429, True)
        running_one.job.cancel()
        assert [w.wait().reason for w in waiting] == ["length", "length"]


def test_a_queue_that_is_too_slow_is_full(base, deployment, monkeypatch):
    engine = engine_of(base, deployment, limits={"rows": 1, "timeout": 100.0})
    monkeypatch.setattr(engine._pace, "wait", lambda ahead: 30.0 * ahead)
    with running(engine):
        first = Answer(engine, asked(engine, "a", max_tokens=390))
        first.next()
        waiting = [Answer(engine, asked(engine, "a", max_tokens=2)) for _ in range(2)]
        assert engine.refusal().status == 429  # 60 of 100 seconds for the next one
        refused = Answer(engine, asked(engine, "a", max_tokens=2)).wait()
        assert (refused.status, refused.retry_after) == (429, 60)
        assert "2 requests wait already, for 60 seconds" in refused.message
        first.job.cancel()
        assert [w.wait().reason for w in waiting] == ["length", "length"]
        assert engine.refusal() is None


def test_a_queue_that_all_have_left_has_no_pace(base, deployment):
    engine = engine_of(base, deployment, limits={"rows": 1})
    with running(engine):
        first = Answer(engine, asked(engine, "a", max_tokens=390))
        first.next()
        waiting = Answer(engine, asked(engine, "a", max_tokens=2))
        engine._pace._left.extend([0.0] * 64)  # long ago
        assert engine._pace.wait(1) > 0
        waiting.job.cancel()
        deadline = time.monotonic() + 60
        while engine._open and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (engine._open, engine._pace.wait(1)) == (0, 0.0)
        first.job.cancel()


def test_in_a_flood_the_model_leaves_a_core(base, deployment, monkeypatch):
    engine = engine_of(base, deployment, limits={"rows": 1, "queue": 1})
    engine._threads = 2
    before = torch.get_num_threads()
    seen, step = [], engine.batch.step
    monkeypatch.setattr(
        engine.batch, "step", lambda: (seen.append(torch.get_num_threads()), step())[1]
    )
    try:
        with running(engine):
            first = Answer(engine, asked(engine, "a", max_tokens=390))
            first.next()
            second = Answer(engine, asked(engine, "a", max_tokens=2))
            assert set(seen) <= {2}
            assert engine.refusal() is not None
            engine._refused += 1000  # however slow this machine is
            first.wait()
            assert (seen[-1], second.wait().reason) == (1, "length")
            engine._refused -= 2000
            Answer(engine, asked(engine, "a", max_tokens=5)).wait()
            assert seen[-1] == 2
    finally:
        torch.set_num_threads(before)


def test_a_request_has_its_time(base, deployment):
    engine = engine_of(base, deployment, limits={"rows": 1})
    with running(engine):
        long = asked(engine, "a", max_tokens=390)
        first = Answer(engine, long)
        first.next()
        late = Answer(engine, asked(engine, "a", deadline=time.monotonic() - 1)).wait()
        assert (late.status, late.message) == (504, "the request ran out of time in the queue")
        first.job.asked = replace(long, deadline=time.monotonic() - 1)
        assert "ran out of time after" in first.wait().message
        assert Answer(engine, asked(engine, "a")).wait().reason == "length"


def test_a_request_that_is_given_up_frees_its_row(base, deployment):
    engine = engine_of(base, deployment, limits={"rows": 1})
    with running(engine):
        first = Answer(engine, asked(engine, "a", max_tokens=399))
        first.next()
        first.job.cancel()
        assert Answer(engine, asked(engine, "b")).wait().reason == "length"
        assert first.job.answered < 399


def test_draining_ends_what_runs_and_refuses_what_waits(base, deployment):
    engine = engine_of(base, deployment, limits={"rows": 1})
    with running(engine):
        first = Answer(engine, asked(engine, "a", max_tokens=100))
        first.next()
        second = Answer(engine, asked(engine, "a"))
        engine.drain(60)
        assert second.wait() == Failure(503, "the server is shutting down")
        assert first.wait().reason == "length"
        assert not engine.alive
    assert Answer(engine, asked(engine, "a")).wait().status == 503


def test_closing_fails_what_runs(base, deployment):
    engine = engine_of(base, deployment)
    engine.start()
    first = Answer(engine, asked(engine, "a", max_tokens=399))
    first.next()
    engine.close()
    assert first.wait() == Failure(503, "the server is shutting down")


def test_a_failed_pass_is_told_and_survived(base, deployment, monkeypatch, caplog, alone):
    engine = engine_of(base, deployment)
    step = engine.batch.step
    with running(engine):
        monkeypatch.setattr(engine.batch, "step", lambda: 1 / 0)
        failed = Answer(engine, asked(engine, "a", "math")).wait()
        assert (failed.status, failed.message) == (500, "the model failed on this batch")
        monkeypatch.setattr(engine.batch, "step", step)
        assert Answer(engine, asked(engine, "b", "math")).tokens == alone("b", "math")


def test_logits_that_are_no_numbers_fail_their_request_only(base, deployment, alone):
    broken = {m: replace_factors(u) for m, u in deployment.serving["math"].modules.items()}
    engine = engine_of(base, deployment)
    target = engine.catalogue.targets["math"]
    engine.resident.ensure(target.sources, ())
    engine.resident.held[target.sources[0]] = broken
    engine.resident._attach()
    with running(engine):
        jobs = [Answer(engine, asked(engine, p, m)) for p in PROMPTS for m in ("math", "law")]
        for prompt, bad, good in zip(PROMPTS, jobs[::2], jobs[1::2], strict=True):
            assert "gave logits that are no numbers" in bad.wait().message
            assert good.tokens == alone(prompt, "law")


def replace_factors(update):
    return replace(update, B=update.B * 1e38)


def test_an_adapter_that_overflows_the_models_dtype_is_not_attached(base, deployment):
    adapter = deployment.serving["math"]
    huge = {name: replace(update, B=update.B * 1e6) for name, update in adapter.modules.items()}
    source = Source("huge", None, replace(adapter, modules=huge))
    with pytest.raises(AdapterError, match=r"'huge' has entries in .* overflow torch.float16"):
        Resident(copy.deepcopy(base.model).half(), 2).ensure([source], ())


def test_only_full_attention_is_decoded(base):
    model = copy.deepcopy(base.model)
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(BaseModelError, match=r"layers of type \['sliding_attention'\]"):
        check_decoder(replace(base, model=model))


# ---- sampling and text


def test_sampling_is_by_its_own_seed():
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    how = [Sampling(seed=seed) for seed in range(6)]
    many = next_tokens(logits, how, [s.generator() for s in how])
    each = [next_tokens(logits[k : k + 1], [s], [s.generator()])[0] for k, s in enumerate(how)]
    assert many == each


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    for top_p, wanted in ((1.0, (0.5, 0.3, 0.15, 0.05)), (0.7, (0.625, 0.375, 0, 0))):
        how = Sampling(top_p=top_p, seed=3)
        draw = how.generator()
        found = torch.tensor(next_tokens(logits, [how] * 4000, [draw] * 4000))
        shares = [float((found == token).double().mean()) for token in range(4)]
        assert shares == pytest.approx(wanted, abs=0.03)
    cold = Sampling(temperature=1e-4, seed=1)
    assert set(next_tokens(logits[:50], [cold] * 50, [cold.generator()] * 50)) == {0}
    masked = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert next_tokens(masked, [Sampling(seed=1)], [Sampling(seed=1).generator()]) == [1]


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens, **others):
        return bytes(tokens).decode("utf-8", "replace")


@pytest.mark.parametrize("stops", [(), ("zzz",), ("é!",), ("!", "ü€")])
def test_text_comes_in_whole_characters_and_ends_at_a_stop(stops):
    whole = "aü€é!🙂b"
    text = Text(Bytes(), list(b"say "), stops)
    parts = []
    for token in whole.encode():
        parts.append(text.add(token))
        if text.stopped:
            break
    parts.append(text.close())
    cuts = [whole.index(stop) for stop in stops if stop in whole]
    assert "".join(parts) == whole[: min(cuts, default=None)]
    assert text.stopped == bool(cuts)
    assert not any("\ufffd" in part for part in parts)


def test_text_that_ends_inside_of_a_character():
    text = Text(Bytes(), [97], ("?",))
    assert [text.add(b) for b in "é€".encode()[:4]] == ["", "é", "", ""]
    assert text.close() == "\ufffd"


def test_a_stop_that_never_comes_is_let_go():
    text = Text(Bytes(), [97], ("stop",))
    assert [text.add(b) for b in b"so sto"] == ["", "so", " ", "", "", ""]
    assert text.close() == "sto"


def test_pieces_are_told_in_order(base, deployment, alone):
    engine = engine_of(base, deployment)
    with running(engine):
        answer = Answer(engine, asked(engine, "abc", "law", max_tokens=15))
        answer.wait()
    assert all(isinstance(piece, Piece) for piece in answer.pieces)
    assert [piece.tokens for piece in answer.pieces] == list(range(1, 16))
    text = words(base, alone("abc", "law", 15))
    assert "".join(piece.text for piece in answer.pieces) == text
