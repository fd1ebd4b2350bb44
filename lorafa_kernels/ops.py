"""Operators of the library `lorafa_kernels`: schemas, shape functions, and the call of one implementation.

forward(x, weight, lora_A, lora_B, bias, scaling, impl) -> (y, z)
backward(dy, z, weight, lora_A, lora_B, scaling, impl) -> (dx, dB)
backward_input(dy, weight, lora_A, lora_B, scaling, impl) -> dx
backward_lora_B(dy, z, lora_B, impl) -> dB

Shapes and dtypes as in reference.py, but weight and bias may be of another dtype than x (under autocast):
they are cast to it here, in a temporary that dies with the call. All outputs are new and contiguous. The
operators have no derivative of their own (autograd.py has it) and compute with autocast switched off: it
would change the dtypes of the products within.

The functions of this module call the operators torch.ops.lorafa_kernels.* where that is needed: for the
Triton kernels, which shape propagation must not enter, under a compiler, and where there is something to
cast. Otherwise a plan made of PyTorch's own operators is called directly, which saves the dispatcher's ~5 µs
a call on the CPU.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from . import library, reference
from .choice import choose

_library = torch.library.Library("lorafa_kernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
# Made of PyTorch's own operators, and therefore open to a direct call.
_PLANS = {"torch": library, "reference": reference}


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Compute y (M, N) and z (M, R) in the dtype of x."""
    if plan := _direct_plan(impl, x, weight, bias):
        return plan.forward(x, weight, lora_A, lora_B, bias, scaling)
    return _forward_op(x, weight, lora_A, lora_B, bias, scaling, impl)


def backward(
    dy: Tensor, z: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, impl: str
) -> tuple[Tensor, Tensor]:
    """Compute dx (M, K) in the dtype of dy and dB (N, R) in the dtype of lora_B."""
    if plan := _direct_plan(impl, dy, weight):
        return plan.backward(dy, z, weight, lora_A, lora_B, scaling)
    return _backward_op(dy, z, weight, lora_A, lora_B, scaling, impl)


def backward_input(
    dy: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, impl: str
) -> Tensor:
    """Compute dx (M, K) alone."""
    if plan := _direct_plan(impl, dy, weight):
        return plan.backward_input(dy, weight, lora_A, lora_B, scaling)
    return _backward_input_op(dy, weight, lora_A, lora_B, scaling, impl)


def backward_lora_B(dy: Tensor, z: Tensor, lora_B: Tensor, impl: str) -> Tensor:
    """Compute dB (N, R) alone, in the dtype of lora_B, of which no value is read."""
    if plan := _direct_plan(impl, dy):
        return plan.backward_lora_B(dy, z, lora_B.dtype)
    return _backward_lora_B_op(dy, z, lora_B, impl)


def _direct_plan(impl: str, x: Tensor, *base: Tensor | None) -> ModuleType | None:
    """Return the plan if it can be called as it is, where the weight and bias in `base` need no cast."""
    if torch.compiler.is_compiling() or autocast_enabled(x.device.type):
        return None
    dtype = x.dtype
    for tensor in base:
        if tensor is not None and tensor.dtype != dtype:
            return None
    return _PLANS.get(choose(impl, x.device, dtype).impl)


def _forward(x, weight, lora_A, lora_B, bias, scaling, impl):
    dtype = x.dtype
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    return _run("forward", impl, x, weight, lora_A, lora_B, bias, scaling)


def _backward(dy, z, weight, lora_A, lora_B, scaling, impl):
    if weight.dtype != dy.dtype:
        weight = weight.to(dy.dtype)
    return _run("backward", impl, dy, z, weight, lora_A, lora_B, scaling)


def _backward_input(dy, weight, lora_A, lora_B, scaling, impl):
    if weight.dtype != dy.dtype:
        weight = weight.to(dy.dtype)
    return _run("backward_input", impl, dy, weight, lora_A, lora_B, scaling)


def _backward_lora_B(dy, z, lora_B, impl):
    return _run("backward_lora_B", impl, dy, z, lora_B.dtype)


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for this type of device; torch has no answer for tensors without data."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _run(operation: str, impl: str, x: Tensor, *rest):
    """Call an operation of the chosen implementation, with autocast off and the device of x current."""
    device = x.device
    if autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return _run(operation, impl, x, *rest)
    # Triton launches on the current device, wherever its arguments lie.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _run(operation, impl, x, *rest)
    name = choose(impl, device, x.dtype).impl
    plan = _PLANS.get(name) or importlib.import_module(".kernels.linear", __package__)
    return getattr(plan, operation)(x, *rest)


def _forward_fake(x, weight, lora_A, lora_B, bias, scaling, impl):
    M = x.shape[0]
    return x.new_empty((M, weight.shape[0])), x.new_empty((M, lora_A.shape[0]))


def _backward_fake(dy, z, weight, lora_A, lora_B, scaling, impl):
    return _backward_input_fake(dy, weight, lora_A, lora_B, scaling, impl), _backward_lora_B_fake(
        dy, z, lora_B, impl
    )


def _backward_input_fake(dy, weight, lora_A, lora_B, scaling, impl):
    return dy.new_empty((dy.shape[0], weight.shape[1]))


def _backward_lora_B_fake(dy, z, lora_B, impl):
    return dy.new_empty(lora_B.shape, dtype=lora_B.dtype)


def _define(name: str, schema: str, operation, fake):
    _library.define(f"{name}{schema}", tags=_TAGS)
    _library.impl(name, operation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorafa_kernels::{name}", fake, lib=_library)
    return getattr(torch.ops.lorafa_kernels, name).default


_forward_op = _define(
    "forward",
    "(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, float scaling, str impl)"
    " -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = _define(
    "backward",
    "(Tensor dy, Tensor z, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, str impl)"
    " -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_backward_input_op = _define(
    "backward_input",
    "(Tensor dy, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, str impl) -> Tensor",
    _backward_input,
    _backward_input_fake,
)
_backward_lora_B_op = _define(
    "backward_lora_B",
    "(Tensor dy, Tensor z, Tensor lora_B, str impl) -> Tensor",
    _backward_lora_B,
    _backward_lora_B_fake,
)
