"""The order in which the plan with dB beside dx reaches the driver, through the stub: which kernel may start
while the one before it runs, and which lets the next one do so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stub_gpu
import torch
from beside_launches import BESIDE, CASES, K, N

from lorafa_kernels.plan.config import KNOWN_DEVICES
from lorafa_kernels.plan.recipe import Problem, launches

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.gate,
    pytest.mark.slow,
    pytest.mark.skipif(stub_gpu.missing() is not None, reason=str(stub_gpu.missing())),
]
# Kernel, whether it may start while the one before it runs and waits for that, whether it lets the next one.
SHRINK = ("shrink_kernel", False, True)
SHRINK_IN_PARTS = [("shrink_kernel", False, False), ("shrink_sum_kernel", False, True)]
REST = [
    ("expand_tma_kernel", True, True),
    ("grad_kernel", True, False),
    ("grad_sum_kernel", False, False),
]
# Of few rows dx and dz are one launch, and nothing is left to run beside it.
EXPECTED = {
    16: [("grad_kernel", False, False), ("recompute_kernel", False, False)],
    512: [*SHRINK_IN_PARTS, *REST],
    1100: [*SHRINK_IN_PARTS, *REST],
    8192: [SHRINK, *REST],
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("beside") / "launches.json"
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    kept["PYTHONPATH"] = str(ROOT)
    command = [
        sys.executable,
        "-m",
        "tests.stub_gpu",
        "--arch",
        "sm_90",
        "tests/beside_launches.py",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_order_and_attributes(rows, case):
    """In the first call, and by the launches that are kept."""
    (row,) = (row for row in rows if row["case"] == list(case))
    first, again = row["calls"]
    for call in (first, again):
        attributes = zip(call["kernels"], call["dependent"], call["triggers"], strict=True)
        assert list(attributes) == EXPECTED[case[0]]
        assert call["waits"] == call["dependent"] and call["faults"] == []
    assert again["repeated"] == len(again["kernels"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plans_say_the_same_order(rows, case):
    M, R, dropout_p, _ = case
    problem = Problem("backward", torch.bfloat16, M, N, K, R, dropout=dropout_p > 0)
    (row,) = (row for row in rows if row["case"] == list(case))
    said = launches(BESIDE, problem, KNOWN_DEVICES["sm_90"])
    assert [name.removesuffix("_kernel").replace("_tma", "") for name in row["calls"][0]["kernels"]] == list(
        said
    )
