"""The gated MLP: its activation, one node for the whole block, and the modules. Results within the error
budget, what is kept, what is launched, and the contract of the layers it is made of.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import implementation_cases
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lorafa_kernels.accuracy import allowed_error, relative_error
from lorafa_kernels.blocks import gated_ops
from lorafa_kernels.blocks.activation import ACTIVATIONS

implementations = pytest.mark.parametrize(("device", "impl"), implementation_cases())
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])


def act(g: Tensor, activation: str) -> Tensor:
    """The activation as eager PyTorch computes it."""
    if activation == "silu":
        return F.silu(g)
    return F.gelu(g, approximate="tanh" if activation == "gelu_tanh" else "none")


def check_budget(got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Assert the error budget for every result, which must be large enough not to be pooled."""
    for name, tensor in got.items():
        assert tensor.shape == exact[name].shape and tensor.numel() >= 256, name
        error, plain_error = (relative_error(t, exact[name]) for t in (tensor, plain[name]))
        allowed = allowed_error(plain_error, tensor.dtype)
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


# The activation product and its gradients.


def draw_gated(dtype, device, shape=(37, 70)) -> tuple[Tensor, Tensor, Tensor]:
    """g, u and dh."""
    generator = torch.Generator().manual_seed(1)
    return tuple((2 * torch.randn(shape, generator=generator)).to(device, dtype) for _ in range(3))


def plain_gated(g: Tensor, u: Tensor, dh: Tensor, activation: str, dtype=None) -> dict[str, Tensor]:
    g, u = (tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in (g, u))
    h = act(g, activation) * u
    dg, du = torch.autograd.grad(h, (g, u), dh.to(h.dtype))
    return {"h": h.detach(), "dg": dg, "du": du}


def run_gated(g: Tensor, u: Tensor, dh: Tensor, activation: str, impl: str) -> dict[str, Tensor]:
    h = gated_ops.gated(g, u, activation, impl)
    dg, du = gated_ops.gated_backward(dh.clone(), g, u, activation, impl)
    return {"h": h, "dg": dg, "du": du}


@implementations
@dtypes
@activations
def test_gated_accuracy(device, impl, dtype, activation):
    operands = draw_gated(dtype, device)
    got = run_gated(*operands, activation, impl)
    assert all(tensor.is_contiguous() and tensor.dtype == dtype for tensor in got.values())
    exact = plain_gated(*operands, activation, torch.float64)
    check_budget(got, plain_gated(*operands, activation), exact)


@implementations
@dtypes
@activations
def test_gated_at_extreme_values(device, impl, dtype, activation):
    """No |g| overflows; NaN and Inf go where the plain formula lets them go, with the sign it gives them.

    The formula in fp64: in fp32 PyTorch's gelu of Inf is NaN on some CPUs, which impl="torch" takes over.
    """
    gates = [1e4, -1e4, 1.0, -1.0, 0.0, float("inf"), -float("inf"), float("nan")]
    values = [1.0, -2.5, 0.0, float("inf"), float("nan")]
    cube = torch.cartesian_prod(torch.tensor(gates), torch.tensor(values), torch.tensor(values))
    operands = tuple(cube.to(device, dtype)[:, i : i + 1].contiguous() for i in range(3))
    got = run_gated(*operands, activation, impl)
    plain = plain_gated(*operands, activation, dtype if impl == "torch" else torch.float64)
    for name, want in plain.items():
        torch.testing.assert_close(got[name], want.to(dtype), equal_nan=True)


@implementations
@activations
def test_gated_with_strides(device, impl, activation):
    """Rows within larger matrices and transposed matrices give what their contiguous copies give, from the
    kernels the same bits; the gradient is written into dh wherever it lies, and nowhere else.
    """
    operands = draw_gated(torch.bfloat16, device)
    plain, exact = (plain_gated(*operands, activation, dtype) for dtype in (None, torch.float64))
    want = run_gated(*operands, activation, impl)

    def in_rows(tensor):
        wide = torch.full((tensor.shape[0], 133), float("nan"), dtype=tensor.dtype, device=device)
        wide[:, 5:75] = tensor
        return wide[:, 5:75]

    def transposed(tensor):
        return tensor.t().contiguous().t()

    for change in (in_rows, transposed):
        g, u, dh = (change(tensor) for tensor in operands)
        h = gated_ops.gated(g, u, activation, impl)
        dg, du = gated_ops.gated_backward(dh, g, u, activation, impl)
        assert dg is dh and h.is_contiguous() and du.is_contiguous()
        got = {"h": h, "dg": dg, "du": du}
        check_budget(got, plain, exact)
        if impl == "triton":
            assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())
    around = in_rows(operands[2])
    gated_ops.gated_backward(around, operands[0], operands[1], activation, impl)
    assert around._base[:, :5].isnan().all() and around._base[:, 75:].isnan().all()


@implementations
@activations
def test_one_gradient_alone(device, impl, activation):
    """dg or du alone: the same bits, in dh's memory; g and u are read only."""
    g, u, dh = draw_gated(torch.float16, device)
    want = run_gated(g, u, dh, activation, impl)
    before = g.clone(), u.clone()
    only = dh.clone()
    dg, du = gated_ops.gated_backward(only, g, u, activation, impl, need_du=False)
    assert du is None and dg is only and torch.equal(dg, want["dg"])
    only = dh.clone()
    dg, du = gated_ops.gated_backward(only, g, None, activation, impl)
    assert dg is None and du is only and torch.equal(du, want["du"])
    assert torch.equal(g, before[0]) and torch.equal(u, before[1])


@implementations
def test_gated_of_no_rows(device, impl):
    empty = torch.empty(0, 24, device=device)
    got = run_gated(empty, empty, empty, "silu", impl)
    assert all(tensor.shape == (0, 24) for tensor in got.values())


@pytest.mark.parametrize("operand", ["g", "u", "dh"])
def test_gated_offsets_past_32_bits(triton_device, operand):
    """Rows of a view whose last one starts more than 2³² elements behind the first."""
    operands = dict(zip(("g", "u", "dh"), draw_gated(torch.float16, triton_device, (5, 7)), strict=True))
    want = run_gated(**operands, activation="gelu", impl="triton")
    near = operands[operand]
    stride = (1 << 32) // 4 + 1
    far = torch.empty(4 * stride + 7, dtype=near.dtype, device=triton_device).as_strided((5, 7), (stride, 1))
    far.copy_(near)
    operands[operand] = far
    h = gated_ops.gated(operands["g"], operands["u"], "gelu", "triton")
    dg, du = gated_ops.gated_backward(operands["dh"], operands["g"], operands["u"], "gelu", "triton")
    for name, tensor in (("h", h), ("dg", dg), ("du", du)):
        assert torch.equal(tensor, want[name]), name


def gated_arguments(name: str, impl: str, device: str, u: bool = True, need_du: bool = True) -> tuple:
    g, other, dh = draw_gated(torch.bfloat16, device, (9, 12))
    if name == "gated":
        return g, other, "silu", impl
    return dh, g, other if u else None, "gelu", need_du, impl


GATED_CALLS = [("gated", True, True), ("gated_backward_", True, True)]
GATED_CALLS += [("gated_backward_", True, False), ("gated_backward_", False, True)]


@implementations
@pytest.mark.parametrize(("name", "u", "need_du"), GATED_CALLS)
def test_gated_operators(device, impl, name, u, need_du):
    """PyTorch's own check of an operator, and fakes of the right shape and strides for any layout."""
    operator = getattr(torch.ops.lorafa_kernels, name).default
    arguments = gated_arguments(name, impl, device, u, need_du)
    torch.library.opcheck(operator, arguments)
    assert torch.Tag.pt2_compliant_tag in operator.tags
    arguments = [a.t().contiguous().t() if isinstance(a, Tensor) else a for a in arguments]
    real = operator(*arguments)
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
