"""Operators of linear layers that share an input and their autograd node: schemas, shape functions, the call
of one implementation and what is kept for backward, as linear/ops.py has them for one layer.

group_forward(x, weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A, impl) -> (ys, z)
group_backward(dys, z, weights, lora_As, lora_Bs, scalings, dropout_ps, seeds, share_A, need_dx, need_dBs,
               impl) -> (dx, dBs)

Lists have one entry per member (one linear layer); shapes, dtypes and what may be None as in reference.py.
weights and biases may have another dtype than x (under autocast): they are cast here, into temporaries that
end with the call. seeds is None without dropout.

The plan is that of a single layer as wide as all members together. The passes over wide rows and the launches
for few rows, which decide between fused kernels and library products, grow in the same way in both.

The node keeps, through save_for_backward only: one z (M, ΣR), with share_A (M, R), if a lora_B needs a
gradient; the weight, lora_A and lora_B objects themselves, and the seeds of dropout, if x needs one. It keeps
neither x nor an output. For corrected dBs it keeps the inverses (R, R) that correction.py has made.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import (
    Implementations,
    announce,
    call,
    decide,
    define,
    first_order,
    open_to_direct_calls,
)
from ..linear import ops as linear
from ..plan.choice import Decision
from . import library, reference
from .operands import corrected, rank_columns


def _backward_with_one_pass(
    configs, dys, z, weights, lora_As, lora_Bs, scalings, dropout_ps, seeds, share_A, need_dx, need_dBs
):
    grad = importlib.import_module("..kernels.grad", __package__).grad
    dBs: list[Tensor | None] = [None] * len(dys)
    parts = []
    columns = rank_columns(lora_Bs, share_A)
    for i, (dy, lora_B) in enumerate(zip(dys, lora_Bs, strict=True)):
        if dy is None or lora_B is None:
            continue
        if need_dBs[i]:
            part = z[:, slice(*columns[i])]
            dz, dBs[i] = grad(dy, part, lora_B, scalings[i], lora_B.dtype, config=configs.grad)
            parts.append(dz)
        else:
            parts.append(library.low_rank_gradient([dy], [lora_B], [scalings[i]], False))
    # Members that share lora_A have one dz, their sum.
    dz = sum(parts[1:], parts[0]) if share_A else torch.cat(parts, dim=1)
    return library.input_gradient(dys, dz, weights, lora_As, dropout_ps, seeds, share_A), dBs


IMPLEMENTATIONS = Implementations(reference, library, f"{__package__}.fused", _backward_with_one_pass)


def group_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    seeds: Tensor | None,
    share_A: bool,
    impl: str,
) -> tuple[list[Tensor], Tensor]:
    """Compute the y_i (M, N_i) and z (M, ΣR), with share_A (M, R), in the dtype of x."""
    if len(weights) == 1 and lora_Bs[0] is not None:
        # A layer by itself, whose way to its implementation is shorter.
        layer = weights[0], lora_As[0], lora_Bs[0], biases[0], scalings[0], impl
        y, z = linear.forward(x, *layer, *_dropout_of_layer(dropout_ps, seeds))
        return [y], z
    arguments = (x, weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A)
    if run := _direct("forward", impl, x, weights, lora_Bs, share_A, biases, seeds is not None):
        return run(*arguments)
    announce()
    *ys, z = _forward_op(*arguments, impl)
    return ys, z


def group_backward(
    dys: Sequence[Tensor | None],
    z: Tensor | None,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    seeds: Tensor | None,
    share_A: bool,
    need_dx: bool,
    need_dBs: Sequence[bool],
    impl: str,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Compute dx (M, K) in the dtype of the dy_i, None unless needed, and the dB_i (N_i, R_i) that are
    needed, in the dtypes of the lora_B_i. At least one dy_i must be there. z may be None where no dB is
    needed; where dx is not, weights and lora_As are not read, and their entries may be None.
    """
    if len(dys) == 1 and lora_Bs[0] is not None:
        return _layer_backward(
            dys[0],
            z,
            weights[0],
            lora_As[0],
            lora_Bs[0],
            scalings[0],
            impl,
            dropout_ps,
            seeds,
            need_dx,
            need_dBs[0],
        )
    need_dBs = [need and dy is not None for need, dy in zip(need_dBs, dys, strict=True)]
    dy = next(dy for dy in dys if dy is not None)
    op = "backward_lora_B" if not need_dx else "backward" if any(need_dBs) else "backward_input"
    arguments = (dys, z, weights, lora_As, lora_Bs, scalings, dropout_ps, seeds, share_A, need_dx, need_dBs)
    if run := _direct(op, impl, dy, weights, lora_Bs, share_A, dropout=seeds is not None):
        return run(*arguments)
    announce()
    found = iter(_backward_op(*arguments, impl))
    return next(found) if need_dx else None, [next(found) if need else None for need in need_dBs]


def _layer_backward(
    dy, z, weight, lora_A, lora_B, scaling, impl, dropout_ps, seeds, need_dx, need_dB
) -> tuple[Tensor | None, list[Tensor | None]]:
    """group_backward of a single layer."""
    layer = weight, lora_A, lora_B, scaling, impl
    if not need_dx:
        return None, [linear.backward_lora_B(dy, z, lora_B, impl) if need_dB else None]
    dropout = _dropout_of_layer(dropout_ps, seeds)
    if not need_dB:
        return linear.backward_input(dy, *layer, *dropout), [None]
    dx, dB = linear.backward(dy, z, *layer, *dropout)
    return dx, [dB]


def _dropout_of_layer(dropout_ps: Sequence[float], seeds: Tensor | None) -> tuple[float, Tensor | None]:
    """Return the dropout of a single layer: none where the group has drawn no seed."""
    return (0.0, None) if seeds is None else (dropout_ps[0], seeds)


def _direct(
    op: str,
    impl: str,
    x: Tensor,
    weights: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    share_A: bool,
    biases: Sequence[Tensor | None] = (),
    dropout: bool = False,
) -> Callable[..., Any] | None:
    """Return the implementation to call directly; None where the operator is needed, as for a cast.
    op: one of plan.recipe.OPERATIONS. dropout: whether there is one.
    """
    if not open_to_direct_calls():
        return None
    dtype = x.dtype
    for tensor in (*weights, *biases):
        if tensor is not None and tensor.dtype != dtype:
            return None
    decision = decide_group(op, impl, x, weights, lora_Bs, share_A, biases, dropout)
    return IMPLEMENTATIONS.direct("forward" if op == "forward" else "backward", decision, x)


def decide_group(
    op: str,
    impl: str,
    x: Tensor,
    weights: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    share_A: bool,
    biases: Sequence[Tensor | None] = (),
    dropout: bool = False,
) -> Decision:
    """Arguments as of _direct."""

    def sizes() -> tuple:
        widths, R, makers = [], 1, 0
        for weight, lora_B in zip(weights, lora_Bs, strict=True):
            if lora_B is not None:
                makers += 1
                if (rank := lora_B.shape[1]) > R:
                    R = rank
            wide = lora_B if weight is None else weight
            widths.append(wide.shape[0] if wide is not None else 0)
        K = 0 if op == "backward_lora_B" else weights[0].shape[1]
        return sum(widths), K, R, tuple(widths), min(makers, 1) if share_A else makers

    return decide(op, impl, x, sizes, any(bias is not None for bias in biases), dropout)


def _forward(x, weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A, impl):
    weights, biases = cast_all(weights, x.dtype), cast_all(biases, x.dtype)
    decision = decide_group("forward", impl, x, weights, lora_Bs, share_A, biases, seeds is not None)
    arguments = (x, weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A)
    ys, z = call(IMPLEMENTATIONS.find("forward", decision), x.device, *arguments)
    return [*ys, z]


def _backward(
    dys, z, weights, lora_As, lora_Bs, scalings, dropout_ps, seeds, share_A, need_dx, need_dBs, impl
):
    dy = next(dy for dy in dys if dy is not None)
    if need_dx:
        weights = cast_all(weights, dy.dtype)
    op = "backward_lora_B" if not need_dx else "backward" if any(need_dBs) else "backward_input"
    decision = decide_group(op, impl, dy, weights, lora_Bs, share_A, dropout=seeds is not None)
    arguments = (dys, z, weights, lora_As, lora_Bs, scalings, dropout_ps, seeds, share_A, need_dx, need_dBs)
    dx, dBs = call(IMPLEMENTATIONS.find("backward", decision), dy.device, *arguments)
    return [grad for grad in (dx, *dBs) if grad is not None]


def cast_all(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors]


def _forward_fake(x, weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A, impl):
    M = x.shape[0]
    width = max(last for _, last in rank_columns(lora_Bs, share_A))
    return [*(x.new_empty((M, weight.shape[0])) for weight in weights), x.new_empty((M, width))]


def _backward_fake(
    dys, z, weights, lora_As, lora_Bs, scalings, dropout_ps, seeds, share_A, need_dx, need_dBs, impl
):
    dy = next(dy for dy in dys if dy is not None)
    dBs = [
        dy.new_empty(lora_B.shape, dtype=lora_B.dtype)
        for lora_B, need in zip(lora_Bs, need_dBs, strict=True)
        if need
    ]
    return [dy.new_empty((dy.shape[0], weights[0].shape[1])), *dBs] if need_dx else dBs


_forward_op = define(
    "group_forward",
    "(Tensor x, Tensor[] weights, Tensor?[] lora_As, Tensor?[] lora_Bs, Tensor?[] biases, float[] scalings,"
    " float[] dropout_ps, Tensor? seeds, bool share_A, str impl) -> Tensor[]",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "group_backward",
    "(Tensor?[] dys, Tensor? z, Tensor?[] weights, Tensor?[] lora_As, Tensor?[] lora_Bs, float[] scalings,"
    " float[] dropout_ps, Tensor? seeds, bool share_A, bool need_dx, bool[] need_dBs, str impl) -> Tensor[]",
    _backward,
    _backward_fake,
)


class LoRAFALinearGroupFunction(torch.autograd.Function):
    """The y_i (M, N_i) from x (M, K) and n weights, lora_Bs, biases, lora_As and inverses (A Aᵀ + εI)⁻¹ to
    correct dB by, in this order, with None for what a member lacks, and with share_A a single lora_A and
    inverse if there is an adapter; gradients for x and the lora_Bs only.
    """

    @staticmethod
    def forward(ctx, x, seeds, scalings, dropout_ps, share_A, impl, *operands):
        n = len(scalings)
        weights, lora_Bs, biases, kept = cut_off(operands, n, 3)
        kept_As, inverses = halves(kept)
        lora_As = each_lora_A(kept_As, lora_Bs, share_A)
        ys, z = group_forward(
            x, weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A, impl
        )
        need_dx, need_dBs = _needs(ctx, n)
        ctx.set_materialize_grads(False)
        z = z if any(need_dBs) else None
        if need_dx:
            ctx.save_for_backward(z, seeds, *lora_Bs, *inverses, *weights, *kept_As)
        else:
            # A dB takes its dtype and shape from lora_B, z its columns from all of them, but no value.
            ctx.save_for_backward(z, None, *lora_Bs, *inverses)
        ctx.scalings = scalings
        ctx.dropout_ps = dropout_ps
        ctx.share_A = share_A
        ctx.impl = impl
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        dx, *dBs = first_order(_gradients, ctx, dys)
        n, operands = len(dys), len(ctx.needs_input_grad) - 6
        return dx, *[None] * (5 + n), *dBs, *[None] * (operands - 2 * n)


def _needs(ctx, n: int) -> tuple[bool, list[bool]]:
    """Whether x, and which of the n lora_B, need a gradient."""
    first = 6 + n
    return ctx.needs_input_grad[0], list(ctx.needs_input_grad[first : first + n])


def cut_off(tensors: Sequence[Tensor | None], n: int, count: int) -> list[Sequence[Tensor | None]]:
    """Cut off `count` parts of n tensors each, and the rest."""
    return [*(tensors[i * n : (i + 1) * n] for i in range(count)), tensors[count * n :]]


def halves(tensors: Sequence[Tensor | None]) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    middle = len(tensors) // 2
    return tensors[:middle], tensors[middle:]


def each_lora_A(
    kept: Sequence[Tensor | None], lora_Bs: Sequence[Tensor | None], share_A: bool
) -> Sequence[Tensor | None]:
    """Return one lora_A (or inverse) for each member, None where it has no lora_B, from what the node takes
    and keeps.
    """
    return [None if lora_B is None else kept[0] for lora_B in lora_Bs] if share_A else kept


def _gradients(ctx, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return dx and the dB_i."""
    n = len(dys)
    if all(dy is None for dy in dys):
        return (None,) * (1 + n)
    need_dx, need_dBs = _needs(ctx, n)
    z, seeds, *rest = ctx.saved_tensors
    lora_Bs, rest = rest[:n], rest[n:]
    weights = lora_As = [None] * n
    inverses = rest
    if need_dx:
        # Inverses and lora_As, as many as each other, stand before and after the weights.
        count = (len(rest) - n) // 2
        inverses, weights, kept_As = rest[:count], rest[count : count + n], rest[count + n :]
        lora_As = each_lora_A(kept_As, lora_Bs, ctx.share_A)
    dx, dBs = group_backward(
        dys,
        z,
        weights,
        lora_As,
        lora_Bs,
        ctx.scalings,
        ctx.dropout_ps,
        seeds,
        ctx.share_A,
        need_dx,
        need_dBs,
        ctx.impl,
    )
    return dx, *corrected(dBs, each_lora_A(inverses, lora_Bs, ctx.share_A), ctx.scalings)
