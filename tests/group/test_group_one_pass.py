"""A group whose plan reads each dy once, for dz and dB, and multiplies by the library: y, dx and
every dB are within the budget of the formula with the masks of dropout.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import check_budget
from conftest import TRITON_DEVICE, on_device

from lorafa_kernels.checks.budget import draw_operands
from lorafa_kernels.group.api import lorafa_linear_group
from lorafa_kernels.group.operands import LinearOperands
from lorafa_kernels.philox import keep_mask
from lorafa_kernels.plan.config import KernelPlan
from lorafa_kernels.plan.pin import pin_plan
from lorafa_kernels.plan.recipe import OPERATIONS, Recipe

pytestmark = pytest.mark.numerics
pytest.importorskip("triton")
ONE_PASS = {name: Recipe("library", KernelPlan(one_pass=True)) for name in OPERATIONS}


@pytest.mark.parametrize("device", [on_device(TRITON_DEVICE)])
@pytest.mark.parametrize("ps", [(0.0, 0.0), (0.5, 0.25)], ids=["", "dropout"])
def test_dropout_enters_each_dz_once(device, ps):
    M, K, N, R = 34, 40, 64, 8
    layers = [draw_operands(M, K, N, R, torch.float32, device, seed=seed) for seed in range(2)]
    members = [
        LinearOperands(i.weight, i.bias, i.lora_A, i.lora_B.requires_grad_(), scaling, p)
        for i, scaling, p in zip(layers, (0.7, 1.5), ps, strict=True)
    ]
    x, dys = layers[0].x, [i.dy for i in layers]
    torch.manual_seed(1)
    seeds = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)

    def results_of(forward, to):
        leaf = x.detach().to(to).requires_grad_()
        lora_Bs = [m.lora_B.detach().to(to).requires_grad_() for m in members]
        ys = forward(leaf, lora_Bs)
        found = torch.autograd.grad(ys, (leaf, *lora_Bs), [dy.to(to) for dy in dys])
        return dict(zip(("y0", "y1", "dx", "dB0", "dB1"), (*ys, *found), strict=True))

    def by_formula(leaf, lora_Bs):
        ys = []
        for index, (m, lora_B) in enumerate(zip(members, lora_Bs, strict=True)):
            to = leaf.dtype
            keep = keep_mask(seeds[index : index + 1], m.dropout_p, M, K).to(to) / (1 - m.dropout_p)
            low_rank = F.linear(F.linear(leaf * keep, m.lora_A.to(to)), lora_B)
            ys.append(F.linear(leaf, m.weight.to(to), m.bias.to(to)) + m.scaling * low_rank)
        return ys

    def by_group(leaf, lora_Bs):
        torch.manual_seed(1)
        group = [m._replace(lora_B=lora_B) for m, lora_B in zip(members, lora_Bs, strict=True)]
        return lorafa_linear_group(leaf, group, impl="auto")

    with pin_plan(ONE_PASS):
        got = results_of(by_group, torch.float32)
    check_budget(got, results_of(by_formula, torch.float64), results_of(by_formula, torch.float32))
