"""Operators of the library `lorafa_kernels`: schemas, shape functions, and the call of one implementation.

forward(x, weight, lora_A, lora_B, bias, scaling, impl, dropout_p, seed) -> (y, z)
backward(dy, z, weight, lora_A, lora_B, scaling, impl, dropout_p, seed) -> (dx, dB)
backward_input(dy, weight, lora_A, lora_B, scaling, impl, dropout_p, seed) -> dx
backward_lora_B(dy, z, lora_B, impl) -> dB

Shapes and dtypes as in reference.py, but weight and bias may be of another dtype than x (under autocast):
they are cast to it here, in a temporary that dies with the call. dropout_p and seed, int64 of shape (1,) on
the device of x, have the defaults 0 and None: no dropout. scaling does not hold the 1/(1 − p). All outputs
are new and contiguous. The operators have no derivative of their own (node.py has it) and compute with
autocast switched off: it would change the dtypes of the products within.

The functions of this module call the operators torch.ops.lorafa_kernels.* where that is needed: for the
Triton kernels, which shape propagation must not enter, under a compiler, where there is something to cast, or
dropout, and where a TorchDispatchMode watches: it would see the library's products accumulate into each
other's outputs, which selective activation checkpointing cannot save, and which FlopCounterMode does not
count (flops.py). Otherwise what is made of PyTorch's own operators alone is called directly, which saves the
dispatcher's ~5 µs a call on the CPU. Under a compiler the plan is chosen when the operator runs, for the
sizes it then has.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from ..flops import tell_flop_counters
from ..plan.choice import choose, choose_plan
from ..plan.make import Plan
from ..plan.pin import pinned
from . import library, reference

# Absent or renamed, direct calls would go unnoticed: an error at import is better.
_len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack
_library = torch.library.Library("lorafa_kernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
# Made of PyTorch's own operators, and therefore open to a direct call.
_MODULES = {"torch": library, "reference": reference}


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    impl: str,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute y (M, N) and z (M, R) in the dtype of x."""
    if not dropout_p and (module := _direct("forward", impl, x, lora_A, weight, bias)):
        return module.forward(x, weight, lora_A, lora_B, bias, scaling)
    announce()
    return _forward_op(x, weight, lora_A, lora_B, bias, scaling, impl, dropout_p, seed)


def backward(
    dy: Tensor,
    z: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    impl: str,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute dx (M, K) in the dtype of dy and dB (N, R) in the dtype of lora_B."""
    if not dropout_p and (module := _direct("backward", impl, dy, lora_A, weight)):
        return module.backward(dy, z, weight, lora_A, lora_B, scaling)
    announce()
    return _backward_op(dy, z, weight, lora_A, lora_B, scaling, impl, dropout_p, seed)


def backward_input(
    dy: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    impl: str,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Compute dx (M, K) alone."""
    if not dropout_p and (module := _direct("backward_input", impl, dy, lora_A, weight)):
        return module.backward_input(dy, weight, lora_A, lora_B, scaling)
    announce()
    return _backward_input_op(dy, weight, lora_A, lora_B, scaling, impl, dropout_p, seed)


def backward_lora_B(dy: Tensor, z: Tensor, lora_B: Tensor, impl: str) -> Tensor:
    """Compute dB (N, R) alone, in the dtype of lora_B, of which no value is read."""
    if module := _direct("backward_lora_B", impl, dy, lora_B):
        return module.backward_lora_B(dy, z, lora_B.dtype)
    announce()
    return _backward_lora_B_op(dy, z, lora_B, impl)


def _direct(
    op: str, impl: str, x: Tensor, factor: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> ModuleType | None:
    """Return the module to call as it is, where neither `weight` nor `bias` needs a cast, or None.

    factor: lora_A (R, K), or lora_B (N, R) where there is no weight.
    """
    if not open_to_direct_calls(x.device.type):
        return None
    dtype = x.dtype
    if weight is not None and weight.dtype != dtype:
        return None
    if bias is not None and bias.dtype != dtype:
        return None
    name, plan = _decide(op, impl, x, factor, weight, bias)
    if plan is None:
        return _MODULES.get(name)
    return library if plan.name == "library" and not _takes_grad_kernel(op, plan) else None


def _decide(
    op: str,
    impl: str,
    x: Tensor,
    factor: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    dropout: bool = False,
) -> tuple[str, Plan | None]:
    """Return the implementation of an operation, and its plan if that is "triton" and sizes are known.

    Arguments as of _direct; dropout: whether there is one.
    """
    pin = pinned() if impl in ("auto", "triton") else None
    kernels = pin is not None and pin.needs_kernels(op)
    name = choose(impl, x.device, x.dtype, kernels).impl
    M = x.shape[0]
    # While shapes are propagated a size can be a symbol, and nothing is computed.
    if name != "triton" or type(M) is not int:
        return name, None
    if weight is None:
        N, R = factor.shape
        K = 0
    else:
        N, K = weight.shape
        R = factor.shape[0]
    return name, choose_plan(impl, op, x.device, x.dtype, M, N, K, R, bias is not None, dropout, pin)


def _takes_grad_kernel(op: str, plan: Plan) -> bool:
    """Whether a plan of the library's products takes dz and dB from the kernel that reads dy once."""
    return op == "backward" and plan.kernels.one_pass


def _forward(x, weight, lora_A, lora_B, bias, scaling, impl, dropout_p=0.0, seed=None):
    dtype = x.dtype
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    dropout = _check_dropout(dropout_p, seed)
    decided = _decide("forward", impl, x, lora_A, weight, bias, dropout)
    return _run("forward", decided, x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed)


def _backward(dy, z, weight, lora_A, lora_B, scaling, impl, dropout_p=0.0, seed=None):
    if weight.dtype != dy.dtype:
        weight = weight.to(dy.dtype)
    dropout = _check_dropout(dropout_p, seed)
    decided = _decide("backward", impl, dy, lora_A, weight, dropout=dropout)
    return _run("backward", decided, dy, z, weight, lora_A, lora_B, scaling, dropout_p, seed)


def _backward_input(dy, weight, lora_A, lora_B, scaling, impl, dropout_p=0.0, seed=None):
    if weight.dtype != dy.dtype:
        weight = weight.to(dy.dtype)
    dropout = _check_dropout(dropout_p, seed)
    decided = _decide("backward_input", impl, dy, lora_A, weight, dropout=dropout)
    return _run("backward_input", decided, dy, weight, lora_A, lora_B, scaling, dropout_p, seed)


def _backward_lora_B(dy, z, lora_B, impl):
    decided = _decide("backward_lora_B", impl, dy, lora_B, None)
    return _run("backward_lora_B", decided, dy, z, lora_B.dtype)


def _check_dropout(dropout_p: float, seed: Tensor | None) -> bool:
    """Whether there is dropout. Raises ValueError for one without a seed."""
    if dropout_p and seed is None:
        raise ValueError(f"dropout of {dropout_p} needs a seed, an int64 tensor of shape (1,)")
    return bool(dropout_p)


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for this type of device; torch has no answer for tensors without data."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def open_to_direct_calls(device_type: str) -> bool:
    """Whether what is made of PyTorch's own operators may be called as it is: nothing compiles, casts or
    watches.
    """
    return not (torch.compiler.is_compiling() or autocast_enabled(device_type) or _len_torch_dispatch_stack())


def watched() -> bool:
    """Whether a TorchDispatchMode sees what is called now."""
    return not torch.compiler.is_compiling() and _len_torch_dispatch_stack() > 0


def announce() -> None:
    """Prepare what watches for an operator that is about to be called."""
    if watched():
        tell_flop_counters()


def _run(op: str, decided: tuple[str, Plan | None], x: Tensor, *rest):
    """Call an operation as decided, with autocast off and the device of x current."""
    device = x.device
    if autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return _run(op, decided, x, *rest)
    # Triton launches on the current device, wherever its arguments lie.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _run(op, decided, x, *rest)
    name, plan = decided
    if plan is None:
        return getattr(_MODULES[name], op)(x, *rest)
    if plan.name == "fused":
        kernels = importlib.import_module(".fused", __package__)
        return getattr(kernels, op)(x, *rest, plan=plan.kernels)
    if _takes_grad_kernel(op, plan):
        return _backward_with_one_pass(plan, x, *rest)
    return getattr(library, op)(x, *rest)


def _backward_with_one_pass(plan, dy, z, weight, lora_A, lora_B, scaling, dropout_p, seed):
    kernels = importlib.import_module("..kernels.grad", __package__)
    dz, dB = kernels.grad(dy, z, lora_B, scaling, lora_B.dtype, config=plan.kernels.grad)
    return library.input_gradient(dy, dz, weight, lora_A, dropout_p, seed), dB


def _forward_fake(x, weight, lora_A, lora_B, bias, scaling, impl, dropout_p=0.0, seed=None):
    M = x.shape[0]
    return x.new_empty((M, weight.shape[0])), x.new_empty((M, lora_A.shape[0]))


def _backward_fake(dy, z, weight, lora_A, lora_B, scaling, impl, dropout_p=0.0, seed=None):
    return _backward_input_fake(dy, weight, lora_A, lora_B, scaling, impl), _backward_lora_B_fake(
        dy, z, lora_B, impl
    )


def _backward_input_fake(dy, weight, lora_A, lora_B, scaling, impl, dropout_p=0.0, seed=None):
    return dy.new_empty((dy.shape[0], weight.shape[1]))


def _backward_lora_B_fake(dy, z, lora_B, impl):
    return dy.new_empty(lora_B.shape, dtype=lora_B.dtype)


def define(name: str, schema: str, operation, fake):
    _library.define(f"{name}{schema}", tags=_TAGS)
    _library.impl(name, operation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorafa_kernels::{name}", fake, lib=_library)
    return getattr(torch.ops.lorafa_kernels, name).default


_forward_op = define(
    "forward",
    "(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, float scaling, str impl,"
    " float dropout_p=0.0, Tensor? seed=None) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "backward",
    "(Tensor dy, Tensor z, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, str impl,"
    " float dropout_p=0.0, Tensor? seed=None) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_backward_input_op = define(
    "backward_input",
    "(Tensor dy, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, str impl,"
    " float dropout_p=0.0, Tensor? seed=None) -> Tensor",
    _backward_input,
    _backward_input_fake,
)
_backward_lora_B_op = define(
    "backward_lora_B",
    "(Tensor dy, Tensor z, Tensor lora_B, str impl) -> Tensor",
    _backward_lora_B,
    _backward_lora_B_fake,
)
