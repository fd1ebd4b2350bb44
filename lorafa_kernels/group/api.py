"""lorafa_linear_group: linear layers that share an input, as one autograd node.

Kept for backward, through save_for_backward alone: one z (M, ΣR) if a lora_B needs a gradient, with share_A
(M, R); the weight, lora_A and lora_B objects themselves if x needs one, and the seeds of the dropout masks.
Not x, and no output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..linear.api import cast, check_frozen, check_shapes, check_tensors, checked_dropout, checked_scaling
from ..linear.node import RefuseSecondBackward
from ..plan.choice import check_impl
from . import ops
from .operands import LinearOperands


def lorafa_linear_group(
    x: Tensor, members: Sequence[LinearOperands], *, share_A: bool = False, impl: str = "auto"
) -> tuple[Tensor, ...]:
    """Apply linear layers to one x: y_i = x weight_iᵀ + s_i · (x lora_A_iᵀ) lora_B_iᵀ + bias_i.

    As lorafa_linear for each member, in one autograd node: one pass over x for all z, and one dx, written
    once, where autograd would add up one from each layer. Gradients flow to x and to each lora_B only.

    Args:
        x: (..., K), fp32, bf16, fp16 or fp64. Any strides.
        members: at least one; weights (N_i, K) of one K, dtype and device. A member without lora_A and
            lora_B is a plain frozen linear layer. Dropout masks are drawn for each member on its own.
        share_A: the adapted members have the same lora_A object, scaling and dropout: z is computed, and
            kept, once; they share one dropout mask.
        impl: "auto", "triton", "torch" or "reference"; plan/choice.py has the rule of "auto".

    Returns:
        y_i (..., N_i) for each member, separate tensors in the dtype of x, or autocast's under autocast.

    Raises:
        ValueError: no members; members that disagree in K, dtype or device; with share_A in lora_A, scaling
            or dropout; one of lora_A and lora_B without the other; and what lorafa_linear raises it for.
        TypeError: a share_A that is no bool; members that are no sequence of LinearOperands; and what
            lorafa_linear raises it for.
        RuntimeError: as lorafa_linear.
    """
    check_impl(impl)
    x, members = _checked(x, members, share_A)
    K = members[0].weight.shape[1]
    rows = x if x.dim() == 2 else x.reshape(-1, K) if K else x.reshape(math.prod(x.shape[:-1]), 0)

    weights, biases, lora_As, lora_Bs, scalings, dropout_ps = map(list, zip(*members, strict=True))
    seeds = None
    if any(p and lora_B is not None for p, lora_B in zip(dropout_ps, lora_Bs, strict=True)):
        count = 1 if share_A else len(members)
        seeds = torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64, device=x.device)
    if torch.is_grad_enabled() and (
        x.requires_grad or any(B is not None and B.requires_grad for B in lora_Bs)
    ):
        # Each object once: torch.compile takes no tensor twice.
        kept_As = _first(lora_As) if share_A else lora_As
        ys = LoRAFALinearGroupFunction.apply(
            rows, seeds, scalings, dropout_ps, share_A, impl, *weights, *lora_Bs, *biases, *kept_As
        )
    else:
        ys, _ = ops.group_forward(
            rows, weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A, impl
        )
    if x.dim() == 2:
        return tuple(ys)
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


class LoRAFALinearGroupFunction(torch.autograd.Function):
    """The y_i (M, N_i) from x (M, K) and n weights, lora_Bs, biases and lora_As, in this order, with None for
    what a member lacks, and with share_A a single lora_A if there is one; gradients for x and the lora_Bs
    only.
    """

    @staticmethod
    def forward(ctx, x, seeds, scalings, dropout_ps, share_A, impl, *operands):
        n = len(scalings)
        weights, lora_Bs, biases, kept_As = _parts(operands, n, 3)
        lora_As = _lora_As(kept_As, lora_Bs, share_A)
        ys, z = ops.group_forward(
            x, weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A, impl
        )
        need_dx, need_dBs = _needs(ctx, n)
        ctx.set_materialize_grads(False)
        z = z if any(need_dBs) else None
        if need_dx:
            ctx.save_for_backward(z, seeds, *lora_Bs, *weights, *kept_As)
        else:
            # A dB takes its dtype and shape from lora_B, z its columns from all of them, but no value.
            ctx.save_for_backward(z, None, *lora_Bs)
        ctx.scalings = scalings
        ctx.dropout_ps = dropout_ps
        ctx.share_A = share_A
        ctx.impl = impl
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        if not torch.is_grad_enabled():
            dx, dBs = _gradients(ctx, dys)
        else:
            with torch.no_grad():
                dx, dBs = _gradients(ctx, dys)
            # As in linear/node.py: under create_graph=True they must not pass for constants.
            anchor = torch.empty(0, requires_grad=True)
            dx, *dBs = (
                None if grad is None else RefuseSecondBackward.apply(grad, anchor) for grad in (dx, *dBs)
            )
        n, operands = len(dys), len(ctx.needs_input_grad) - 6
        return dx, *[None] * (5 + n), *dBs, *[None] * (operands - 2 * n)


def _needs(ctx, n: int) -> tuple[bool, list[bool]]:
    """Whether x, and which of the n lora_B, need a gradient."""
    first = 6 + n
    return ctx.needs_input_grad[0], list(ctx.needs_input_grad[first : first + n])


def _first(lora_As: Sequence[Tensor | None]) -> list[Tensor]:
    return [lora_A for lora_A in lora_As if lora_A is not None][:1]


def _parts(tensors: Sequence[Tensor | None], n: int, count: int) -> list[Sequence[Tensor | None]]:
    """Cut off `count` parts of n tensors each, and the rest."""
    return [*(tensors[i * n : (i + 1) * n] for i in range(count)), tensors[count * n :]]


def _lora_As(
    kept: Sequence[Tensor | None], lora_Bs: Sequence[Tensor | None], share_A: bool
) -> Sequence[Tensor | None]:
    """Return one lora_A for each member, None where it has no lora_B, from what the node takes and keeps."""
    return [None if lora_B is None else kept[0] for lora_B in lora_Bs] if share_A else kept


def _gradients(ctx, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, list[Tensor | None]]:
    n = len(dys)
    if all(dy is None for dy in dys):
        return None, [None] * n
    need_dx, need_dBs = _needs(ctx, n)
    z, seeds, *rest = ctx.saved_tensors
    lora_Bs = rest[:n]
    weights = lora_As = [None] * n
    if need_dx:
        _, weights, kept_As = _parts(rest, n, 2)
        lora_As = _lora_As(kept_As, lora_Bs, ctx.share_A)
    return ops.group_backward(
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


def _checked(
    x: Tensor, members: Sequence[LinearOperands], share_A: bool
) -> tuple[Tensor, list[LinearOperands]]:
    """Return x in the dtype to compute in, and the members with their numbers as floats, after all checks."""
    if not isinstance(share_A, bool):
        raise TypeError(f"share_A must be a bool, got {type(share_A).__name__}")
    if not isinstance(members, (list, tuple)):
        raise TypeError(f"members must be a list of LinearOperands, got {type(members).__name__}")
    if not members:
        raise ValueError("members is empty: a group has at least one linear layer")
    shared = None
    checked = []
    for index, member in enumerate(members):
        try:
            check_kinds(x, member)
            _check_alike(member.weight, members[0].weight)
            x, member = checked_member(x, member)
            checked.append(member)
            if member.lora_A is not None and share_A:
                shared = shared or member
                _check_shared(member, shared)
        except (ValueError, TypeError) as error:
            raise type(error)(f"member {index}: {error}") from None
    return x, checked


def _check_alike(weight: Tensor, first: Tensor) -> None:
    if weight.shape[1] != first.shape[1]:
        raise ValueError(f"it takes {weight.shape[1]} columns of x, member 0 {first.shape[1]}")
    if weight.dtype != first.dtype:
        raise ValueError(f"its weight has dtype {weight.dtype}, that of member 0 {first.dtype}")
    if weight.device != first.device:
        raise ValueError(f"its weight is on {weight.device}, that of member 0 on {first.device}")


def _check_shared(member: LinearOperands, first: LinearOperands) -> None:
    if member.lora_A is not first.lora_A:
        raise ValueError("share_A=True, but its lora_A is not the object that the other members have")
    for name in ("scaling", "dropout_p"):
        value, expected = getattr(member, name), getattr(first, name)
        if value != expected:
            raise ValueError(f"share_A=True, but its {name} is {value}, that of another member {expected}")


def check_kinds(x: Tensor, member: LinearOperands) -> None:
    """Raise TypeError or ValueError for a member that is made of anything but tensors, or of no matrix."""
    if not isinstance(member, LinearOperands):
        raise TypeError(f"expected LinearOperands, got {type(member).__name__}")
    weight, bias, lora_A, lora_B, *_ = member
    if (lora_A is None) != (lora_B is None):
        raise ValueError("it has one of lora_A and lora_B without the other")
    check_tensors(x, weight, weight if lora_A is None else lora_A, weight if lora_B is None else lora_B, bias)
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (N, K)")


def checked_member(x: Tensor, member: LinearOperands) -> tuple[Tensor, LinearOperands]:
    """Return x in the dtype to compute in, and the member with its numbers as floats, after the checks of one
    layer that passed check_kinds.
    """
    weight, bias, lora_A, lora_B, scaling, dropout_p = member
    s = checked_scaling(scaling)
    p = checked_dropout(dropout_p, s)
    if s is not scaling or p is not dropout_p:
        member = member._replace(scaling=s, dropout_p=p)
    if lora_A is None:
        return _checked_plain(x, weight, bias), member
    check_shapes(x, weight, lora_A, lora_B, bias)
    check_frozen(weight, lora_A, bias)
    return cast(x, weight, lora_A, lora_B, bias), member


def _checked_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., {K}) for weight {(N, K)}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({N},)")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: all must be on one device")
    check_frozen(weight, weight, bias)
    return cast(x, weight, weight, weight, bias)
