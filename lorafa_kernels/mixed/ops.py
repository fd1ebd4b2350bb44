"""Operators of a layer whose rows have adapters of their own, and its autograd node: schemas, shape
functions, the call of one implementation and what is kept for backward, as linear/ops.py has them for one
adapter.

mixed_forward(x, weight, lora_As, lora_Bs, bias, index, places, numbers, scalings, dropout_ps, seed, impl)
    -> (y, z)
mixed_backward(dy, z, weight, lora_As, lora_Bs, index, places, numbers, scalings, dropout_ps, seed, need_dx,
               need_dBs, impl) -> (dx, dBs), what is needed of them

Shapes and dtypes as in reference.py. lora_As and lora_Bs have one entry per adapter; one lora_A object may
stand in several. weight and bias may have another dtype than x (under autocast): they are cast here, into
temporaries that end with the call. seed is None without dropout.

impl="auto" takes the library's products on every device, unless a plan "fused" is pinned: the kernels were
never timed on a GPU.

The node keeps, through save_for_backward only: z (M, R) if a lora_B needs a gradient, R the largest rank; the
index (B,) int32, one object for all layers; the weight, lora_A and lora_B objects themselves, and the seed of
dropout, if x needs a gradient. It keeps neither x nor an output. For corrected dBs it keeps the inverses
(R_i, R_i) that correction.py has made.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..dispatch import (
    announce,
    call,
    define,
    first_order,
    functorch_level,
    open_to_direct_calls,
    tracing_state,
)
from ..group.operands import corrected
from ..plan.choice import choose_mixed, plan_mixed
from ..plan.pin import pinned
from . import library, reference


def mixed_forward(
    x: Tensor,
    weight: Tensor,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    bias: Tensor | None,
    index: Tensor,
    places: Sequence[int],
    numbers: Sequence[int],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    seed: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Compute y (M, N) and z (M, R) in the dtype of x."""
    arguments = (x, weight, lora_As, lora_Bs, bias, index, places, numbers, scalings, dropout_ps, seed)
    if _direct(x, weight, bias) and (run := _found(impl, "forward", x, weight, lora_Bs, seed, direct=True)):
        return run(*arguments)
    announce()
    return _forward_op(*arguments, impl)


def mixed_backward(
    dy: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    index: Tensor,
    places: Sequence[int],
    numbers: Sequence[int],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    seed: Tensor | None,
    need_dx: bool,
    need_dBs: Sequence[bool],
    impl: str,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Compute dx (M, K), None unless needed, and the dB_i (N, R_i) that are needed. z may be None where no dB
    is needed; where dx is not, weight is not read and may be None.
    """
    arguments = (dy, z, weight, lora_As, lora_Bs, index, places, numbers, scalings, dropout_ps, seed)
    if _direct(dy, weight, None) and (
        run := _found(impl, "backward", dy, weight, lora_Bs, seed, direct=True)
    ):
        return run(*arguments, need_dx, need_dBs)
    announce()
    found = iter(_backward_op(*arguments, need_dx, need_dBs, impl))
    return next(found) if need_dx else None, [next(found) if need else None for need in need_dBs]


def _direct(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the implementation may be called as it is, without its operator."""
    return open_to_direct_calls() and all(t is None or t.dtype == x.dtype for t in (weight, bias))


def _found(
    impl: str,
    op: str,
    rows: Tensor,
    weight: Tensor | None,
    lora_Bs: Sequence[Tensor],
    seed: Tensor | None,
    direct: bool = False,
) -> Callable | None:
    """The function that computes `op`. direct: as it is called without its operator, or None where that must
    be called, as in dispatch.Implementations.direct.
    """
    pin = pinned() if impl == "auto" else None
    choice = choose_mixed(impl, op, rows.device, rows.dtype, pin)
    if choice.impl != "triton":
        return getattr(library if choice.impl == "torch" else reference, op)
    if direct and (type(rows) is not Tensor or tracing_state() is not None or functorch_level() is not None):
        return None
    N, K = (rows.shape[1], 0) if weight is None else weight.shape
    R = max(B.shape[1] for B in lora_Bs)
    plan = plan_mixed(op, rows.device, rows.dtype, N, K, R, seed is not None)
    run = partial(getattr(importlib.import_module(f"{__package__}.fused"), op), plan=plan)
    return partial(call, run, rows.device) if direct else run


def _forward(x, weight, lora_As, lora_Bs, bias, index, places, numbers, scalings, dropout_ps, seed, impl):
    weight, bias = _cast(weight, x.dtype), _cast(bias, x.dtype)
    run = _found(impl, "forward", x, weight, lora_Bs, seed)
    arguments = (lora_As, lora_Bs, bias, index, places, numbers, scalings, dropout_ps, seed)
    return call(run, x.device, x, weight, *arguments)


def _backward(dy, z, weight, *arguments):
    *arguments, need_dx, need_dBs, impl = arguments
    weight = _cast(weight, dy.dtype) if need_dx else None
    run = _found(impl, "backward", dy, weight, arguments[1], arguments[7])
    dx, dBs = call(run, dy.device, dy, z, weight, *arguments, need_dx, need_dBs)
    return [grad for grad in (dx, *dBs) if grad is not None]


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _forward_fake(
    x, weight, lora_As, lora_Bs, bias, index, places, numbers, scalings, dropout_ps, seed, impl
):
    M = x.shape[0]
    return x.new_empty((M, weight.shape[0])), x.new_empty((M, max(A.shape[0] for A in lora_As)))


def _backward_fake(dy, z, weight, lora_As, lora_Bs, *arguments):
    *_, need_dx, need_dBs, _ = arguments
    dBs = [dy.new_empty(B.shape, dtype=B.dtype) for B, need in zip(lora_Bs, need_dBs, strict=True) if need]
    return [dy.new_empty((dy.shape[0], lora_As[0].shape[1])), *dBs] if need_dx else dBs


_forward_op = define(
    "mixed_forward",
    "(Tensor x, Tensor weight, Tensor[] lora_As, Tensor[] lora_Bs, Tensor? bias, Tensor index, int[] places,"
    " int[] numbers, float[] scalings, float[] dropout_ps, Tensor? seed, str impl) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "mixed_backward",
    "(Tensor dy, Tensor? z, Tensor? weight, Tensor[] lora_As, Tensor[] lora_Bs, Tensor index, int[] places,"
    " int[] numbers, float[] scalings, float[] dropout_ps, Tensor? seed, bool need_dx, bool[] need_dBs,"
    " str impl) -> Tensor[]",
    _backward,
    _backward_fake,
)


class LoRAFAMixedFunction(torch.autograd.Function):
    """y (M, N) from x (M, K), weight (N, K), bias (N,) or None and n lora_Bs (N, R_i), then n places for each
    of lora_As and inverses; gradients for x and the lora_Bs only. `how`: places, numbers, scalings,
    dropout_ps and impl.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, index, seed, how, *operands):
        places, numbers, scalings, dropout_ps, impl = how
        n = len(numbers)
        lora_Bs, lora_As, inverses = operands[:n], operands[n : 2 * n], operands[2 * n :]
        y, z = mixed_forward(
            x, weight, lora_As, lora_Bs, bias, index, places, numbers, scalings, dropout_ps, seed, impl
        )
        need_dx, need_dBs = _needs(ctx, n)
        z = z if any(need_dBs) else None
        if need_dx:
            ctx.save_for_backward(z, index, *inverses, *lora_Bs, weight, *lora_As, seed)
        else:
            # A dB takes its dtype and shape from lora_B, but no value of it; the mask is in z.
            ctx.save_for_backward(z, index, *inverses, *lora_Bs)
        ctx.how = how
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        n = len(ctx.how[1])
        dx, *dBs = first_order(_gradients, ctx, dy)
        return dx, None, None, None, None, None, *dBs, *[None] * (2 * n)


def _needs(ctx, n: int) -> tuple[bool, list[bool]]:
    """Whether x, and which of the n lora_B, need a gradient."""
    return ctx.needs_input_grad[0], list(ctx.needs_input_grad[6 : 6 + n])


def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return dx and the dB_i."""
    places, numbers, scalings, dropout_ps, impl = ctx.how
    n = len(numbers)
    z, index, *rest = ctx.saved_tensors
    inverses, lora_Bs, rest = rest[:n], rest[n : 2 * n], rest[2 * n :]
    need_dx, need_dBs = _needs(ctx, n)
    weight, lora_As, seed = None, lora_Bs, None
    if need_dx:
        weight, lora_As, seed = rest[0], rest[1 : 1 + n], rest[1 + n]
    dx, dBs = mixed_backward(
        dy,
        z,
        weight,
        lora_As,
        lora_Bs,
        index,
        places,
        numbers,
        scalings,
        dropout_ps,
        seed,
        need_dx,
        need_dBs,
        impl,
    )
    return dx, *corrected(dBs, inverses, scalings)
