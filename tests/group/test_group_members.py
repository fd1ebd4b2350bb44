"""Any number of layers may share an input: dx of one to four comes from the Hopper kernel, of more from the
portable one, and both are right.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy import Budget

from lorafa_kernels.plan.config import KernelConfig

pytestmark = pytest.mark.numerics

TMA = KernelConfig(64, 64, 64, 32, 2, 4, 2, "tma", EPILOGUE_SUBTILE=2)


@pytest.mark.parametrize("adapters", ["all", "first", "none"])
@pytest.mark.parametrize("members", [1, 2, 3, 4, 5])
def test_dx_of_members(triton_device, monkeypatch, members, adapters):
    if triton_device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the TMA kernel is for sm_90")
    group = pytest.importorskip("lorafa_kernels.kernels.group")
    forget_launches = pytest.importorskip("lorafa_kernels.kernels.launch").forget_launches
    hopper = []
    make = group.total_tma_launch
    forget_launches()
    monkeypatch.setattr(group, "total_tma_launch", lambda *args: hopper.append(1) or make(*args))
    draw = lambda *shape: torch.randn(shape, device=triton_device).to(torch.float16)  # noqa: E731
    ranks = {"all": range(8, 8 * members + 1, 8), "first": (8,), "none": ()}[adapters]
    dys = [draw(70, 24 + 8 * i) for i in range(members)]
    weights = [draw(dy.shape[1], 72) for dy in dys]
    dzs = [draw(70, R) for R in ranks]
    factors = [draw(R, 72) for R in ranks]

    got = {
        "dx": group.expand_total(
            dys, weights, dzs, factors, config=TMA, unaligned=replace(TMA, variant="portable")
        )
    }

    def formula(to):
        pairs = zip((*dys, *dzs), (*weights, *factors), strict=True)
        return {"dx": sum(left.to(to) @ right.to(to) for left, right in pairs)}

    budget = Budget()
    budget.compare(got, formula(torch.float64), formula(torch.float16))
    budget.check()
    assert len(hopper) == (members <= 4)
