"""A size of 0 is a size: what is empty contributes zeros, and no memory is handed out as it was found."""

from __future__ import annotations

import pytest
import torch
from conftest import implementation_cases
from kernel_plans import implementation_and_plan_cases, pin_by_name

from lorafa_kernels import lorafa_linear
from lorafa_kernels.group.api import lorafa_linear_group
from lorafa_kernels.group.operands import LinearOperands
from lorafa_kernels.mlp.api import lorafa_gated_mlp

pytestmark = pytest.mark.numerics

SIZES = {"K": (5, 8, 0), "N": (5, 0, 8), "K-N": (5, 0, 0), "M": (0, 8, 8)}
R = 4


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that is not written is NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        found = empty(*args, **kwargs)
        return found.fill_(float("nan")) if found.is_floating_point() else found

    monkeypatch.setattr(torch, "empty", poisoned)


def draw(M: int, N: int, K: int, device: str, dtype: torch.dtype, bias: bool, p: float):
    """x and one layer."""
    tensor = lambda *shape: torch.randn(shape, device=device).to(dtype)  # noqa: E731
    layer = LinearOperands(
        tensor(N, K), tensor(N) if bias else None, tensor(R, K), tensor(N, R).requires_grad_(), 2.0, p
    )
    return tensor(M, K), layer


def plain(M: int, layer: LinearOperands) -> torch.Tensor:
    """y of a layer to which nothing comes in."""
    y = layer.weight.new_zeros((M, layer.weight.shape[0]))
    return y if layer.bias is None else y + layer.bias


cases = pytest.mark.parametrize(
    "size, need_dx, need_dB", [(size, dx, not dx or size == "K") for size in SIZES for dx in (True, False)]
)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "need_dx, need_dB, bias, p, dtype",
    [
        (True, True, True, 0.0, torch.float32),
        (True, False, False, 0.5, torch.float32),
        (False, True, True, 0.5, torch.float32),
        (True, True, True, 0.5, torch.bfloat16),
    ],
    ids=["bias", "dx-dropout", "dB-dropout", "bf16"],
)
@pytest.mark.parametrize(
    "device, impl, plan", implementation_and_plan_cases(("tma", "tma-one-pass", "recompute"))
)
def test_layer(monkeypatch, device, impl, plan, size, need_dx, need_dB, bias, p, dtype):
    pin_by_name(monkeypatch, plan)
    M, N, K = SIZES[size]
    x, layer = draw(M, N, K, device, dtype, bias, p)
    x.requires_grad_(need_dx)
    layer.lora_B.requires_grad_(need_dB)
    y = lorafa_linear(
        x,
        layer.weight,
        layer.lora_A,
        layer.lora_B,
        layer.bias,
        scaling=layer.scaling,
        dropout_p=p,
        impl=impl,
    )
    assert torch.equal(y, plain(M, layer)) or M == 0
    y.backward(torch.randn_like(y))
    if need_dx:
        assert torch.equal(x.grad, torch.zeros_like(x))
    if need_dB:
        assert torch.equal(layer.lora_B.grad, torch.zeros_like(layer.lora_B))


@pytest.mark.parametrize("share_A", [False, True], ids=["own-A", "shared-A"])
@pytest.mark.parametrize("p", [0.0, 0.5])
@cases
@pytest.mark.parametrize("device, impl", implementation_cases())
def test_group(device, impl, size, need_dx, need_dB, p, share_A):
    """The second member is a layer with columns where the first has none."""
    M, N, K = SIZES[size]
    x, first = draw(M, N, K, device, torch.float32, True, p)
    second = draw(M, 8, K, device, torch.float32, False, p)[1]
    if share_A:
        second = second._replace(lora_A=first.lora_A)
    members = [first, second]
    x.requires_grad_(need_dx)
    for member in members:
        member.lora_B.requires_grad_(need_dB)
    ys = lorafa_linear_group(x, members, share_A=share_A, impl=impl)
    assert all(y.isfinite().all() for y in ys)
    if K == 0:
        assert all(torch.equal(y, plain(M, member)) for y, member in zip(ys, members, strict=True))
    torch.autograd.backward(ys, [torch.randn_like(ys[0]), torch.zeros_like(ys[1])])
    if need_dx:
        assert torch.equal(x.grad, torch.zeros_like(x)) or K * N
    for member in members if need_dB else ():
        assert torch.equal(member.lora_B.grad, torch.zeros_like(member.lora_B))


@pytest.mark.parametrize(
    "sizes", [(5, 0, 8, 8), (5, 8, 0, 8), (5, 8, 8, 0), (0, 8, 8, 8)], ids=["K", "I", "N", "M"]
)
@pytest.mark.parametrize("device, impl", implementation_cases())
def test_gated_mlp(device, impl, sizes):
    M, K, width, N = sizes
    x, gate = draw(M, width, K, device, torch.float32, False, 0.5)
    up = draw(M, width, K, device, torch.float32, False, 0.0)[1]
    down = draw(M, N, width, device, torch.float32, True, 0.5)[1]
    x.requires_grad_()
    y = lorafa_gated_mlp(x, gate, up, down, impl=impl)
    assert torch.equal(y, plain(M, down)) or K * width
    y.backward(torch.randn_like(y))
    for leaf in (x, gate.lora_B, up.lora_B, down.lora_B):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))
