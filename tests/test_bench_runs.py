"""bench: a run that is cut keeps what it has and goes on; a damaged line costs itself alone."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from bench import results, runner
from bench.results import Store
from bench.runner import Job

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
        return {"rows": [{"contender": "a", "status": "ok"}]}

    return Job(key, "time", seconds, measure, {"case": {"label": key}}, ("a", "b"))


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_names_its_run_and_the_file_says_where_it_comes_from(tmp_path):
    ran: list[str] = []
    path = tmp_path / "new" / "g.jsonl"
    outcome = run([job("one", ran), job("two", ran)], path)
    assert (outcome.stopped, outcome.left, ran) == ("complete", [], ["one", "two"])
    first, *measured, last = lines(path)
    assert (first["kind"], first["environment"], first["command"]) == ("run", ABOUT, "c")
    assert [record["key"] for record in measured] == ["one", "two"]
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
    assert [record["key"] for record in records if "key" in record] == ["one", "two", "three"]
    assert len({record["run"] for record in records}) == 1


def test_killed_run_without_an_end_goes_on(tmp_path):
    ran: list[str] = []
    path = tmp_path / "g.jsonl"
    run([job("one", ran), job("two", ran)], path)
    text = path.read_text().splitlines(keepends=True)
    path.write_text("".join(text[:2]) + text[2][:20])
    run([job("one", ran), job("two", ran)], path)
    assert ran == ["one", "two", "two"]
    records, warnings = results.read(path)
    assert [record["key"] for record in records if "key" in record] == ["one", "two"]
    assert warnings == [f"{path}, line 3: damaged, skipped"]


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
    run([job("one", ran)], tmp_path / "kept" / "suite.jsonl")
    outcome = run([job("one", ran), job("two", ran)], tmp_path / "out.jsonl", elsewhere=tmp_path / "kept")
    assert ran == ["one", "two"]
    assert [record["key"] for record in outcome.records] == ["two"]
    other = {**ABOUT, "versions": {"python": "3", "torch": "3"}}
    run([job("one", ran)], tmp_path / "other.jsonl", elsewhere=tmp_path / "kept", about=other)
    assert ran == ["one", "two", "one"]


def test_budget_leaves_out_what_does_not_fit_and_the_next_call_does_it(tmp_path):
    ran: list[str] = []
    path = tmp_path / "g.jsonl"
    jobs = [job("small", ran, 1.0), job("large", ran, 1000.0), job("also small", ran, 1.0)]
    outcome = run(jobs, path, budget=60.0)
    assert (ran, outcome.left, outcome.stopped) == (["small", "also small"], ["large"], "budget")
    assert lines(path)[-1]["left"] == ["large"]
    assert run(jobs, path).stopped == "complete"
    assert ran == ["small", "also small", "large"]


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


def test_damaged_lines_are_skipped_with_a_warning_and_the_rest_is_used(tmp_path):
    path = tmp_path / "g.jsonl"
    run([job(key, []) for key in ("one", "two", "three")], path)
    text = path.read_text().splitlines()
    text[2] = text[2][: len(text[2]) // 2]
    text.insert(1, '["a list"]')
    path.write_text("\n".join(text))
    records, warnings = results.load(tmp_path)
    assert [record["key"] for record in records if "key" in record] == ["one", "three"]
    assert warnings == [f"{path}, line {number}: damaged, skipped" for number in (2, 4)]


def test_lines_of_a_run_that_nothing_describes_are_skipped(tmp_path):
    path = tmp_path / "g.jsonl"
    run([job("one", [])], path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    records, warnings = results.read(path)
    assert records == []
    assert len(warnings) == 2


def test_line_is_appended_whole_after_a_cut_one(tmp_path):
    path = tmp_path / "g.jsonl"
    path.write_text('{"kind":"ti')
    Store(path, "r").append("run", environment=ABOUT)
    assert path.read_text().startswith('{"kind":"ti\n{"kind":"run"')
    with pytest.raises(ValueError, match="JSON"):
        Store(path, "r").append("time", ms=float("nan"))
    assert len(path.read_text().splitlines()) == 2
