"""The model of the cost gives the estimates that the designs were judged by, and is sensible elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafa_kernels.plan import cost
from lorafa_kernels.plan.config import INTERPRETER, KNOWN_DEVICES, DeviceLimits, KernelConfig, KernelPlan
from lorafa_kernels.plan.cost import (
    DESCRIPTOR_LAUNCH_US,
    DRIVER_US,
    GAP_US,
    LIBRARY_CALL_US,
    MAIN_LOOP_SHARE,
    OPERATOR_US,
    PHILOX_INSTRUCTIONS,
    TRITON_LAUNCH_US,
    Ceilings,
    ceilings,
    frozen,
    main_loop_share,
    predict,
    predict_step,
)
from lorafa_kernels.plan.make import candidates, make_plan
from lorafa_kernels.plan.recipe import OPERATIONS, Device, Problem, Recipe, heuristic_config, kernel_configs

HOPPER = KNOWN_DEVICES["sm_90"]
H200 = Device("NVIDIA H200", HOPPER, "3.6.0")
CEILINGS = ceilings(H200.name, HOPPER)


def recipe(name: str, R: int, **options) -> Recipe:
    """The configurations that the estimates assume."""
    rank = max(16, R)
    configs = {
        "shrink": KernelConfig(64, 0, 64, rank, 1, 4, 3),
        "expand": KernelConfig(128, 256, 64, rank, 8, 8, 3, variant="tma"),
        "grad": KernelConfig(64, 256, 0, rank, 1, 4, 4),
    }
    return Recipe(name, KernelPlan(**configs, **options))


# Extra microseconds over the plain product on an H200 at M = 8192, K = 4096, for (N, R) = (4096, 16),
# (14336, 16), (14336, 64): the estimated ranges, with a main loop as fast as the library's. Of the designs
# with programmatic dependent launch those are listed that exist: expand overlaps the kernel before it.
SIZES = ((4096, 16), (14336, 16), (14336, 64))
ESTIMATES = [
    ("forward", "fused", {"pdl": False}, ((19, 25), (22, 29), (37, 43))),
    ("forward", "fused", {"pdl": True}, ((4, 13), (7, 17), (21, 31))),
    ("forward", "library", {}, ((38, 57), (86, 135), (86, 135))),
    ("backward", "library", {"one_pass": False}, ((67, 90), (146, 194), (148, 197))),
    ("backward", "fused", {"one_pass": False, "pdl": False}, ((36, 48), (114, 152), (120, 159))),
    ("backward", "fused", {"one_pass": True, "pdl": False}, ((24, 32), (68, 91), (100, 132))),
    ("backward", "library", {"one_pass": True}, ((40, 55), (75, 95), (110, 135))),
]
CASES = [
    pytest.param(
        op, name, options, *size, *span, id=f"{op}-{name}-{'-'.join(map(str, (*options.values(), *size)))}"
    )
    for op, name, options, spans in ESTIMATES
    for size, span in zip(SIZES, spans, strict=True)
]


@pytest.mark.parametrize(("op", "name", "options", "N", "R", "least", "most"), CASES)
def test_estimates_of_the_designs(op, name, options, N, R, least, most):
    problem = Problem(op, torch.bfloat16, 8192, N, 4096, R)
    cost = predict(recipe(name, R, **options), problem, HOPPER, CEILINGS, main_loop={"tma": 1.0})
    extra = cost.device_us - frozen(problem, HOPPER, CEILINGS).device_us
    assert least <= extra <= most


def test_ceilings_of_the_reference_gpu_are_those_measured_there():
    assert CEILINGS.half_tflops == pytest.approx(790, rel=0.01)
    assert CEILINGS.copy_tbs == pytest.approx(4.3, rel=0.01)
    product = frozen(Problem("forward", torch.bfloat16, 8192, 4096, 4096, 16), HOPPER, CEILINGS)
    assert product.device_us == pytest.approx(348, rel=0.01)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("Unheard-of 9000", None),
    ],
)
def test_published_figures_are_found_by_whole_names(name, source):
    found = ceilings(name, HOPPER)
    expected = f"published figures of {source}" if source else "guessed from 132 multiprocessors of sm_90"
    assert found.source == expected


def test_a_guess_is_near_the_published_figures_of_a_relative():
    for arch, name in (
        ("sm_80", "A100-SXM4-80GB"),
        ("sm_90", "H100"),
        ("sm_100", "B200"),
        ("sm_89", "RTX 4090"),
    ):
        guess, known = (ceilings(n, KNOWN_DEVICES[arch]) for n in ("?", name))
        assert guess.half_tflops == pytest.approx(known.half_tflops, rel=0.05)
        assert guess.copy_tbs == pytest.approx(known.copy_tbs, rel=0.05)


def test_the_interpreter_has_no_ceilings():
    assert ceilings("anything", INTERPRETER) is None


sizes = st.one_of(st.integers(0, 300), st.integers(1, 1 << 20))
problems = st.builds(
    Problem,
    st.sampled_from(OPERATIONS),
    st.sampled_from((torch.float32, torch.bfloat16)),
    st.integers(1, 1 << 20),
    sizes,
    sizes,
    st.integers(1, 300),
)
devices = st.sampled_from([*KNOWN_DEVICES.values(), DeviceLimits("sm_990", 40 * 1024, 7)])


@given(problems, devices)
def test_every_candidate_has_a_cost_that_grows_with_the_rows(problem, limits):
    device = Device("?", limits, "3.6.0")
    reached = ceilings(device.name, limits)
    for found in candidates(problem, device):
        cost = predict(found, problem, limits, reached)
        assert 0 < cost.device_us < float("inf") and 0 < cost.host_us < 1000
        # More rows fill more of a GPU with the blocks of the grad kernel.
        if found.name == "library" and not kernel_configs(found, problem, limits):
            more = predict(found, replace(problem, M=4 * problem.M), limits, reached)
            assert more.device_us >= cost.device_us


def test_faster_memory_makes_the_rank_r_part_cheaper_and_dropout_makes_it_dearer():
    problem = Problem("forward", torch.bfloat16, 8192, 4096, 4096, 16)
    fused = recipe("fused", 16)
    faster = Ceilings(CEILINGS.half_tflops, CEILINGS.fp32_tflops, 2 * CEILINGS.copy_tbs, "")
    base = predict(fused, problem, HOPPER, CEILINGS).device_us
    assert predict(fused, problem, HOPPER, faster).device_us < base
    assert predict(fused, replace(problem, dropout=True), HOPPER, CEILINGS).device_us > base


@pytest.mark.parametrize("op", ["forward", "backward", "backward_input"])
@pytest.mark.parametrize("M", [1, 128, 8192])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_with_dropout_the_kernels_are_predicted_to_win(arch, M, op):
    """The library's plan makes the mask by a hundred passes over 64-bit numbers, a kernel in registers."""
    device = Device("?", KNOWN_DEVICES[arch], "3.6.0")
    problem = Problem(op, torch.bfloat16, M, 4096, 4096, 16, dropout=True)
    plan = make_plan(problem, device)
    assert plan.name == "fused"
    library = min(us for name, us in plan.predicted if name.startswith("library"))
    assert library > 2 * plan.predicted_us


def test_a_mask_made_again_in_every_column_of_blocks_costs_more():
    """In forward the one launch for z and y repeats keep; in backward it does not."""
    few = Problem("forward", torch.bfloat16, 128, 14336, 4096, 16, dropout=True)
    for op, repeats in (("forward", True), ("backward_input", False)):
        problem = replace(few, op=op)
        expand = heuristic_config("expand", problem, HOPPER)
        assert expand.variant == "recompute"
        recipe = Recipe("fused", KernelPlan(expand=expand, one_pass=False, pdl=False))
        plain = replace(problem, dropout=False)
        extra = [predict(recipe, one, HOPPER, CEILINGS).device_us for one in (problem, plain)]
        once = 2 * PHILOX_INSTRUCTIONS * problem.M * problem.K / CEILINGS.flops_per_us(4)
        blocks = -(-problem.out_width // expand.BLOCK_N) if repeats else 1
        assert extra[0] - extra[1] == pytest.approx(blocks * once)


def test_few_rows_cost_what_their_launches_cost():
    problem = Problem("forward", torch.bfloat16, 1, 2048, 2048, 16)
    costs = {name: predict(Recipe(name), problem, HOPPER, CEILINGS) for name in ("fused", "library")}
    assert all(cost.us == cost.host_us for cost in costs.values())
    assert costs["fused"].host_us == OPERATOR_US + TRITON_LAUNCH_US + DRIVER_US
    # The fourth rounds an fp32 lora_B.
    assert costs["library"].host_us == OPERATOR_US + 4 * LIBRARY_CALL_US


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("widths", [(), (4096, 4096)])
@pytest.mark.parametrize("name", ["fused", "library"])
def test_lora_B_is_rounded_by_a_launch_of_its_own(monkeypatch, name, widths, dtype):
    """Where a kernel of two passes, or the library, reads the layers' fp32 lora_B beside 16-bit rows: grad,
    which makes dz in one pass, and shrink of forward round it themselves.
    """
    problem = Problem("backward", dtype, 8192, 8192, 4096, 16, widths=widths, makers=len(widths))
    gap, call = cost.GAP_US, cost.LIBRARY_CALL_US

    def shown(op: str, one_pass: bool) -> tuple[float, float]:
        recipe = Recipe(name, KernelPlan(one_pass=one_pass))
        with_it = predict(recipe, replace(problem, op=op), HOPPER, CEILINGS)
        with monkeypatch.context() as context:
            context.setattr(cost._Model, "rounding", lambda self: cost.Cost(0.0, 0.0))
            without = predict(recipe, replace(problem, op=op), HOPPER, CEILINGS)
        return round(with_it.device_us - without.device_us, 6), round(with_it.host_us - without.host_us, 6)

    times = max(1, len(widths)) if dtype == torch.bfloat16 else 0
    each = times * gap, times * call
    assert shown("backward", one_pass=True) == (0, 0)
    assert shown("backward", one_pass=False) == shown("backward_input", one_pass=False) == each
    assert shown("forward", one_pass=False) == ((0, 0) if name == "fused" else each)
    assert shown("backward_lora_B", one_pass=False) == (0, 0)


@pytest.mark.parametrize(
    ("op", "by_pointers", "by_descriptors"),
    [("forward", 1, 1), ("backward", 1, 2), ("backward_lora_B", 1, 1)],
)
def test_launches_with_descriptors_are_counted_as_such(op, by_pointers, by_descriptors):
    """shrink and the sum of grad's parts take pointers, expand and grad on Hopper descriptors."""
    problem = Problem(op, torch.bfloat16, 8192, 4096, 4096, 16)
    host = OPERATOR_US + DRIVER_US * (by_pointers + by_descriptors)
    host += TRITON_LAUNCH_US * by_pointers + DESCRIPTOR_LAUNCH_US * by_descriptors
    found = predict(Recipe("fused"), problem, HOPPER, CEILINGS).host_us
    assert round(found, 6) == round(host, 6)
    ampere = KNOWN_DEVICES["sm_80"]
    pointers = (TRITON_LAUNCH_US + DRIVER_US) * (by_pointers + by_descriptors)
    reached = ceilings("NVIDIA A100-SXM4-80GB", ampere)
    assert predict(Recipe("fused"), problem, ampere, reached).host_us == OPERATOR_US + pointers


H100 = Device("NVIDIA H100 80GB HBM3", HOPPER, "3.7.1")


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize(
    ("M", "name"), [pytest.param(256, "library", id="some-rows"), pytest.param(8192, "fused", id="many-rows")]
)
def test_fewer_launches_win_with_some_rows_and_no_pass_over_the_output_with_many(M, name, op):
    plan = make_plan(Problem(op, torch.bfloat16, M, 4096, 4096, 16), H100)
    assert plan.name == name


def test_with_one_row_one_launch_costs_no_more_than_the_products():
    plan = make_plan(Problem("forward", torch.bfloat16, 1, 4096, 4096, 16), H100)
    times = dict(plan.predicted)
    one_launch, products = times["fused, one launch for z and y"], times["library"]
    assert 0.8 < one_launch / products < 1
    assert times["fused, PDL"] > 1.5 * plan.predicted_us


def test_a_shrink_of_few_blocks_draws_its_blocks_part_of_the_copy_rate():
    """32 blocks on 132 multiprocessors: the pass takes four times what the bytes alone would."""
    problem = Problem("forward", torch.bfloat16, 2048, 4096, 4096, 16)
    serial = recipe("fused", 16, pdl=False)
    cost = predict(serial, problem, HOPPER, CEILINGS, main_loop={"tma": 1.0})
    pass_us = cost.device_us - frozen(problem, HOPPER, CEILINGS).device_us - GAP_US
    bytes_us = 2 * problem.M * problem.K / CEILINGS.bytes_per_us
    assert pass_us >= 132 / 32 * bytes_us
    # It waits rather than works: beside expand nearly all of it is hidden.
    overlapped = predict(recipe("fused", 16, pdl=True), problem, HOPPER, CEILINGS, main_loop={"tma": 1.0})
    assert overlapped.device_us - frozen(problem, HOPPER, CEILINGS).device_us < pass_us / 4


# The measured rate of expand


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_a_slower_main_loop_takes_longer_and_the_library_s_plan_does_not_change(op):
    problem = Problem(op, torch.bfloat16, 8192, 4096, 4096, 16)
    fused = [
        predict(Recipe("fused"), problem, HOPPER, CEILINGS, {"tma": share}).device_us
        for share in (0.7, 0.97, 1.05)
    ]
    assert fused == sorted(fused, reverse=True) and fused[0] > 1.3 * fused[1]
    library = {predict(Recipe("library"), problem, HOPPER, CEILINGS, s).us for s in ({"tma": 0.7}, {})}
    assert len(library) == 1


def test_a_measured_share_is_for_its_variant_and_for_16_bits():
    def found(variant: str, itemsize: int) -> float:
        return main_loop_share(variant, itemsize, KNOWN_DEVICES["sm_80"], {"portable": 0.7})

    assert found("portable", 2) == 0.7
    assert found("portable", 4) == MAIN_LOOP_SHARE["portable"]
    assert found("recompute", 2) == MAIN_LOOP_SHARE["recompute"]


def test_a_step_is_its_parts():
    recipes = {"forward": recipe("fused", 16), "backward": recipe("fused", 16)}
    found = predict_step(recipes, Problem("forward", torch.bfloat16, 8192, 4096, 4096, 16), HOPPER, CEILINGS)
    for op in recipes:
        problem = Problem(op, torch.bfloat16, 8192, 4096, 4096, 16)
        assert found[f"{op}_us"] == predict(recipes[op], problem, HOPPER, CEILINGS).us
        assert found[f"frozen_{op}_us"] == frozen(problem, HOPPER, CEILINGS).us
    both = found["forward_us"] + found["backward_us"]
    assert found["overhead"] == both / (found["frozen_forward_us"] + found["frozen_backward_us"]) - 1
