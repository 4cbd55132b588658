"""schemathesis looks for a request that the server answers otherwise than its description says."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import load_all_checks
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serve_samples import deployment_of, served_base

from mergeprobe.serve.app import make_app
from mergeprobe.serve.engine import Limits
from mergeprobe.serve.server import make_engine

TOKEN = {"Authorization": "Bearer secret"}
PATHS = {
    "/health": 2,
    "/metrics": 2,
    "/v1/models": 2,
    "/v1/models/{model}": 20,
    "/v1/completions": 40,
    "/v1/chat/completions": 40,
    "/v1/load_lora_adapter": 20,
    "/v1/unload_lora_adapter": 20,
}
SEEN = set()
load_all_checks()


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    base = served_base()
    deployment = deployment_of(base, tmp_path_factory.mktemp("served") / "deployment")
    engine = make_engine(base, deployment, Limits(tokens=100), pinned=("math",))
    app = make_app(engine, token="secret")

    async def running(scope, receive, send):
        """The application of an engine that runs already, not to be started by each client."""
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})

    engine.start()
    yield schemathesis.openapi.from_asgi("/openapi.json", running, headers=TOKEN)
    engine.close()


def test_every_path_is_described_and_looked_at(api):
    assert sorted(api) == sorted(PATHS)


CASES = [(path, GenerationMode.POSITIVE) for path in PATHS]
CASES += [(path, GenerationMode.NEGATIVE) for path, count in PATHS.items() if count > 2]


@pytest.mark.parametrize(("path", "mode"), CASES)
def test_the_description_holds(api, path, mode):
    cases = next(iter(api[path].values())).as_strategy(generation_mode=mode)
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]

    @given(cases)
    @settings(
        max_examples=PATHS[path],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=quiet,
    )
    def holds(case):
        answer = case.call(headers=TOKEN)
        SEEN.add((path, answer.status_code))
        excluded = []
        if answer.status_code == 400:
            # how many tokens a text has is the one thing that a JSON schema can't say
            assert answer.json()["error"]["code"] == "context_length_exceeded"
            excluded = [positive_data_acceptance]
        case.validate_response(answer, excluded_checks=excluded, headers=TOKEN)

    holds()


def test_it_has_looked_at_answers_and_at_refusals(api):
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert {200, 422} <= {status for seen, status in SEEN if seen == path}
