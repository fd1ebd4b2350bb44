"""Products with a quantised base, and the autograd node of a layer that is frozen as a whole.

    product(x, base, bias)    y (M, N) = x Wᵀ + bias, in the dtype of x (M, K)
    gradient(dy, base)        dx (M, K) = dy W, in the dtype of dy (M, N)

W (N, K) is made for the call and freed after it, and again in backward; where plan/ says so, product() reads
the codes and makes no W (reading.py). The node keeps the codes and scales,
by reference, and neither W nor x. Each is an operator of its own (dispatch.py), so that a compiler cannot
keep W from the one for the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import announce, call, define, first_order, open_to_direct_calls
from .frozen import QuantisedBase, base_of
from .reading import product_of_codes, reading_config

_BASE = "Tensor[] base, str kind, int[] shape, ScalarType dtype"


def parts_of(base: QuantisedBase) -> tuple[list[Tensor], str, tuple[int, int], torch.dtype]:
    """A base as the operators take it, in four arguments."""
    return list(base.tensors), base.kind.name, base.shape, base.dtype


def is_direct(x: Tensor) -> bool:
    """Whether what an operator computes from x is called without it."""
    return type(x) is Tensor and open_to_direct_calls()


def product(x: Tensor, base: QuantisedBase, bias: Tensor | None) -> Tensor:
    """Compute y (M, N) in the dtype of x (M, K)."""
    if is_direct(x):
        return call(_product_of, x.device, x, base, bias)
    announce()
    return _product_op(x, *parts_of(base), bias)


def gradient(dy: Tensor, base: QuantisedBase) -> Tensor:
    """Compute dx (M, K) in the dtype of dy (M, N)."""
    if is_direct(dy):
        return call(_gradient_of, dy.device, dy, base)
    announce()
    return _gradient_op(dy, *parts_of(base))


def _product_of(x: Tensor, base: QuantisedBase, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    if config := reading_config(x, base, bias is not None):
        return product_of_codes(x, base, bias, config=config)
    return F.linear(x, base.dense(x.dtype), bias)


def _gradient_of(dy: Tensor, base: QuantisedBase) -> Tensor:
    return dy.mm(base.dense(dy.dtype))


def _product(x, base, kind, shape, dtype, bias):
    return call(_product_of, x.device, x, base_of(kind, base, shape, dtype), bias)


def _gradient(dy, base, kind, shape, dtype):
    return call(_gradient_of, dy.device, dy, base_of(kind, base, shape, dtype))


_product_op = define(
    "frozen_product",
    f"(Tensor x, {_BASE}, Tensor? bias) -> Tensor",
    _product,
    lambda x, base, kind, shape, dtype, bias: x.new_empty((x.shape[0], shape[0])),
)
_gradient_op = define(
    "frozen_gradient",
    f"(Tensor dy, {_BASE}) -> Tensor",
    _gradient,
    lambda dy, base, kind, shape, dtype: dy.new_empty((dy.shape[0], shape[1])),
)


class FrozenFunction(torch.autograd.Function):
    """y (M, N) from x (M, K), the parts of a base and bias (N,) or None; a gradient for x only."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        bias: Tensor | None,
        kind: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.how = kind, shape, dtype
        return product(x, base_of(kind, tensors, shape, dtype), bias)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (dx,) = first_order(_input_gradient, ctx, dy)
        return (dx, *(None for _ in ctx.needs_input_grad[1:]))


def _input_gradient(ctx, dy: Tensor) -> tuple[Tensor]:
    kind, shape, dtype = ctx.how
    return (gradient(dy, base_of(kind, ctx.saved_tensors, shape, dtype)),)
