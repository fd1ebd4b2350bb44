"""The order in which the plan of a group with dB beside dx reaches the driver, through the stub: which kernel
may start while the one before it runs and waits for that one, and which lets the next one do so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stub_gpu
from group_beside_launches import CASES, Case

from lorafa_kernels.plan.config import KNOWN_DEVICES

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.gate,
    pytest.mark.slow,
    pytest.mark.skipif(stub_gpu.missing() is not None, reason=str(stub_gpu.missing())),
]
# "<" starts while the kernel before it runs, and waits for its end; ">" lets the next one start.
ROW = {
    1: "grad<",
    2: "grad<> grad<",
    3: "grad<> grad<> grad<",
    4: "grad<> grad<> grad<> grad<",
    5: "grad<> grad<> grad<> grad<> grad<",
}
SUMS = {count: " ".join(["grad_sum"] * count) for count in ROW}
SHRINKS = {count: " ".join(["shrink"] * count) for count in ROW}
PARTS = "shrink shrink_sum"
BEFORE = f"grad {PARTS}"
# A layer by itself, where dx waits for dz besides.
LAYER = "shrink> expand_tma<> grad< grad_sum"
EXPECTED = {
    Case(): f"{SHRINKS[3]} total_tma> {ROW[3]} {SUMS[3]}",
    Case(M=512): f"{PARTS} {PARTS} {PARTS} total_tma> {ROW[3]} {SUMS[3]}",
    # Of few rows nothing runs beside dx.
    Case(M=16): f"{BEFORE} {BEFORE} {BEFORE} total_tma",
    # One chunk of rows each has no parts to add.
    Case(widths=(4096, 4096, 4096)): f"{SHRINKS[3]} total_tma> {ROW[3]}",
    Case(ranks=(64, 64, 64)): f"{SHRINKS[3]} total_tma> {ROW[3]} {SUMS[3]}",
    Case(ranks=(64, 4, 24)): f"{SHRINKS[3]} total_tma> {ROW[3]} {SUMS[3]}",
    Case(dropout_p=0.25): f"{SHRINKS[3]} total_tma> {ROW[3]} {SUMS[3]}",
    # "total" is dz of all members, which nothing overlaps.
    Case(share_A=True): f"total total_tma> {ROW[3]} {SUMS[3]}",
    Case(share_A=True, dropout_p=0.25): f"total total_tma> {ROW[3]} {SUMS[3]}",
    Case(frozen=(0,)): f"{SHRINKS[3]} total_tma> {ROW[2]} {SUMS[2]}",
    Case(frozen=(2,)): f"{SHRINKS[3]} total_tma> {ROW[2]} {SUMS[2]}",
    Case(frozen=(1, 2)): f"{SHRINKS[3]} total_tma> {ROW[1]} {SUMS[1]}",
    Case(frozen=(0, 1, 2)): f"{SHRINKS[3]} total_tma",
    Case(unused=(0,)): f"{SHRINKS[2]} total_tma> {ROW[2]} {SUMS[2]}",
    Case(unused=(2,)): f"{SHRINKS[2]} total_tma> {ROW[2]} {SUMS[2]}",
    Case(need_dx=False): "grad grad_sum grad grad_sum grad grad_sum",
    Case(ranks=(16, None, 16)): f"{SHRINKS[2]} total_tma> {ROW[2]} {SUMS[2]}",
    Case(ranks=(16, 16, None)): f"{SHRINKS[2]} total_tma> {ROW[2]} {SUMS[2]}",
    Case(widths=(512, 256), ranks=(16, 16)): f"{SHRINKS[2]} total_tma> {ROW[2]} {SUMS[2]}",
    Case(widths=(512,), ranks=(16,)): LAYER,
    Case(widths=(256,) * 4, ranks=(16,) * 4): f"{SHRINKS[4]} total_tma> {ROW[4]} {SUMS[4]}",
    Case(widths=(256,) * 5, ranks=(16,) * 5): f"{SHRINKS[5]} total> {ROW[5]} {SUMS[5]}",
    Case(widths=(509, 251, 256)): f"{SHRINKS[3]} total> {ROW[3]} {SUMS[3]}",
    Case(dtype=CASES[-2].dtype): f"{SHRINKS[3]} total> {ROW[3]} {SUMS[3]}",
    # One weight is there at a time.
    Case(kind="int8"): f"{LAYER} {LAYER} {LAYER}",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, list[dict]]:
    """The calls of each case, by its name."""
    out = tmp_path_factory.mktemp("beside") / "launches.json"
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    kept["PYTHONPATH"] = str(ROOT)
    stub = (sys.executable, "-m", "tests.stub_gpu", "--arch", "sm_90")
    command = [*stub, "tests/group_beside_launches.py", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return {row["case"]: row["calls"] for row in json.loads(out.read_text())}


def written(call: dict) -> str:
    launched = zip(call["kernels"], call["dependent"], call["triggers"], strict=True)
    return " ".join(f"{name}{'<' * dependent}{'>' * triggers}" for name, dependent, triggers in launched)


def test_every_case_is_expected():
    assert list(EXPECTED) == list(CASES)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_order_and_attributes(rows, case):
    """In the first call, and by the launches that are kept."""
    first, again = rows[case.name]
    for call in (first, again):
        assert written(call) == EXPECTED[case]
        assert call["waits"] == call["dependent"] and call["faults"] == []
    # An address within z that is not aligned is specialised on anew.
    assert again["repeated"] == len(again["kernels"]) or 4 in case.ranks


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_what_runs_beside_dx_fits_at_a_time(rows, case):
    """With a block of dB on each multiprocessor at most, where they are fewer than those by pointers."""
    call = rows[case.name][0]
    beside = [
        blocks
        for name, blocks, dependent in zip(call["kernels"], call["blocks"], call["dependent"], strict=True)
        if name == "grad" and dependent
    ]
    several = beside if not case.kind else beside[:1]
    strips = sum(-(-N // 64) for N in case.widths)
    most = KNOWN_DEVICES["sm_90"].num_sms
    if case.dtype.itemsize == 2:
        assert sum(several) <= max(most, strips)
