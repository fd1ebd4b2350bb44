"""Operators of one linear layer and its autograd node: schemas, shape functions, the call of one
implementation, and what is kept for backward.

forward(x, weight, lora_A, lora_B, bias, scaling, impl, dropout_p, seed) -> (y, z)
backward(dy, z, weight, lora_A, lora_B, scaling, impl, dropout_p, seed) -> (dx, dB)
backward_input(dy, weight, lora_A, lora_B, scaling, impl, dropout_p, seed) -> dx
backward_lora_B(dy, z, lora_B, impl) -> dB

Shapes and dtypes as in reference.py. weight and bias may have another dtype than x (under autocast): they are
cast here, into a temporary that ends with the call. dropout_p is 0 and seed None by default: no dropout; a
seed is int64 of shape (1,) on the device of x. scaling does not contain 1/(1 − p). All outputs are new and
contiguous. The functions of this module call the operators torch.ops.lorafa_kernels.*, or an implementation
directly (dispatch.py). The autograd node has the derivative, the operators have none.

The node keeps, through save_for_backward only: z (M, R) if lora_B needs a gradient; the weight, lora_A and
lora_B objects themselves if x needs one, and with dropout the seed (8 bytes), from which backward makes the
mask again. It does not keep x: dB = dyᵀ z needs only z (LoRA-FA, arXiv 2308.03303, section 3.2). For a
corrected dB it keeps the inverse (R, R) that correction.py has made, the object itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..correction import correct
from ..dispatch import (
    Implementations,
    announce,
    bare_apply,
    call,
    decide,
    define,
    dispatch_modes,
    first_order,
    holds_data,
    open_to_direct_calls,
    planned,
)
from ..operands import any_autocast
from ..plan.choice import Decision, choose
from ..plan.kernels import KernelConfigs
from ..plan.pin import pinned
from . import library, reference


def _backward_with_one_pass(configs: KernelConfigs, dy, z, weight, lora_A, lora_B, scaling, dropout_p, seed):
    kernels = importlib.import_module("..kernels.grad", __package__)
    dz, dB = kernels.grad(dy, z, lora_B, scaling, lora_B.dtype, config=configs.grad)
    return library.input_gradient(dy, dz, weight, lora_A, dropout_p, seed), dB


_IMPLEMENTATIONS = Implementations(reference, library, f"{__package__}.fused", _backward_with_one_pass)


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
    run = direct("forward", impl, x, lora_A, weight, bias, dropout_p, seed)
    return forward_by(run, x, weight, lora_A, lora_B, bias, scaling, impl, dropout_p, seed)


def forward_by(
    run: Callable[..., Any] | None,
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
    """Compute y and z as forward() does, by what direct() has returned for it."""
    if run is not None:
        return run(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed)
    announce()
    return _forward_op(x, weight, lora_A, lora_B, bias, scaling, impl, dropout_p, seed)


def forward_decided(
    decision: Decision,
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
    """Compute y and z as forward() does, by what was decided for these operands. For the body of another
    operator, which nothing that watches sees into. weight: in the dtype of x.
    """
    if decision.takes_kernels and not holds_data(x):
        return forward(x, weight, lora_A, lora_B, bias, scaling, impl, dropout_p, seed)
    _check_dropout(dropout_p, seed)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return _run("forward", decision, x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed)


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
    if run := direct("backward", impl, dy, lora_A, weight, None, dropout_p, seed):
        return run(dy, z, weight, lora_A, lora_B, scaling, dropout_p, seed)
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
    if run := direct("backward_input", impl, dy, lora_A, weight, None, dropout_p, seed):
        return run(dy, weight, lora_A, lora_B, scaling, dropout_p, seed)
    announce()
    return _backward_input_op(dy, weight, lora_A, lora_B, scaling, impl, dropout_p, seed)


def backward_lora_B(dy: Tensor, z: Tensor, lora_B: Tensor, impl: str) -> Tensor:
    """Compute dB (N, R) alone, in the dtype of lora_B, of which no value is read."""
    if run := direct("backward_lora_B", impl, dy, lora_B):
        return run(dy, z, lora_B.dtype)
    announce()
    return _backward_lora_B_op(dy, z, lora_B, impl)


def direct(
    op: str,
    impl: str,
    x: Tensor,
    factor: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    fits: bool = False,
) -> Callable[..., Any] | None:
    """Return the implementation to call directly; None where the operator is needed, as for a cast.

    factor: lora_A (R, K), or lora_B (N, R) where there is no weight. fits: whether operands.fit holds, so
    that there is nothing to cast.
    """
    dropout = dropout_p != 0.0 and _check_dropout(dropout_p, seed)
    if is_compiling() or (dispatch_modes() and not open_to_direct_calls()):
        return None
    if not fits:
        dtype = x.dtype
        if (
            any_autocast()
            or (weight is not None and weight.dtype is not dtype)
            or (bias is not None and bias.dtype is not dtype)
        ):
            return None
    # As chosen() and plain() do: of a small layer every call counts.
    pin = pinned() if impl == "auto" or impl == "triton" else None
    choice = choose(impl, x.device, x.dtype, pin is not None and pin.needs_kernels(op))
    if choice.impl == "torch":
        return getattr(library, op)
    if choice.impl != "triton":
        return _IMPLEMENTATIONS.plain(op, choice.impl)
    sizes = partial(_sizes, factor, weight)
    return _IMPLEMENTATIONS.direct(op, planned(choice, pin, op, impl, x, sizes, bias is not None, dropout), x)


def _sizes(factor: Tensor, weight: Tensor | None) -> tuple[int, int, int]:
    if weight is None:
        N, R = factor.shape
        return N, 0, R
    return *weight.shape, factor.shape[0]


def _decide(
    op: str,
    impl: str,
    x: Tensor,
    factor: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    dropout: bool = False,
) -> Decision:
    """Arguments as of direct; dropout: whether there is one."""
    return decide(op, impl, x, partial(_sizes, factor, weight), bias is not None, dropout)


def _forward(x, weight, lora_A, lora_B, bias, scaling, impl, dropout_p=0.0, seed=None):
    dtype = x.dtype
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    dropout = _check_dropout(dropout_p, seed)
    decision = _decide("forward", impl, x, lora_A, weight, bias, dropout)
    return _run("forward", decision, x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed)


def _backward(dy, z, weight, lora_A, lora_B, scaling, impl, dropout_p=0.0, seed=None):
    if weight.dtype != dy.dtype:
        weight = weight.to(dy.dtype)
    dropout = _check_dropout(dropout_p, seed)
    decision = _decide("backward", impl, dy, lora_A, weight, dropout=dropout)
    return _run("backward", decision, dy, z, weight, lora_A, lora_B, scaling, dropout_p, seed)


def _backward_input(dy, weight, lora_A, lora_B, scaling, impl, dropout_p=0.0, seed=None):
    if weight.dtype != dy.dtype:
        weight = weight.to(dy.dtype)
    dropout = _check_dropout(dropout_p, seed)
    decision = _decide("backward_input", impl, dy, lora_A, weight, dropout=dropout)
    return _run("backward_input", decision, dy, weight, lora_A, lora_B, scaling, dropout_p, seed)


def _backward_lora_B(dy, z, lora_B, impl):
    decision = _decide("backward_lora_B", impl, dy, lora_B, None)
    return _run("backward_lora_B", decision, dy, z, lora_B.dtype)


def _check_dropout(dropout_p: float, seed: Tensor | None) -> bool:
    """Whether there is dropout. Raises ValueError for one without a seed."""
    if dropout_p and seed is None:
        raise ValueError(f"dropout of {dropout_p} needs a seed, an int64 tensor of shape (1,)")
    return bool(dropout_p)


def _run(op: str, decision: Decision, x: Tensor, *rest):
    return call(_IMPLEMENTATIONS.find(op, decision), x.device, x, *rest)


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


class LoRAFALinearFunction(torch.autograd.Function):
    """y (M, N) from x (M, K), weight (N, K), lora_A (R, K), lora_B (N, R), bias (N,) or None; gradients for
    x and lora_B only. how: scaling, impl and dropout_p, in one argument since torch handles each in Python.
    seed: int64 (1,), None where dropout_p is 0. inverse: (A Aᵀ + εI)⁻¹ (R, R) to correct dB by, or None.
    Both may be left away.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        how: tuple[float, str, float, Callable[..., Any] | None],
        seed: Tensor | None = None,
        inverse: Tensor | None = None,
    ) -> Tensor:
        scaling, impl, dropout_p, run = how
        if run is None:
            y, z = forward_by(None, x, weight, lora_A, lora_B, bias, scaling, impl, dropout_p, seed)
        else:
            y, z = run(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed)
        needs = ctx.needs_input_grad
        if not needs[0]:
            # dB takes its dtype and shape from lora_B, but no value of it; the mask is in z.
            ctx.save_for_backward(z, inverse, None, None, lora_B, None)
        elif needs[3]:
            ctx.save_for_backward(z, inverse, weight, lora_A, lora_B, seed)
        else:
            ctx.save_for_backward(None, None, weight, lora_A, lora_B, seed)
        ctx.how = how
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        return first_order(_gradients, ctx, dy) if torch.is_grad_enabled() else _gradients(ctx, dy)


# Where bare_apply says so.
bare_apply_linear = bare_apply(LoRAFALinearFunction)


def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of all that forward was given."""
    z, inverse, weight, lora_A, lora_B, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad
    scaling, impl, dropout_p, _ = ctx.how
    dx = dB = None
    if not needs[3]:
        dx = backward_input(dy, weight, lora_A, lora_B, scaling, impl, dropout_p, seed)
    elif not needs[0]:
        dB = backward_lora_B(dy, z, lora_B, impl)
    elif run := direct("backward", impl, dy, lora_A, weight, None, dropout_p, seed):
        dx, dB = run(dy, z, weight, lora_A, lora_B, scaling, dropout_p, seed)
    else:
        announce()
        dx, dB = _backward_op(dy, z, weight, lora_A, lora_B, scaling, impl, dropout_p, seed)
    if inverse is not None:
        dB = correct(dB, inverse, scaling)
    if len(needs) == 6:
        return dx, None, None, dB, None, None
    return dx, None, None, dB, None, None, None, None
