"""The tests of a GPU call: a line for each as it ends, none twice, none blamed for another's broken GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu.driver import RESTART, ROOT, VARIABLE

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes as on Linux")
CASES = """
import os
import pytest
from bench.gpu import recorder

pytestmark = pytest.mark.gpu

def test_right():
    pass

def test_wrong():
    assert "this" == "that"

def test_absent():
    pytest.skip("no such thing")

def test_lost():
    recorder.answers = lambda: False
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_after():
    pass

{more}

@pytest.mark.memory
def test_large():
    pass
"""
CRASH = "def test_crash():\n    os._exit(9)"


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases" / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n    memory\n")
    about = {"machine": {"gpu": None}, "versions": {}, "tree": "t"}
    for run in ("one", "two"):
        line = {"kind": "run", "run": run, "date": "d", "environment": about}
        line |= dict.fromkeys(("identity", "grid", "command"), "")
        with (tmp_path / "gpu.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    return tmp_path


def run(folder: Path, name: str, marks: str = "gpu and not memory", workers: int = 0) -> tuple[int, str]:
    """Run the cases as a stage of the call `name`; return the exit code and what is printed."""
    about = {
        "file": str(folder / "gpu.jsonl"),
        "run": name,
        "past": [],
        "tree": "t",
        "seconds": 90,
    }
    text = "import sys; from bench.gpu.driver import Call; from bench.gpu.stages import run_tests\n"
    text += f"sys.exit(run_tests(Call.told(), {marks!r}, {workers}, {str(folder / 'cases')!r}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), VARIABLE: json.dumps(about)}
    environment.pop("LORAFA_STUB_GPU", None)
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=folder, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def lines(folder: Path, run: str) -> list[tuple[str, str]]:
    found = [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]
    mine = [line for line in found if line["kind"] == "test" and line["run"] == run]
    return [(line["name"].split("::")[-1].removeprefix("test_"), line["outcome"]) for line in mine]


@pytest.mark.slow
def test_in_one_process_a_lost_gpu_ends_it_and_the_next_does_the_rest(folder):
    (folder / "cases" / "test_cases.py").write_text(CASES.format(more=""))
    code, shown = run(folder, "one")
    assert code == RESTART, shown
    ended = [("right", "passed"), ("wrong", "failed"), ("absent", "skipped"), ("lost", "failed")]
    assert [line for line in lines(folder, "one") if line[1] != "begun"] == ended
    code, shown = run(folder, "one")
    assert code == 1
    assert [line for line in lines(folder, "one") if line[1] != "begun"] == [*ended, ("after", "passed")]
    assert "verdict: 2 passed, 2 failed, 1 skipped; first failed: " in shown and "test_wrong" in shown
    # A later call does what did not pass.
    code, shown = run(folder, "two", "gpu")
    assert [line for line in lines(folder, "two") if line[1] != "begun"] == [
        ("wrong", "failed"),
        ("lost", "failed"),
    ]
    text = (folder / "gpu.jsonl").read_text()
    assert "illegal memory access" in text and "'this' == 'that'" in text


@pytest.mark.slow
def test_a_test_that_takes_its_process_along_is_named_and_not_tried_again(folder):
    (folder / "cases" / "test_cases.py").write_text(CASES.format(more=CRASH).replace("test_lost", "lost"))
    assert run(folder, "one")[0] == 9
    code, shown = run(folder, "one")
    found = lines(folder, "one")
    assert ("crash", "failed") in found and found.count(("crash", "begun")) == 1
    assert code == 1 and "2 failed" in shown


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="needs pytest-xdist")
def test_among_workers_a_lost_gpu_and_a_crash_cost_themselves_alone(folder):
    (folder / "cases" / "test_cases.py").write_text(CASES.format(more=CRASH))
    code, shown = run(folder, "one", workers=2)
    assert code == 1, shown
    found = dict(lines(folder, "one"))
    assert {name for name, outcome in found.items() if outcome == "passed"} == {"right", "after"}
    assert {name for name, outcome in found.items() if outcome == "failed"} == {"wrong", "lost", "crash"}
    assert "large" not in found


@pytest.mark.slow
def test_tests_of_much_memory_run_by_themselves(folder):
    (folder / "cases" / "test_cases.py").write_text(CASES.format(more=""))
    code, _ = run(folder, "one", "gpu and memory")
    assert code == 0
    assert lines(folder, "one") == [("large", "begun"), ("large", "passed")]
