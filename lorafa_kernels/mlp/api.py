"""lorafa_gated_mlp: the gated MLP of a Transformer, down(act(gate(x)) · up(x)), as one autograd node.

Kept for backward, through save_for_backward alone: the outputs g and u of gate and up (M, I), z of the two
(M, ΣR) and z of down (M, R), the weight, lora_A and lora_B objects themselves and the seeds of the dropout
masks. Not x, nor act(g) or h = act(g) · u: dB of down needs its z alone, and everything else follows from g
and u. Of these only what a gradient that is asked for needs.

Backward makes dh, writes dg over it and du beside it: it needs 2·M·I elements beside what it returns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..group import ops as group_ops
from ..group.api import check_kinds, checked_member
from ..group.operands import LinearOperands
from ..linear.node import RefuseSecondBackward
from ..plan.choice import check_impl
from .activation import check_activation
from .ops import gated, gated_backward

# Of lists with an entry for each of gate, up and down: the group of the two that read x, and that of down.
_INPUTS = slice(0, 2)
_DOWN = slice(2, 3)


def lorafa_gated_mlp(
    x: Tensor,
    gate: LinearOperands,
    up: LinearOperands,
    down: LinearOperands,
    *,
    activation: str = "silu",
    impl: str = "auto",
) -> Tensor:
    """Apply a gated MLP of linear layers with LoRA-FA adapters: y = down(act(gate(x)) · up(x)).

    Gradients flow to x and to each lora_B only. Each layer as lorafa_linear computes it; the product with the
    activation is rounded once, or by PyTorch's own operators (impl="torch") twice.

    Args:
        x: (..., K), fp32, bf16, fp16 or fp64. Any strides.
        gate, up: weights (I, K) of one dtype and device. down: weight (N, I). Any of the three without lora_A
            and lora_B is a plain frozen linear layer. Dropout masks are drawn for each on its own.
        activation: "silu", "gelu" (by erf) or "gelu_tanh".
        impl: "auto", "triton", "torch" or "reference"; plan/choice.py has the rule of "auto".

    Returns:
        y: (..., N), in the dtype of x, or in autocast's dtype under autocast.

    Raises:
        ValueError: an unknown activation; shapes that do not fit; one of lora_A and lora_B without the other;
            and what lorafa_linear raises it for.
        TypeError: a layer that is no LinearOperands; and what lorafa_linear raises it for.
        RuntimeError: as lorafa_linear.
    """
    check_impl(impl)
    check_activation(activation)
    x, (gate, up, down) = _checked(x, gate, up, down)
    K = gate.weight.shape[1]
    rows = x if x.dim() == 2 else x.reshape(-1, K) if K else x.reshape(math.prod(x.shape[:-1]), 0)

    weights, biases, lora_As, lora_Bs, scalings, dropout_ps = map(list, zip(gate, up, down, strict=True))
    dropout_ps = [0.0 if B is None else p for p, B in zip(dropout_ps, lora_Bs, strict=True)]
    seeds = None
    if any(dropout_ps):
        seeds = torch.randint(-(2**63), 2**63 - 1, (3,), dtype=torch.int64, device=x.device)
    if torch.is_grad_enabled() and (
        x.requires_grad or any(B is not None and B.requires_grad for B in lora_Bs)
    ):
        y = LoRAFAGatedMLPFunction.apply(
            rows, seeds, scalings, dropout_ps, activation, impl, *weights, *lora_Bs, *biases, *lora_As
        )
    else:
        operands = weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, impl
        (g, u), _ = _linears(_INPUTS, rows, *operands)
        h = gated(g, u, activation, impl)
        # The product of down, the widest moment, goes without them.
        del g, u
        (y,), _ = _linears(_DOWN, h, *operands)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


class LoRAFAGatedMLPFunction(torch.autograd.Function):
    """y (M, N) from x (M, K) and the weights, lora_Bs, biases and lora_As of gate, up and down, three of each
    in this order, None for what a layer lacks; gradients for x and the lora_Bs only.
    """

    @staticmethod
    def forward(ctx, x, seeds, scalings, dropout_ps, activation, impl, *operands):
        weights, lora_Bs, biases, lora_As = (operands[i : i + 3] for i in range(0, 12, 3))
        arguments = weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, impl
        (g, u), z = _linears(_INPUTS, x, *arguments)
        (y,), z_down = _linears(_DOWN, gated(g, u, activation, impl), *arguments)

        need_dx, need_dBs = _needs(ctx)
        need_dg, need_du = need_dx or need_dBs[0], need_dx or need_dBs[1]
        need_dh = need_dg or need_du
        trains_input = need_dBs[0] or need_dBs[1]
        reads_values = need_dx, need_dx, need_dh
        ctx.save_for_backward(
            g if need_dh else None,
            u if need_dg else None,
            z if trains_input else None,
            z_down if need_dBs[2] else None,
            seeds if need_dh else None,
            # Those whose values nothing needs say of which dtype a dB is, and where z lies beside another.
            *_only(lora_Bs, (need_dx or trains_input, need_dx or trains_input, need_dh or need_dBs[2])),
            *_only(weights, reads_values),
            *_only(lora_As, reads_values),
        )
        ctx.scalings = scalings
        ctx.dropout_ps = dropout_ps
        ctx.activation = activation
        ctx.impl = impl
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        if not torch.is_grad_enabled():
            dx, dBs = _gradients(ctx, dy)
        else:
            with torch.no_grad():
                dx, dBs = _gradients(ctx, dy)
            # As in linear/node.py: under create_graph=True they must not pass for constants.
            anchor = torch.empty(0, requires_grad=True)
            dx, *dBs = (
                None if grad is None else RefuseSecondBackward.apply(grad, anchor) for grad in (dx, *dBs)
            )
        return dx, *[None] * 8, *dBs, *[None] * 6


def _linears(
    which: slice, x, weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, impl
) -> tuple[Sequence[Tensor], Tensor]:
    """Return the outputs of gate and up, or of down, and their z."""
    return group_ops.group_forward(
        x,
        weights[which],
        lora_As[which],
        lora_Bs[which],
        biases[which],
        scalings[which],
        dropout_ps[which],
        _seeds(which, dropout_ps, seeds),
        False,
        impl,
    )


def _seeds(which: slice, dropout_ps: Sequence[float], seeds: Tensor | None) -> Tensor | None:
    return seeds[which] if any(dropout_ps[which]) else None


def _needs(ctx) -> tuple[bool, Sequence[bool]]:
    """Whether x, and which of the three lora_B, need a gradient."""
    return ctx.needs_input_grad[0], ctx.needs_input_grad[9:12]


def _only(tensors: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    return [tensor if want else None for tensor, want in zip(tensors, wanted, strict=True)]


def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
    g, u, z, z_down, seeds, *operands = ctx.saved_tensors
    lora_Bs, weights, lora_As = (operands[i : i + 3] for i in range(0, 9, 3))
    need_dx, need_dBs = _needs(ctx)
    need_dg, need_du = need_dx or need_dBs[0], need_dx or need_dBs[1]

    def backward(which, dys, z, need_dx):
        return group_ops.group_backward(
            dys,
            z,
            weights[which],
            lora_As[which],
            lora_Bs[which],
            ctx.scalings[which],
            ctx.dropout_ps[which],
            _seeds(which, ctx.dropout_ps, seeds) if need_dx else None,
            False,
            need_dx,
            need_dBs[which],
            ctx.impl,
        )

    dh, dB_down = backward(_DOWN, [dy], z_down, need_dg or need_du)
    if dh is None:
        return None, [None, None, *dB_down]
    # dh is this function's own: dg, or du if that alone is needed, is written over it.
    dg, du = gated_backward(dh, g, u, ctx.activation, ctx.impl, need_du)
    dx, dBs = backward(_INPUTS, [dg, du], z, need_dx)
    return dx, [*dBs, *dB_down]


def _checked(
    x: Tensor, gate: LinearOperands, up: LinearOperands, down: LinearOperands
) -> tuple[Tensor, list[LinearOperands]]:
    """Return x in the dtype to compute in, and the layers with their numbers as floats, after all checks."""
    checked = []
    for name, member in (("gate", gate), ("up", up), ("down", down)):
        try:
            check_kinds(x, member)
            weight = member.weight
            if name == "down":
                _check_down(weight, gate.weight)
                # What h will be, as far as the checks look at it.
                _, member = checked_member(x.new_empty((0, weight.shape[1])), member)
            else:
                _check_up(weight, gate.weight)
                x, member = checked_member(x, member)
            checked.append(member)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from None
    return x, checked


def _check_up(weight: Tensor, gate: Tensor) -> None:
    for what in ("shape", "dtype", "device"):
        got, expected = getattr(weight, what), getattr(gate, what)
        if got != expected:
            raise ValueError(f"weight has {what} {_words(got)}, that of gate {_words(expected)}")


def _check_down(weight: Tensor, gate: Tensor) -> None:
    columns = gate.shape[0]
    if weight.shape[1] != columns:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected (N, {columns}): gate has {columns} outputs"
        )


def _words(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)
