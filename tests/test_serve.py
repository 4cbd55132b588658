"""The server over HTTP: the stock OpenAI client against a live one, every refusal, its end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import httpx
import openai
import pytest
from serve_samples import NAMES, deployment_of, served_base, spare

from mergeprobe.cli import main
from mergeprobe.errors import DeploymentError
from mergeprobe.serve.app import make_app
from mergeprobe.serve.engine import Limits
from mergeprobe.serve.gate import host_name, is_loopback
from mergeprobe.serve.prompts import chat_ids, plain
from mergeprobe.serve.schema import Message
from mergeprobe.serve.server import _Server, address_of, bound, make_engine

TOKEN = "secret"
ASK = {"model": "math", "prompt": "one and two", "max_tokens": 12, "temperature": 0}
HELLO = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Hello!"}]


class Live:
    """A server in a thread of this process."""

    def __init__(self, base, deployment, limits, token=TOKEN, **options):
        import uvicorn

        self.engine = make_engine(base, deployment, limits, **options)
        self.at = bound("127.0.0.1", 0, token)
        self.url = address_of(self.at)
        app = make_app(self.engine, token=token)
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5)
        ready = threading.Event()
        self.server = _Server(config, self.engine, 2.0, ready.set)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.at]})
        self.thread.start()
        assert ready.wait(30)

    def client(self, **options):
        options = {"api_key": TOKEN, "max_retries": 0} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def http(self, token=TOKEN):
        return httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {token}"}, timeout=60
        )

    def value(self, name, **labels):
        return self.engine.metrics.registry.get_sample_value(f"mergeprobe_{name}", labels) or 0.0

    def close(self):
        self.server.should_exit = True
        self.thread.join(30)
        self.at.close()


@pytest.fixture(scope="module")
def base():
    return served_base()


@pytest.fixture
def other():
    """The same base again: a model runs in one engine at a time."""
    return served_base()


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """A deployment, and beside it one more adapter."""
    root = tmp_path_factory.mktemp("served")
    deployment_of(base, root / "deployment")
    spare(base, root)
    return root


@pytest.fixture(scope="module")
def live(base, folder):
    from mergeprobe.compose import read_deployment

    limits = Limits(tokens=600, rows=8, body=20_000, adapters=4)
    server = Live(base, read_deployment(folder / "deployment"), limits, pinned=("math",))
    yield server
    server.close()


@pytest.fixture
def client(live):
    with live.client() as found:
        yield found


@pytest.fixture
def http(live):
    with live.http() as found:
        yield found


# ---- the stock client


def test_models(client):
    assert [m.id for m in client.models.list()] == ["base", "pair", *NAMES, "left", "right"]
    assert client.models.retrieve("law").parent == "base"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_a_completion_and_its_stream_say_the_same(client):
    whole = client.completions.create(**ASK)
    assert (whole.model, whole.object, whole.choices[0].finish_reason) == (
        "math",
        "text_completion",
        "length",
    )
    assert whole.usage.model_dump()["total_tokens"] == len("one and two") + 12
    parts = [*client.completions.create(**ASK, stream=True)]
    assert "".join(p.choices[0].text for p in parts) == whole.choices[0].text
    assert [p.choices[0].finish_reason for p in parts[-2:]] == [None, "length"]
    assert len({p.id for p in parts}) == 1


def test_a_prompt_of_token_ids(client, base):
    whole = client.completions.create(**ASK)
    ids = base.tokenizer(ASK["prompt"])["input_ids"]
    assert client.completions.create(**ASK | {"prompt": ids}).choices == whole.choices
    with pytest.raises(openai.BadRequestError, match="token ids are 0 … 80"):
        client.completions.create(**ASK | {"prompt": [81]})


def test_a_chat_and_its_stream_say_the_same(client):
    ask = {"model": "law", "messages": HELLO, "max_completion_tokens": 9, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    assert whole.choices[0].message.role == "assistant"
    assert (whole.usage.completion_tokens, whole.object) == (9, "chat.completion")
    parts = [
        *client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    ]
    said = "".join(p.choices[0].delta.content or "" for p in parts[:-1])
    assert said == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant"
    assert (parts[-1].choices, parts[-1].usage) == ([], whole.usage)
    # no chat template: a plain one, the same as that text as a prompt
    prompt = plain([Message(**m) for m in HELLO])
    assert prompt == "System: be brief\nUser: Hello!\nAssistant:"
    text = client.completions.create(model="law", prompt=prompt, max_tokens=9, temperature=0)
    assert text.choices[0].text == said


def test_a_seed_repeats_and_stops_cut(client):
    ask = ASK | {"temperature": 1.0, "top_p": 0.9, "max_tokens": 30}
    first, second, other = (
        client.completions.create(**ask, seed=seed).choices[0].text for seed in (5, 5, 6)
    )
    assert first == second != other
    stop = first[4:6]
    cut = client.completions.create(**ask, seed=5, stop=["<no>", stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (first[: first.index(stop)], "stop")


def test_every_name_answers_and_a_merged_one_for_all_its_names(client):
    text = {
        m.id: client.completions.create(**ASK | {"model": m.id}).choices[0].text
        for m in client.models.list()
    }
    assert text["left"] == text["right"] == text["pair"]
    assert len({*text.values()}) == 5


def test_many_at_once_get_what_each_gets_alone(live, client):
    names = ["base", *NAMES, "left"]
    asks = [ASK | {"model": n, "prompt": p} for n in names for p in ("a", "b c d", "12 + 30 =")]
    alone = [client.completions.create(**ask).choices[0].text for ask in asks]
    found = [None] * len(asks)

    def run(k):
        with live.client() as own:
            found[k] = own.completions.create(**asks[k]).choices[0].text

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(asks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == alone


def test_loading_an_adapter(live, client, http, folder):
    load = {"lora_name": "late", "lora_path": "spare"}
    assert http.post("/v1/load_lora_adapter", json=load).json() == {"message": "'late' is served"}
    assert client.completions.create(**ASK | {"model": "late"}).model == "late"
    again = http.post("/v1/load_lora_adapter", json=load)
    assert (again.status_code, "is served already" in again.text) == (409, True)
    gone = http.post("/v1/unload_lora_adapter", json={"lora_name": "late"})
    assert gone.status_code == 200
    with pytest.raises(openai.NotFoundError, match="'late' is not served"):
        client.completions.create(**ASK | {"model": "late"})
    for path, status in (("nowhere", 404), ("../..", 404), ("/etc", 404), ("bare", 400)):
        (folder / "bare").mkdir(exist_ok=True)
        missing = http.post("/v1/load_lora_adapter", json=load | {"lora_path": path})
        assert (missing.status_code, str(folder) in missing.text) == (status, False), missing.text


# ---- refusals


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "nothing"}, 404, "model 'nothing' is not served; served are 'base', 'pair'"),
        ({"model": "auto"}, 404, "no router"),
        ({"model": "../law"}, 422, "model: a name, not a path"),
        ({"model": "/etc/passwd"}, 422, "model: a name, not a path"),
        ({"model": "a\\b"}, 422, "model: a name, not a path"),
        ({"model": 3}, 422, "model: "),
        ({"n": 2}, 422, "n: "),
        ({"n": True}, 422, "n: "),
        ({"max_tokens": 2.5}, 422, "max_tokens: "),
        ({"best_of": 2}, 422, "best_of: "),
        ({"echo": True}, 422, "echo: "),
        ({"echo": 0}, 422, "echo: "),
        ({"logprobs": 3}, 422, "logprobs: "),
        ({"suffix": "x"}, 422, "suffix: "),
        ({"logit_bias": {"3": 1.0}}, 422, "logit_bias: "),
        ({"presence_penalty": 0.5}, 422, "presence_penalty: "),
        ({"tools": []}, 422, "'tools' is not supported by this server"),
        ({"min_tokens": 3}, 422, "'min_tokens' is not supported by this server"),
        ({"prompt": ["a", "b"]}, 422, "prompt"),
        ({"prompt": []}, 422, "prompt"),
        ({"temperature": -1}, 422, "temperature: "),
        ({"top_p": 0}, 422, "top_p: "),
        ({"max_tokens": 0}, 422, "max_tokens: "),
        ({"stop": [""]}, 422, "stop"),
        ({"stop": ["a"] * 5}, 422, "stop"),
        ({"seed": "x"}, 422, "seed: "),
        ({"max_tokens": 600}, 400, "11 tokens of prompt and 600 of answer are more than the 600"),
        ({"prompt": "a" * 600}, 400, "more than the 600 that this server takes"),
        ({"stream_options": {"include_usage": 1}}, 422, "stream_options.include_usage: "),
    ],
)
def test_requests_that_are_refused(http, change, status, message):
    answer = http.post("/v1/completions", json=ASK | change)
    error = answer.json()["error"]
    assert (answer.status_code, message in error["message"]) == (status, True), error
    assert {*error} == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: "),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format.type: "),
        ({"logprobs": True}, "logprobs: "),
        ({"functions": []}, "'functions' is not supported"),
    ],
)
def test_chats_that_are_refused(http, change, message):
    answer = http.post("/v1/chat/completions", json={"model": "math", "messages": HELLO} | change)
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (422, True)


def test_the_smaller_of_both_names_of_max_tokens_counts(http):
    ask = {"model": "math", "messages": HELLO, "max_tokens": 4, "max_completion_tokens": 3}
    answer = http.post("/v1/chat/completions", json=ask | {"ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens"] == 3
    beyond = http.post("/v1/chat/completions", json=ask | {"max_completion_tokens": 600})
    assert beyond.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("body", [b"{", b"", b"[1,", b'{"model": "\\ud800"}', b"\xff", b"3"])
def test_malformed_bodies(http, body):
    answer = http.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert (answer.status_code, "error" in answer.json()) == (422, True)


def test_a_body_too_large(http, live):
    large = ASK | {"prompt": "a" * 30_000}
    assert http.post("/v1/completions", json=large).status_code == 413
    # without a length in front
    chunks = (b" " * 1000 for _ in range(100))
    answer = http.post(
        "/v1/completions", content=chunks, headers={"content-type": "application/json"}
    )
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")


@pytest.mark.parametrize("token", ["", "wrong", "secret2", "sécret"])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/nothing"])
def test_a_wrong_token(live, token, path):
    headers = {"Authorization": f"Bearer {token}".encode()} if token else {}
    answer = httpx.get(f"{live.url}{path}", headers=headers)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_the_client_raises_for_a_wrong_token(live):
    with live.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_what_is_not_there(http):
    assert http.get("/nothing").json()["error"]["message"] == "Not Found"
    wrong = http.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert http.get("/docs").status_code == 404


def test_unloading_that_is_refused(http):
    for name, status in (("math", 409), ("base", 409), ("nothing", 404), ("../x", 422)):
        answer = http.post("/v1/unload_lora_adapter", json={"lora_name": name})
        assert answer.status_code == status, answer.text


# ---- health, metrics, clients that leave


def test_health_and_metrics(live, http):
    assert httpx.get(f"{live.url}/health").json() == {"status": "ok"}
    before = live.value("requests_total", model="code", how="done")
    http.post("/v1/completions", json=ASK | {"model": "code"})
    text = http.get("/metrics").text
    found = re.search(r'mergeprobe_requests_total\{how="done",model="code"\} (\S+)', text)
    assert float(found[1]) == before + 1
    assert "mergeprobe_step_seconds_bucket" in text
    assert re.search(r"mergeprobe_resident_adapters [1-4]\.0", text)
    assert "python_gc" not in text  # a registry of its own


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(live, stream):
    before = live.value("requests_total", model="law", how="cancelled")
    body = json.dumps(
        ASK | {"model": "law", "max_tokens": 580, "ignore_eos": True, "stream": stream}
    )
    with socket.create_connection(live.at.getsockname()) as one:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        one.sendall((head + body).encode())
        if stream:
            assert one.recv(20).startswith(b"HTTP/1.1 200")
        else:
            _until(lambda: live.engine.batch.rows)
    _until(lambda: live.value("requests_total", model="law", how="cancelled") == before + 1)
    _until(lambda: not live.engine.batch.rows)


def test_a_full_queue_is_429_with_a_time(other, folder, monkeypatch):
    from mergeprobe.compose import read_deployment

    limits = Limits(tokens=600, rows=1, queue=1, adapters=1)
    server = Live(other, read_deployment(folder / "deployment"), limits)
    go, step = threading.Event(), server.engine.batch.step
    monkeypatch.setattr(server.engine.batch, "step", lambda: (go.wait(60), step())[1])
    found = []

    def ask():
        with server.client() as client:
            found.append(client.completions.create(**ASK).usage.completion_tokens)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    try:
        threads[0].start()
        _until(lambda: server.engine.batch.rows)
        threads[1].start()
        _until(lambda: server.engine._open == 1)
        with server.client() as client, pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(**ASK)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        # said before anyone reads what is asked, on a connection that stays
        with server.http() as client:
            told = [client.post("/v1/completions", content=b"{") for _ in range(2)]
            assert client.get("/v1/models").status_code == 200
        assert [answer.status_code for answer in told] == [429, 429]
        assert told[0].json()["error"]["code"] == "queue_full"
        assert all("connection" not in answer.headers for answer in told)
        with server.http(token="wrong") as client:
            assert client.post("/v1/completions", content=b"{").status_code == 401
        assert server.value("requests_total", model="", how="refused") >= 3
    finally:
        go.set()
        for thread in threads:
            thread.join(60)
        server.close()
    assert found == [12, 12]


def test_a_server_that_closes_tells_a_stream(other, folder):
    from mergeprobe.compose import read_deployment

    server = Live(other, read_deployment(folder / "deployment"), Limits(tokens=2000, rows=1))
    with server.client() as client:
        ask = ASK | {"max_tokens": 1900, "stream": True}
        stream = client.completions.create(**ask, extra_body={"ignore_eos": True})
        next(stream)
        server.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.APIError, match="shutting down"):
            for _ in stream:
                pass
    server.close()
    assert not server.engine._thread.is_alive()


def _until(true, seconds=30.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- chat templates


def test_the_tokenizers_template_is_used(base):
    import copy

    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}={{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}a={% endif %}"
    )
    messages = [Message(**m) for m in HELLO]
    assert tokenizer.decode(chat_ids(tokenizer, messages)) == "s=be brief;u=Hello!;a="
    parts = [Message(role="user", content=[{"type": "text", "text": t} for t in ("He", "llo!")])]
    assert chat_ids(tokenizer, parts) == tokenizer("u=Hello!;a=")["input_ids"]


def test_a_template_that_refuses(base):
    import copy

    from mergeprobe.errors import DataError

    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="the chat template refuses these messages: roles must"):
        chat_ids(tokenizer, [Message(**m) for m in HELLO])


# ---- where it serves


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", "127.0.0.1.nip.io"])
def test_no_token_no_other_address(host):
    assert not is_loopback(host)
    with pytest.raises(DeploymentError, match="can be reached from other machines"):
        bound(host, 0, None)


def test_a_port_that_is_taken():
    with bound("127.0.0.1", 0, None) as one:
        one.listen()
        port = one.getsockname()[1]
        with pytest.raises(DeploymentError, match=f"cannot serve on 127.0.0.1 port {port}: "):
            bound("127.0.0.1", port, None)


def test_loopback_names():
    assert all(is_loopback(h) for h in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    assert host_name("[::1]:80") == "::1"
    assert host_name("localhost:80") == "localhost"


def test_without_a_token_only_loopback_names_are_answered(other, folder):
    from fastapi.testclient import TestClient

    from mergeprobe.compose import read_deployment

    engine = make_engine(other, read_deployment(folder / "deployment"), Limits(tokens=600))
    with TestClient(make_app(engine), base_url="http://127.0.0.1:8000") as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403


def test_auto_says_what_the_router_chose(other, folder):
    from fastapi.testclient import TestClient

    from mergeprobe.compose import read_deployment
    from mergeprobe.compose.router_file import make_router

    prompts = {"math": [f"{a} + {a} = ?" for a in range(12)], "law": [w * 9 for w in "abcdefghij"]}
    found = replace(read_deployment(folder / "deployment"), router=make_router(other, prompts))
    engine = make_engine(other, found, Limits(tokens=600))
    with TestClient(make_app(engine), base_url="http://127.0.0.1:8000") as client:
        assert [m["id"] for m in client.get("/v1/models").json()["data"]][-1] == "auto"
        ask = ASK | {"model": "auto"}
        for name in prompts:
            text = client.post("/v1/completions", json=ask | {"prompt": prompts[name][4]}).json()
            assert (text["model"], text["route"]["model"]) == (name, name)
            chat = {"model": "auto", "messages": [{"role": "user", "content": prompts[name][4]}]}
            said = client.post("/v1/chat/completions", json=chat | {"max_tokens": 2}).json()
            assert said["model"] == name
            assert said["route"]["certain"] == (not said["route"]["rivals"])


# ---- the command


@pytest.mark.timeout(300)
def test_the_command_serves_and_ends_cleanly(base, folder, tmp_path):
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    command = [sys.executable, "-m", "mergeprobe", "serve", str(folder / "deployment")]
    command += ["--base", str(tmp_path / "base"), "--port", "0", "--grace", "20"]
    environment = os.environ | {"MERGEPROBE_TOKEN": TOKEN}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        url = re.search(r"http://\S+", line)[0]
        assert "Serving base, pair, math, code, law, left, right on" in line
        with openai.OpenAI(base_url=url, api_key=TOKEN, max_retries=0) as client:
            ask = ASK | {"max_tokens": 300, "stream": True}
            stream = client.completions.create(**ask, extra_body={"ignore_eos": True})
            next(stream)
            process.send_signal(signal.SIGTERM)
            # what runs may end
            assert [*stream][-1].choices[0].finish_reason == "length"
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()


def refused(capsys, *arguments):
    assert main(["serve", *map(str, arguments)]) == 1
    return capsys.readouterr().err


def test_commands_that_are_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MERGEPROBE_TOKEN", raising=False)
    said = refused(capsys, folder / "deployment", "--host", "0.0.0.0")
    assert "can be reached from other machines and there is no token; give --token" in said
    said = refused(capsys, tmp_path, "--port", 0)
    assert "routing.json" in said
    said = refused(capsys, folder / "deployment", "--port", 0, "--token", "a b\n")
    assert "the token must be printable ASCII" in said
