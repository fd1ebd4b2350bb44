"""bench: a run that is cut keeps what it has and goes on; a damaged line costs itself alone."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace

import pytest
from rich.console import Console

from bench.measure.layers import DeviceLost
from bench.run import runner
from bench.run import store as results
from bench.run.runner import Job
from bench.run.store import Store

ABOUT = {
    "date": "2026-01-01T00:00:00+00:00",
    "machine": {"cpu": "chip", "cores": 2, "threads": 2, "load_average": 0.1, "gpu": None},
    "versions": {"python": "3", "torch": "2"},
    "commit": None,
    "dirty": None,
}


def run(jobs, path, **options) -> runner.Outcome:
    console = Console(file=io.StringIO(), width=100)
    return runner.run(
        jobs, path, **{"grid": "g", "command": "c", "console": console, "about": ABOUT, **options}
    )


def job(key: str, ran: list[str], seconds: float = 0.0, error: BaseException | None = None) -> Job:
    def measure(tick) -> dict:
        ran.append(key)
        tick(0.5)
        if error:
            raise error
        return {"rounds": 5, "rows": [{"contender": name, "status": "ok"} for name in ("a", "b")]}

    return Job(key, "time", seconds, measure, {"case": {"label": key}}, ("a", "b"))


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_names_its_run_and_the_file_says_where_it_comes_from(tmp_path):
    ran: list[str] = []
    path = tmp_path / "new" / "g.jsonl"
    outcome = run([job("one", ran), job("two", ran)], path)
    assert (outcome.stopped, outcome.left, ran) == ("complete", [], ["one", "two"])
    first, *between, last = lines(path)
    assert (first["kind"], first["environment"], first["command"]) == ("run", ABOUT, "c")
    assert [(record["kind"], record["key"]) for record in between] == [
        (kind, key) for key in ("one", "two") for kind in ("begin", "time")
    ]
    assert (last["kind"], last["done"], last["left"]) == ("end", 2, [])
    assert len({record["run"] for record in lines(path)}) == 1


def test_interrupted_run_keeps_its_lines_and_goes_on(tmp_path):
    ran: list[str] = []
    path = tmp_path / "g.jsonl"
    cut = [job("one", ran), job("two", ran, error=KeyboardInterrupt()), job("three", ran)]
    outcome = run(cut, path)
    assert (outcome.stopped, outcome.left) == ("interrupted", ["two", "three"])
    outcome = run([job(key, ran) for key in ("one", "two", "three")], path)
    assert outcome.stopped == "complete"
    assert ran == ["one", "two", "two", "three"]
    records, warnings = results.read(path)
    assert not warnings
    assert [record["key"] for record in records if "rows" in record] == ["one", "two", "three"]
    assert len({record["run"] for record in records}) == 1


def test_killed_run_without_an_end_goes_on(tmp_path):
    ran: list[str] = []
    path = tmp_path / "g.jsonl"
    run([job("one", ran), job("two", ran)], path)
    text = path.read_text().splitlines(keepends=True)
    path.write_text("".join(text[:4]) + text[4][:20])
    run([job("one", ran), job("two", ran)], path)
    assert ran == ["one", "two", "two"]
    records, warnings = results.read(path)
    assert [record["key"] for record in records if "rows" in record] == ["one", "two"]
    assert warnings == [f"{path}, line 5: damaged, skipped"]


def test_complete_run_is_measured_again_in_a_run_of_its_own(tmp_path):
    ran: list[str] = []
    path = tmp_path / "g.jsonl"
    for _ in range(2):
        run([job("one", ran)], path)
    assert ran == ["one", "one"]
    assert len({record["run"] for record in lines(path)}) == 2


@pytest.mark.parametrize(
    "change",
    [{"grid": "h"}, {"about": {**ABOUT, "versions": {"python": "3", "torch": "3"}}}],
    ids=["grid", "versions"],
)
def test_other_code_or_grid_does_not_go_on(tmp_path, change):
    ran: list[str] = []
    path = tmp_path / "g.jsonl"
    run([job("one", ran), job("two", ran, error=KeyboardInterrupt())], path)
    run([job("one", ran)], path, **change)
    assert ran == ["one", "two", "one"]


def test_results_elsewhere_are_not_measured_again(tmp_path):
    ran: list[str] = []
    kept = tmp_path / "kept"
    run([job("one", ran)], kept / "suite.jsonl")
    both = [job("one", ran), job("two", ran)]
    outcome = run(both, tmp_path / "out.jsonl", elsewhere=(kept,))
    assert ran == ["one", "two"]
    assert [record["key"] for record in outcome.records] == ["two"]
    other = {**ABOUT, "versions": {"python": "3", "torch": "3"}}
    run([job("one", ran)], tmp_path / "other.jsonl", elsewhere=(kept,), about=other)
    assert ran == ["one", "two", "one"]


def test_poorer_measurement_does_not_stand_for_a_richer_one(tmp_path):
    ran: list[str] = []
    kept = (tmp_path,)
    run([replace(job("one", ran), contenders=("a",), rounds=5)], tmp_path / "1.jsonl")
    for wanted, measured in (
        ({"contenders": ("a",), "rounds": 5}, 1),
        ({"contenders": ("a",), "rounds": 6}, 2),
        ({"contenders": ("a", "c"), "rounds": 5}, 3),
    ):
        run([replace(job("one", ran), **wanted)], tmp_path / "2.jsonl", elsewhere=kept)
        assert len(ran) == measured


def test_what_is_always_measured_does_not_make_a_run_of_its_own(tmp_path):
    ran: list[str] = []
    path = tmp_path / "g.jsonl"
    jobs = [replace(job("limit", ran), always=True), job("one", ran), job("two", ran)]
    run([jobs[0], jobs[1]], path)
    run(jobs, tmp_path / "h.jsonl", elsewhere=(tmp_path,))
    assert ran == ["limit", "one", "limit", "two"]
    assert run(jobs, tmp_path / "h.jsonl", elsewhere=(tmp_path,)).records == []
    assert len(ran) == 4


def test_budget_leaves_out_what_does_not_fit_and_the_next_call_does_it(tmp_path):
    ran: list[str] = []
    path = tmp_path / "g.jsonl"
    jobs = [job("small", ran, 1.0), job("large", ran, 1000.0), job("also small", ran, 1.0)]
    outcome = run(jobs, path, budget=60.0)
    assert (ran, outcome.left, outcome.stopped) == (["small", "also small"], ["large"], "budget")
    assert lines(path)[-1]["left"] == ["large"]
    assert run(jobs, path).stopped == "complete"
    assert ran == ["small", "also small", "large"]


def test_job_is_cut_when_the_budget_is_spent(tmp_path):
    ran: list[str] = []
    path = tmp_path / "g.jsonl"

    def endless(tick) -> dict:
        ran.append("endless")
        while True:
            try:
                tick(0.5)
            except Exception as error:
                raise AssertionError("a contender would be blamed for it") from error

    jobs = [job("one", ran), Job("endless", "time", 0.01, endless), job("two", ran)]
    outcome = run(jobs, path, budget=0.5)
    assert (outcome.stopped, outcome.left) == ("budget", ["endless", "two"])
    assert [record["key"] for record in outcome.records] == ["one"]


def test_time_before_the_run_counts(tmp_path):
    ran: list[str] = []
    started = time.monotonic() - 100
    outcome = run([job("one", ran, 1.0)], tmp_path / "g.jsonl", budget=100.5, started=started)
    assert (ran, outcome.left) == ([], ["one"])


def test_broken_job_is_a_red_row_for_everyone_and_the_rest_runs(tmp_path):
    ran: list[str] = []
    path = tmp_path / "g.jsonl"
    outcome = run([job("one", ran, error=RuntimeError("broke\nmore")), job("two", ran)], path)
    assert ran == ["one", "two"]
    broken = outcome.records[0]
    assert broken["case"] == {"label": "one"}
    assert {(row["contender"], row["status"], row["reason"]) for row in broken["rows"]} == {
        ("a", "failed", "RuntimeError: broke"),
        ("b", "failed", "RuntimeError: broke"),
    }
    assert outcome.left == ["one"]
    run([job("one", ran), job("two", ran), job("three", ran)], path)
    assert ran[2:] == ["three", "one"], "what broke is measured again, after the rest"


def test_lost_device_ends_the_run_and_nobody_else_is_blamed(tmp_path):
    ran: list[str] = []
    path = tmp_path / "g.jsonl"
    jobs = [job("one", ran), job("two", ran, error=DeviceLost("triton: illegal access")), job("three", ran)]
    outcome = run(jobs, path)
    assert (outcome.stopped, outcome.left, ran) == ("device lost", ["two", "three"], ["one", "two"])
    assert {row["status"] for row in outcome.records[-1]["rows"]} == {"not run"}
    assert "illegal access" in outcome.records[-1]["retry"]
    run([job(key, ran) for key in ("one", "two", "three")], path)
    assert ran[2:] == ["three", "two"]


def test_job_that_takes_the_process_along_comes_last(tmp_path):
    ran: list[str] = []
    path = tmp_path / "g.jsonl"
    run([job("one", ran), job("two", ran)], path)
    text = path.read_text().splitlines(keepends=True)
    begin_two = next(number for number, line in enumerate(text) if '"begin"' in line and '"two"' in line)
    path.write_text("".join(text[: begin_two + 1]))
    run([job(key, ran) for key in ("one", "two", "three")], path)
    assert ran == ["one", "two", "three", "two"]


def test_damaged_lines_are_skipped_with_a_warning_and_the_rest_is_used(tmp_path):
    path = tmp_path / "g.jsonl"
    run([job(key, []) for key in ("one", "two", "three")], path)
    text = path.read_text().splitlines()
    text[4] = text[4][: len(text[4]) // 2]
    text.insert(1, '["a list"]')
    text.insert(1, '{"kind": "time", "run": [], "date": 3}')
    path.write_text("\n".join(text))
    records, warnings = results.load(tmp_path)
    assert [record["key"] for record in records if "rows" in record] == ["one", "three"]
    assert warnings == [f"{path}, line {number}: damaged, skipped" for number in (2, 3, 7)]


def test_lines_of_a_run_that_nothing_describes_are_skipped(tmp_path):
    path = tmp_path / "g.jsonl"
    run([job("one", [])], path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    records, warnings = results.read(path)
    assert records == []
    assert len(warnings) == 3


def test_line_is_appended_whole_after_a_cut_one(tmp_path):
    path = tmp_path / "g.jsonl"
    path.write_text('{"kind":"ti')
    Store(path, "r").write("run", environment=ABOUT)
    assert path.read_text().startswith('{"kind":"ti\n{"kind":"run"')
    with pytest.raises(ValueError, match="JSON"):
        Store(path, "r").write("time", ms=float("nan"))
    assert len(path.read_text().splitlines()) == 2
