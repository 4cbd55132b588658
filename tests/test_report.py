"""The page: what it says is what the data says, it stands alone, and nothing in it can run."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
from report_samples import ONE, full_data, sample_plan

from mergeprobe.errors import DataError, OutputExists
from mergeprobe.plan import Action, AdapterRef, Group, Plan
from mergeprobe.report.charts import as_script_json, payload
from mergeprobe.report.data import (
    AdapterRow,
    CurvePoint,
    LayerRow,
    PairValues,
    PartitionRow,
    ReportData,
    RoutedRow,
    StrategyRow,
)
from mergeprobe.report.headline import outcome, sentence, verdicts
from mergeprobe.report.page import render, write_report
from mergeprobe.report.wording import number, parameters


def without_scripts(page: str) -> str:
    return re.sub(r"<script\b.*?</script>|<style>.*?</style>", "", page, flags=re.S)


def words_of(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", without_scripts(page))).split())


def charts_of(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


def section_titles(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_full_page_has_every_section_in_order():
    assert section_titles(render(full_data())) == [
        "Strategies",
        "Forecast against measured",
        "The plan",
        "Pairs",
        "The frontier",
        "Interference by layer",
        "Training",
        "Tasks",
        "Provenance and notes",
    ]


def test_minimal_page_leaves_out_what_is_absent_and_says_so():
    page = render(ReportData(title="nothing yet"))
    assert section_titles(page) == ["Provenance and notes"]
    assert len(page) < 40_000  # no charts, so no plotly
    assert "No adapters; nothing measured yet." in words_of(page)
    absent = words_of(page).split("not available")[1]
    for title in ("strategies", "the plan", "the frontier", "training", "tasks"):
        assert title in absent


def test_plan_only_page_forecasts_without_claiming_a_measurement():
    page = render(ReportData(title="plan", plan=sample_plan()))
    said = words_of(page)
    assert "5 adapters → 3 groups: 0.91 worst-case retention forecast with 60 %" in said
    assert "measured retention" not in sentence(ReportData(title="plan", plan=sample_plan()))
    assert section_titles(page) == [
        "Forecast",
        "The plan",
        "The frontier",
        "Provenance and notes",
    ]
    assert 'id="chart-scatter"' not in page


def test_headline_by_hand():
    data = full_data()
    assert sentence(data) == (
        "5 adapters → 3 groups: 0.83 ± 0.04 worst-case retention measured (forecast 0.91) "
        "with 60 % of the parameters of full routing."
    )
    found = outcome(data)
    assert found.forecast_mean == pytest.approx((0.93 + 0.97 + 0.91 + 0.98 + 0.92) / 5)
    assert (found.resident, found.full_routing) == (3 * ONE, 5 * ONE)
    said = [(verdict.outcome, verdict.words) for verdict in verdicts(data)]
    assert said[0] == (
        "even",
        "The floor of 0.90 for the worst case was missed: 0.83 ± 0.04 measured, "
        "too close to tell apart from the floor.",
    )
    assert said[1] == (
        "even",
        "4 of 5 adapters came out inside the 90 % forecast interval; "
        "outside: safety (0.83; forecast 0.86 to 1.03).",
    )
    assert said[2][0] == "even"  # 0.83 against 0.80, errors 0.04 and 0.03
    assert "routing, truncated: 0.80 ± 0.03" in said[2][1]
    assert said[3] == (
        "right",
        "52 partitions were measured; none with no more parameters has a better worst case.",
    )


@pytest.mark.parametrize(
    ("worst", "error", "expected"), [(0.97, 0.01, "right"), (0.6, 0.05, "wrong")]
)
def test_floor_verdict_follows_the_measurement(worst, error, expected):
    rows = (StrategyRow(name="plan", worst_retention=worst, worst_se=error, chosen=True),)
    data = full_data(strategies=rows, partitions=(), adapters=())
    assert [verdict.outcome for verdict in verdicts(data)] == [expected]


def test_a_better_partition_at_no_more_cost_is_told_with_its_distance():
    rows = (
        PartitionRow(label="plan", worst=0.80, resident_parameters=20, chosen=True),
        PartitionRow(label="other", worst=0.86, resident_parameters=20),
        PartitionRow(label="dearer", worst=0.99, resident_parameters=30),
    )
    last = verdicts(full_data(partitions=rows))[-1]
    assert last.words == (
        "3 partitions were measured; with no more parameters, other does best in the worst "
        "case: 0.86, 0.06 above the plan's 0.80."
    )


def test_every_table_number_is_on_the_page():
    data = full_data()
    said = words_of(render(data))
    for row in data.strategies:
        assert row.name in said
        assert f"{number(row.mean_retention)} ± {number(row.mean_se)}" in said
        assert f"{number(row.worst_retention)} ± {number(row.worst_se)}" in said
        assert parameters(row.resident_parameters) in said
    for row in data.adapters:
        assert f"{number(row.low)} to {number(row.high)}" in said
        assert f"{number(row.measured)} ± {number(row.measured_se)}" in said
        assert f"gain {number(row.gain)} nats" in said
        assert " ".join(row.completion_example.split()) in said
        for value in (row.accuracy_base, row.accuracy_single, row.accuracy_deployed):
            assert f"{100 * value:.0f} %" in said
    for reason in (*data.plan.reasons, *(text for g in data.plan.groups for text in g.reasons)):
        assert reason in said
    assert "weight 0.58" in said
    assert "without 2 components" in said
    assert "5f1c9a70be12" in said
    assert "torch 2.13.0" in said


def test_the_chosen_row_and_the_best_of_each_column_are_marked():
    page = render(full_data())
    table = re.search(r'<table class="strategies stacked">.*?</table>', page, re.S)[0]
    rows = re.findall(r"<tr class=.*?</tr>", table, re.S)
    # full routing has the best mean and worst case; five one-adapter merges share the best cost
    assert [row.count('class="best"') for row in rows] == [1, 1, 1, 1, 1, 0, 0, 2]
    assert [row for row in rows if 'class="chosen"' in row] == [rows[5]]


def test_charts_hold_the_data():
    charts = charts_of(render(full_data()))
    assert charts["scatter"][4] == {
        "index": 4,
        "name": "safety",
        "forecast": 0.92,
        "low": 0.86,
        "high": 1.03,
        "measured": 0.83,
        "se": 0.04,
    }
    grid = charts["pairs"][0]["grid"]
    assert grid[0][3] == 0.08  # what math does to instruction
    assert grid[3][0] == 0.34
    assert grid[2][2] is None
    cosine = charts["pairs"][2]["grid"]
    assert cosine[1][3] == cosine[3][1] == pytest.approx(0.11 * math.sin(3 + 21))
    assert len(charts["layers"]) == 20 * 30 * 2
    assert len(charts["frontier"]["measured"]) == 52
    assert [point["y"] for point in charts["frontier"]["forecast"]] == [0.22, 0.71, 0.91, 0.91, 1]
    assert charts["probes"]["code"] == 10


def test_page_stands_alone(tmp_path):
    path = tmp_path / "report.html"
    write_report(full_data(), path)
    page = path.read_text("utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert "Plotly" in page
    targets = re.findall(
        r"""\b(?:src|href|action|poster)\s*=\s*["']?([^"'\s>]*)""", without_scripts(page)
    )
    assert targets
    assert all(target.startswith(("#", "data:")) for target in targets)
    assert not re.search(r"<(?:link rel=.stylesheet|iframe|img|object|embed|base)\b", page[:60_000])
    assert "://" not in without_scripts(page)
    style = re.search(r"<style>(.*?)</style>", page, re.S)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in page  # the browser refuses whatever a script may ask for
    assert "connect-src" not in page


def test_write_refuses_what_exists_without_force(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("mine", "utf-8")
    with pytest.raises(OutputExists):
        write_report(ReportData(title="x"), path, force=False)
    assert path.read_text("utf-8") == "mine"


HOSTILE = "<script>alert(1)</script>\"'&|é–名"
NAME = "<img src=x onerror=alert(1)>\"'&|é–名"  # what a folder can be called


def test_where_prompts_go_and_what_a_token_costs():
    routed = (
        RoutedRow(task="math", sent={"math": 7}, base=1),
        RoutedRow(task="code", sent={"math": 2, "code": 6}, rivals=("math", "law")),
    )
    mixed = StrategyRow(name="logits of all, mixed", worst_retention=0.8, passes=6)
    page = render(full_data(routed=routed, strategies=(mixed, StrategyRow(name="mean", passes=1))))
    assert section_titles(page).index("At decode time") == 3
    table = re.search(r'<table class="routed">.*?</table>', page, re.S)[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert rows == [["7", "–", "1"], ["2", "6", "–"]]
    assert table.count("--share:0.875") == 1
    assert "13 of 16 held-out prompts go to their own task's adapter." in words_of(page)
    assert "Prompts of code look like those of math and law." in words_of(page)
    assert words_of(page).count("rows a token") == 1
    assert "6 rows a token" in words_of(page)


def test_every_string_is_escaped():
    row = AdapterRow(
        name=NAME,
        domain=HOSTILE,
        prompt_example=HOSTILE,
        group=HOSTILE,
        completion_example=HOSTILE,
        forecast=0.9,
        low=0.8,
        high=1.0,
        measured=0.7,
    )
    plan = Plan(
        adapters=(AdapterRef(name=NAME), AdapterRef(name="b")),
        groups=(
            Group(
                name="g <b>",
                adapters=(NAME, "b"),
                action=Action.merge,
                method=HOSTILE,
                reasons=(HOSTILE,),
            ),
        ),
        reasons=(HOSTILE,),
        missing=(HOSTILE,),
        base=HOSTILE,
    )
    data = ReportData(
        title=HOSTILE,
        subtitle=HOSTILE,
        base=HOSTILE,
        provenance={HOSTILE: HOSTILE},
        notes=(HOSTILE,),
        adapters=(row,),
        plan=plan,
        strategies_caption=HOSTILE,
        strategies=(StrategyRow(name=HOSTILE, note=HOSTILE, chosen=True, worst_retention=0.7),),
        pair_values=(
            PairValues(
                name="p", label=HOSTILE, summary=HOSTILE, unit=HOSTILE, values={f"{NAME}|b": 1.0}
            ),
        ),
        layers=(LayerRow(a=NAME, b="b", layer=0, value=1.0),),
        curves=(CurvePoint(adapter=NAME, step=1, loss=1.0),),
        partitions=(PartitionRow(label=HOSTILE, worst=0.5, resident_parameters=3, chosen=True),),
        routed=(RoutedRow(task=NAME, sent={HOSTILE: 1}),),
    )
    page = render(data)
    assert "<script>alert" not in page
    assert '</script>"' not in page
    assert "<img" not in without_scripts(page)
    assert HOSTILE in words_of(page)
    assert NAME in words_of(page)
    charts = charts_of(page)
    assert charts["names"] == [NAME, "b"]
    # the name holds the separator itself and is still found
    assert charts["pairs"][0]["names"] == [NAME, "b"]
    assert charts["pairs"][0]["grid"] == [[None, 1.0], [None, None]]


def test_script_json_cannot_end_its_element():
    plain = as_script_json({"x": "</script><!-- &"})
    assert "<" not in plain
    assert json.loads(plain) == {"x": "</script><!-- &"}


def test_a_pair_key_that_names_no_two_adapters_is_refused():
    data = full_data(pair_values=(PairValues(name="cos", values={"a|b|c": 1.0}),))
    with pytest.raises(DataError, match=r"pair matrix 'cos' has the key 'a\|b\|c'"):
        render(data)


def test_unknown_numbers_are_dashes_not_nan():
    row = AdapterRow(name="weak", gain=0.02, measured=float("nan"), forecast=0.9, low=0.1, high=1.2)
    rows = (StrategyRow(name="mean", mean_retention=math.inf, worst_retention=None),)
    pairs = (PairValues(name="p", values={"weak|b": math.nan, "b|weak": 0.5}),)
    known = AdapterRow(name="b", forecast=0.9, measured=0.8)
    data = ReportData(title="t", adapters=(row, known), strategies=rows, pair_values=pairs)
    page = render(data)
    assert not re.search(r"\bnan\b", words_of(page), re.I)
    assert "inf " not in words_of(page)
    assert charts_of(page)["pairs"][0]["grid"] == [[None, None], [0.5, None]]
    assert "undefined because the gain is within its own noise" in words_of(page)


def test_the_calibration_warning_stands_with_the_forecasts():
    def warned(**changes):
        page = render(full_data(**changes))
        return "Uncalibrated forecast." in page.split('id="forecast"')[1].split("<section")[0]

    assert warned()
    assert warned(notes=())  # the plan says so by itself
    assert not warned(notes=(), plan=sample_plan(calibrated=True))


def test_number_formats():
    assert [number(x) for x in (0.9349, -0.2, -0.001, None)] == ["0.93", "−0.20", "0.00", "–"]
    counts = (412, 8300, 920_000, ONE, 1_200_000_000, None)
    assert [parameters(x) for x in counts] == ["412", "8,300", "920 k", "4.88 M", "1.20 B", "–"]


def test_the_report_needs_no_torch():
    code = "import sys, mergeprobe.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_scripts_parse(tmp_path):
    page = render(full_data())
    for at, script in enumerate(re.findall(r"<script>(.*?)</script>", page, re.S)[1:]):
        path = tmp_path / f"{at}.js"
        path.write_text(script, "utf-8")
        subprocess.run(["node", "--check", str(path)], check=True)


def test_payload_is_empty_without_data():
    charts = payload(ReportData(title="x"))
    assert charts["frontier"] == {"measured": [], "forecast": []}
    assert not any(charts[key] for key in ("names", "scatter", "pairs", "layers", "curves"))
