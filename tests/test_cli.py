"""The command line and the face: what they print, their statuses, and that they answer at once."""

import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import polars as pl
import pytest
import torch
import typer
from builders import tiny_adapter, tiny_probe
from cli_samples import ANSWERS, command, printed, refused, small_world
from peft import PeftModel
from tiny_base import tiny_model

import mergeprobe
from mergeprobe.adapters.checkpoint import read_adapter, write_adapter
from mergeprobe.artefact import write_json
from mergeprobe.bench.folder import Config, RunFolder
from mergeprobe.bench.measure import Measurement, result_path
from mergeprobe.bench.summary import summary
from mergeprobe.capture.probe import read_probe, write_probe
from mergeprobe.cli.app import VERBS, app
from mergeprobe.cli.sources import expand
from mergeprobe.plan import read_plan

NAMES = sorted(ANSWERS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _no_progress(monkeypatch):
    """A slow machine would add lines of progress to what is compared here."""
    monkeypatch.setattr("mergeprobe.cli.show.QUIET_SECONDS", 1e9)


def child(*arguments, **options):
    """`mergeprobe ARGUMENTS` in a process of its own."""
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.Popen(
        [sys.executable, "-m", "mergeprobe", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


# --- the face


def test_the_face_has_what_it_says():
    for name in mergeprobe.__all__:
        assert getattr(mergeprobe, name) is not None
    assert dir(mergeprobe) == sorted(mergeprobe.__all__)
    assert len(mergeprobe.__all__) < 20
    with pytest.raises(AttributeError, match="no attribute 'merge_everything'"):
        mergeprobe.merge_everything  # noqa: B018


def test_the_example_of_the_face_runs(tmp_path, monkeypatch):
    lines = [line for line in mergeprobe.__doc__.split("\n") if line.startswith("    ")]
    example = textwrap.dedent("\n".join(lines))
    assert len(example.splitlines()) == 6
    for seed, name in enumerate(("math", "code", "safety")):
        adapter = tiny_adapter(seed, name=name, fingerprint="f" * 16)
        write_adapter(adapter, tmp_path / "adapters" / name)
        write_probe(tiny_probe(seed, name=name), tmp_path / "probes" / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(example, found)
    assert set(found["deployment"].entries) == {"math", "code", "safety"}
    assert (tmp_path / "deployment" / "routing.json").exists()


# --- help, usage, interruption


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_every_help_has_examples(capsys, verb):
    text = printed(capsys, *verb.split(), "--help")
    assert "Examples" in text
    assert f"mergeprobe {verb}".strip() in text


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_in_the_help_are_right_usage(verb):
    group = typer.main.get_command(app)
    for line in VERBS[verb][1]:
        program, name, *arguments = shlex.split(line)
        assert (program, name) == ("mergeprobe", verb)
        group.commands[name].make_context(name, arguments)  # raises where it is wrong


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    # how long that takes is measured by benchmarks/help_time.py: a clock in a test fails on a
    # busy machine
    code = (
        f"import sys; from mergeprobe.cli import main; status = main({arguments!r}); "
        "heavy = {'torch', 'transformers', 'peft', 'polars', 'plotly', 'numpy', 'scipy', "
        "'xgboost', 'safetensors', 'datasets'} & {*sys.modules}; "
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("plam",),
        ("plan",),
        ("plan", "--nonsense"),
        ("forecast", "x", "--items", "many"),
        ("merge", "a", "--out", "b", "--rank", "0"),
        ("demo", "--control", "hard"),
        ("probe", "x"),
    ],
)
def test_wrong_usage_is_status_2(capsys, arguments):
    status, out, err = command(capsys, *arguments)
    assert (status, out) == (2, "")
    assert "Traceback" not in err


def test_weights_that_are_no_numbers_are_wrong_usage(capsys, world, tmp_path):
    out = tmp_path / "m"
    status, _, err = command(
        capsys, "merge", world.adapters, "--method", "linear", "--weights", "1,x", "--out", out
    )
    assert status == 2
    assert "1,x" in err
    assert not out.exists()


def test_interrupted_is_status_130_and_one_line(world, tmp_path):
    pipe = tmp_path / "data.jsonl"
    os.mkfifo(pipe)
    out = tmp_path / "p.safetensors"
    process = child(
        "probe", world.adapters / "math", "--base", world.base, "--data", pipe, "--out", out
    )
    with open(pipe, "wb"):  # opens when the command has begun to read
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines() == [
        "mergeprobe: interrupted; what is finished stays, the same command goes on"
    ]
    assert not out.exists()


def test_malloc_settings_are_taken_once_and_before_torch(tmp_path):
    """The command starts itself anew and still says what is wrong with its arguments."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    code = (
        "import os, sys, mergeprobe.cli as cli\n"
        "sys.argv = ['mergeprobe', 'probe', 'x', '--base', 'b', '--data', 'd', '--out', 'o']\n"
        "status = cli.main()\n"
        "print(status, os.environ.get('MALLOC_TOP_PAD_'), os.environ.get(cli.GUARD))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        env=environment,
    )
    gpu = Path("/proc/driver/nvidia/version").exists()
    settings = "None None" if gpu or sys.platform != "linux" else "268435456 1"
    assert done.stdout == f"1 {settings}\n"
    assert done.stderr == "mergeprobe: 'd' does not exist; expected a JSON-lines file\n"


def test_version(capsys):
    assert printed(capsys, "--version") == f"mergeprobe {mergeprobe.__version__}\n"


# --- sources


def test_a_folder_stands_for_what_is_inside_in_natural_order(tmp_path):
    for name in ("a10", "a2", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    (tmp_path / "other").mkdir()
    found = [path.name for path in expand([tmp_path])]
    assert found == ["a2", "a2.safetensors", "a10", "a10.safetensors"]
    assert [path.name for path in expand([tmp_path], probes=False)] == ["a2", "a10"]
    assert expand([tmp_path / "a2", tmp_path / "none"]) == [tmp_path / "a2", tmp_path / "none"]


# --- measuring, deciding


def test_signals_of_probes_and_of_adapters(capsys, world, tmp_path):
    out = tmp_path / "signals.parquet"
    text = printed(capsys, "signals", world.probes, "--out", out)
    assert "6 rows" in text
    rows = pl.read_parquet(out)
    found = json.loads(printed(capsys, "signals", world.probes, "--json"))
    assert found["pairs"] == rows.to_dicts()
    assert [row["a"] for row in found["adapters"]] == NAMES
    assert all(row["own_gain"] > 0.3 for row in found["adapters"])
    bare = json.loads(printed(capsys, "signals", world.adapters, "--json"))
    assert bare["pairs"][0]["gradient_cosine"] is None
    assert bare["pairs"][0]["frobenius_cosine"] == pytest.approx(
        found["pairs"][0]["frobenius_cosine"], abs=1e-6
    )


def test_a_probe_of_a_checkpoint_knows_its_step_from_the_trainer(capsys, world, tmp_path):
    folder = tmp_path / "checkpoint-30"
    write_adapter(read_adapter(world.adapters / "math"), folder)
    state = {"global_step": 30, "max_steps": 600, "log_history": [{"step": 10, "loss": 2.5}]}
    write_json(folder / "trainer_state.json", state)
    base = ("--base", world.base, "--data", world.data / "math.jsonl", "--no-text", "--json")
    out = tmp_path / "math.safetensors"
    facts = json.loads(printed(capsys, "probe", folder, *base, "--out", out))
    assert (facts["name"], facts["step"], facts["planned_steps"]) == ("math", 30, 600)
    probe = read_probe(out)
    assert probe.meta["losses"] == [[10, 2.5]]
    assert probe.calibration is not None
    assert probe.calibration.ids.numel() == 0
    known = read_probe(world.probes / "math.safetensors")
    assert facts["own_gain"] == pytest.approx(
        float((known.calibration.base_loss - known.calibration.loss).mean()), abs=1e-5
    )
    for module, update in known.updates.items():
        assert torch.allclose(probe.updates[module].dense(), update.dense(), atol=1e-6)


def test_forecasts_at_three_tiers(capsys, world):
    tiers = {}
    for tier, arguments in {
        "weights": (world.adapters,),
        "file": (world.probes,),
        "model": (world.probes, "--base", world.base),
    }.items():
        found = json.loads(printed(capsys, "forecast", *arguments, "--json"))
        assert (found["tier"], found["calibrated"]) == (tier, False)
        assert len(found["forecasts"]) == 6
        for row in found["forecasts"]:
            assert row["low"] <= row["forecast"] <= row["high"]
        tiers[tier] = found
    assert any("MergeProbeCallback" in line for line in tiers["weights"]["missing"])
    assert any("--base" in line for line in tiers["file"]["missing"])
    assert "disturbance_late" in tiers["model"]["forecasts"][0]["signals"]
    text = printed(capsys, "forecast", world.adapters, "--method", "sum")
    assert "Uncalibrated" in text
    assert "merged by sum" in text


def test_plan_from_plain_adapters(capsys, world, tmp_path):
    """No data, no base weights: groups, wide intervals, and what is missing."""
    out = tmp_path / "plan.json"
    folders = [world.adapters / name for name in NAMES]
    text = printed(capsys, "plan", *folders, "--out", out)
    plan = read_plan(out)
    assert plan.tier == "weights"
    assert [ref.path for ref in plan.adapters] == [str(folder) for folder in folders]
    for group in plan.groups:
        for forecast in group.forecast.values():
            assert len(group.adapters) == 1 or forecast.high - forecast.low > 0.3
    assert "What would make this better" in text
    assert "no gradients" in text
    assert "uncalibrated" in text
    for reason in plan.reasons:
        assert reason in text
    written = json.loads(out.read_text())
    again = json.loads(printed(capsys, "plan", world.adapters, "--json"))
    assert again["groups"] == written["groups"]


def test_a_limit_on_adapters_goes_before_the_floor(capsys, world):
    limits = ("--min-retention", "1", "--max-adapters", "1")
    made = json.loads(printed(capsys, "plan", world.adapters, *limits, "--json"))
    assert len(made["groups"]) == 1


def test_the_floor_moves_the_plan(capsys, world):
    at = {}
    for floor in ("0", "1"):
        arguments = (world.probes, "--base", world.base, "--min-retention", floor, "--json")
        at[floor] = json.loads(printed(capsys, "plan", *arguments))
    assert [group["adapters"] for group in at["0"]["groups"]] == [NAMES]
    assert len(at["1"]["groups"]) == 3


# --- carrying out, judging


def test_apply_and_evaluate_a_deployment(capsys, world, tmp_path):
    plan, out = tmp_path / "plan.json", tmp_path / "deployment"
    groups = [{"name": "both", "adapters": ["math", "code"], "action": "merge", "method": "mean"}]
    groups += [{"name": "law", "adapters": ["law"], "action": "route"}]
    write_json(plan, {"adapters": [{"name": name} for name in NAMES], "groups": groups})
    text = printed(capsys, "apply", plan, "--adapters", world.adapters, "--out", out)
    assert "both" in text
    arguments = ("--adapters", world.adapters, "--base", world.base, "--data", world.data)
    found = json.loads(printed(capsys, "evaluate", out, *arguments, "--json"))
    rows = {row["name"]: row for row in found["adapters"]}
    assert rows["law"]["measured"] == pytest.approx(1.0, abs=1e-5)
    assert rows["law"]["ratio_retention"] == pytest.approx(1.0, abs=1e-5)
    assert found["worst_retention"] == min(row["measured"] for row in rows.values())
    assert rows["math"]["measured"] == pytest.approx(by_hand(world, out, "math", "both"), abs=1e-3)
    assert "Retention under the deployment" in printed(capsys, "evaluate", out, *arguments)
    assert command(capsys, "evaluate", out)[0] == 2  # without base and data


def by_hand(world, deployment, name, group):
    """Gain retention with stock PEFT alone, one item at a time."""
    rows = [json.loads(line) for line in (world.data / f"{name}.jsonl").read_text().splitlines()]

    def loss(model):
        from tiny_base import tiny_tokenizer

        tokenizer, total = tiny_tokenizer(), 0.0
        for row in rows:
            prompt = tokenizer(row["prompt"])["input_ids"]
            answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                logprob = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            total -= float(logprob.gather(1, torch.tensor(answer)[:, None]).mean())
        return total / len(rows)

    base = loss(tiny_model())
    single = loss(PeftModel.from_pretrained(tiny_model(), str(world.adapters / name)).eval())
    merged = loss(PeftModel.from_pretrained(tiny_model(), str(deployment / group)).eval())
    return (base - merged) / (base - single)


def test_apply_finds_adapters_where_the_plan_says_or_as_arguments(capsys, world, tmp_path):
    plan = tmp_path / "plan.json"
    printed(capsys, "plan", world.adapters, "--out", plan)
    folders = [world.adapters / name for name in NAMES]
    for at, arguments in enumerate([(), ("--adapters", *folders), folders]):
        out = tmp_path / f"d{at}"
        found = json.loads(printed(capsys, "apply", plan, *arguments, "--out", out, "--json"))
        assert set(found["entries"]) == set(NAMES)


def test_merge_prints_its_certificate(capsys, world, tmp_path):
    pair = (world.adapters / "math", world.adapters / "code")
    assert "exact" in printed(capsys, "merge", *pair, "--out", tmp_path / "exact")
    options = ("--method", "linear", "--weights", "1,0.5", "--rank", "1", "--json")
    found = json.loads(printed(capsys, "merge", *pair, *options, "--out", tmp_path / "cut"))
    assert (found["merged_from"], found["rank"]) == (["math", "code"], 1)
    one, two, cut = (read_adapter(p) for p in (*pair, tmp_path / "cut"))
    error = size = 0.0
    for module, update in cut.modules.items():
        exact = one.modules[module].dense() + 0.5 * two.modules[module].dense()
        error += float((update.dense() - exact).square().sum())
        size += float(exact.square().sum())
    assert found["error"] == pytest.approx((error / size) ** 0.5, rel=1e-3)


def test_doctor(capsys, world, tmp_path):
    found = json.loads(printed(capsys, "doctor", world.adapters, "--json"))
    assert [finding["name"] for finding in found["findings"]] == NAMES
    assert found["groups"] == [NAMES]
    (tmp_path / "empty").mkdir()
    folders = (world.adapters / "math", tmp_path / "empty")
    status, out, err = command(capsys, "doctor", world.adapters / "math", tmp_path / "none")
    assert status == 1
    assert "'math'" not in err
    assert err == "mergeprobe: 1 of 2 adapters cannot be merged: 'none'\n"
    assert "unreadable" in out
    assert "holds no adapter" in refused(capsys, "doctor", *folders)


# --- a run


LOSSES = {  # (measurement, by adapter): base 2 to 3 nats, alone 1 less
    ("base", "math"): [2.0, 2.0, 3.0, 3.0],
    ("mean", "math"): [1.0, 1.0, 2.0, 2.0],
    ("base", "code"): [2.0, 3.0, 2.0, 3.0],
    ("mean", "code"): [1.0, 2.0, 1.0, 2.0],
}
DEPLOYED = {"math": [1.2, 1.4, 2.2, 2.4], "code": [1.5, 2.5, 1.5, 2.5]}
WORSE = {"math": [1.5, 1.5, 2.5, 2.5], "code": [2.0, 3.0, 2.0, 3.0]}


def write_run(path):
    """A measured run of two adapters, written by hand."""
    names = ("math", "code")
    folder = RunFolder(path)
    config = folder.claim(Config(tasks=names, test_items=4, rank=8))
    forecast = {
        "math": {"retention": 0.75, "low": 0.6, "high": 0.9},
        "code": {"retention": 0.8, "low": 0.7, "high": 0.9},
    }
    group = {"name": "math+code", "adapters": names, "action": "merge", "method": "mean"}
    plan = {
        "adapters": [{"name": name} for name in names],
        "groups": [group | {"rank": 8, "forecast": forecast, "resident_parameters": 100}],
        "min_retention": 0.4,
        "resident_parameters": 100,
        "full_routing_parameters": 200,
    }
    write_json(folder.plan, plan)

    def measured(method, adapters, rank, losses, parameters):
        exact = {name: [True, True, False, False] for name in adapters}
        value = {"losses": losses, "exact": exact, "parameters": parameters, "error": 0.0}
        write_json(result_path(folder.measured, Measurement(method, adapters, rank)), value)

    for (method, name), values in LOSSES.items():
        measured(method, (name,), None, {name: values}, 0 if method == "base" else 100)
    measured("deployed", names, None, DEPLOYED, 100)
    measured("mean", names, config.rank, DEPLOYED, 100)
    for method in ("sum", "norm_preserving_mean", "ties", "svc"):
        measured(method, names, config.rank, WORSE, 100)
    for name in names:  # two adapters at rank 4 fit into 100 parameters
        measured("mean", (name,), 4, {name: LOSSES["base", name]}, 50)
    folder.outcomes.write_bytes(b"")
    return folder


def test_a_runs_summary_by_hand(tmp_path):
    found = summary(write_run(tmp_path / "run"))
    math, code = found["adapters"]
    assert (math["forecast"], math["low"], math["high"]) == (0.75, 0.6, 0.9)
    # kept 0.8, 0.6, 0.8, 0.6 of 1; its standard error is sqrt(4 · 0.01 / 3) / 2
    assert math["measured"] == pytest.approx(0.7)
    assert math["measured_se"] == pytest.approx((0.04 / 3) ** 0.5 / 2)
    assert (math["inside"], code["inside"]) == (True, False)
    assert code["measured"] == pytest.approx(0.5)
    assert math["ratio_retention"] == pytest.approx(2.718281828 ** (1.5 - 1.8))
    assert (math["own_gain"], math["accuracy_deployed"]) == (1.0, 0.5)
    strategies = {row["name"]: row for row in found["strategies"]}
    assert list(strategies) == [
        *("mean", "sum", "norm_preserving_mean", "ties", "svc", "plan"),
        *("routing, truncated to the plan's parameters", "full routing by name"),
    ]
    plan = strategies["plan"]
    assert plan["mean_retention"] == pytest.approx(0.6)
    assert (plan["worst_retention"], plan["worst_adapter"]) == (pytest.approx(0.5), "code")
    assert [row["chosen"] for row in found["strategies"]].count(True) == 1
    assert plan["resident_parameters"] == 100
    assert strategies["full routing by name"]["resident_parameters"] == 200
    assert strategies["sum"]["worst_retention"] == pytest.approx(0.0)
    # one partition has at most the plan's 100 parameters: the plan's own
    assert found["regret"]["best"] == "math + code"
    assert found["regret"]["worst"] == pytest.approx(0.0)


def test_evaluate_prints_a_run(capsys, tmp_path):
    folder = write_run(tmp_path / "run")
    found = json.loads(printed(capsys, "evaluate", folder.path, "--json"))
    keys = {"name", "mean_retention", "worst_retention", "resident_parameters"}
    assert all(keys <= row.keys() for row in found["strategies"])
    keys = {"name", "forecast", "low", "high", "measured"}
    assert all(keys <= row.keys() for row in found["adapters"])
    text = printed(capsys, "evaluate", folder.path)
    for part in ("0.75 (0.60 to 0.90)", "0.70 ± 0.06", "→ plan", "full routing by name", "200"):
        assert part in text
    folder.outcomes.unlink()
    assert "not measured yet" in refused(capsys, "evaluate", folder.path)
    assert "not measured yet" in refused(capsys, "report", folder.path)


def test_a_run_with_other_settings_is_not_touched(capsys, tmp_path):
    folder = write_run(tmp_path / "run")
    line = refused(capsys, "demo", "--out", folder.path, "--seed", "3")
    assert "seed 0 (asked: 3)" in line
    assert "--force" in line


# --- the display


def stages(display, plan):
    display("base", name="tiny")
    display("train", job="probe", names=["a", "b"], steps=100)
    for step in range(1, 9):
        display("step", name="a", step=step, loss=3.0 - 0.1 * step)
    display("forecast", message="a + b by mean")
    display("planned", plan=plan, folder=None)
    display("train", job="finish", names=["a", "b"], steps=100)
    for step in range(9, 101):
        display("step", name="b", step=step, loss=1.0)
    display("apply", plan=plan)
    display("measure", total=10, left=4)
    display("measured", folder=None)
    display("done", folder=None)


def test_progress_in_a_log(capsys, world):
    from mergeprobe.cli.demo import Display

    seen = []
    with Display(on_plan=seen.append) as display:
        stages(display, "the plan")
    out, err = capsys.readouterr()
    assert out == ""
    assert seen == ["the plan"]
    lines = err.splitlines()
    assert lines[:4] == [
        "base model tiny",
        "training a, b up to the probe point, step 8 of 100",
        "a: step 1 of 8, loss 2.900",
        "a: step 8 of 8, loss 2.200",
    ]
    assert lines[4] == "training a, b up to the end, step 100 of 100"
    assert [line.split(",")[0] for line in lines[5:]] == [
        "b: step 9 of 100",
        *(f"b: step {step} of 100" for step in (20, 40, 60, 80, 100)),
        "carrying out the plan",
        "measured",
    ]


def test_progress_on_a_terminal(capsys, monkeypatch):
    from mergeprobe.cli.demo import Display

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with Display(on_plan=None) as display:
        stages(display, "the plan")
        assert display.screen.is_terminal
    err = capsys.readouterr().err
    assert "waiting" in err  # b, while a trains
    assert "8/8" in err
    assert "100/100" in err
    assert "loss 2.200" in err
    assert "a + b by mean" in err


# --- all of it


@pytest.fixture(scope="module")
def finished(tmp_path_factory, world):
    out = tmp_path_factory.mktemp("runs") / "demo"
    process = child("demo", "--out", out, "--quick", "--base", world.base, "--json")
    printed_, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return out, printed_, err


def test_the_demo_from_the_command_line(finished, capsys):
    out, said, err = finished
    found = json.loads(said)  # JSON and nothing else
    assert "Traceback" not in err
    assert "training math, instruction, safety" in err
    assert len(found["adapters"]) == 3
    assert len(found["strategies"]) == 12
    for name in ("signals.parquet", "plan.json", "deployment", "outcomes.parquet", "report.html"):
        assert (out / name).exists()
    assert json.loads(printed(capsys, "evaluate", out, "--json")) == found


def test_the_page_is_written_again(finished, capsys, tmp_path):
    out, _, _ = finished
    page = tmp_path / "page.html"
    assert str(page) in printed(capsys, "report", out, "--out", page)
    assert page.read_text("utf-8").startswith("<!doctype html>")
