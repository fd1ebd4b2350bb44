"""Streams, devices and events of the stub driver are as torch documents them, and order what is launched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stub_gpu

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(stub_gpu.missing() is not None, reason=str(stub_gpu.missing())),
]
# [the device that is current, whether its stream is the default one, …]
CURRENT = {
    "at first": [0, True],
    "handles": 5,
    "devices of streams": [0, 1, 1],
    "in a block of device 1": [1, True],
    "made there": 1,
    "a stream of 0 there": True,
    "in a block of a": True,
    "in a block of a stream of 1": [1, False, True],
    "a stays that of 0": True,
    "behind it": [0, False, True],
    "None changes nothing": True,
    "in another thread": [0, True],
    "set to a stream of 1": [1, False, True],
    "set back": [0, True],
    "of a pool": [32, True],
    "a device too many": ["RuntimeError", 2],
    "an event on another device": "RuntimeError",
    "a time without timing": "ValueError",
    "a time": True,
}
WAITS = {
    "one stream": True,
    "two streams": False,
    "default stream, then another": False,
    "wait_stream": True,
    "wait_event": True,
    "an event from before the launch": False,
    "an event from before, recorded again": True,
    "waited for before it is recorded": False,
    "recorded again afterwards": False,
    "the other one waits": False,
    "by way of a third": True,
    "a synchronised stream": True,
    "another synchronised stream": False,
    "a synchronised event": True,
    "a synchronised device": True,
}


@pytest.fixture(scope="module")
def found() -> dict:
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    program = str(Path(__file__).with_name("stub_streams.py"))
    command = [sys.executable, "-m", "tests.stub_gpu", "--arch", "sm_90", "--devices", "2", program]
    environment = kept | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("what", CURRENT)
def test_what_is_current(found, what):
    assert found[what] == CURRENT[what]


@pytest.mark.parametrize("between", WAITS)
def test_what_waits_for_what(found, between):
    assert found[between] is WAITS[between]


def test_everything_that_was_found_is_judged(found):
    assert set(found) == {*CURRENT, *WAITS}
