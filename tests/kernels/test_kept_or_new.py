"""What launchers keep a launch under tells apart all that the launch depends on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import stub_gpu

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = (
    "dequantise",
    "expand",
    "expand_codes",
    "expand_total",
    "gated",
    "gated_backward",
    "grad",
    "grads_beside",
    "mixed_expand",
    "mixed_grad",
    "mixed_shrink",
    "recompute",
    "shrink",
    "shrink_group",
    "shrink_total",
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(stub_gpu.missing() is not None, reason=str(stub_gpu.missing())),
]


@pytest.fixture(scope="module")
def found() -> dict:
    program = str(Path(__file__).with_name("kept_or_new.py"))
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.stub_gpu", "--arch", "sm_90", program],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_of_every_launcher(found):
    assert sorted(found) == sorted(LAUNCHERS)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_call_that_differs_in_one_thing_gets_the_launch_of_its_own(found, launcher):
    calls, wrong = found[launcher]
    assert calls > 0 and wrong == []
