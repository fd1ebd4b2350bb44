"""What a plan holds of configurations: one for every kernel that an operation may launch."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from lorafa_kernels.plan.config import INTERPRETER, KNOWN_DEVICES, KernelConfig, KernelPlan
from lorafa_kernels.plan.defaults import (
    default_config,
    expand_total_config,
    shrink_group_config,
    shrink_total_config,
)
from lorafa_kernels.plan.kernels import all_configs
from lorafa_kernels.plan.make import candidates, make_plan
from lorafa_kernels.plan.recipe import OPERATIONS, Device, Problem, kernel_configs

LIMITS = {**KNOWN_DEVICES, "interpreter": INTERPRETER}
HOPPER = KNOWN_DEVICES["sm_90"]
MANY = Problem("backward", torch.bfloat16, 8192, 4096, 4096, 16)
FEW = replace(MANY, M=64)
GROUP = replace(MANY, N=12288, widths=(4096, 4096, 4096), makers=3)
GIVEN = KernelConfig(64, 64, 64, 32, 1, 4, 2)


@pytest.mark.parametrize("arch", LIMITS)
@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
def test_every_kernel_has_the_configuration_that_its_recipe_gives_it(arch, op, dropout):
    """Of every recipe that can be picked."""
    for problem in (MANY, FEW, replace(MANY, dtype=torch.float32, M=300), replace(FEW, N=4099)):
        problem = replace(problem, op=op, dropout=dropout)
        for recipe in candidates(problem, Device("some", LIMITS[arch], "3.7.1")):
            found = all_configs(recipe.kernels, problem, LIMITS[arch])
            for kernel, config in kernel_configs(recipe, problem, LIMITS[arch]).items():
                assert getattr(found, kernel) == config
            assert (found.one_pass, found.pdl) == (recipe.kernels.one_pass, recipe.kernels.pdl)
            assert all(getattr(found, one.name) is not None for one in fields(found) if one.name != "group")
            assert found.expand_after.variant != "recompute" != found.expand_unaligned.variant
            assert found.expand_unaligned.variant == "portable"


def test_a_plan_is_made_with_them():
    for problem in (MANY, GROUP):
        plan = make_plan(problem, Device("NVIDIA H200", HOPPER, "3.7.1"))
        assert plan.kernels == all_configs(plan.recipe.kernels, problem, HOPPER)


def test_what_a_recipe_names_is_taken():
    found = all_configs(KernelPlan(shrink=GIVEN, expand=GIVEN, grad=GIVEN, pdl=False), MANY, HOPPER)
    assert found.shrink == found.expand == found.expand_after == found.grad == GIVEN
    assert not found.pdl


def test_expand_that_makes_no_z_itself_where_the_recipe_s_does():
    found = all_configs(KernelPlan(), FEW, HOPPER)
    assert found.recomputes and found.expand_after == default_config(
        "expand", HOPPER, 2, 64, 16, recompute=False
    )


@pytest.mark.parametrize("arch", LIMITS)
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
def test_kernels_of_a_group_have_their_own(arch, dropout):
    limits, problem = LIMITS[arch], replace(GROUP, dropout=dropout)
    group = all_configs(KernelPlan(), problem, limits).group
    assert (group.shrink, group.members) == shrink_group_config(limits, 2, 8192, 16, 3, dropout)
    assert group.shrink_total == shrink_total_config(limits, 2, 8192, 16)
    assert group.expand_total == expand_total_config(limits, 2, 8192, 16, True, dropout)
    assert group.expand_unaligned == expand_total_config(limits, 2, 8192, 16, False, dropout)
    given = all_configs(KernelPlan(expand=GIVEN), problem, limits).group
    assert given.expand_total == (group.expand_total if dropout else GIVEN)
    # The heuristics' own, named by a recipe for few rows, is nobody's choice.
    after = all_configs(KernelPlan(), problem, limits).expand_after
    assert all_configs(KernelPlan(expand=after), problem, limits).group == group
    assert all_configs(KernelPlan(), replace(problem, widths=()), limits).group is None


def test_a_group_is_aligned_if_every_member_is():
    assert GROUP.aligned
    assert not replace(GROUP, N=8192, widths=(4099, 4093)).aligned
