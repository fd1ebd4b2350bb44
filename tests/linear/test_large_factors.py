"""Large scalings, and dropout near 1: nothing overflows where the plain formula is finite, and a rank-R term
that outweighs the base product stays within the error budget.
"""

from __future__ import annotations

import c_oracle
import numpy as np
import pytest
import torch
from accuracy import Budget
from conftest import implementation_cases
from kernel_plans import implementation_and_plan_cases, pin_by_name
from torch import Tensor

from lorafa_kernels import lorafa_linear
from lorafa_kernels.checks.budget import Operands, allowed_error, draw_operands, lorafa_results, plain_formula
from lorafa_kernels.group.api import lorafa_linear_group
from lorafa_kernels.group.operands import LinearOperands
from lorafa_kernels.linear import library, ops
from lorafa_kernels.mlp.api import lorafa_gated_mlp

pytestmark = pytest.mark.numerics
implementations = pytest.mark.parametrize(("device", "impl"), implementation_cases())
with_plans = pytest.mark.parametrize(
    ("device", "impl", "plan"), implementation_and_plan_cases(("tma", "tma-one-pass", "recompute"))
)
FACTORS = {"p=0.999": (3.0, 0.999), "p=0.99-s=-20": (-20.0, 0.99), "s=300": (300.0, 0.0)}
factors = pytest.mark.parametrize(("scaling", "dropout_p"), FACTORS.values(), ids=FACTORS)


def draw(scaling: float, dropout_p: float, device: str) -> Operands:
    """A layer in fp16 whose dz, with 1/(1 − p) in it, would not be in fp16. lora_A is small, as z is not to
    overflow either.
    """
    i = draw_operands(40, 48, 64, 8, torch.float16, device, scaling=scaling, dropout_p=dropout_p)
    i.dy *= 4
    i.lora_A *= 0.02
    if dropout_p:
        dz = scaling / (1 - dropout_p) * (i.dy.double() @ i.lora_B.double())
        assert (dz.abs() > torch.finfo(torch.float16).max).any()
    return i


def assert_finite_where(got: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    for name, tensor in got.items():
        finite = plain[name].isfinite()
        assert finite.any() and tensor[finite].isfinite().all(), name


@with_plans
@factors
def test_a_layer_is_finite_where_the_plain_formula_is(device, impl, plan, scaling, dropout_p, monkeypatch):
    pin_by_name(monkeypatch, plan)
    i = draw(scaling, dropout_p, device)
    got, plain = lorafa_results(i, impl), plain_formula(i)
    assert_finite_where(got, plain)
    budget = Budget()
    budget.compare(got, plain_formula(i, torch.float64), plain)
    budget.check()


@implementations
@pytest.mark.parametrize("share_A", [False, True])
def test_a_group_is_finite(device, impl, share_A):
    """Each dx and dB of a group, where a sum of separate layers is."""
    i = draw(3.0, 0.999, device)
    member = LinearOperands(i.weight, i.bias, i.lora_A, i.lora_B, i.scaling, i.dropout_p)
    x, lora_B = i.x.requires_grad_(), i.lora_B.requires_grad_()
    members = [member, member._replace(scaling=3.0 if share_A else 2.0)]
    ys = lorafa_linear_group(x, members, share_A=share_A, impl=impl)
    grads = torch.autograd.grad(ys, (x, lora_B), [i.dy, i.dy])
    # dx is at most some thousands here: the plain formula's is finite everywhere.
    assert all(tensor.isfinite().all() for tensor in (*ys, *grads))


@implementations
def test_an_mlp_is_finite(device, impl):
    i, o = draw(3.0, 0.999, device), draw_operands(40, 64, 48, 8, torch.float16, device)
    gate = LinearOperands(i.weight, i.bias, i.lora_A, i.lora_B, i.scaling, i.dropout_p)
    up = gate._replace(lora_B=None, lora_A=None)
    down = LinearOperands(o.weight, o.bias, o.lora_A * 0.02, o.lora_B * 0.1, 3.0, 0.999)
    x = i.x.requires_grad_()
    y = lorafa_gated_mlp(x, gate, up, down, impl=impl)
    (dx,) = torch.autograd.grad(y, x, 0.01 * torch.ones_like(y))
    assert y.isfinite().all() and dx.isfinite().all()


def test_the_oracle_is_finite():
    i = draw(3.0, 0.999, "cpu")
    dy, weight, lora_A, lora_B = (t.double().numpy() for t in (i.dy, i.weight, i.lora_A, i.lora_B))
    z = np.zeros((40, 8))
    dz, dx, _ = c_oracle.backward(dy, z, weight, lora_A, lora_B, 3.0, "fp16", "fp16", 0.999, 5)
    assert np.isfinite(dz).all() and np.isfinite(dx).all()


# A contraction of many terms, and a rank of few: a sum onto the rank-R term rounds far oftener than it.
SHAPES = {"R=1": (32, 1024, 256, 1), "R=2": (96, 512, 128, 2), "R>K": (40, 16, 24, 70)}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def check_against(
    exact: dict[str, Tensor | np.ndarray], got: dict[str, Tensor], plain: dict[str, Tensor]
) -> None:
    """The budget, measured in long double: an fp64 sum is judged by a wider one."""
    for name, want in exact.items():
        want = want.numpy() if isinstance(want, Tensor) else want
        size = np.sqrt((want * want).sum())
        if size == 0:
            assert not got[name].any(), f"{name} must be zero"
            continue
        error, plain_error = (
            float(np.sqrt(((t.detach().double().numpy().astype(np.longdouble) - want) ** 2).sum()) / size)
            for t in (got[name], plain[name])
        )
        allowed = allowed_error(plain_error, got[name].dtype)
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def longdouble_formula(i: Operands) -> dict[str, np.ndarray]:
    """What fp64 is measured against."""
    x, weight, A, B, bias, dy = (
        t.numpy().astype(np.longdouble) for t in (i.x, i.weight, i.lora_A, i.lora_B, i.bias, i.dy)
    )
    s = np.longdouble(i.scaling)
    mask = 1.0 if i.mask() is None else i.mask().numpy().astype(np.longdouble)
    z = s * ((x * mask) @ A.T)
    dz = s * (dy @ B)
    return {"y": x @ weight.T + z @ B.T + bias, "dx": dy @ weight + mask * (dz @ A), "dB": dy.T @ z}


@pytest.mark.parametrize(
    ("scaling", "dropout_p"), [(0.7, 0.0), (100.0, 0.0), (0.7, 0.5), (100.0, 0.9), (0.7, 0.999)]
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("M", "K", "N", "R"), SHAPES.values(), ids=SHAPES)
def test_a_rank_term_that_outweighs_the_base_product(M, K, N, R, dtype, scaling, dropout_p):
    i = draw_operands(M, K, N, R, dtype, "cpu", scaling=scaling, dropout_p=dropout_p)
    exact = longdouble_formula(i) if dtype == torch.float64 else plain_formula(i, torch.float64)
    check_against(exact, lorafa_results(i, "torch"), plain_formula(i))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_members_of_a_group_that_outweigh_the_others(dtype):
    """The one with few columns, whose own product rounds seldom, dominates dx."""
    wide, narrow = (draw_operands(200, 64, N, 2, dtype, "cpu", seed=N) for N in (1024, 8))
    x = wide.x.requires_grad_()
    dys = [wide.dy, 1000 * narrow.dy]
    members = [LinearOperands(o.weight, None, o.lora_A, o.lora_B, 0.5) for o in (wide, narrow)]
    for order in (slice(None), slice(None, None, -1)):
        ys = lorafa_linear_group(x, members[order], impl="torch")
        (dx,) = torch.autograd.grad(ys, x, dys[order])

        def formula(to, convert, dys=dys):
            total = 0
            for dy, m in zip(dys, members, strict=True):
                dy, weight, A, B = (convert(t) for t in (dy, m.weight, m.lora_A, m.lora_B))
                total = total + (dy @ weight + (to(0.5) * dy @ B) @ A)
            return total

        exact = formula(np.longdouble, lambda t: t.detach().numpy().astype(np.longdouble))
        check_against({"dx": exact}, {"dx": dx}, {"dx": formula(float, lambda t: t)})


# Which dtype torch.mm(out_dtype=) is asked for, on a machine without CUDA.

WANTED = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("cuda", [False, True], ids=["other", "cuda"])
@pytest.mark.parametrize("operands", WANTED, ids=str)
@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_products_are_asked_for_what_torch_can_do(operands, wanted, cuda):
    """mm(out_dtype=) takes bf16 and fp16 and gives fp32, and nothing else."""
    out = library.product_dtype(operands, wanted, cuda)
    can = cuda and operands.itemsize == 2
    assert out == operands or (can and out == torch.float32)
    # It is used for every dB that would lose digits otherwise.
    assert (out == torch.float32) == (can and wanted.itemsize > 2) or out == operands == torch.float32


@implementations
@pytest.mark.parametrize("factor", WANTED, ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_any_lora_B_under_autocast(device, impl, autocast, factor, monkeypatch):
    """On CUDA too: the product with an output dtype of its own is not asked for what it cannot do."""

    def mm(left, right, *, out_dtype):
        assert left.itemsize == 2 and out_dtype == torch.float32
        return left.float() @ right.float()

    if device == "cpu":
        monkeypatch.setattr(torch, "mm", mm)
        monkeypatch.setattr(
            library,
            "product_dtype",
            lambda *dtypes, product_dtype=library.product_dtype: product_dtype(*dtypes[:2], True),
        )
    i = draw_operands(24, 40, 48, 6, torch.float32, device)
    lora_B = i.lora_B.to(factor).requires_grad_()
    x = i.x.requires_grad_()
    with torch.autocast(device, autocast):
        y = lorafa_linear(x, i.weight, i.lora_A, lora_B, i.bias, scaling=0.7, impl=impl)
    dx, dB = torch.autograd.grad(y, (x, lora_B), i.dy.to(y.dtype))
    assert (y.dtype, dx.dtype, dB.dtype) == (autocast, torch.float32, factor)
    narrow = Operands(
        *(t.detach().to(autocast) for t in (i.x, i.weight, i.lora_A, lora_B, i.bias, i.dy)), 0.7
    )
    exact, plain = plain_formula(narrow, torch.float64), plain_formula(narrow)
    # A dB in a dtype of its own is rounded once more; one in fp64 comes from a product of at most fp32.
    plain["dB"] = plain["dB"].to(factor)
    if factor == torch.float64:
        dB, plain["dB"] = dB.float(), plain["dB"].float()
    budget = Budget()
    budget.compare({"y": y.detach(), "dx": dx.to(autocast), "dB": dB}, exact, plain)
    budget.check()


def test_operators_multiply_after_the_product():
    """dz does not hold 1/(1 − p): what reaches it is s · (dy lora_B) alone."""
    seed = torch.tensor([3])
    one = torch.ones(1, 1, dtype=torch.float16)
    arguments = (60000 * one, 0 * one, one / 64, one, 1.0)
    for impl in ("torch", "reference"):
        kept = ops.backward_input(*arguments, impl, 0.9, seed).item()
        assert kept in (0.0, 60000 / 64 * 10)
