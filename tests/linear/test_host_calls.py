"""What a call costs the host on the CPU, counted: Python calls of this package, operations of PyTorch's, and
what torch.autograd.Function.apply does for torch.func, which is left out where there is nothing to do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lorafa_kernels
from lorafa_kernels import LoRAFALinear, lorafa_linear
from lorafa_kernels.checks.budget import draw_operands
from lorafa_kernels.correction import correct
from lorafa_kernels.dispatch import only_looked_on
from lorafa_kernels.linear import library
from lorafa_kernels.linear.ops import LoRAFALinearFunction

PACKAGE = Path(lorafa_kernels.__file__).parent
M, K, N, R = 8, 20, 24, 3
FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16


def layer_of(
    dtype: torch.dtype = FP32, bias: bool = False, alpha: float = 2.0
) -> tuple[LoRAFALinear, Tensor]:
    """Return a layer with a lora_B that is not 0, and x (M, K), which needs a gradient."""
    layer = LoRAFALinear(K, N, bias, r=R, lora_alpha=alpha, dtype=dtype, adapter_dtype=dtype)
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer, torch.randn(M, K, dtype=dtype, requires_grad=True)


def calls_within(function: Callable[[], object]) -> list[str]:
    """Names of the functions of this package that are called, in their order, without those of plan/."""
    found = []

    def note(frame, event, argument):
        code = frame.f_code
        file = Path(code.co_filename)
        if event == "call" and PACKAGE in file.parents and file.parent.name != "plan":
            found.append(code.co_name)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


class Operations(TorchDispatchMode):
    """Notes the names of the operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def operations_within(function: Callable[[], object]) -> list[str]:
    with only_looked_on(operators=False), Operations() as mode:
        function()
    return mode.names


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_python_calls_of_a_step(bias):
    """Each takes about 0.1 µs of the host, and a small layer's product 2 to 4."""
    layer, x = layer_of(bias=bias)
    torch.autograd.grad(layer(x).sum(), x)
    y = []
    forward = calls_within(lambda: y.append(layer(x)))
    backward = calls_within(lambda: torch.autograd.grad(y[0], (x, layer.lora_B), torch.ones_like(y[0])))
    assert "forward" in forward and "backward" in backward
    assert len(forward) <= 8, forward
    assert len(backward) <= 4, backward


VIEWS = {"t", "transpose"}


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16], ids=["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("alpha", [float(R), 2.0], ids=["scaling 1", "scaled"])
def test_operations_of_a_step(dtype, alpha):
    """Three products in each direction, and nothing but views beside them."""
    layer, x = layer_of(dtype, alpha=alpha)
    narrow = "mm" if alpha == R else "addmm"
    y = []
    forward = operations_within(lambda: y.append(layer(x)))
    dy = torch.ones_like(y[0])
    backward = operations_within(lambda: torch.autograd.grad(y[0], (x, layer.lora_B), dy))
    assert [name for name in forward if name not in VIEWS] == [narrow, "mm", "addmm_"]
    assert [name for name in backward if name not in {*VIEWS, "detach"}] == [narrow, "mm", "addmm_", "mm"]


def parts(rank: int, dtype: torch.dtype, scaling: float, columns: int = K, adapter=None):
    i = draw_operands(M, columns, N, rank, dtype, "cpu", scaling=scaling, factor_dtype=adapter)
    return i, (i.weight, i.lora_A, i.lora_B)


@pytest.mark.parametrize("scaling", [1.0, 0.7])
@pytest.mark.parametrize(("rank", "columns"), [(R, K), (600, 300)], ids=["narrow", "more ranks than columns"])
@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [(FP32, FP32), (FP64, FP64), (FP64, FP32), (BF16, BF16), (BF16, FP32), (torch.float16, FP32)],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_one_place_has_the_bits_of_the_parts(dtype, adapter, rank, columns, scaling):
    """library.forward and .backward write out what scaled_product and input_gradient compute."""
    i, (weight, A, B) = parts(rank, dtype, scaling, columns, adapter)
    y, z = library.forward(i.x, weight, A, B, i.bias, scaling)
    assert torch.equal(z, library.scaled_product(i.x, A.t(), scaling))
    rounded = B.to(dtype)
    if dtype in (FP32, FP64) and rank <= columns:
        assert torch.equal(y, F.linear(i.x, weight, i.bias).addmm_(z, rounded.t()))
    else:
        assert torch.equal(y, F.linear(z, rounded, i.bias).addmm_(i.x, weight.t()))
    dx, dB = library.backward(i.dy, z, weight, A, B, scaling)
    assert torch.equal(dx, library.backward_input(i.dy, weight, A, B, scaling))
    assert dB.dtype == adapter and torch.equal(dB, library.backward_lora_B(i.dy, z, adapter))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_dx_reads_nothing_of_z(value):
    """z lends its shape to the product for dz."""
    i, (weight, A, B) = parts(R, FP32, 0.7)
    z = torch.full((M, R), value)
    dx, _ = library.backward(i.dy, z, weight, A, B, 0.7)
    assert torch.equal(dx, library.backward_input(i.dy, weight, A, B, 0.7))
    assert bool((z == value).all() if value == value else z.isnan().all())


@pytest.fixture
def applied(monkeypatch) -> list[str]:
    """Names of the Functions of this package that torch.autograd.Function.apply is called for."""
    found = []
    apply = torch.autograd.Function.apply.__func__

    def noting(cls, *args, **kwargs):
        found.append(cls.__name__)
        return apply(cls, *args, **kwargs)

    monkeypatch.setattr(torch.autograd.Function, "apply", classmethod(noting))
    return found


def test_apply_is_bare_in_a_plain_call(applied):
    layer, x = layer_of()
    y = layer(x)
    assert type(y.grad_fn).__name__ == "LoRAFALinearFunctionBackward" and not applied


def test_apply_is_torchs_where_a_mode_watches(applied):
    layer, x = layer_of()
    with Operations() as mode:
        layer(x)
    assert applied == ["LoRAFALinearFunction"] and "forward" in mode.names


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "vmap"])
def test_transforms_are_refused_as_by_torch(transform):
    """Not by an internal assertion, which the bare apply would come to."""
    layer, x = layer_of()
    compute = {
        "grad": lambda: torch.func.grad(lambda v: layer(v).sum())(x),
        "vjp": lambda: torch.func.vjp(layer, x),
        "jacrev": lambda: torch.func.jacrev(layer)(x),
        "vmap": lambda: torch.vmap(layer)(x[None]),
    }
    with pytest.raises(RuntimeError, match="setup_context"):
        compute[transform]()


def left_over(tensor: Tensor) -> Tensor:
    """Return a wrapper of `tensor` that has outlived the transform that made it."""
    kept = []

    def keep(wrapper):
        kept.append(wrapper)
        return wrapper.sum()

    torch.func.grad(keep)(tensor)
    return kept[0]


@pytest.mark.parametrize("which", ["x", "lora_B"])
def test_gradients_pass_what_a_transform_has_left_over(which):
    i, (weight, A, B) = parts(R, FP32, 0.7)
    tensors = {"x": i.x.requires_grad_(), "lora_B": B.requires_grad_()}
    x, lora_B = (left_over(t) if name == which else t for name, t in tensors.items())
    y = lorafa_linear(x, weight, A, lora_B, scaling=0.7)
    got = torch.autograd.grad(y, tuple(tensors.values()), i.dy)
    y = lorafa_linear(i.x, weight, A, B, scaling=0.7)
    assert all(map(torch.equal, got, torch.autograd.grad(y, tuple(tensors.values()), i.dy)))


def test_a_node_is_given_what_is_rare_or_not():
    """A seed and an inverse: it returns as many gradients as it was given arguments."""
    i, (weight, A, B) = parts(R, FP32, 0.7)
    leaves = i.x.requires_grad_(), B.requires_grad_()
    how = 0.7, "auto", 0.0, None
    nodes = [
        LoRAFALinearFunction.apply(i.x, weight, A, B, None, how, *rare) for rare in ((), (None, torch.eye(R)))
    ]
    (dx, dB), (same, corrected) = (torch.autograd.grad(y, leaves, i.dy) for y in nodes)
    assert torch.equal(dx, same) and not torch.equal(corrected, dB)
    assert torch.equal(corrected, correct(dB, torch.eye(R), 0.7))


def test_backward_under_autocast_computes_as_without():
    """The products of the direct call would be cast."""
    layer, x = layer_of()
    dy = torch.randn(M, N)
    expected = torch.autograd.grad(layer(x), (x, layer.lora_B), dy)
    y = layer(x)
    with torch.autocast("cpu", BF16):
        got = torch.autograd.grad(y, (x, layer.lora_B), dy)
    assert all(map(torch.equal, got, expected))
