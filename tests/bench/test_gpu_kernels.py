"""The GPU call's checks of kernels: what was wrong is told, and what broke its process is not tried again."""

from __future__ import annotations

import json
import os
import sys
import time

import pytest
import torch

from bench.gpu import checks as of_kernels
from bench.gpu import stages
from bench.gpu.driver import UNFINISHED, Call

posix = pytest.mark.skipif(os.name != "posix", reason="a shell script")
Y = torch.linspace(1, 2, 512)


def planted(tried: list[str], name: str, returns=Y):
    def make():
        tried.append(name)
        return (lambda pdl: {"y": returns() if callable(returns) else returns}), {"y": Y.double()}, {"y": Y}

    return name, make, (True,)


@pytest.fixture
def call(tmp_path, monkeypatch) -> Call:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: None)
    monkeypatch.setattr(stages, "REPEATS", 3)
    found = Call(tmp_path / "gpu.jsonl", None, "one", 100.0, time.monotonic(), tree="t")
    about = {"machine": {"gpu": None}, "versions": {}, "tree": "t"}
    found.write("run", environment=about, identity="", grid="gpu", command="c")
    return found


def run(call: Call, monkeypatch, capsys, *checks) -> tuple[int, str, dict[str, dict]]:
    """Return the stage's exit code, its verdict, and by key the last line of each check."""
    monkeypatch.setattr(of_kernels, "checks", lambda device: list(checks))
    code = stages.kernels(call)
    lines = [json.loads(line) for line in call.file.read_text().splitlines()]
    of_checks = {line["key"].split(",")[0]: line for line in lines if line["kind"] == "check"}
    return code, capsys.readouterr().out.split("verdict: ")[1].strip(), of_checks


def test_right_and_wrong(call, monkeypatch, capsys):
    tried: list[str] = []
    draws = iter(range(100))
    checks = [
        planted(tried, "right"),
        planted(tried, "wrong", Y * 1.01),
        planted(tried, "restless", lambda: Y * (1 + 2e-8 * next(draws))),
    ]
    code, said, lines = run(call, monkeypatch, capsys, *checks)
    assert code == 1 and said.startswith(
        "2 of 3 wrong, first wrong, with dependent launch: outside the error"
    )
    assert lines["right"]["rows"][0]["repeats"] == 3 and lines["right"]["rows"][0]["equal"] is True
    assert lines["restless"]["retry"] == "not the same bits each time"
    # A process of this call that is started again tries none of them; a later call those that were wrong.
    assert run(call, monkeypatch, capsys, *checks)[0] == 1 and tried == ["right", "wrong", "restless"]
    call.run = "two"
    assert run(call, monkeypatch, capsys, *checks)[0] == 1
    assert sorted(tried[3:]) == ["restless", "wrong"]


def test_what_took_its_process_along_is_named_and_not_tried_again(call, monkeypatch, capsys):
    tried: list[str] = []
    call.write("begin", key="crashes, with dependent launch")
    code, said, lines = run(call, monkeypatch, capsys, planted(tried, "crashes"), planted(tried, "right"))
    assert (code, tried) == (1, ["right"])
    assert said == "1 of 2 wrong, first crashes, with dependent launch: it took its process along"
    assert lines["crashes"]["rows"][0]["status"] == "failed"


def test_without_time_a_later_call_does_the_rest(call, monkeypatch, capsys):
    call.budget = 0.0
    code, said, _ = run(call, monkeypatch, capsys, *(planted([], f"check {n}") for n in range(9)))
    assert code == UNFINISHED and "left, no time" in said


# compute-sanitizer, by programs that stand for it

TOOL = """#!/bin/sh
echo "$@" >> "$0.calls"
shift 4
"$@"
code=$?
test -e "$0.found" && echo "========= Invalid __global__ write of size 4 bytes" && exit 99
exit $code
"""
CHECKED = "print('check: one'); print('verdict: 1 checks without an error')"


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """A program that runs what it is given, and finds an error where a file `.found` lies beside it."""
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(TOOL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return program


def sanitize(call: Call, monkeypatch, capsys, text: str = CHECKED) -> tuple[int, str, dict[str, str]]:
    """Return the stage's exit code and verdict, and the status of each tool."""
    monkeypatch.setattr(stages, "command_of", lambda stage: [sys.executable, "-c", text])
    code = stages.sanitizer(call)
    lines = [json.loads(line) for line in call.file.read_text().splitlines()]
    statuses = {line["key"]: line["rows"][0]["status"] for line in lines if line["kind"] == "check"}
    return code, capsys.readouterr().out.rsplit("verdict: ", 1)[1].strip(), statuses


@posix
def test_both_tools_watch_the_checks(call, tool, monkeypatch, capsys):
    code, said, statuses = sanitize(call, monkeypatch, capsys)
    assert (code, list(statuses.values())) == (0, ["ok", "ok"])
    assert said == "memcheck: 1 checks without an error; racecheck: 1 checks without an error"
    calls = tool.with_name("compute-sanitizer.calls").read_text().splitlines()
    assert [line.split()[:4] for line in calls] == [
        ["--tool", name, "--error-exitcode", "99"] for name in ("memcheck", "racecheck")
    ]


@posix
def test_what_a_tool_finds_fails(call, tool, monkeypatch, capsys):
    tool.with_name("compute-sanitizer.found").touch()
    code, said, statuses = sanitize(call, monkeypatch, capsys)
    assert (code, list(statuses.values())) == (1, ["failed", "failed"])
    assert "memcheck: errors, first in one: Invalid __global__ write of size 4 bytes" in said


@posix
def test_checks_that_break_under_a_tool_fail(call, tool, monkeypatch, capsys):
    code, said, _ = sanitize(
        call, monkeypatch, capsys, "print('check: one', flush=True); raise SystemExit(7)"
    )
    assert code == 1 and "memcheck: ended with 7 in one" in said
    text = "print('verdict: 1 of 2 checks, then the time was up'); raise SystemExit(3)"
    code, said, statuses = sanitize(call, monkeypatch, capsys, text)
    assert code == UNFINISHED and "the time was up" in said
    assert list(statuses.values()) == ["not run", "not run"]


def test_without_the_program_nothing_passes(call, tmp_path, monkeypatch, capsys):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(stages.shutil, "which", lambda name, path=None: None)
    assert stages.sanitizer(call) == UNFINISHED
    assert "no compute-sanitizer" in capsys.readouterr().out
