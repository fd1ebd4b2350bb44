"""The plan that launches dB's kernel last, beside expand: order, numbers and, on a GPU, what runs with it."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from accuracy import Budget, assert_same

from lorafa_kernels.checks.budget import draw_operands, lorafa_results
from lorafa_kernels.linear import ops
from lorafa_kernels.plan import KernelPlan, Recipe, pin_plan
from lorafa_kernels.plan.config import KNOWN_DEVICES, KernelConfig
from lorafa_kernels.plan.defaults import OVERLAP_REGISTERS, OVERLAP_SHARED_MEMORY, beside_config
from lorafa_kernels.plan.kernels import all_configs
from lorafa_kernels.plan.make import candidates
from lorafa_kernels.plan.recipe import (
    Device,
    Problem,
    describe,
    kernel_configs,
    launches,
    recipe_from_json,
    recipe_to_json,
)

BESIDE = Recipe("fused", KernelPlan(one_pass=False, beside=True))
PINNED = {"backward": BESIDE}
HOPPER = KNOWN_DEVICES["sm_90"]
PROBLEM = Problem("backward", torch.bfloat16, 8192, 4096, 4096, 16)


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("shape", [(300, 40, 72, 8), (130, 72, 200, 130), (5, 90, 70, 3)], ids=str)
def test_accuracy(triton_device, dtype, p, shape):
    budget = Budget()
    for seed in range(1 if shape[0] > 5 else 3):
        operands = draw_operands(
            *shape, dtype, triton_device, factor_dtype=torch.float32, dropout_p=p, seed=seed
        )
        with pin_plan(PINNED):
            budget.add(operands, lorafa_results(operands, "triton"))
    budget.check()


def test_order_of_launches():
    assert launches(BESIDE, PROBLEM, HOPPER) == ("shrink", "expand", "grad", "grad_sum")
    two_passes = replace(BESIDE, kernels=replace(BESIDE.kernels, beside=False))
    assert launches(two_passes, PROBLEM, HOPPER) == ("grad", "grad_sum", "shrink", "expand")
    # For few rows dz is made within expand; nothing is left to run beside.
    few = launches(BESIDE, replace(PROBLEM, M=16), HOPPER)
    assert few == ("grad", "recompute")


@pytest.mark.parametrize("kernels", [{"one_pass": True}, {"pdl": False}, {"beside": False}])
def test_it_takes_two_passes_and_dependent_launch(kernels):
    recipe = Recipe("fused", replace(BESIDE.kernels, **kernels))
    assert launches(recipe, PROBLEM, HOPPER)[0] == "grad"
    assert kernel_configs(recipe, PROBLEM, HOPPER)["grad"] != beside_config(HOPPER, 2, 8192, 16)


@pytest.mark.parametrize("variant", ["ws", "ws_z"])
def test_specialised_warps_leave_no_room_for_it(variant):
    """A plan that names both has dB first: a launch behind them would start when they have ended."""
    expand = KernelConfig(128, 128, 64, 16, 8, 8, 3 if variant == "ws" else 2, variant, EPILOGUE_SUBTILE=2)
    both = replace(BESIDE, kernels=replace(BESIDE.kernels, expand=expand))
    assert not all_configs(both.kernels, PROBLEM, HOPPER).beside
    assert launches(both, PROBLEM, HOPPER)[:2] == ("grad", "grad_sum")
    assert kernel_configs(both, PROBLEM, HOPPER)["grad"] != beside_config(HOPPER, 2, 8192, 16)
    assert "dB beside dx" not in describe(both, "backward")


@pytest.mark.parametrize("R", [1, 16, 17, 32, 33, 64, 65, 128, 300])
def test_its_blocks_share_a_multiprocessor_with_expand(R):
    config = beside_config(HOPPER, 2, 8192, R)
    staged = config.num_stages * config.BLOCK_M * (config.BLOCK_N + config.BLOCK_R) * 2
    assert staged + 64 <= OVERLAP_SHARED_MEMORY
    # The accumulator, and as many registers for the rest.
    threads = 32 * config.num_warps
    accumulator = config.BLOCK_N * config.BLOCK_R // threads
    assert threads * 2 * max(accumulator, 32) <= OVERLAP_REGISTERS
    assert min(128, max(16, 1 << (R - 1).bit_length())) == config.BLOCK_R


def test_it_is_a_candidate_where_a_kernel_can_depend_on_the_one_before():
    def offered(arch, problem=PROBLEM):
        return BESIDE in candidates(problem, Device("some", KNOWN_DEVICES[arch], "3.7.1"))

    assert offered("sm_90") and not offered("sm_80")
    assert not offered("sm_90", replace(PROBLEM, op="backward_input"))
    group = replace(PROBLEM, widths=(2048, 2048), makers=2)
    assert offered("sm_90", group) and not offered("sm_80", group)
    assert not offered("sm_90", replace(group, op="backward_input"))


def test_files_hold_it():
    assert recipe_from_json(recipe_to_json(BESIDE, "backward")) == BESIDE
    assert "beside" not in recipe_to_json(Recipe("fused"), "backward")
    assert describe(BESIDE, "backward") == "fused, dB beside dx"
    with pytest.raises(ValueError, match="beside"):
        recipe_from_json({"name": "fused", "beside": 1})


def test_a_config_that_is_named_is_its_config():
    given = KernelConfig(32, 64, 0, 16, 1, 4, 2, "tma")
    recipe = replace(BESIDE, kernels=replace(BESIDE.kernels, grad=given))
    assert kernel_configs(recipe, PROBLEM, HOPPER)["grad"] == given


# On a GPU.


def _step(i) -> tuple[torch.Tensor, ...]:
    y, z = ops.forward(i.x, i.weight, i.lora_A, i.lora_B, i.bias, i.scaling, "triton")
    return y, *ops.backward(i.dy, z, i.weight, i.lora_A, i.lora_B, i.scaling, "triton")


def _many(seed: int = 0):
    return draw_operands(4096, 1024, 2048, 16, torch.bfloat16, "cuda", factor_dtype=torch.float32, seed=seed)


@pytest.mark.gpu
def test_its_bits_are_those_of_every_run():
    i = _many()
    with pin_plan(PINNED):
        first = _step(i)
        for _ in range(200):
            assert_same(_step(i), first)


@pytest.mark.gpu
def test_memory_that_is_free_again_is_not_written_too_early():
    """dz and the parts of shrink are free for others while dB's kernel runs."""
    i = _many()
    with pin_plan(PINNED):
        want = _step(i)
        for _ in range(50):
            got = _step(i)
            # Overwrites what the allocator has just got back.
            torch.empty(4096, 16, dtype=torch.bfloat16, device="cuda").fill_(float("nan"))
            assert_same(got, want)


@pytest.mark.gpu
def test_a_graph_captures_it():
    i = _many()
    with pin_plan(PINNED):
        _step(i)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _step(i)
        i.x.normal_()
        i.dy.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, _step(i))


@pytest.mark.gpu
def test_a_graph_of_autograd_is_run_twice():
    i = _many()
    x, lora_B = i.x.clone().requires_grad_(), i.lora_B.clone().requires_grad_()
    with pin_plan(PINNED):
        how = i.scaling, "triton", 0.0, None
        y = ops.LoRAFALinearFunction.apply(x, i.weight, i.lora_A, lora_B, i.bias, how)
        first = torch.autograd.grad(y, (x, lora_B), i.dy, retain_graph=True)
        assert_same(torch.autograd.grad(y, (x, lora_B), i.dy), first)


@pytest.mark.gpu
def test_threads_run_it_on_streams_of_their_own():
    """And on one stream, where another thread's kernels come between a kernel and the one before it."""
    inputs = [_many(seed) for seed in range(4)]
    with pin_plan(PINNED):
        want = [_step(i) for i in inputs]
        torch.cuda.synchronize()
        found: dict[tuple[int, bool], list] = {}

        def work(index: int, own: bool) -> None:
            stream = torch.cuda.Stream() if own else torch.cuda.current_stream()
            with torch.cuda.stream(stream):
                found[index, own] = [_step(inputs[index]) for _ in range(20)]
            stream.synchronize()

        for own in (True, False):
            threads = [threading.Thread(target=work, args=(index, own)) for index in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert len(found) == 8
    for (index, _), results in found.items():
        for got in results:
            assert_same(got, want[index])
