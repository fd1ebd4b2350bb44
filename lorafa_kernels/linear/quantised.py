"""A LoRA-FA linear layer on a quantised base: operators, autograd node, and the functions that check.

The formula is that of reference.py with W = base.dense(dtype of x). W is made for forward, freed at its end,
and made again in backward; for few rows a plan may read the codes in forward instead (base/reading.py).
Between them the node keeps, through save_for_backward only, what ops.py keeps, and in the place of the weight
the codes and scales of the base, the objects themselves. Each operator makes W and calls what ops.py would
call for a dense layer, so a compiler sees no W that it could keep.

quantised_forward(x, base, …, lora_A, lora_B, bias, scaling, impl, dropout_p, seed) -> (y, z)
quantised_backward(dy, z, base, …, lora_A, lora_B, scaling, impl, dropout_p, seed) -> (dx, dB)
quantised_backward_input(dy, base, …, lora_A, lora_B, scaling, impl, dropout_p, seed) -> dx

base, …: QuantisedBase in four arguments (base/product.py). The rest as in ops.py.
"""

from __future__ import annotations

import importlib
from functools import partial

import torch
from torch import Tensor

from ..base.frozen import QuantisedBase, base_of
from ..base.product import FrozenFunction, is_direct, parts_of, product
from ..base.reading import decide_forward, reads_codes
from ..correction import correct, gram_inverse
from ..dispatch import announce, call, define, first_order
from ..operands import (
    FLOAT_DTYPES,
    as_rows,
    autocast_enabled,
    cast,
    check_correction,
    check_frozen,
    check_shapes,
    check_tensor,
    checked_dropout,
    checked_scaling,
    draw_seed,
    shaped_as,
)
from ..plan.choice import Decision, check_impl
from . import ops

_BASE = "Tensor[] base, str kind, int[] shape, ScalarType dtype"


def quantised_linear(
    x: Tensor,
    base: QuantisedBase,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    gradient_correction: bool = False,
    impl: str = "auto",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute y = x Wᵀ + scaling · (x lora_Aᵀ) lora_Bᵀ + bias for the W (N, K) that `base` stands for.

    As lorafa_linear, which has the arguments and errors; those about the weight are about the dtype, shape
    and device of W, and about the tensors of the base. compute_dtype: what x, of any floating-point dtype, is
    cast to outside of autocast, y coming back in the dtype of x. None: x must have the dtype of W.
    """
    check_base(x, base, bias)
    check_tensor("lora_A", lora_A)
    check_tensor("lora_B", lora_B, frozen=False)
    check_shapes(x, base, lora_A, lora_B, bias)
    check_frozen(base, lora_A, bias)
    scaling = checked_scaling(scaling)
    dropout_p = checked_dropout(dropout_p, scaling)
    check_correction(gradient_correction, scaling)
    check_impl(impl)
    given, x = x, into_compute_dtype(x, base, lora_A, lora_B, bias, compute_dtype)
    rows = as_rows(x, base.shape[1])
    seed = draw_seed(x.device) if dropout_p else None
    if torch.is_grad_enabled() and (x.requires_grad or lora_B.requires_grad):
        inverse = gram_inverse(lora_A) if gradient_correction and lora_B.requires_grad else None
        how = (scaling, impl, dropout_p, seed, inverse, base.kind.name, base.shape, base.dtype)
        y = QuantisedLinearFunction.apply(rows, lora_A, lora_B, bias, *how, *base.tensors)
    else:
        y = forward(rows, base, lora_A, lora_B, bias, scaling, impl, dropout_p, seed)[0]
    return out_of_compute_dtype(shaped_as(y, x), given, compute_dtype)


def frozen_linear(
    x: Tensor, base: QuantisedBase, bias: Tensor | None = None, *, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """Compute y = x Wᵀ + bias (..., N) for x (..., K), with a gradient for x only. compute_dtype and errors
    as of quantised_linear.
    """
    check_base(x, base, bias)
    check_shapes(x, base, None, None, bias)
    if bias is not None and bias.requires_grad:
        raise ValueError("bias requires grad, but a quantised layer is frozen: bias.requires_grad_(False)")
    given, x = x, into_compute_dtype(x, base, base, base, bias, compute_dtype)
    rows = as_rows(x, base.shape[1])
    if torch.is_grad_enabled() and x.requires_grad:
        y = FrozenFunction.apply(rows, bias, base.kind.name, base.shape, base.dtype, *base.tensors)
    else:
        y = product(rows, base, bias)
    return out_of_compute_dtype(shaped_as(y, x), given, compute_dtype)


def into_compute_dtype(
    x: Tensor,
    base: QuantisedBase,
    lora_A: Tensor | QuantisedBase,
    lora_B: Tensor | QuantisedBase,
    bias: Tensor | None,
    compute_dtype: torch.dtype | None,
) -> Tensor:
    """Return x in the dtype to compute in: compute_dtype, or as operands.cast, which raises, where that is
    None and under autocast.
    """
    if compute_dtype is None or autocast_enabled(x.device.type):
        return cast(x, base, lora_A, lora_B, bias)
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x has dtype {x.dtype}, expected a floating-point one")
    return x.to(compute_dtype)


def out_of_compute_dtype(y: Tensor, given: Tensor, compute_dtype: torch.dtype | None) -> Tensor:
    """Return y in the dtype that the layer returns for an x `given` in its own."""
    if compute_dtype is None or autocast_enabled(given.device.type):
        return y
    return y.to(given.dtype)


def check_base(x: Tensor, base: QuantisedBase, bias: Tensor | None) -> None:
    """Raise TypeError or ValueError, naming it, for an operand of a frozen layer that is no plain tensor, or
    a tensor of the base that does not fit.
    """
    check_tensor("x", x, frozen=False)
    for name, tensor in zip(base.kind.names, base.tensors, strict=True):
        check_tensor(name, tensor)
    base.check()
    if bias is not None:
        check_tensor("bias", bias)


def forward(
    x: Tensor,
    base: QuantisedBase,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    impl: str,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute y (M, N) and z (M, R) in the dtype of x."""
    operands = lora_A, lora_B, bias, scaling, impl, dropout_p, seed
    if is_direct(x):
        return _forward_of(x, base, *operands)
    announce()
    return _forward_op(x, *parts_of(base), *operands)


def backward(
    dy: Tensor,
    z: Tensor,
    base: QuantisedBase,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    impl: str,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute dx (M, K) in the dtype of dy and dB (N, R) in the dtype of lora_B."""
    operands = lora_A, lora_B, scaling, impl, dropout_p, seed
    if is_direct(dy):
        return _backward_of(dy, z, base, *operands)
    announce()
    return _backward_op(dy, z, *parts_of(base), *operands)


def backward_input(
    dy: Tensor,
    base: QuantisedBase,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    impl: str,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Compute dx (M, K) alone."""
    operands = lora_A, lora_B, scaling, impl, dropout_p, seed
    if is_direct(dy):
        return _backward_input_of(dy, base, *operands)
    announce()
    return _backward_input_op(dy, *parts_of(base), *operands)


def forward_decided(
    decision: Decision,
    x: Tensor,
    base: QuantisedBase,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    impl: str,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute y and z as forward() does, as base/reading.py decided for these operands. For the body of an
    operator.
    """
    if reads_codes(decision):
        fused = importlib.import_module(".fused", __package__)
        bias = None if bias is None else bias.to(x.dtype)
        operands = x, base, lora_A, lora_B, bias, scaling, dropout_p, seed
        return call(partial(fused.forward_of_codes, plan=decision.plan.kernels), x.device, *operands)
    weight = call(base.dense, x.device, x.dtype, impl)
    return ops.forward_decided(decision, x, weight, lora_A, lora_B, bias, scaling, impl, dropout_p, seed)


def _forward_of(x, base, lora_A, lora_B, bias, scaling, impl, dropout_p, seed):
    decision = decide_forward(x, base, lora_A.shape[0], bias is not None, dropout_p > 0, impl)
    return forward_decided(decision, x, base, lora_A, lora_B, bias, scaling, impl, dropout_p, seed)


def _backward_of(dy, z, base, lora_A, lora_B, scaling, impl, dropout_p, seed):
    weight = call(base.dense, dy.device, dy.dtype, impl)
    return ops.backward(dy, z, weight, lora_A, lora_B, scaling, impl, dropout_p, seed)


def _backward_input_of(dy, base, lora_A, lora_B, scaling, impl, dropout_p, seed):
    weight = call(base.dense, dy.device, dy.dtype, impl)
    return ops.backward_input(dy, weight, lora_A, lora_B, scaling, impl, dropout_p, seed)


def _forward(x, base, kind, shape, dtype, lora_A, lora_B, bias, scaling, impl, dropout_p=0.0, seed=None):
    held = base_of(kind, base, shape, dtype)
    return _forward_of(x, held, lora_A, lora_B, bias, scaling, impl, dropout_p, seed)


def _backward(dy, z, base, kind, shape, dtype, lora_A, lora_B, scaling, impl, dropout_p=0.0, seed=None):
    held = base_of(kind, base, shape, dtype)
    return _backward_of(dy, z, held, lora_A, lora_B, scaling, impl, dropout_p, seed)


def _backward_input(dy, base, kind, shape, dtype, lora_A, lora_B, scaling, impl, dropout_p=0.0, seed=None):
    held = base_of(kind, base, shape, dtype)
    return _backward_input_of(dy, held, lora_A, lora_B, scaling, impl, dropout_p, seed)


def _forward_fake(x, base, kind, shape, dtype, lora_A, lora_B, bias, scaling, impl, dropout_p=0.0, seed=None):
    M = x.shape[0]
    return x.new_empty((M, shape[0])), x.new_empty((M, lora_A.shape[0]))


def _backward_fake(dy, z, base, kind, shape, dtype, lora_A, lora_B, scaling, impl, dropout_p=0.0, seed=None):
    dx = _backward_input_fake(dy, base, kind, shape, dtype, lora_A, lora_B, scaling, impl)
    return dx, dy.new_empty(lora_B.shape, dtype=lora_B.dtype)


def _backward_input_fake(
    dy, base, kind, shape, dtype, lora_A, lora_B, scaling, impl, dropout_p=0.0, seed=None
):
    return dy.new_empty((dy.shape[0], shape[1]))


_FACTORS = "Tensor lora_A, Tensor lora_B"
_HOW = "float scaling, str impl, float dropout_p=0.0, Tensor? seed=None"
_forward_op = define(
    "quantised_forward",
    f"(Tensor x, {_BASE}, {_FACTORS}, Tensor? bias, {_HOW}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "quantised_backward",
    f"(Tensor dy, Tensor z, {_BASE}, {_FACTORS}, {_HOW}) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_backward_input_op = define(
    "quantised_backward_input",
    f"(Tensor dy, {_BASE}, {_FACTORS}, {_HOW}) -> Tensor",
    _backward_input,
    _backward_input_fake,
)


class QuantisedLinearFunction(torch.autograd.Function):
    """y (M, N) from x (M, K), lora_A (R, K), lora_B (N, R), bias (N,) or None, and the tensors of a base of W
    (N, K); gradients for x and lora_B only. seed: int64 (1,), None where dropout_p is 0. inverse: as in
    ops.py.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scaling: float,
        impl: str,
        dropout_p: float,
        seed: Tensor | None,
        inverse: Tensor | None,
        kind: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        *tensors: Tensor,
    ) -> Tensor:
        base = base_of(kind, tensors, shape, dtype)
        y, z = forward(x, base, lora_A, lora_B, bias, scaling, impl, dropout_p, seed)
        need_dx, _, need_dB, *_ = ctx.needs_input_grad
        if need_dx:
            of_dB = (z, inverse) if need_dB else (None, None)
            ctx.save_for_backward(*of_dB, lora_A, lora_B, seed, *tensors)
        else:
            ctx.save_for_backward(z, inverse, None, lora_B, None)
        ctx.base = kind, shape, dtype
        ctx.how = scaling, impl, dropout_p
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        dx, dB = first_order(_gradients, ctx, dy)
        return (dx, None, dB, *(None for _ in ctx.needs_input_grad[3:]))


def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    z, inverse, lora_A, lora_B, seed, *tensors = ctx.saved_tensors
    need_dx, _, need_dB, *_ = ctx.needs_input_grad
    scaling, impl, dropout_p = ctx.how
    if need_dx:
        kind, shape, dtype = ctx.base
        base = base_of(kind, tensors, shape, dtype)
        how = scaling, impl, dropout_p, seed
        if not need_dB:
            return backward_input(dy, base, lora_A, lora_B, *how), None
        dx, dB = backward(dy, z, base, lora_A, lora_B, *how)
    else:
        dx, dB = None, ops.backward_lora_B(dy, z, lora_B, impl)
    return dx, dB if inverse is None else correct(dB, inverse, scaling)
