"""Kernels that are found by what they are specialised on, beside what Triton's own call would launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import stub_gpu

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(stub_gpu.missing() is not None, reason=str(stub_gpu.missing())),
]


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    program = str(Path(__file__).with_name("specialised_launches.py"))
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.stub_gpu", "--arch", "sm_90", program]
    kept["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_is_the_code_that_triton_would_launch(found):
    assert found["other code"] == [] and found["faults"] == []


def test_triton_is_asked_for_new_code_alone(found):
    """Else a batch of another number of rows would pay for its call again."""
    assert found["known"] == []


@pytest.mark.parametrize(
    "kernel",
    ["shrink", "shrink_sum", "expand", "recompute", "grad", "grad_sum", "gated", "expand_ws", "expand_ws_z"],
)
def test_another_shape_finds_its_kernel(found, kernel):
    assert f"_{kernel}_kernel" in found["found"]
