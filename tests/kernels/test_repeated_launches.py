"""Kernels that are kept and launched again, beside a stub driver that checks every argument."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import stub_gpu

ROOT = Path(__file__).resolve().parents[2]
REPEATED = [
    "again, other addresses",
    "aligned behind it",
    "not aligned, again",
    "first not aligned",
    "then aligned",
    "then aligned again",
    "other rows",
    "others",
    "other strides",
    "dropout, other p and seed",
    "no longer",
    "fp32 factor",
    "a copy beside it, again",
    "no longer debugged",
    "no longer instrumented",
    "no longer with its stages inspected",
    "times a float behind it",
]
ANEW = [
    "first",
    "not aligned",
    "rows that 16 does not divide",
    "one row",
    "other dtype",
    "a copy beside it",
    "dropout",
    "a profiler watches",
    "debugged",
    "new and debugged",
    "instrumented",
    "new and instrumented",
    "with its stages inspected",
    "new and with its stages inspected",
    "with a hook of the kernel",
    "times True",
]
# Of each: how it is launched by descriptors of P and Q, and how by pointers.
KINDS = [
    ("expand", "expand_tma_kernel", "expand_kernel"),
    ("expand_total", "total_tma_kernel", "total_kernel"),
]


@pytest.fixture(scope="module")
def found() -> dict:
    if lacks := stub_gpu.missing():
        pytest.skip(lacks)
    program = str(Path(__file__).with_name("repeated.py"))
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.stub_gpu", "--arch", "sm_90", program],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("what", REPEATED)
def test_what_is_alike_is_launched_again(found, what):
    assert found[what] == [["shrink_kernel", True, []]]


@pytest.mark.parametrize("what", ANEW)
def test_what_differs_goes_through_triton(found, what):
    """Code that nothing has needed before, and what somebody watches."""
    assert found[what] == [["shrink_kernel", False, []]]


@pytest.mark.parametrize(("name", "by_tma", "by_pointers"), KINDS)
def test_each_pair_of_operands_has_an_alignment_of_its_own(found, name, by_tma, by_pointers):
    """A call with L alone not aligned must not leave its launch to one with P alone not aligned."""
    calls = {
        "L not aligned": by_tma,
        "then P not aligned": by_pointers,
        "then both aligned": by_tma,
    }
    for call, kernel in calls.items():
        assert found[f"{name}, {call}"] == [[kernel, False, []]], call


def test_a_profiler_sees_launches_that_were_kept(found):
    assert found["seen by it"] == ["_shrink_kernel"]


def test_a_hook_of_a_kernel_sees_launches_that_were_kept(found):
    assert found["seen by the hook"] == [128]


def test_what_fails_fails_again(found):
    """With the same words, for another shape of the same code too."""
    assert len(found["errors"]) == 3 and len(set(found["errors"])) == 1
    assert "shared memory" in found["errors"][0]


def test_code_for_all_addresses_is_launched_at_all_of_them(found):
    """Once through Triton's call, whatever the alignment of the others."""
    through_triton, again = found["one code for all addresses"]
    assert through_triton == [["anywhere_kernel", False, []]]
    assert again == found["one code for all addresses, found"] == [["anywhere_kernel", True, []]]


@pytest.mark.parametrize("what", ["a launch that is dropped is gone", "operands are not kept"])
def test_nothing_is_kept_alive(found, what):
    """Without a collection of cycles."""
    assert found[what]


@pytest.mark.parametrize("what", ["kept at most", "the new one is kept", "forgotten"])
def test_what_is_kept_is_bounded(found, what):
    assert found[what]
