"""A run says from the start what it does, and its budget ends whatever it is doing."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from bench import __main__ as command
from bench.measure import timing
from bench.run import jobs, runner
from bench.run import store as results
from bench.run.environment import ROOT
from bench.run.runner import Job

PAYLOAD = {"rounds": 1, "rows": [{"contender": "a", "status": "ok"}]}


def run(wanted: list[Job], path, **options) -> tuple[runner.Outcome, str]:
    """Run the jobs into a log, and return the outcome and what was printed."""
    console = Console(file=io.StringIO(), width=200)
    outcome = runner.run(wanted, path, grid="g", command="c", console=console, **options)
    return outcome, console.file.getvalue()


def job(key: str, seconds: float, action=lambda tick: None) -> Job:
    def measure(tick) -> dict:
        action(tick)
        return PAYLOAD

    return Job(key, "time", seconds, measure, {}, ("a",))


def test_a_log_says_what_runs_before_it_runs(tmp_path):
    seen: list[str] = []
    console = Console(file=io.StringIO(), width=200)
    wanted = [job(key, 2.0, lambda tick: seen.append(console.file.getvalue())) for key in ("one", "two")]
    runner.run(wanted, tmp_path / "g.jsonl", grid="g", command="c", console=console, budget=60.0)
    first, second = (text.splitlines() for text in seen)
    assert re.fullmatch(r"\[0 s, 60 s left\] measuring g into .*g\.jsonl: 2 steps, about 4 s", first[0])
    assert re.fullmatch(r"\[0 s, 60 s left\] 1/2 one: about 2 s", first[1])
    assert "2/2 two" in second[-1]


def test_a_long_measurement_says_that_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "HEARTBEAT_S", 0.0)
    _, shown = run([job("one", 2.0, lambda tick: tick(0.5))], tmp_path / "g.jsonl")
    assert "one: 50 %" in shown


def test_many_short_measurements_do_not_fill_the_log(tmp_path):
    _, shown = run([job(f"short {number}", 0.01) for number in range(200)], tmp_path / "g.jsonl")
    assert len(shown.splitlines()) < 10


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarms on this system")
def test_the_budget_ends_a_measurement_that_never_ticks(tmp_path):
    began = time.monotonic()
    endless = job("endless", 0.1, lambda tick: time.sleep(20))
    outcome, _ = run([job("one", 0.1), endless, job("two", 0.1)], tmp_path / "g.jsonl", budget=0.5)
    assert time.monotonic() - began < 5
    assert (outcome.stopped, outcome.left) == ("budget", ["endless", "two"])
    assert [record["key"] for record in results.read(tmp_path / "g.jsonl")[0] if "rows" in record] == ["one"]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarms on this system")
def test_the_alarm_is_not_swallowed_and_leaves_nothing_behind():
    def swallows() -> None:
        for _ in range(2):
            try:
                time.sleep(10)
            except BaseException:
                continue

    handler, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    began = time.monotonic()
    with pytest.raises(runner.BudgetSpent), runner.alarm(began + 0.2):
        swallows()
        time.sleep(10)
    assert time.monotonic() - began < 6
    assert signal.getsignal(signal.SIGALRM) == handler
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (timer[0] > 0)


def test_ctrl_c_while_the_tables_are_made_says_where_the_results_are(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(command, "show", interrupted)
    tiny = ["--layers", "MiniLM/query", "--rows", "16", "--ranks", "4", "--dtype", "fp32", "--rounds", "1"]
    more = [
        "--kinds",
        "time",
        "--contenders",
        "frozen",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "a.jsonl"),
    ]
    assert command.main(["run", *tiny, *more]) == 130
    assert f"what was measured is in {tmp_path / 'a.jsonl'}" in capsys.readouterr().err
    assert [record["kind"] for record in results.read(tmp_path / "a.jsonl")[0]][-1] == "end"


def test_a_quick_look_leaves_time_for_its_report(tmp_path, monkeypatch):
    budgets = []

    def nothing(options, *arguments) -> int:
        budgets.append(options.budget)
        return 1

    monkeypatch.setattr(command, "measure", nothing)
    monkeypatch.setattr(jobs, "jobs_of", lambda *arguments, **options: [])
    for more in ([], ["--no-report"], ["--budget", "4"]):
        command.main(["quick", "--budget", "60", "--device", "cpu", *more])
    assert budgets == [60 - command.REPORT_SECONDS, 60, 2]


@pytest.mark.slow
def test_a_quick_look_into_a_pipe_prints_at_once_and_keeps_its_budget(tmp_path):
    budget = 30
    arguments = ["quick", "--budget", str(budget), "--no-report", "--device", "cpu", "--out", str(tmp_path)]
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as child:
        first = child.stdout.readline()
        lines = child.stdout.readlines()
    # Python's start and its end are not measured here, on a machine that is busy.
    assert time.monotonic() - began < budget + 15
    assert "measuring quick into" in first or "no commit is known" in first
    assert any(re.match(r"\[\d+ s, \d+ s left\] \d+/\d+ \w+", line) for line in lines), lines
    assert any("measurements in" in line for line in lines)
