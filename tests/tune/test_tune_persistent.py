"""tune refuses an expand by TMA that is right where it is timed, and wrong in what else its entry serves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_plans import PLANS

from lorafa_kernels.plan import choice
from lorafa_kernels.plan.config import INTERPRETER
from lorafa_kernels.plan.recipe import Device, Problem, Recipe
from lorafa_kernels.tune.check import Check

expand = pytest.importorskip("lorafa_kernels.kernels.expand")
FORWARD = Problem("forward", torch.bfloat16, 160, 64, 64, 8)
RECIPE = Recipe("fused", PLANS["tma"])


@pytest.fixture
def check(monkeypatch, triton_device):
    """A function: what a check says of a recipe whose kernel's result spoil(C, bias, Q) damages."""
    if triton_device != "cpu":
        pytest.skip("a GPU's kernel is compiled, and walks other tiles")
    make = expand.expand_tma_launch

    def run(spoil, problem=FORWARD):
        def spoiled(P, Q, L, F, bias, C, *rest):
            launch = make(P, Q, L, F, bias, C, *rest)

            def launch_and_spoil(*values):
                launch(*values)
                _, Q, _, _, bias, C, *_ = values
                spoil(C, bias, Q)

            return launch_and_spoil

        monkeypatch.setattr(expand, "expand_tma_launch", spoiled)
        device = torch.device("cpu")
        choice.forget_plans()
        return Check(problem, device, Device("interpreter", INTERPRETER, None))(RECIPE)

    yield run
    choice.forget_plans()


def test_a_right_one_passes(check):
    assert check(lambda C, bias, Q: None) is None


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        pytest.param(lambda C, bias, Q: C.mul_(1.05), "", id="always"),
        pytest.param(lambda C, bias, Q: bias is not None and C.sub_(bias), " a bias", id="forgets-bias"),
        pytest.param(lambda C, bias, Q: bias is None and C.mul_(1.05), " no bias", id="without-bias"),
        pytest.param(
            lambda C, bias, Q: Q.stride(1) == 1 and C.mul_(1.05), "stored by columns", id="by-columns"
        ),
        pytest.param(lambda C, bias, Q: C.shape[0] % 16 and C.mul_(1.05), "rows", id="odd-rows"),
    ],
)
def test_a_wrong_one_is_refused(check, spoil, said, biased):
    why = check(spoil, replace(FORWARD, bias=biased))
    assert why.startswith("y has a relative error of") and said in why
