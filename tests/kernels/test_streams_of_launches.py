"""First and kept launches go to the stream that is current, of the device that is: through a stub driver of
two devices, which refuses a function or a stream of another device than the current one.
"""

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
# Kernels' launchers.
LAUNCHERS = [
    "shrink",
    "expand by pointers",
    "expand by TMA",
    "expand_total by pointers",
    "expand_total by TMA",
    "grad",
]
# Autograd nodes, forward and backward.
NODES = [
    "a layer",
    "a layer of few rows",
    "a layer, dB beside dx",
    "a layer of specialised warps",
    "a layer whose specialised warps make z",
    "a group",
    "a gated MLP",
    "a mixed batch",
    "a quantised layer",
    "a quantised layer whose codes are read",
]
OPERATIONS = LAUNCHERS + NODES
# The device and the stream of each call, in order; of two of them no launch was kept before.
CALLS = {
    "first, on a": (0, "a"),
    "kept, on b": (0, "b"),
    "kept, on the default stream": (0, "default of 0"),
    "first on device 1, on c": (1, "c"),
    "kept, on d": (1, "d"),
    "kept, on the default stream of 1": (1, "default of 1"),
    "kept, on a again": (0, "a"),
}


def run_on_stub(*arguments: str) -> str:
    """Run a program beside the stub and return what it printed."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.stub_gpu", "--arch", "sm_90", *arguments]
    environment = kept | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def found() -> dict:
    program = str(Path(__file__).with_name("on_streams.py"))
    return json.loads(run_on_stub("--devices", "2", program).splitlines()[-1])


def kernels(found: dict, operation: str) -> list[str]:
    return [kernel for kernel, *_ in found[operation]["first, on a"]]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_launch_goes_to_the_current_stream_of_the_current_device(found, operation, call):
    launched = found[operation][call]
    assert len(launched) >= (3 if operation in NODES else 1)
    assert [one[0] for one in launched] == kernels(found, operation)
    assert [one[2:] for one in launched] == [[*CALLS[call], []]] * len(launched)


@pytest.mark.parametrize("call", [call for call in CALLS if call.startswith("kept")])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_was_launched_on_a_device_is_kept_for_all_of_its_streams(found, operation, call):
    assert all(repeated for _, repeated, *_ in found[operation][call])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_is_kept_for_another_device(found, operation):
    """A group's members share a launch, so that its second may be a kept one."""
    first, on_other = found[operation]["first, on a"], found[operation]["first on device 1, on c"]
    assert [one[:2] for one in on_other] == [one[:2] for one in first]
    assert not on_other[0][1] and not first[0][1]


@pytest.mark.parametrize("operation", LAUNCHERS)
def test_what_is_kept_is_of_the_current_device_wherever_the_operands_lie(found, operation):
    for times in ("", ", again"):
        for device, stream in enumerate("ac"):
            launched = found[operation][f"operands of no device, on {stream}{times}"]
            assert [one[0] for one in launched] == kernels(found, operation)
            assert [one[2:] for one in launched] == [[device, stream, []]] * len(launched)


@pytest.mark.parametrize("operation", NODES)
def test_backward_launches_on_the_stream_of_forward(found, operation):
    """By the stub's imitation of autograd: what is held is that nothing keeps a stream of its own."""
    for times in ("", ", again"):
        launched = found[operation][f"backward of a forward on a, called on b{times}"]
        assert launched and [one[1:] for one in launched] == [[True, 0, "a", []]] * len(launched)


@pytest.mark.parametrize("operation", NODES)
def test_tensors_of_another_device_are_computed_there(found, operation):
    """Forward and backward; and the device and the stream that were current are so afterwards."""
    for times in ("", ", again"):
        launched = found[operation][f"on c, while device 0 is current{times}"]
        assert [one[0] for one in launched] == kernels(found, operation)
        assert [one[1:] for one in launched] == [[True, 1, "c", []]] * len(launched)
    assert found[operation]["current afterwards"] == [0, "b"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_thread_launches_on_its_own_stream(found, operation):
    """Four threads at a time, two on each device, call three times."""
    threads = found[operation]["threads"]
    assert threads.pop("raised") == []
    assert len(threads) == 4
    once = kernels(found, operation)
    for index in range(4):
        launched = threads[f"of thread {index}"]
        assert [one[0] for one in launched] == once * 3
        assert [one[2:] for one in launched] == [[index % 2, f"of thread {index}", []]] * 3 * len(once)
        # Whatever the other threads have got to.
        assert all(one[1] for one in launched[2 * len(once) :])
