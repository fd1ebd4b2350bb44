"""Every kernel reads its operands and nothing beside them, and writes its results, whole, and nothing beside
them, for sizes that are no multiples of blocks.
"""

from __future__ import annotations

import pytest
import torch
from kernel_plans import PLANS, pin_by_name
from memory_beds import Beds

from lorafa_kernels.checks.budget import draw_operands
from lorafa_kernels.group import ops as group_ops
from lorafa_kernels.linear import ops
from lorafa_kernels.plan.config import KernelConfig

pytestmark = pytest.mark.numerics
pytest.importorskip("triton")
pytest.importorskip("lorafa_kernels.group.fused")
grad = pytest.importorskip("lorafa_kernels.kernels.grad")
gated = pytest.importorskip("lorafa_kernels.kernels.gated")
pytest.importorskip("lorafa_kernels.linear.fused")

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
dropouts = pytest.mark.parametrize("p", [0.0, 0.5], ids=["", "dropout"])


@pytest.fixture
def beds(monkeypatch):
    beds = Beds()
    monkeypatch.setattr(torch, "empty", beds.make)
    return beds


def laid(beds, M, K, N, R, dtype, device, seed=0):
    """x, weight, lora_A, lora_B, bias and dy in beds; lora_B is fp32."""
    i = draw_operands(M, K, N, R, dtype, device, factor_dtype=torch.float32, seed=seed)
    return tuple(beds.lay(tensor) for tensor in (i.x, i.weight, i.lora_A, i.lora_B, i.bias, i.dy))


@dtypes
@dropouts
@pytest.mark.parametrize("plan", [None, *PLANS])
def test_those_of_a_layer(monkeypatch, triton_device, beds, plan, dtype, p):
    """Rows of 16 bytes, that TMA can address; 70 = 64 + 6 rows."""
    pin_by_name(monkeypatch, plan)
    seed = torch.tensor([3], device=triton_device)
    x, weight, lora_A, lora_B, bias, dy = laid(beds, 70, 40, 72, 8, dtype, triton_device)
    factors = weight, lora_A, lora_B
    _, z = ops.forward(x, *factors, bias, 0.7, "triton", p, seed)
    z = beds.lay(z)
    ops.backward(dy, z, *factors, 0.7, "triton", p, seed)
    ops.backward_lora_B(dy, z, lora_B, "triton")
    assert len(beds.results) >= 5
    beds.check()


@dtypes
@pytest.mark.parametrize("variant", ["portable", "tma"])
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("need_dz", [True, False], ids=["both", "dB"])
def test_that_of_one_pass_over_dy(triton_device, beds, dtype, variant, chunks, need_dz):
    """Rows of one block, and of two with a chunk for each; the last is not full."""
    M = 32 * chunks - 5
    _, _, _, lora_B, _, dy = laid(beds, M, 8, 72, 8, dtype, triton_device)
    z = beds.lay(torch.randn(M, 8, device=triton_device).to(dtype))
    config = KernelConfig(32, 64, 0, 16, 1, 4, 2, variant)
    grad.grad(dy, z, lora_B if need_dz else None, 0.7, torch.float32, config=config)
    beds.check()


@dtypes
@dropouts
@pytest.mark.parametrize("share_A", [False, True])
def test_those_of_a_group(triton_device, beds, dtype, p, share_A):
    members = [laid(beds, 70, 40, N, 8, dtype, triton_device, seed=N) for N in (72, 24)]
    weights, lora_As, lora_Bs, biases, dys = map(list, list(zip(*members, strict=True))[1:])
    if share_A:
        lora_As = [lora_As[0]] * 2
    scalings, seeds = [0.7, 0.7 if share_A else 1.5], torch.tensor([3, 4], device=triton_device)
    how = scalings, [p, p], seeds[: 1 if share_A else 2] if p else None, share_A
    _, z = group_ops.group_forward(members[0][0], weights, lora_As, lora_Bs, biases, *how, "triton")
    z = beds.lay(z)
    group_ops.group_backward(dys, z, weights, lora_As, lora_Bs, *how, True, [True, True], "triton")
    beds.check()


@dtypes
@pytest.mark.parametrize("columns", [7, 64], ids=["ragged", "even"])
def test_those_of_the_activation(triton_device, beds, dtype, columns):
    """In rows of wider matrices too, which are not one row for the kernel."""
    for wide in (columns, columns + 9):
        g, u, dh = (
            beds.lay(torch.randn(37, wide, device=triton_device).to(dtype))[:, :columns] for _ in range(3)
        )
        gated.gated(g, u, "silu")
        # dg is written over dh: that is a result then.
        bed, _ = beds.operands.pop()
        before = bed.clone()
        gated.gated_backward(dh, g, u, "silu", True)
        changed = bed.view(torch.int16) != before.view(torch.int16)
        inside = torch.zeros_like(bed, dtype=torch.bool)
        inside.as_strided(dh.shape, dh.stride(), dh.storage_offset()).fill_(True)
        assert torch.isfinite(dh).all()
        assert not (changed.view(bed.numel(), -1).any(1) & ~inside).any()
    beds.check()
