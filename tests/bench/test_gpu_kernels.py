"""The GPU call's checks of kernels: what was wrong is told, and what broke its process is not tried again."""

from __future__ import annotations

import json
import time

import pytest
import torch

from bench.gpu import checks as of_kernels
from bench.gpu import stages
from bench.gpu.driver import UNFINISHED, Call

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
