"""Autograd steps of groups among streams, threads, CUDA graphs and the allocator, by the plan whose kernels
of dB run beside that of dx, and by the default one: as tests/linear/test_streams_and_graphs.py has them of a
layer, on a GPU, through the interpreter, and beside the stub driver.
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
from gpu_or_cpu import Captured, in_threads, memory_held, on_stream
from test_group import Group, draw_group
from torch import Tensor

from lorafa_kernels.group.api import lorafa_linear_group
from lorafa_kernels.plan.config import KernelPlan
from lorafa_kernels.plan.pin import pin_plan
from lorafa_kernels.plan.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
STUB = stub_gpu.VARIABLE in os.environ
# M, K, and the widths and ranks of the members: on a GPU several waves of blocks, and parts of dB to add.
M, K, SHAPES = (
    (1100, 256, [(128, 16), (64, 16), (64, 16)])
    if STUB
    else (4096, 1024, [(1024, 16), (512, 16), (512, 64)])
    if GPU
    else (66, 72, [(40, 8), (24, 4), (32, 8)])
)
TIMES, THREADS = (3, 4) if STUB else (100, 4) if GPU else (1, 2)
PLANS = {
    "default": {},
    "beside": {"backward": Recipe("fused", KernelPlan(one_pass=False, beside=True))},
}


@pytest.fixture(params=PLANS)
def pinned(request, triton_device) -> Mapping[str, Recipe]:
    """A plan while the test runs, in all of its threads."""
    recipes = PLANS[request.param]
    with pin_plan(recipes) if recipes else contextlib.nullcontext():
        yield recipes


def drawn(device: str, seed: int = 0, dropout_p: float = 0.0, share_A: bool = False) -> Group:
    """A group of which x and every lora_B are leaves that require a gradient."""
    shapes = [(N, SHAPES[0][1]) for N, _ in SHAPES] if share_A else SHAPES
    how = {"seed": seed, "share_A": share_A, "dropout_ps": (dropout_p,) * 3}
    found = draw_group(M, K, shapes, torch.bfloat16, device, factor_dtype=torch.float32, **how)
    for leaf in leaves_of(found):
        leaf.requires_grad_()
    return found


def leaves_of(group: Group) -> list[Tensor]:
    return [group.x, *(member.lora_B for member in group.members)]


def forward(group: Group) -> tuple[Tensor, ...]:
    return lorafa_linear_group(group.x, group.members, share_A=group.share_A, impl="triton")


def step(group: Group) -> Sequence[Tensor]:
    """The y_i, dx and the dB_i."""
    ys = forward(group)
    return (*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves_of(group), group.dys))


def train(group: Group, times: int) -> Sequence[Tensor]:
    """dx and the dB_i, summed by `times` steps of loss.backward(), whose dys are those of the group."""
    for _ in range(times):
        ys = forward(group)
        sum((y.float() * dy.float()).sum() for y, dy in zip(ys, group.dys, strict=True)).backward()
    found = [leaf.grad for leaf in leaves_of(group)]
    for leaf in leaves_of(group):
        leaf.grad = None
    return found


@pytest.mark.parametrize("share_A", [False, True], ids=["", "one-A"])
def test_the_bits_are_those_of_every_run(pinned, triton_device, share_A):
    group = drawn(triton_device, share_A=share_A)
    first = step(group)
    for _ in range(TIMES):
        assert_same(step(group), first)


def test_memory_that_is_free_again_is_not_written_too_early(pinned, triton_device):
    """dz and the parts of shrink are free for others while the kernels of dB may run, and so is one member's
    part of them while the next one's runs.
    """
    group = drawn(triton_device)
    want = step(group)
    for _ in range(TIMES):
        got = step(group)
        # Overwrites what the allocator has just got back.
        for result in got:
            torch.empty_like(result).fill_(float("nan"))
        torch.empty((M, SHAPES[0][1]), dtype=torch.bfloat16, device=triton_device).fill_(float("nan"))
        assert_same(got, want)


def test_a_graph_of_autograd_is_run_twice(pinned, triton_device):
    group = drawn(triton_device)
    ys = forward(group)
    first = torch.autograd.grad(ys, leaves_of(group), group.dys, retain_graph=True)
    assert_same(torch.autograd.grad(ys, leaves_of(group), group.dys), first)


def test_a_step_is_captured_and_replayed_with_other_input(pinned, triton_device):
    """Forward and backward of autograd in one graph."""
    group, other = drawn(triton_device), drawn(triton_device, seed=1)
    captured = Captured(lambda: step(group))
    captured.replay()
    assert_same(captured.results, step(group))
    with torch.no_grad():
        group.x.copy_(other.x)
        for dy, from_dy in zip(group.dys, other.dys, strict=True):
            dy.copy_(from_dy)
        for member, from_member in zip(group.members, other.members, strict=True):
            for name in ("lora_B", "lora_A", "weight"):
                getattr(member, name).copy_(getattr(from_member, name))
    captured.replay()
    assert_same(captured.results, step(group))


@pytest.mark.parametrize("own", [True, False], ids=["own-stream", "one-stream"])
def test_threads_call_backward(pinned, triton_device, own):
    """On streams of their own; and all on one, where another thread's kernels come between a kernel and the
    one before it.
    """
    groups = [drawn(triton_device, seed) for seed in range(THREADS)]
    times = min(TIMES, 20)
    want = [train(group, times) for group in groups]

    def work(index: int) -> Sequence[Tensor]:
        with on_stream(own):
            return train(groups[index], times)

    assert_same(in_threads(THREADS, work), want)


@pytest.mark.parametrize("own", [True, False], ids=["own-stream", "one-stream"])
def test_the_allocator_does_not_grow(pinned, triton_device, own):
    """After 100 steps it holds what it holds after 10."""
    group = drawn(triton_device, dropout_p=0.25)
    with on_stream(own):
        train(group, 10 if GPU else 1)
        early = memory_held()
        train(group, 90 if GPU else 2)
        assert memory_held() == early


@pytest.mark.gpu
@pytest.mark.parametrize("share_A", [False, True], ids=["", "one-A"])
def test_the_bits_are_those_of_kernels_one_after_another(share_A):
    """Where nothing overlaps, since the device is waited for behind each launch."""
    group = drawn("cuda", share_A=share_A)
    with pin_plan(PLANS["beside"]):
        with one_by_one():
            want = step(group)
        for _ in range(TIMES):
            assert_same(step(group), want)


@contextlib.contextmanager
def one_by_one():
    """Wait for the device behind each launch of a kernel."""
    launch = pytest.importorskip("lorafa_kernels.kernels.launch").Launch
    call = launch.__call__

    def waited(self, *values):
        call(self, *values)
        torch.cuda.synchronize()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "__call__", waited)
        yield


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="the tests themselves run here")
@pytest.mark.skipif(stub_gpu.missing() is not None, reason=str(stub_gpu.missing()))
def test_as_on_a_gpu_beside_the_stub():
    """Every test of this file as it runs on sm_90: no name or argument there can be wrong unseen."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    kept["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "tests/gpu_tests_on_stub.py", "tests/group/test_group_streams_and_graphs.py"]
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=600)
    # Six tests, three of them in two kinds, for each plan, and one more in two kinds.
    assert done.returncode == 0 and f"{9 * len(PLANS) + 2} passed" in done.stdout, done.stdout + done.stderr
