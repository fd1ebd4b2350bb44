"""Autograd steps among streams, threads, CUDA graphs and the allocator, for every plan that leaves something
to their order: a kernel that starts while the one before it runs, dB's kernel beside expand, specialised
warps.

On a GPU they are what is tested. Without one the same functions run through the interpreter, and through the
stub driver as on a GPU (test_as_on_a_gpu_beside_the_stub), where nothing is computed.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import stub_gpu
import torch
from accuracy import assert_same
from conftest import GPU
from gpu_or_cpu import Captured, in_threads, live_bytes, memory_held, on_stream
from torch import Tensor

from lorafa_kernels import lorafa_linear
from lorafa_kernels.checks.budget import Operands, draw_operands
from lorafa_kernels.plan.choice import planned_device
from lorafa_kernels.plan.config import KernelConfig, KernelPlan
from lorafa_kernels.plan.pin import pin_plan
from lorafa_kernels.plan.recipe import Recipe
from lorafa_kernels.plan.specialised import missing_for_ws

ROOT = Path(__file__).resolve().parents[2]
STUB = stub_gpu.VARIABLE in os.environ
# M, K, N, R: on a GPU several waves of blocks.
SIZES = (1100, 256, 128, 16) if STUB else (4096, 1024, 2048, 16) if GPU else (66, 72, 40, 8)
TIMES, THREADS = (3, 4) if STUB else (100, 4) if GPU else (1, 2)
WS = KernelConfig(128, 128, 64, 16, 8, 8, 3, "ws", EPILOGUE_SUBTILE=2)
WS_Z = KernelConfig(128, 128, 64, 16, 8, 8, 2, "ws_z", EPILOGUE_SUBTILE=2)
PLANS = {
    "default": {},
    "beside": {"backward": Recipe("fused", KernelPlan(one_pass=False, beside=True))},
    "ws": {op: Recipe("fused", KernelPlan(expand=WS)) for op in ("forward", "backward")},
    "ws_z": {
        op: Recipe("fused", KernelPlan(expand=WS_Z, one_pass=False, pdl=False))
        for op in ("forward", "backward")
    },
}


@pytest.fixture(params=PLANS)
def pinned(request, triton_device) -> Mapping[str, Recipe]:
    """A plan while the test runs, in all of its threads."""
    recipes = PLANS[request.param]
    if request.param.startswith("ws"):
        device = planned_device(torch.device(triton_device))
        if lacks := missing_for_ws(device.limits, device.triton):
            pytest.skip(f"the kernel {lacks}")
    with pin_plan(recipes) if recipes else contextlib.nullcontext():
        yield recipes


def drawn(device: str, seed: int = 0, dropout_p: float = 0.0) -> Operands:
    """Operands of which x and lora_B are leaves that require a gradient."""
    found = draw_operands(
        *SIZES, torch.bfloat16, device, factor_dtype=torch.float32, seed=seed, dropout_p=dropout_p
    )
    found.x.requires_grad_()
    found.lora_B.requires_grad_()
    return found


def forward(i: Operands) -> Tensor:
    how = {"scaling": i.scaling, "dropout_p": i.dropout_p, "impl": "triton"}
    return lorafa_linear(i.x, i.weight, i.lora_A, i.lora_B, i.bias, **how)


def step(i: Operands) -> Sequence[Tensor]:
    """y, dx and dB."""
    y = forward(i)
    return (y.detach(), *torch.autograd.grad(y, (i.x, i.lora_B), i.dy))


def train(i: Operands, times: int) -> Sequence[Tensor]:
    """dx and dB, summed by `times` steps of loss.backward(), whose dy is that of the operands."""
    for _ in range(times):
        (forward(i).float() * i.dy.float()).sum().backward()
    found = i.x.grad, i.lora_B.grad
    i.x.grad = i.lora_B.grad = None
    return found


def test_the_bits_are_those_of_every_run(pinned, triton_device):
    i = drawn(triton_device)
    first = step(i)
    for _ in range(TIMES):
        assert_same(step(i), first)


def test_memory_that_is_free_again_is_not_written_too_early(pinned, triton_device):
    """dz and the parts of shrink are free for others while dB's kernel may run."""
    i = drawn(triton_device)
    want = step(i)
    for _ in range(TIMES):
        got = step(i)
        # Overwrites what the allocator has just got back.
        torch.empty_like(got[0]).fill_(float("nan"))
        torch.empty((SIZES[0], SIZES[3]), dtype=torch.bfloat16, device=triton_device).fill_(float("nan"))
        assert_same(got, want)


def test_a_graph_of_autograd_is_run_twice(pinned, triton_device):
    i = drawn(triton_device)
    y = forward(i)
    first = torch.autograd.grad(y, (i.x, i.lora_B), i.dy, retain_graph=True)
    assert_same(torch.autograd.grad(y, (i.x, i.lora_B), i.dy), first)


def test_a_step_is_captured_and_replayed_with_other_input(pinned, triton_device):
    """Forward and backward of autograd in one graph."""
    i, other = drawn(triton_device), drawn(triton_device, seed=1)
    captured = Captured(lambda: step(i))
    captured.replay()
    assert_same(captured.results, step(i))
    with torch.no_grad():
        for name in ("x", "dy", "lora_B", "lora_A", "weight"):
            getattr(i, name).copy_(getattr(other, name))
    captured.replay()
    assert_same(captured.results, step(i))


@pytest.mark.parametrize("own", [True, False], ids=["own-stream", "one-stream"])
def test_threads_call_backward(pinned, triton_device, own):
    """On streams of their own; and all on one, where another thread's kernels come between a kernel and the
    one before it.
    """
    inputs = [drawn(triton_device, seed) for seed in range(THREADS)]
    times = min(TIMES, 20)
    want = [train(i, times) for i in inputs]

    def work(index: int) -> Sequence[Tensor]:
        with on_stream(own):
            return train(inputs[index], times)

    assert_same(in_threads(THREADS, work), want)


@pytest.mark.parametrize("own", [True, False], ids=["own-stream", "one-stream"])
def test_the_allocator_does_not_grow(pinned, triton_device, own):
    """After 100 steps it holds what it holds after 10."""
    # Specialised warps make no mask.
    dropout_p = 0.0 if pinned in (PLANS["ws"], PLANS["ws_z"]) else 0.25
    i = drawn(triton_device, dropout_p=dropout_p)
    with on_stream(own):
        train(i, 10 if GPU else 1)
        early = memory_held()
        train(i, 90 if GPU else 2)
        assert memory_held() == early


def test_live_bytes_are_those_of_dense_tensors():
    """A process that has run other tests holds tensors without any storage."""
    dense = torch.eye(8)
    without = live_bytes()
    others = dense.to_sparse(), dense.to_mkldnn(), torch.eye(8, device="meta")
    assert live_bytes() == without and len(others) == 3
    held = dense.clone(), dense.view(64)
    assert live_bytes() == without + held[0].nbytes


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="the tests themselves run here")
@pytest.mark.skipif(stub_gpu.missing() is not None, reason=str(stub_gpu.missing()))
def test_as_on_a_gpu_beside_the_stub():
    """Every test of this file as it runs on sm_90: its threads, streams and captures are called, and no name
    or argument of theirs can be wrong unseen.
    """
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    kept["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "tests/gpu_tests_on_stub.py", "tests/linear/test_streams_and_graphs.py"]
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=600)
    # Six tests, two of them on two kinds of stream, for each plan.
    assert done.returncode == 0 and f"{8 * len(PLANS)} passed" in done.stdout, done.stdout + done.stderr
