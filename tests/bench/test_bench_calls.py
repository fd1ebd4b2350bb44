"""Wrong calls of the commands of bench/ give one line and exit code 2; a closed pipe ends them quietly."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench import __main__ as command
from bench.report import tables
from bench.run.environment import ROOT

FILE, FOLDER, MISSING = "a-file", "a-folder", "missing"


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (command.main, []),
        (command.main, ["qick"]),
        (command.main, ["run", "--rows", "many"]),
        (command.main, ["run", "--budget", "nan"]),
        (command.main, ["run", "--budget", "inf"]),
        (command.main, ["run", "--rounds", "0"]),
        (command.main, ["run", "--threads", "-1"]),
        (command.main, ["run", "--device", "tpu"]),
        (command.main, ["run", "--kinds", "times"]),
        (command.main, ["run", "--dropout", "nan"]),
        (command.main, ["run", "--grid", "quick", "--out", f"{FILE}/below"]),
        (command.main, ["quick", "--out", FILE, "--budget", "1"]),
        (command.main, ["quick", "--out", f"{FILE}/below.jsonl", "--budget", "1"]),
        (command.main, ["suite", "--device", "cpu", "--out", f"{FILE}/below", "--budget", "1"]),
        (command.main, ["report", "--results", MISSING]),
        (command.main, ["report", "--results", FILE]),
        (command.main, ["report", "--results", FOLDER]),
        (command.main, ["report", "--results", MISSING, "--compare", "HEAD"]),
        (command.main, ["report", "--compare", ""]),
        (command.main, ["report", "--compare", "missing.jsonl"]),
        (command.main, ["report", "--compare", FILE]),
        (command.main, ["list", "more"]),
        (tables.main, ["--chek"]),
        (tables.main, ["--take-demo", MISSING]),
        (tables.main, ["--take-demo", FILE]),
        (tables.main, ["--take-demo", FOLDER]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value.__module__,
)
def test_a_wrong_call_is_answered_in_one_line(main, arguments, tmp_path, monkeypatch, capsys):
    (tmp_path / FILE).write_text("[1, 2")
    (tmp_path / FOLDER).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "PAGE", tmp_path / MISSING / "page.md")
    monkeypatch.setattr(command, "PLOTS", tmp_path / MISSING / "plots")
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(said) == 1, said
    assert said[0].startswith("python -m bench")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [FILE, FOLDER]


PRINTS = """
import sys
from bench.run.shell import Parser, run_command

def command():
    Parser(prog="some").parse_args()
    for _ in range({lines}):
        print("a line")
    return 0

sys.exit(run_command("some", command))
"""


def closed_pipe(*arguments: str) -> tuple[int, str]:
    """Run Python with a pipe as stdout that nobody reads; return the exit code and what it says."""
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Buffered, as a user's Python is: what is left is written at exit.
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
    ) as child:
        child.stdout.close()
        said = child.stderr.read().decode()
    return child.returncode, said


@pytest.mark.parametrize(
    ("lines", "more"), [(1, ()), (10**5, ()), (0, ("--help",))], ids=["few", "many", "help"]
)
def test_a_reader_that_has_seen_enough_is_no_error(lines, more):
    assert closed_pipe("-c", PRINTS.format(lines=lines), *more) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [("bench", "list"), ("bench", "--help"), ("bench.tables", "--check")], ids=" ".join
)
def test_commands_bear_a_closed_pipe(arguments):
    assert closed_pipe("-m", *arguments) == (0, "")
