"""What operators of this library allocate inside a call is what the planner's table says: the fused kernels
run in Triton's interpreter, and the allocator's events are counted.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from lorafa_kernels.memory import corrections

pytest.importorskip("triton")
M, N, K, R = 96, 64, 80, 8


def events(call) -> tuple[object, int]:
    """The result of call() and the peak of what is allocated during it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # What a launcher keeps, it keeps from here on.
    kept = call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = call()
    found = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = (e.nbytes() for e in sorted(found, key=lambda e: e.start_ns()))
    del kept
    return result, max(itertools.accumulate(sizes, initial=0))


def operands(dtype: torch.dtype, factor: torch.dtype) -> dict[str, torch.Tensor]:
    shapes = {"x": (M, K), "weight": (N, K), "lora_A": (R, K), "lora_B": (N, R), "dy": (M, N), "z": (M, R)}
    return {
        name: torch.randn(shape, dtype=factor if name.startswith("lora") else dtype)
        for name, shape in shapes.items()
    }


def check(op, arguments: tuple, parts: int = 0) -> None:
    """parts: bytes of fp32 sums of dz and dB, which a launch may make before they are rounded."""
    out, peak = events(lambda: op(*arguments))
    outputs = out if isinstance(out, (tuple, list)) else [out]
    taken = peak - sum(t.numel() * t.itemsize for t in outputs)
    planned = corrections.temporaries()[op](arguments, {}, out)
    # A flag or a counter of a launch is no more than 512 bytes. A plan of one launch copies no factor.
    copies = 2 * 3 * R * (N + K)
    assert -copies <= taken - planned <= parts + 512, f"planned {planned}, really {taken}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer(dtype):
    # fp32 factors beside 16-bit x are copied.
    t = operands(dtype, torch.float32)
    ops = torch.ops.lorafa_kernels
    frozen = t["weight"], t["lora_A"], t["lora_B"]
    check(ops.forward.default, (t["x"], *frozen, None, 2.0, "triton"))
    check(ops.backward.default, (t["dy"], t["z"], *frozen, 2.0, "triton"), 4 * R * (M + N))
    check(ops.backward_input.default, (t["dy"], *frozen, 2.0, "triton"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_group(dtype):
    t = operands(dtype, torch.float32)
    ops = torch.ops.lorafa_kernels
    lists = [t["weight"]] * 3, [t["lora_A"]] * 3, [t["lora_B"]] * 3
    common = [2.0] * 3, [0.0] * 3, None, False
    check(ops.group_forward.default, (t["x"], *lists, [None] * 3, *common, "triton"))
    if dtype == torch.bfloat16:
        # The interpreter's own casts are in the way of the allocator's events.
        return
    z = torch.randn(M, 3 * R, dtype=dtype)
    arguments = ([t["dy"]] * 3, z, *lists, *common, True, [True] * 3, "triton")
    check(ops.group_backward.default, arguments, 3 * 4 * R * (M + N))
