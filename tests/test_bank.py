"""A tiny cohort from training to rows: what is in them is what was measured."""

import json
from collections import Counter

import polars as pl
import pytest
import torch

from mergeprobe.adapters.base import load_base
from mergeprobe.adapters.checkpoint import read_adapter
from mergeprobe.bench.bank.cohorts import COHORTS, again, chosen, cohort
from mergeprobe.bench.bank.folder import CohortFolder, read_spec, write_spec
from mergeprobe.bench.bank.jobs import KINDS, Job, done, job_from, jobs_of, needs
from mergeprobe.bench.bank.queue import Times, run_cohorts
from mergeprobe.bench.bank.rows import collate
from mergeprobe.bench.bank.spec import AdapterSpec, CohortSpec
from mergeprobe.bench.bank.tasks import task_of
from mergeprobe.bench.measure import Measurement, read_measured
from mergeprobe.capture.probe import read_probe
from mergeprobe.compose import merge
from mergeprobe.errors import DataError, OutputExists
from mergeprobe.predict.early import open_tier
from mergeprobe.signals import pair_rows, set_rows
from tests.bank_samples import KEYS, SORTED, THREE, read, tiny
from tests.tiny_base import write_tiny_base


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def finished(base_folder, tmp_path_factory):
    work = tmp_path_factory.mktemp("bank")
    spec = tiny(
        base_folder,
        joint=True,
        truncated_ranks=(1, 3),
        set_points=(1.0,),
        points=(0.25, 0.5, 1.0),
        model_points=(0.25, 1.0),
        whole_methods=("norm_preserving_mean",),
    )
    (rows,) = run_cohorts([spec], work / "work", work / "rows", workers=0)
    return CohortFolder(work / "work", spec), rows


# --- specs


def six(**changes):
    tasks = ("sort_up", "sort_down", "sql", "redact", "spell", "binary")
    return cohort("six", tasks, seed=3, **changes)


def sets_of_two(spec):
    return [group for group in spec.sets() if len(group) == 2]


def test_sets_of_a_cohort():
    spec = six()
    sets = spec.sets()
    assert Counter(map(len, sets)) == {2: 15, 3: 4, 5: 1}
    assert len(set(sets)) == len(sets)
    assert all(list(group) == sorted(group) for group in sets)
    # 4 triples are 12 places for 6 adapters: two each
    places = Counter(name for group in sets if len(group) == 3 for name in group)
    assert set(places.values()) == {2}
    assert six().sets() == sets
    every = spec.model_copy(update={"set_sizes": ((2, None), (6, None))})
    assert Counter(map(len, every.sets())) == {2: 15, 6: 1}


def test_configuration_varies_inside_a_cohort_and_between_two():
    one, two = six().adapters, six(turn=4).adapters
    for field in ("learning_rate", "steps", "rank"):
        assert Counter(Counter(getattr(a, field) for a in one).values()) == {2: 3}
    for rate in {a.learning_rate for a in one}:
        mine = [a for a in one if a.learning_rate == rate]
        assert len({a.rank for a in mine}) == len({a.steps for a in mine}) == 2
    for a, b in zip(one, two, strict=True):
        assert (a.learning_rate, a.steps, a.rank) != (b.learning_rate, b.steps, b.rank)
    turns = [a for turn in range(3) for a in six(turn=turn).adapters]
    assert len({(a.learning_rate, a.steps, a.rank) for a in turns}) == 18
    repeated = again(six(), "six again", 9)
    assert repeated.sets() == sets_of_two(six())
    assert repeated.points == ()  # nothing is forecast of it
    assert not {a.seed for a in repeated.adapters} & {a.seed for a in one}
    assert [a.rank for a in repeated.adapters] == [a.rank for a in one]


def test_a_spec_survives_json(tmp_path):
    spec = six(joint=True, points=(0.1, 1.0), model_points=(0.1,), set_points=(0.1,))
    write_spec(tmp_path / "cohort.json", spec, "somebody 1.0")
    assert read_spec(tmp_path / "cohort.json") == (spec, "somebody 1.0")
    assert CohortSpec.model_validate_json(spec.model_dump_json()) == spec
    value = json.loads((tmp_path / "cohort.json").read_text())
    for change in ({"schema_version": 99}, {"points": [0.5, 0.1]}, {"adapters": []}):
        (tmp_path / "bad.json").write_text(json.dumps(value | change))
        with pytest.raises(DataError):
            read_spec(tmp_path / "bad.json")


def test_joint_adapter_by_hand():
    joint = six().joint_spec()
    assert joint.steps == 2 * (100 + 120 + 160)
    assert joint.rank == 16
    assert joint.learning_rate == 1e-3  # of 5e-4, 5e-4, 1e-3, 1e-3, 2e-3, 2e-3 the upper middle


def test_steps_of_points():
    adapter = AdapterSpec(name="a", task="math", seed=0, steps=120)
    found = [adapter.step_at(point) for point in (0.001, 0.025, 0.05, 0.1, 0.25, 1.0)]
    assert found == [1, 3, 6, 12, 30, 120]


def test_cohorts_can_be_made():
    for spec in COHORTS.values():
        if spec.data:
            continue
        assert len(spec.adapters) == 6
        for adapter in spec.adapters:
            task = task_of(adapter.task, None)
            assert task.size("test") >= spec.test_items
            assert task.size("calibration") >= spec.calibration_items
    seeds = [(a.task, a.seed) for spec in COHORTS.values() for a in spec.adapters]
    assert len(set(seeds)) == len(seeds)
    assert [spec.name for spec in chosen([], with_data=True)] == list(COHORTS)
    with pytest.raises(DataError, match="no cohort 'c99'"):
        chosen(["c99"], with_data=True)


def test_a_task_that_is_too_small_is_met_at_once(base_folder, tmp_path):
    spec = tiny(base_folder, test_items=100_000)
    with pytest.raises(DataError, match=r"has .* test items, 100000 are needed"):
        run_cohorts([spec], tmp_path / "work", tmp_path / "rows", workers=0)


def test_unknown_tasks_are_met_at_once(base_folder, tmp_path):
    adapters = [AdapterSpec(name=name, task=name, seed=0) for name in ("math", "nonsense")]
    spec = CohortSpec(name="bad", base=str(base_folder), adapters=tuple(adapters))
    with pytest.raises(DataError, match="no task 'nonsense'"):
        run_cohorts([spec], tmp_path / "work", tmp_path / "rows", workers=0)


# --- jobs


def test_jobs_come_after_what_they_need(tmp_path):
    folder = CohortFolder(tmp_path, six(joint=True, truncated_ranks=(2, 8)))
    jobs = jobs_of(folder)
    place = {job: k for k, job in enumerate(jobs)}
    assert len(place) == len(jobs) == len({job.label for job in jobs})
    for job in jobs:
        assert all(place[need] < place[job] for need in needs(job, folder))
        assert job_from(json.loads(json.dumps(job.message()))) == job
        assert not done(job, folder)
    # 3 points with the file tier, 2 of them with 6 lengths, 6 adapters and 15 pairs; 20 sets by 4
    # methods, 1 joint; six cut to rank 2, the two of rank 16 to 8
    kinds = Counter(job.kind for job in jobs)
    assert kinds == {
        "train": 6,
        "joint": 1,
        "single": 6,
        "length": 12,
        "files": 3,
        "early": 12,
        "pair": 30,
        "cut": 12,
        "merge": 81,
        "truncated": 8,
    }


# --- rows


def test_rows_are_complete_and_unique(finished):
    _, rows = finished
    tables = read(rows)
    # 3 points, the model tier at 2; 6 ordered pairs; one triple of 3; 3 methods, one more for the
    # whole set, and the joint adapter; ranks 2, 3 and 4 cut to 1, the last one to 3 as well
    assert {name: len(table) for name, table in tables.items()} == {
        "adapters": 3,
        "pairs": 3 * 6,
        "sets": 3 * 3,
        "truncations": 2 * 4,
        "outcomes": 3 * (3 * 2 + 3) + 3 + 3 + 4,
    }
    whole = tables["outcomes"].filter(method="norm_preserving_mean")
    assert set(whole["set"]) == {"+".join(SORTED)}
    halfway = tables["pairs"].filter(point=0.5)  # of the file tier alone
    assert halfway["disturbance_late"].null_count() == 6
    assert halfway["frobenius_cosine"].null_count() == halfway["interference"].null_count() == 0
    for name, table in tables.items():
        assert table.select(KEYS[name]).is_duplicated().sum() == 0
        if name == "pairs":
            table = table.filter(pl.col("point") != 0.5)
        if name == "sets":
            early = [c for c in table.columns if c.startswith("early_retention")]
            assert table.filter(point=0.25).select(early).null_count().row(0) == (3,) * len(early)
            table = table.filter(point=1.0)
        assert table.null_count().row(0).count(0) > 0.9 * table.width
    adapters = tables["adapters"].sort("adapter").to_dicts()
    assert [row["adapter"] for row in adapters] == list(SORTED)
    assert [row["rank"] for row in adapters] == [3, 2, 4]
    assert [row["alpha"] for row in adapters] == [6, 4, 8]
    assert [row["data_items"] for row in adapters] == [12 * 8, 24 * 8, 14 * 8]
    assert all(row["made_by"].startswith("mergeprobe ") for row in adapters)
    merges = tables["outcomes"].filter(pl.col("method") != "truncated")
    ranks = dict(merges.select("set", "rank").unique().iter_rows())
    assert ranks["instruction+math"] == 3  # the largest among the members


def test_what_a_snapshot_keeps_at_smaller_ranks(finished, base_folder):
    folder, rows = finished
    table = read(rows)["truncations"]
    cuts = {(row["adapter"], row["rank"]): row for row in table.to_dicts() if row["point"] == 1.0}
    assert cuts.keys() == {("math", 1), ("instruction", 1), ("safety", 1), ("safety", 3)}
    found = cuts["safety", 3]
    # again, from the finished adapter: its singular values, and its losses run here
    probe = read_probe(folder.probe("safety", 1.0))
    values = [torch.linalg.svdvals(u.dense().double()).square() for u in probe.updates.values()]
    lost = sum(float(v[3:].sum()) for v in values) / sum(float(v.sum()) for v in values)
    assert found["error"] == pytest.approx(lost**0.5, rel=1e-4)
    tier = open_tier(load_base(str(base_folder), dtype="float32"), [probe], items=4)
    own = tier.snapshots["safety"].update
    kept = tier.early_retention("safety", merge([own], "mean", rank=3).adapter)
    assert found["early_retention"] == pytest.approx(kept, rel=1e-3)


def test_probes_are_taken_at_their_points(finished):
    folder, rows = finished
    pairs = read(rows)["pairs"].to_dicts()
    steps = {row["i"]: row["step"] for row in pairs if row["point"] == 0.25}
    assert steps == {"math": 6, "instruction": 3, "safety": 4}  # 3.5 is rounded to even
    for name in THREE:
        last = read_probe(folder.probe(name, 1.0))
        saved = read_adapter(folder.adapters / name)
        assert last.meta["step"] == folder.spec.adapter(name).steps
        for module, update in saved.modules.items():
            assert torch.allclose(last.updates[module].dense(), update.dense(), atol=1e-6)


def test_outcomes_are_ratios_of_measured_losses(finished):
    folder, rows = finished
    tables = read(rows)
    wanted = Measurement("sum", ("instruction", "math"), 3)
    merged = read_measured(folder.measured, wanted).losses["math"]
    base, single = (
        read_measured(folder.measured, m).losses["math"] for m in folder.singles("math")
    )
    outcomes = tables["outcomes"]
    row = outcomes.row(
        by_predicate=(pl.col("adapter") == "math")
        & (pl.col("set") == "instruction+math")
        & (pl.col("method") == "sum"),
        named=True,
    )
    expected = (base - merged).mean() / (base - single).mean()
    assert row["gain_retention"] == pytest.approx(float(expected))
    odd = (base - merged)[1::2].mean() / (base - single)[1::2].mean()
    assert row["gain_retention_odd"] == pytest.approx(float(odd))
    mine = tables["adapters"].row(by_predicate=pl.col("adapter") == "math", named=True)
    assert mine["own_gain"] == pytest.approx(float((base - single).mean()))
    joint = outcomes.filter(pl.col("method") == "joint")
    assert set(joint["set"]) == {"+".join(SORTED)}
    assert sorted(joint["adapter"]) == list(SORTED)


def test_adapters_alone_at_smaller_ranks(finished):
    folder, rows = finished
    table = read(rows)["outcomes"].filter(pl.col("method") == "truncated")
    assert table["set"].to_list() == table["adapter"].to_list()
    assert sorted(table.select("adapter", "rank", "size").iter_rows()) == [
        ("instruction", 1, 1),
        ("math", 1, 1),
        ("safety", 1, 1),
        ("safety", 3, 1),
    ]
    whole = read_adapter(folder.adapters / "safety")
    row = table.row(by_predicate=pl.col("rank") == 3, named=True)
    assert row["resident_parameters"] == whole.parameters * 3 // 4
    # the certificate: what the smallest of four singular values holds, over all modules
    dropped = [torch.linalg.svdvals(update.dense()) for update in whole.modules.values()]
    lost, all_of_it = (sum(float((s[k:] ** 2).sum()) for s in dropped) for k in (3, 0))
    assert row["error"] == pytest.approx((lost / all_of_it) ** 0.5, rel=1e-3)
    base, single = (
        read_measured(folder.measured, m).losses["safety"] for m in folder.singles("safety")
    )
    cut = read_measured(folder.measured, Measurement("truncated", ("safety",), 3)).losses["safety"]
    kept = (base - cut).mean() / (base - single).mean()
    assert row["gain_retention"] == pytest.approx(float(kept))


def test_held_out_cohorts_have_all_that_decisions_need():
    held = {name: spec for name, spec in COHORTS.items() if name.startswith("h")}
    assert list(held) == ["h1", "h2", "h3", "h2-again"]
    for name, spec in COHORTS.items():
        if name.endswith("-again"):
            assert Counter(map(len, spec.sets())) == {2: 15}
            continue
        # ranks 4, 8, 16, twice each: cut to 1, 2; to 1, 2, 4; to 1, 2, 4, 8
        assert Counter(rank for _, rank in spec.truncations()) == {1: 6, 2: 6, 4: 4, 8: 2}
        if name in held:
            assert Counter(map(len, spec.sets())) == {2: 15, 3: 10, 5: 1, 6: 1}
            assert "ties" in spec.methods_of(spec.names)
        assert 0.05 in spec.measured_points
        assert 1.0 in spec.points
    assert [name for name, spec in held.items() if spec.joint] == ["h1", "h2", "h3"]
    with pytest.raises(ValueError, match=r"set_points must be among \[0.05, 0.1\]: got \[0.3\]"):
        six(set_points=(0.1, 0.3))
    with pytest.raises(ValueError, match=r"model_points must be among .*: got \[0.3\]"):
        six(model_points=(0.3,), set_points=())
    with pytest.raises(ValueError, match="truncated_ranks must rise"):
        six(truncated_ranks=(4, 2))


def test_a_folder_from_before_a_field_was_added_goes_on(tmp_path):
    spec = six(set_points=None, model_points=None)
    folder = CohortFolder(tmp_path, spec)
    write_spec(folder.spec_file, spec, "somebody 1.0")
    value = json.loads(folder.spec_file.read_text())
    del value["set_points"]
    folder.spec_file.write_text(json.dumps(value))
    folder.probes.mkdir()  # its work has begun
    folder.claim()
    assert json.loads(folder.spec_file.read_text()) == value
    others = {"set_points": None, "model_points": None}
    changed = CohortFolder(tmp_path, six(**others, truncated_ranks=(1, 2)))
    with pytest.raises(OutputExists, match="with other truncated_ranks"):
        changed.claim()
    folder.probes.rmdir()  # as a queue leaves the cohorts that it has not come to
    changed.claim()
    assert read_spec(folder.spec_file)[0] == changed.spec


def test_pair_rows_say_what_j_does_to_i(finished):
    folder, rows = finished
    probes = [read_probe(folder.probe(name, 0.25)) for name in SORTED]
    tier = open_tier(load_base(folder.spec.base), probes, items=4)
    signals = pair_rows(probes)
    pairs = read(rows)["pairs"].filter(pl.col("point") == 0.25)
    adapters = {
        p.name: float((p.calibration.base_loss - p.calibration.loss).mean()) for p in probes
    }
    for i, j in (("math", "safety"), ("safety", "math")):
        row = pairs.row(by_predicate=(pl.col("i") == i) & (pl.col("j") == j), named=True)
        theirs = signals.row(by_predicate=(pl.col("a") == j) & (pl.col("b") == i), named=True)
        for column in ("norm_ratio", "interference", "frobenius_cosine", "first_order_transfer"):
            assert row[column] == pytest.approx(theirs[column], rel=1e-5)
        assert row["i_own_gain"] == pytest.approx(adapters[i], rel=1e-4)
        assert row["j_own_gain"] == pytest.approx(adapters[j], rel=1e-4)
        features = tier.set_features(i, (i, j), "mean") | tier.set_features(i, (i, j), "sum")
        for column, value in features.items():
            assert row[column] == pytest.approx(value, rel=1e-4, abs=1e-5), column
        for method, weight in (("mean", 0.5), ("sum", 1.0)):
            value = tier.extrapolated_merge(i, {i: weight, j: weight})
            assert row[f"extrapolated_{method}"] == pytest.approx(value, rel=1e-4)
        updates = [tier.snapshots[name].update for name in sorted((i, j))]
        trimmed = merge(updates, "ties", rank=folder.spec.rank_of((i, j))).adapter
        kept = tier.early_retention(i, trimmed)
        assert row["early_retention_ties"] == pytest.approx(kept, rel=1e-4, abs=1e-5)
        cosine = tier.joint_gradient_cosine(i, j)
        assert row["joint_gradient_cosine"] == pytest.approx(cosine, rel=1e-4, abs=1e-5)


def test_set_rows_have_both_tiers(finished):
    folder, rows = finished
    probes = [read_probe(folder.probe(name, 1.0)) for name in SORTED]
    signals = set_rows(probes, [SORTED])
    tier = open_tier(load_base(folder.spec.base), probes, items=4)
    table = read(rows)["sets"].filter(pl.col("point") == 1.0)
    assert set(table["set"]) == {"+".join(SORTED)}
    row = table.row(by_predicate=pl.col("adapter") == "safety", named=True)
    theirs = signals.row(by_predicate=pl.col("a") == "safety", named=True)
    assert row["set_amplification"] == pytest.approx(theirs["set_amplification"], rel=1e-5)
    value = tier.set_features("safety", SORTED, "sum")["early_retention_sum"]
    assert row["early_retention_sum"] == pytest.approx(value, rel=1e-4, abs=1e-5)


def test_collating_twice_gives_the_same_bytes(finished, tmp_path):
    folder, rows = finished
    other = collate(folder, tmp_path)
    for file in sorted(rows.iterdir()):
        assert (other / file.name).read_bytes() == file.read_bytes()


def test_a_second_run_does_nothing(finished):
    folder, rows = finished
    stages = []
    before = {file: file.stat().st_mtime_ns for file in rows.iterdir()}
    run_cohorts(
        [folder.spec],
        folder.path.parent,
        rows.parent,
        workers=0,
        notify=lambda stage, **data: stages.append(stage),
    )
    assert stages == ["end"]
    assert {file: file.stat().st_mtime_ns for file in rows.iterdir()} == before


def test_another_cohort_of_that_name_is_refused(finished, tmp_path):
    folder, rows = finished
    other = folder.spec.model_copy(update={"seed": 5, "test_items": 9})
    with pytest.raises(OutputExists, match="with other test_items, seed"):
        run_cohorts([other], tmp_path / "work", rows.parent, workers=0)
    with pytest.raises(OutputExists, match="with other test_items, seed"):
        run_cohorts([other], folder.path.parent, tmp_path / "rows", workers=0)


# --- the command


def test_progress_in_a_log(capsys, tmp_path):
    from mergeprobe.cli.bench import Progressing, duration

    assert [duration(s) for s in (5, 150, 3600, 12_345)] == [
        "1 min",
        "2 min",
        "1 h 0 min",
        "3 h 26 min",
    ]
    job = Job("c1", "train", ("math",))
    with Progressing() as notify:
        notify("begin", left=3, seconds=600.0)
        notify("step", cohort="c1", name="math", step=1, steps=9, loss=1.0)
        notify("died", job=job)
        notify("job", job=job, seconds=61.2, left=2, remaining=400.0)
        notify("cohort", name="c1", rows=tmp_path)
        notify("end")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "3 jobs to do, about 10 min",
        "a worker died; once more: c1: train math",
        "c1: train math: 61 s; 1 of 3 jobs, 7 min left",
        f"c1: rows are in '{tmp_path}'",
    ]


def test_time_left_is_judged_by_jobs_of_the_same_kind(tmp_path):
    times = Times(tmp_path / "times.jsonl")
    assert times.of("merge") == KINDS["merge"]
    for seconds in (2.0, 4.0):
        times.add(Job("c", "merge", ("a", "b"), None, "mean", 2), seconds)
    with open(tmp_path / "times.jsonl", "a") as file:
        file.write('{"kind": "mer')  # a kill in the middle of a line
    again = Times(tmp_path / "times.jsonl")
    assert again.of("merge") == 3.0
    assert again.of("pair") == KINDS["pair"]


def test_an_unknown_cohort_is_one_line(capsys):
    from mergeprobe.cli import main

    assert main(["bench", "run", "c99"]) == 1
    assert capsys.readouterr().err.startswith("mergeprobe: no cohort 'c99'; known are t1")
    assert main(["bench", "run", "real"]) == 1
    assert "pass --data FOLDER" in capsys.readouterr().err
