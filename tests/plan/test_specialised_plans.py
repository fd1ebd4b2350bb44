"""Plans that name an expand with specialised warps: where one runs, where it says why not, and that no
heuristic makes one.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafa_kernels.nn.explain import explain
from lorafa_kernels.plan.config import (
    KNOWN_DEVICES,
    OPS,
    WS_SIZES,
    KernelPlan,
    shared_memory,
    wrong_field,
)
from lorafa_kernels.plan.cost import ceilings, predict
from lorafa_kernels.plan.defaults import all_default_configs
from lorafa_kernels.plan.kernels import all_configs
from lorafa_kernels.plan.make import candidates, make_plan
from lorafa_kernels.plan.pin import make_pin, pin_plan
from lorafa_kernels.plan.recipe import (
    OPERATIONS,
    Device,
    Problem,
    Recipe,
    describe,
    launches,
    obstacle,
    recipe_from_json,
    recipe_to_json,
)
from lorafa_kernels.plan.specialised import MOST_RANK, ws_configs

HOPPER = KNOWN_DEVICES["sm_90"]
H200 = Device("NVIDIA H200", HOPPER, "3.7.1")
FORWARD, BACKWARD = (Problem(op, torch.bfloat16, 8192, 4096, 4096, 16) for op in ("forward", "backward"))
WS, WS_Z = (ws_configs(HOPPER, 2, 16, variant)[0] for variant in ("ws", "ws_z"))
RECIPE = Recipe("fused", KernelPlan(expand=WS))
RECIPE_Z = Recipe("fused", KernelPlan(expand=WS_Z, one_pass=False))


@pytest.mark.parametrize("arch", KNOWN_DEVICES)
def test_no_heuristic_picks_one(arch):
    limits = KNOWN_DEVICES[arch]
    for op in OPS:
        for size in (2, 4):
            for dropout in (False, True):
                configs = all_default_configs(op, limits, size, dropout)
                assert not [config for config in configs if config.variant in ("ws", "ws_z")]
    for problem in (FORWARD, BACKWARD):
        device = Device("?", limits, "3.7.1")
        assert "ws" not in str([*candidates(problem, device), make_plan(problem, device).kernels])


@given(
    st.integers(1, 300),
    st.integers(90, 228),
    st.sampled_from(sorted(KNOWN_DEVICES)),
    st.sampled_from(("ws", "ws_z")),
)
def test_blocks_to_try_fit_the_device_and_the_rank(R, kilobytes, arch, variant):
    limits = replace(KNOWN_DEVICES[arch], shared_memory=kilobytes * 1024)
    found = ws_configs(limits, 2, R, variant)
    if R > MOST_RANK or arch != "sm_90":
        assert found == ()
    for config in found:
        assert wrong_field("expand", config) is None
        assert config.BLOCK_R >= R and config.BLOCK_R in (16, 32, 64, 128)
        assert shared_memory("expand", config, 2, limits) <= limits.shared_memory
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("R", [1, 16, 17, 64, 65, 128])
def test_an_h100_has_three_to_try_at_every_rank(R):
    found = ws_configs(HOPPER, 2, R)
    assert len(found) == 3 and found[0].BLOCK_M * found[0].BLOCK_N == 128 * 256
    assert len(ws_configs(HOPPER, 2, R, "ws_z")) == (3 if R <= 16 else 2 if R <= 32 else 1)
    assert ws_configs(HOPPER, 4, R) == ()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        *[({name: 2 * sizes[-1]}, name) for name, sizes in WS_SIZES.items()],
        ({"BLOCK_M": 64}, "BLOCK_M"),
        ({"BLOCK_N": 32}, "BLOCK_N"),
        ({"BLOCK_M": 256}, "BLOCK_N"),
        ({"BLOCK_K": 16}, "BLOCK_K"),
        ({"num_warps": 4}, "num_warps"),
        ({"num_stages": 1}, "num_stages"),
        ({"EPILOGUE_SUBTILE": 8}, "EPILOGUE_SUBTILE"),
        ({"EPILOGUE_SUBTILE": 3}, "EPILOGUE_SUBTILE"),
    ],
    ids=str,
)
def test_sizes_that_it_is_not_written_for(changes, field):
    assert wrong_field("expand", WS) is None
    config = replace(WS, **changes)
    assert wrong_field("expand", config) == field
    with pytest.raises(ValueError, match=f"configuration of expand has {field}="):
        make_pin({"forward": Recipe("fused", KernelPlan(expand=config))})


def test_sums_of_z_count_beside_those_of_the_tile():
    assert wrong_field("expand", WS_Z) is None
    assert wrong_field("expand", replace(WS, BLOCK_R=64)) is None
    assert wrong_field("expand", replace(WS_Z, BLOCK_R=64)) == "BLOCK_N"


@pytest.mark.parametrize("op", ["shrink", "grad"])
@pytest.mark.parametrize("config", [WS, WS_Z], ids=["ws", "ws_z"])
def test_other_kernels_have_no_such_variant(op, config):
    assert wrong_field(op, config) == "variant"


@pytest.mark.parametrize(
    ("limits", "problem", "triton", "said"),
    [
        pytest.param(HOPPER, FORWARD, "3.7.1", None, id="forward"),
        pytest.param(HOPPER, BACKWARD, "3.6.0", None, id="backward"),
        pytest.param(HOPPER, FORWARD, None, None, id="version-unknown"),
        pytest.param(HOPPER, replace(FORWARD, dropout=True), "3.7.1", None, id="dropout-of-x"),
        pytest.param(HOPPER, replace(BACKWARD, dropout=True), "3.7.1", "makes no mask", id="dropout-of-dx"),
        pytest.param(HOPPER, replace(FORWARD, R=17), "3.7.1", "BLOCK_R = 16 for R = 17", id="rank"),
        pytest.param(HOPPER, replace(FORWARD, dtype=torch.float32), "3.7.1", "16-bit operands", id="fp32"),
        pytest.param(HOPPER, FORWARD, "3.8.0", "not 3.8.0", id="version"),
        pytest.param(KNOWN_DEVICES["sm_100"], FORWARD, "3.7.1", "not of sm_100", id="sm_100"),
        pytest.param(KNOWN_DEVICES["sm_80"], FORWARD, "3.7.1", "not of sm_80", id="sm_80"),
        pytest.param(
            replace(HOPPER, shared_memory=100 * 1024), FORWARD, "3.7.1", "shared memory", id="memory"
        ),
    ],
)
def test_what_keeps_it_from_running(limits, problem, triton, said):
    for recipe in (RECIPE,) if problem.dropout else (RECIPE, RECIPE_Z):
        found = obstacle(recipe, problem, limits, triton)
        assert found is None if said is None else said in found


@pytest.mark.parametrize("problem", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_one_that_makes_z_makes_no_mask_either(problem):
    assert "makes no mask" in obstacle(RECIPE_Z, replace(problem, dropout=True), HOPPER)


@pytest.mark.parametrize("arch, triton", [("sm_80", "3.7.1"), ("sm_90", "3.9.0")])
def test_a_pin_that_cannot_run_says_so(fake_gpu, monkeypatch, arch, triton):
    import triton as installed

    monkeypatch.setattr(installed, "__version__", triton)
    fake_gpu(KNOWN_DEVICES[arch], "Some GPU", (9, 0))
    with (
        pin_plan({"forward": RECIPE}),
        pytest.raises(RuntimeError, match="cannot run on Some GPU: expand in its variant 'ws' "),
    ):
        explain((8192, 4096, 4096, 16))


def test_a_pin_that_runs_is_explained(fake_gpu, monkeypatch):
    import triton as installed

    monkeypatch.setattr(installed, "__version__", "3.7.1")
    fake_gpu(HOPPER, "NVIDIA H200", (9, 0))
    with pin_plan({"forward": RECIPE}):
        told = explain((8192, 4096, 4096, 16))
    assert told.plans["forward"].configs["expand"] == WS
    assert describe(RECIPE, "forward") == "fused, specialised warps, PDL"
    assert launches(RECIPE, FORWARD, HOPPER) == ("shrink", "expand")
    assert describe(RECIPE_Z, "forward") == "fused, specialised warps, one launch for z and y"
    assert launches(RECIPE_Z, FORWARD, HOPPER) == ("recompute",)
    assert launches(RECIPE_Z, BACKWARD, HOPPER) == ("grad", "grad_sum", "recompute")


def test_a_file_can_name_one():
    for op in OPERATIONS:
        written = json.loads(json.dumps(recipe_to_json(RECIPE, op)))
        expand = recipe_from_json(written).kernels.expand
        assert expand == (None if op == "backward_lora_B" else WS)


def test_its_time_is_predicted_like_that_of_tma_with_less_overlap():
    reached = ceilings("NVIDIA H200", HOPPER)
    tma = Recipe("fused", KernelPlan(expand=replace(WS, variant="tma")))
    for problem in (FORWARD, BACKWARD):
        times = [predict(recipe, problem, HOPPER, reached).device_us for recipe in (tma, RECIPE)]
        assert times[0] < times[1] < 1.2 * times[0]
        alone = [
            predict(replace(recipe, kernels=replace(recipe.kernels, pdl=False)), problem, HOPPER, reached)
            for recipe in (tma, RECIPE)
        ]
        assert alone[0] == alone[1]
        assert 0 < predict(RECIPE_Z, problem, HOPPER, reached).device_us < 2 * times[0]


def test_a_group_adds_up_dx_with_its_own_kernel():
    """The kernel of several members has no such variant."""
    problem = replace(BACKWARD, widths=(2048, 1024, 1024), makers=3)
    default = all_configs(KernelPlan(), problem, HOPPER)
    found = all_configs(RECIPE.kernels, problem, HOPPER)
    assert found.expand == found.expand_after == WS and not found.recomputes
    assert found.group.expand_total == default.group.expand_total
    found = all_configs(RECIPE_Z.kernels, problem, HOPPER)
    assert found.recomputes and found.expand_after == default.expand_after
    assert found.group.expand_total == default.group.expand_total
