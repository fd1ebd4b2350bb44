"""The autograd node of a LoRA-FA linear layer: what it keeps, and what it leaves out.

Kept for backward, through save_for_backward alone: z (M, R) if lora_B needs a gradient; the weight, lora_A
and lora_B objects themselves if x needs one, and then with dropout the seed, 8 bytes, which the mask is made
from once more. Not x: dB = dyᵀ z needs z alone (LoRA-FA, arXiv 2308.03303,
section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops


class LoRAFALinearFunction(torch.autograd.Function):
    """y (M, N) from x (M, K), weight (N, K), lora_A (R, K), lora_B (N, R), bias (N,) or None; gradients for
    x and lora_B only. seed: int64 (1,), None where dropout_p is 0.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scaling: float,
        impl: str,
        dropout_p: float,
        seed: Tensor | None,
    ) -> Tensor:
        y, z = ops.forward(x, weight, lora_A, lora_B, bias, scaling, impl, dropout_p, seed)
        need_dx, _, _, need_dB, *_ = ctx.needs_input_grad
        if need_dx:
            ctx.save_for_backward(z if need_dB else None, weight, lora_A, lora_B, seed)
        else:
            # dB takes its dtype and shape from lora_B, but no value of it; the mask is in z.
            ctx.save_for_backward(z, None, None, lora_B, None)
        ctx.scaling = scaling
        ctx.impl = impl
        ctx.dropout_p = dropout_p
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        if not torch.is_grad_enabled():
            dx, dB = _gradients(ctx, dy)
        else:
            with torch.no_grad():
                dx, dB = _gradients(ctx, dy)
            # Under create_graph=True. dx and dB depend on more than dy (on lora_B, and through z on x), so
            # they must not pass for constants even where dy is one.
            anchor = torch.empty(0, requires_grad=True)
            dx, dB = (None if grad is None else RefuseSecondBackward.apply(grad, anchor) for grad in (dx, dB))
        return dx, None, None, dB, None, None, None, None, None


class RefuseSecondBackward(torch.autograd.Function):
    """Passes a gradient on; raises when it is differentiated."""

    @staticmethod
    def forward(ctx, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "double backward through a LoRA-FA layer is not supported: its gradients can be taken once"
        )


def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    z, weight, lora_A, lora_B, seed = ctx.saved_tensors
    need_dx, _, _, need_dB, *_ = ctx.needs_input_grad
    how = ctx.scaling, ctx.impl, ctx.dropout_p, seed
    if need_dx and need_dB:
        return ops.backward(dy, z, weight, lora_A, lora_B, *how)
    if need_dx:
        return ops.backward_input(dy, weight, lora_A, lora_B, *how), None
    return None, ops.backward_lora_B(dy, z, lora_B, ctx.impl)
