"""Promise: an fp32 low-rank factor beside 16-bit x is rounded once, to nearest even, before the product with
it: expand takes it in the dtype of x.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy import assert_same
from conftest import TRITON_DEVICE
from kernel_plans import SPLIT, configs
from torch import Tensor

from lorafa_kernels.checks.budget import draw_operands

pytest.importorskip("triton")
pytestmark = pytest.mark.numerics
linear = pytest.importorskip("lorafa_kernels.linear.fused")
group = pytest.importorskip("lorafa_kernels.group.fused")
shrink = linear.shrink

half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
M, K, N = 70, 96, 200


def fp32(rows: int, columns: int) -> Tensor:
    """Numbers of all magnitudes, ties, and what is not finite."""
    drawn = torch.Generator().manual_seed(5)
    values = torch.randn((rows, columns), generator=drawn) * 10 ** torch.randn(
        (rows, columns), generator=drawn
    )
    values.view(-1)[:5] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, torch.nan, torch.inf, -torch.inf])
    return values.to(TRITON_DEVICE)


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "rows apart": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
}


@half
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("R", [1, 9, 64, 130])
@pytest.mark.parametrize("parts", [1, 3])
def test_shrink_copies_beside_its_product(dtype, layout, R, parts):
    x = torch.randn(M, K, device=TRITON_DEVICE).to(dtype)
    factor = torch.randn(K, 16, device=TRITON_DEVICE).to(dtype)
    source = LAYOUTS[layout](fp32(N, R))
    target = torch.full((N, R), 7.0, dtype=dtype, device=TRITON_DEVICE)
    config = replace(SPLIT, SPLIT_K=parts)
    z = shrink(x, factor, 2.0, config=config, copy=(source, target))
    assert_same(target, source.to(dtype), equal_nan=True)
    assert torch.equal(z, shrink(x, factor, 2.0, config=config)), "the product is the same without a copy"


@pytest.mark.parametrize(("rows", "columns"), [(0, K), (M, 0)], ids=["no rows", "no columns"])
def test_shrink_copies_where_there_is_no_product(rows, columns):
    x, factor = (
        torch.ones(shape, dtype=torch.bfloat16, device=TRITON_DEVICE)
        for shape in ((rows, columns), (columns, 4))
    )
    source, target = fp32(N, 9), torch.zeros((N, 9), dtype=torch.bfloat16, device=TRITON_DEVICE)
    shrink(x, factor, 2.0, config=SPLIT, copy=(source, target))
    assert_same(target, source.bfloat16(), equal_nan=True)


@pytest.fixture
def factors_of_expand(monkeypatch) -> list[Tensor]:
    """The F of every call of expand by a layer or a group."""
    taken = []
    for module in (linear, group):

        def recording(P, Q, L, F, *rest, expand=module.expand, **named):
            taken.append(F)
            return expand(P, Q, L, F, *rest, **named)

        monkeypatch.setattr(module, "expand", recording)
    return taken


@half
@pytest.mark.parametrize("one_pass", [True, False])
def test_a_layer_hands_expand_rounded_factors(dtype, one_pass, factors_of_expand):
    ops = draw_operands(M, K, N, 24, dtype, TRITON_DEVICE, factor_dtype=torch.float32)
    wide_A = torch.randn(24, K, device=TRITON_DEVICE)

    def results(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, ...]:
        plan = configs("forward", ops.x, ops.weight, 24)
        y, z = linear.forward(ops.x, ops.weight, lora_A, lora_B, ops.bias, 2.0, plan=plan)
        plan = replace(configs("backward", ops.dy, ops.weight, 24), one_pass=one_pass)
        dx, dB = linear.backward(ops.dy, z, ops.weight, lora_A, lora_B, 2.0, plan=plan)
        only_dx = linear.backward_input(ops.dy, ops.weight, lora_A, lora_B, 2.0, plan=plan)
        return y, z, dx, dB.float(), only_dx

    found = results(wide_A, ops.lora_B)
    lora_A, lora_B = wide_A.to(dtype), ops.lora_B.to(dtype)
    assert len(factors_of_expand) == 3
    for F, wanted in zip(factors_of_expand, (lora_B.t(), lora_A, lora_A), strict=True):
        assert F.dtype == dtype and torch.equal(F, wanted)
    # To the bit what rounded factors give, but for the dtype that dB is stored in.
    for what, one, other in zip(
        ("y", "z", "dx", "dB", "dx alone"), found, results(lora_A, lora_B), strict=True
    ):
        assert torch.equal(one.to(dtype), other.to(dtype)), what


@half
@pytest.mark.parametrize("share_A", [False, True])
def test_a_group_hands_expand_rounded_factors(dtype, share_A, factors_of_expand):
    ranks = (24, 24, 24) if share_A else (24, 9, 40)
    members = [
        draw_operands(M, K, n, R, dtype, TRITON_DEVICE, factor_dtype=torch.float32)
        for n, R in zip((200, 48, 72), ranks, strict=True)
    ]
    x, weights = members[0].x, [one.weight for one in members]
    lora_As = [members[0].lora_A] * 3 if share_A else [one.lora_A for one in members]
    # One has its factor in the dtype of x already.
    lora_Bs = [members[0].lora_B, members[1].lora_B.to(dtype), members[2].lora_B]
    plan = configs(
        "forward", x, torch.cat(weights), max(ranks), widths=(200, 48, 72), makers=1 if share_A else 3
    )
    rest = [None] * 3, [2.0] * 3, [0.0] * 3, None, share_A

    def results(factors: list[Tensor]) -> list[Tensor]:
        ys, z = group.forward(x, weights, lora_As, factors, *rest, plan=plan)
        return [*ys, z]

    found = results(lora_Bs)
    wanted = [lora_B.to(dtype) for lora_B in lora_Bs]
    assert len(factors_of_expand) == 3
    for F, lora_B in zip(factors_of_expand, wanted, strict=True):
        assert F.dtype == dtype and torch.equal(F, lora_B.t())
    assert all(torch.equal(one, other) for one, other in zip(found, results(wanted), strict=True))
