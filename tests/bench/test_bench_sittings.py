"""bench: rounds are spread over sittings, their samples put together, and a cut run keeps its sittings."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_bench_runs import lines, run

from bench.measure.cases import grid
from bench.report.compare import compare
from bench.report.reading import newest
from bench.run import store as results
from bench.run.jobs import QUICK_KINDS, ROUNDS, SITTINGS, Setting, jobs_of
from bench.run.runner import Job
from bench.run.sittings import bare, merged, turns

# Times of a contender and its baseline by sitting; the machine is slower in the second.
SAMPLES = ([2.0, 4.0], [6.0, 8.0], [3.0, 3.0])
BASELINE = ([1.0, 2.0], [2.0, 2.0], [1.0, 1.0])


def payload(number: int, status: str = "ok") -> dict:
    rows = []
    for key, samples in (("a", SAMPLES[number]), ("frozen", BASELINE[number])):
        row = {"contender": key, "part": "both", "status": "ok", "reason": None, "errors": {}}
        row |= {"ms": {"median": samples[0]}, "ratios": {"frozen": {}} if key == "a" else {}}
        rows.append({**row, "samples_ms": list(samples)})
    if status != "ok":
        rows[0] |= {"status": status, "reason": "why", "ms": None, "ratios": {}, "samples_ms": None}
    return {"case": {"label": "one"}, "mode": "eager", "rounds": 2, "rows": rows}


def job(key: str, ran: list, errors: dict | None = None, **options) -> Job:
    """Three sittings; errors: what to raise in which of all calls."""

    def measure(tick, sitting: int = 0) -> dict:
        ran.append((key, sitting))
        tick(0.5)
        if error := (errors or {}).get(len(ran)):
            raise error
        return payload(sitting)

    return Job(key, "time", 0.0, measure, {}, ("a", "frozen"), 6, **{"sittings": 3, **options})


def test_samples_of_sittings_are_put_together():
    found = merged(merged(payload(0), payload(1)), payload(2))
    assert (found["rounds"], found["sittings"]) == (6, 3)
    ours, frozen = found["rows"]
    assert ours["samples_ms"] == [2.0, 4.0, 6.0, 8.0, 3.0, 3.0]
    assert ours["ms"]["median"] == 3.5
    # 2, 2, 3, 4, 3, 3: of two times of one round each.
    assert ours["ratios"]["frozen"] == {"median": 3.0, "p20": 2.0, "p80": 3.0, "min": 2.0}
    assert frozen["ratios"] == {}


@pytest.mark.parametrize("status", ["failed", "not run"])
@pytest.mark.parametrize("bad", [0, 1])
def test_who_failed_in_one_sitting_has_no_number(status, bad):
    found = merged(*(payload(number, status if number == bad else "ok") for number in (0, 1)))
    ours, frozen = found["rows"]
    assert (ours["status"], ours["reason"], ours["ms"], ours["ratios"]) == (status, "why", None, {})
    assert frozen["samples_ms"] == [1.0, 2.0, 2.0, 2.0]


def test_what_a_sitting_leaves_is_enough_to_go_on_from():
    first = bare(payload(0))
    assert not any({"ms", "ratios"} & row.keys() for row in first["rows"])
    assert merged(first, payload(1))["rows"] == merged(payload(0), payload(1))["rows"]
    assert bare(payload(0, "failed"))["rows"][0]["errors"] == {}


def test_sittings_are_spread_over_the_run():
    jobs = [
        Job(key, "time", 0.0, dict, sittings=sittings)
        for key, sittings in (("limit", 1), ("a", 3), ("b", 3), ("m", 1), ("n", 1), ("o", 1), ("c", 2))
    ]
    order = [job.key for job in turns(jobs)]
    assert order == ["limit", "a", "b", "c", "m", "a", "b", "c", "n", "o", "a", "b"]
    assert [job.key for job in turns([replace(job, sittings=1) for job in jobs])] == [job.key for job in jobs]


def test_file_has_every_sitting_and_one_record_of_all(tmp_path):
    ran: list = []
    path = tmp_path / "g.jsonl"
    single = Job("m", "memory", 0.0, lambda tick: {"rows": [{"contender": "a", "status": "ok"}]}, {}, ("a",))
    outcome = run([job("one", ran), job("two", ran), single], path)
    assert ran == [(key, sitting) for sitting in range(3) for key in ("one", "two")]
    assert (outcome.stopped, outcome.left) == ("complete", [])
    assert sorted(record["key"] for record in outcome.records) == ["m", "one", "two"]
    kinds = [line["kind"] for line in lines(path) if line["kind"] not in ("run", "begin", "end")]
    assert kinds == ["sitting", "sitting", "sitting", "sitting", "memory", "time", "time"]
    counted = newest(results.read(path)[0])
    assert sorted(key for _, _, key in counted) == ["m", "one", "two"]
    assert counted["cpu", "time", "one"]["rounds"] == 6


@pytest.mark.parametrize("killed", [False, True], ids=["interrupted", "killed"])
def test_cut_run_keeps_its_sittings_and_goes_on(tmp_path, killed):
    ran: list = []
    path = tmp_path / "g.jsonl"
    outcome = run([job("one", ran), job("two", ran, {4: KeyboardInterrupt()})], path)
    assert (outcome.stopped, outcome.left) == ("interrupted", ["one", "two"])
    partial = {record["key"]: record for record in outcome.records}
    assert {key: (record["sittings"], record["rounds"]) for key, record in partial.items()} == {
        "one": (2, 4),
        "two": (1, 2),
    }
    if killed:
        # Nothing was written when the process ended.
        text = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in text if '"kind":"time"' not in line and '"end"' not in line))
    outcome = run([job("one", ran), job("two", ran)], path)
    assert (outcome.stopped, outcome.left) == ("complete", [])
    assert sorted(ran[4:]) == [("one", 2), ("two", 1), ("two", 2)]
    for record in outcome.records:
        assert (record["sittings"], record["rounds"]) == (3, 6)
        assert record["rows"][0]["samples_ms"] == [2.0, 4.0, 6.0, 8.0, 3.0, 3.0]


def test_budget_cuts_sittings_and_leaves_what_there_is(tmp_path):
    ran: list = []
    path = tmp_path / "g.jsonl"
    slow = replace(job("slow", ran), seconds=1000.0)
    outcome = run([job("one", ran), slow], path, budget=60.0)
    assert (outcome.stopped, outcome.left) == ("budget", ["slow"])
    assert [record["key"] for record in outcome.records] == ["one"]


def test_job_that_breaks_is_not_sat_for_again(tmp_path):
    ran: list = []
    path = tmp_path / "g.jsonl"
    outcome = run([job("one", ran, {3: RuntimeError("broke")}), job("two", ran)], path)
    assert ran == [("one", 0), ("two", 0), ("one", 1), ("two", 1), ("two", 2)]
    assert outcome.left == ["one"]
    broken = next(record for record in outcome.records if record["key"] == "one")
    assert {row["status"] for row in broken["rows"]} == {"failed"}
    ran.clear()
    run([job("one", ran), job("two", ran)], path)
    assert ran == [("one", 0), ("one", 1), ("one", 2)], "its samples went with it"


def test_sittings_without_all_contenders_do_not_count(tmp_path):
    ran: list = []
    path = tmp_path / "g.jsonl"
    run([job("one", ran, {2: KeyboardInterrupt()})], path)
    ran.clear()
    wider = replace(job("one", ran), contenders=("a", "frozen", "c"))
    run([wider], path)
    assert ran == [("one", 0), ("one", 1), ("one", 2)]


def test_quick_look_on_a_cpu_spreads_its_timings_and_a_gpu_does_not():
    for device in ("cpu", "cuda"):
        setting = Setting(device, rounds=ROUNDS[device], sittings=SITTINGS[device])
        found = jobs_of(grid("quick"), QUICK_KINDS, setting, compiled=False)
        timed = [each for each in found if each.kind == "time" and not each.key.startswith("graph")]
        assert {each.sittings for each in timed} == {SITTINGS[device]}
        assert {each.rounds for each in found if each.kind == "time"} == {ROUNDS[device]}
        order = [each.key for each in turns(found)]
        assert len(order) == len(found) + len(timed) * (SITTINGS[device] - 1)
        if device == "cpu":
            first = timed[0].key
            places = [place for place, key in enumerate(order) if key == first]
            assert places[0] == 1 and places[-1] > 0.7 * len(order)


def test_comparison_is_of_the_samples_of_all_sittings(tmp_path):
    for name in ("old", "new"):
        run([job("one", [])], tmp_path / f"{name}.jsonl")
    old, new = (results.read(tmp_path / f"{name}.jsonl")[0] for name in ("old", "new"))
    changes = [change for change in compare(new, old).changes if change.kind == "ratio"]
    assert [(change.new["median"], change.beyond) for change in changes] == [(3.0, False)]
