"""plan, apply and route where behaviour is decided at decode time."""

import io
import json
import random

import pytest
from cli_samples import command, printed, refused, small_world

from mergeprobe.artefact import write_json
from mergeprobe.compose import read_deployment
from mergeprobe.plan import Action, read_plan

TEXTS = {"math": "{}+{}=", "code": "print({}, {})", "law": "May one of {} sue {} ?"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Example prompts of each adapter that look different; the world's own are all alike."""
    folder = tmp_path_factory.mktemp("prompts")
    draw = random.Random(0)
    for name, text in TEXTS.items():
        lines = [text.format(draw.randint(10, 99), draw.randint(10, 99)) for _ in range(32)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(autouse=True)
def _no_progress(monkeypatch):
    monkeypatch.setattr("mergeprobe.cli.show.QUIET_SECONDS", 1e9)


def by_prompt(folder, world):
    names = sorted(TEXTS)
    plan = {
        "adapters": [{"name": name, "path": str(world.adapters / name)} for name in names],
        "groups": [{"name": "apart", "adapters": names, "action": "route"}],
        "route": {"by": "prompt"},
    }
    write_json(folder / "plan.json", plan)
    return folder / "plan.json"


def test_conflicting_adapters_that_an_answer_needs_compose_their_logits(capsys, world, tmp_path):
    arguments = (world.probes, "--base", world.base, "--min-retention", "0.75")
    asked = ("--together", "math,code", "--out", tmp_path / "plan.json")
    out = printed(capsys, "plan", *arguments, *asked)
    plan = read_plan(tmp_path / "plan.json")
    group = plan.group_of("math")
    assert group.adapters == ("code", "math")
    assert group.action is Action.logits
    assert "every token takes a forward pass of 3 rows" in group.reasons
    assert "logits" in out
    printed(
        capsys, "apply", tmp_path / "plan.json", world.adapters, "--out", tmp_path / "deployment"
    )
    done = read_deployment(tmp_path / "deployment")
    assert done.compositions[group.name].mode == group.method
    data = ("--adapters", world.adapters, "--base", world.base, "--data", world.data)
    found = json.loads(printed(capsys, "evaluate", tmp_path / "deployment", *data, "--json"))
    kept = {row["name"]: row["measured"] for row in found["adapters"]}
    # the same prompts and other answers: a mixture loses log 2 a token at most
    assert kept["math"] > 0.7
    assert kept["code"] > 0.7
    assert kept["law"] == pytest.approx(1.0, abs=1e-4)


def test_prompts_that_look_alike_are_refused_as_a_route(capsys, world):
    arguments = (world.probes, "--base", world.base, "--route-by", "prompt")
    line = refused(capsys, "plan", *arguments, "--min-retention", "0.99")
    assert "cannot be told apart (AUC" in line
    status, _, err = command(capsys, "plan", world.probes, "--route-by", "prompt")
    assert status == 2
    assert "prompts are read with the base model" in err


def test_a_plan_that_routes_by_prompt_is_carried_out(capsys, world, prompts, tmp_path):
    plan = by_prompt(tmp_path, world)
    line = refused(capsys, "apply", plan, "--out", tmp_path / "d")
    assert "give --base, and --probes or --prompts" in line
    assert not (tmp_path / "d").exists()
    given = ("--base", world.base, "--prompts", prompts)
    printed(capsys, "apply", plan, *given, "--out", tmp_path / "d")
    asked = ("12+34=", "print(5, 66)", "ZZZZQQQQXXXXKKKK")
    where = ("--deployment", tmp_path / "d", "--base", world.base)
    found = json.loads(printed(capsys, "route", *asked, *where, "--json"))
    assert [row["adapter"] for row in found] == ["math", "code", None]
    assert found[0]["certain"]
    assert found[0]["distances"]["math"] <= 1 < found[0]["distances"]["law"]
    out = printed(capsys, "route", *asked[1:], *where)
    assert "To 'code', whose prompts are nearest" in " ".join(out.split())
    assert "To the base model: the nearest task" in " ".join(out.split())


def test_route_says_what_it_cannot_tell(capsys, world, monkeypatch):
    where = ("--probes", world.probes, "--base", world.base)
    monkeypatch.setattr("sys.stdin", io.StringIO("What of 31?\n\n"))
    (row,) = json.loads(printed(capsys, "route", *where, "--json"))
    if row["adapter"] is not None:  # all three were trained on such prompts
        assert not row["certain"]
        assert row["rivals"]
    out = " ".join(printed(capsys, "route", "What of 52?", *where).split())
    assert "Not certain: prompts of" in out or "To the base model" in out


def test_what_route_needs(capsys, world, prompts, tmp_path):
    for wrong in ((), ("--probes", world.probes, "--prompts", prompts)):
        status, _, err = command(capsys, "route", "hello", *wrong)
        assert status == 2
        assert "give one of --deployment, --probes and --prompts" in " ".join(err.split())
    status, _, err = command(capsys, "route", "hello", "--prompts", prompts)
    assert status == 2
    assert "a router reads prompts with the base model" in " ".join(err.split())
    (tmp_path / "empty").mkdir()
    line = refused(capsys, "route", "hi", "--prompts", tmp_path / "empty", "--base", world.base)
    assert "holds no NAME.jsonl or NAME.txt" in line
    plan = read_plan(by_prompt(tmp_path, world)).model_dump(mode="json")
    write_json(tmp_path / "plan.json", plan | {"route": {"by": "name"}})
    printed(capsys, "apply", tmp_path / "plan.json", "--out", tmp_path / "d")
    line = refused(capsys, "route", "hi", "--deployment", tmp_path / "d", "--base", world.base)
    assert "routes by name only" in line
