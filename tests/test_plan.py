"""plan.json: what is written is read back, and what is wrong is said in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergeprobe.errors import OutputExists, PlanError
from mergeprobe.plan import (
    Action,
    AdapterRef,
    Forecast,
    FrontierPoint,
    Group,
    Plan,
    Pruned,
    Route,
    check_name,
    plan_dict,
    read_plan,
    write_plan,
)

HAND = {
    "adapters": [{"name": "math"}, {"name": "code"}, {"name": "safety"}],
    "groups": [
        {"name": "math+code", "adapters": ["math", "code"], "action": "merge", "method": "mean"},
        {"name": "safety", "adapters": ["safety"], "action": "route"},
    ],
}


def written(folder: Path, value) -> Path:
    path = folder / "plan.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
    return path


def test_a_plan_written_by_hand(tmp_path):
    plan = read_plan(written(tmp_path, HAND))
    assert plan.tier == "hand"
    assert plan.schema_version == 1
    assert plan.group_of("code").method == "mean"
    assert plan.group_of("safety").action is Action.route
    assert plan.route.by == "name"
    with pytest.raises(PlanError, match="no adapter 'poetry'"):
        plan.group_of("poetry")


names = st.text(
    st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="/\\"),
    min_size=1,
    max_size=12,
).filter(lambda name: not name.startswith("."))
numbers = st.floats(-100, 100, allow_nan=False)
forecasts = st.builds(Forecast, retention=numbers, low=numbers, high=numbers)
pruned = st.builds(
    Pruned,
    modules=st.lists(names, max_size=2).map(tuple),
    components=st.dictionaries(names, st.lists(st.integers(0, 9), max_size=3).map(tuple)),
)


@st.composite
def plans(draw):
    adapters = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    cut = draw(st.integers(1, len(adapters)))
    groups = []
    for members in filter(None, (adapters[:cut], adapters[cut:])):
        action = draw(st.sampled_from(Action))
        weights: dict[str, float] = {name: draw(numbers) for name in members}
        groups.append(
            Group(
                name=f"g{len(groups)}",
                adapters=tuple(members),
                action=action,
                method=draw(st.sampled_from(["mean", "ties"])),
                options=draw(st.dictionaries(st.sampled_from(["density", "t"]), numbers)),
                weights=weights if action is Action.reweight else None,
                rank=draw(st.none() | st.integers(1, 512)),
                pruned={members[0]: draw(pruned)},
                forecast={name: draw(forecasts) for name in members},
                resident_parameters=draw(st.none() | st.integers(0, 10**12)),
                reasons=tuple(draw(st.lists(st.text(max_size=20), max_size=2))),
            )
        )
    return Plan(
        base=draw(names),
        base_fingerprint=draw(st.none() | st.just("f" * 16)),
        adapters=tuple(AdapterRef(name=name, path=f"a/{name}") for name in adapters),
        groups=tuple(groups),
        route=draw(st.builds(Route, by=st.sampled_from(["name", "prompt"]))),
        tier=draw(st.sampled_from(["weights", "file", "model", "hand"])),
        calibrated=draw(st.booleans()),
        min_retention=draw(st.none() | numbers),
        frontier=(
            FrontierPoint(
                groups=tuple((name,) for name in adapters),
                methods=(None,) * len(adapters),
                mean_retention=draw(numbers),
                worst_retention=draw(numbers),
                resident_parameters=draw(st.integers(0, 10**12)),
            ),
        ),
        missing=tuple(draw(st.lists(names, max_size=2))),
    )


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(plan=plans())
def test_round_trip(tmp_path, plan):
    write_plan(plan, tmp_path / "plan.json")
    again = read_plan(tmp_path / "plan.json")
    assert again == plan
    assert plan_dict(again) == plan_dict(plan)


def changed(**changes):
    return json.loads(json.dumps(HAND)) | changes


def with_group(**changes):
    value = changed()
    value["groups"][0] |= changes
    return value


def with_names(first: str):
    value = json.dumps(HAND)
    return json.loads(value.replace('"safety"', json.dumps(first)))


WRONG = {
    "unknown action": (with_group(action="blend"), ["groups.0.action", "'blend'", "'merge'"]),
    "unknown field": (with_group(colour="red"), ["groups.0", "unknown field 'colour'"]),
    "unknown field of the plan": (changed(grups=[]), ["plan", "unknown field 'grups'"]),
    "missing field": ({"adapters": []}, ["plan: missing field 'groups'"]),
    "newer schema": (changed(schema_version=99), ["schema 99", "up to 1", "upgrade mergeprobe"]),
    "no schema number": (changed(schema_version="one"), ["schema version", "'one'"]),
    "weights for others": (
        with_group(action="reweight", weights={"math": 0.5, "poetry": 0.5}),
        ["'math+code'", "['math', 'poetry']", "expected ['code', 'math']"],
    ),
    "no weights": (with_group(action="reweight"), ["'math+code'", "'reweight' needs weights"]),
    "no method": (with_group(method=None), ["'math+code'", "'merge' needs a method"]),
    "pruned for others": (with_group(pruned={"poetry": {}}), ["'math+code'", "['poetry']"]),
    "no rank": (with_group(rank=0), ["groups.0.rank", "got 0"]),
    "twice in a group": (with_group(adapters=["math", "math"]), ["'math+code'", "twice"]),
    "empty group": (with_group(adapters=[]), ["'math+code' has no adapters"]),
    "in two groups": (
        with_group(adapters=["math", "code", "safety"]),
        ["['safety'] stand in more than one group"],
    ),
    "in no group": (with_group(adapters=["math"]), ["['code'] stand in no group", "'route'"]),
    "not an adapter": (
        with_group(adapters=["math", "code", "poetry"]),
        ["['poetry'] stand in a group but not among"],
    ),
    "same name": (changed(adapters=[{"name": "math"}] * 2), ["two adapters", "same name"]),
    "same label": (with_group(name="safety"), ["two groups", "same name"]),
    "climbing group": (with_group(name="../x"), ["'../x' cannot name a group"]),
    "climbing adapter": (with_names("../x"), ["'../x' cannot name a group or adapter"]),
    "line break in a name": (with_names("a\nb"), ["'a\\nb' cannot name"]),
    "line break in a field": (changed(**{"a\nb": 1}), ["unknown field 'a b'"]),
    "infinite": (
        json.dumps(changed(min_retention=float("inf"))),
        ["min_retention", "finite"],
    ),
    "malformed": ('{"adapters": [\n  {"name": }', ["not valid JSON (line 2"]),
    "truncated": (json.dumps(HAND)[:80], ["not valid JSON"]),
    "empty": ("", ["not valid JSON (line 1"]),
    "no object": ("[1, 2]", ["holds no JSON object"]),
    "absurdly nested": ("[" * 100_000, ["cannot be read as JSON"]),
    "absurdly long number": ('{"rank": ' + "9" * 5000 + "}", ["cannot be read as JSON"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line_that_names_it(case, tmp_path):
    value, said = WRONG[case]
    path = written(tmp_path, value)
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"'{path}'")
    for words in said:
        assert words in line, line


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(PlanError, match=r"plan\.json' does not exist"):
        read_plan(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="cannot be read"):
        read_plan(tmp_path)
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot be read"):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("name", ["math", "código português", "数学", "a b+c", "x" * 200, "été-2"])
def test_good_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "a\0", "a\tb", "x" * 201, "数" * 67]
)
def test_bad_names(name):
    with pytest.raises(PlanError, match="cannot name a group or adapter") as caught:
        check_name(name)
    assert "\n" not in str(caught.value)


def test_nothing_half_written(tmp_path, monkeypatch):
    """A disk that is full when the file is synced leaves the old plan, and nothing else."""
    plan = read_plan(written(tmp_path, HAND))
    before = (tmp_path / "plan.json").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mergeprobe.artefact.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_plan(plan, tmp_path / "plan.json")
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    assert (tmp_path / "plan.json").read_bytes() == before
    with pytest.raises(OutputExists, match="already exists"):
        write_plan(plan, tmp_path / "plan.json", force=False)
    assert (tmp_path / "plan.json").read_bytes() == before
