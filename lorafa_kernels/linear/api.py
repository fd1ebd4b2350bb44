"""lorafa_linear: check the arguments, apply autocast's casts, flatten, draw the seed of dropout, and call the
autograd node.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..correction import gram_inverse
from ..dispatch import transforming, unwrapped
from ..operands import (
    as_rows,
    cast,
    check_correction,
    check_frozen,
    check_shapes,
    check_tensors,
    checked_dropout,
    checked_scaling,
    draw_seed,
    fit,
    shaped_as,
)
from ..plan.choice import check_impl
from . import ops

_AUTO = "auto"


def lorafa_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    gradient_correction: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Apply a linear layer with a LoRA-FA adapter: y = x weightᵀ + scaling · (x lora_Aᵀ) lora_Bᵀ + bias.

    Gradients flow to x and lora_B only. For backward the layer keeps z = scaling · (x lora_Aᵀ), M·R
    numbers, and not x (LoRA-FA, arXiv 2308.03303, section 3.2). Backward can be run once per graph edge,
    not differentiated again.

    Args:
        x: (..., K), fp32, bf16, fp16 or fp64; M is the product of its leading dimensions. Any strides.
        weight: (N, K), frozen, in the dtype of x (any dtype under autocast).
        lora_A: (R, K), frozen, in the dtype of x or fp32.
        lora_B: (N, R), trained, in the dtype of x or fp32; its gradient comes back in its dtype.
        bias: (N,), frozen, in the dtype of x, or None.
        scaling: finite factor s of the low-rank term: alpha/R, or alpha/√R for rsLoRA.
        dropout_p: probability p in [0, 1) of dropping an element of x before lora_A; the others are divided
            by 1 − p. Drawn from a seed, which the default generator of x's device gives: 8 bytes are kept for
            backward, and no mask. 0 draws nothing.
        gradient_correction: lora_B's gradient is multiplied by (1/s²) · (A Aᵀ + 1e-8 I)⁻¹, as LoRA-FA's
            second version does. The inverse (R, R) is made once for each lora_A, and again when that is
            changed by anything but a write through `.data`.
        impl: "auto", "triton", "torch" or "reference"; plan/choice.py has the rule of "auto".

    Returns:
        y: (..., N), in the dtype of x, or in autocast's dtype under autocast.

    Raises:
        ValueError: shapes that do not fit; a weight, bias or lora_A that requires grad; mixed devices; a
            scaling or dropout_p out of range; gradient_correction with a scaling of 0; an unknown impl.
        TypeError: dtypes that are not floating point or cannot be combined; operands that are no dense
            tensors, or are sharded or quantised ones; a scaling or dropout_p that is no real number.
        RuntimeError: impl="triton" where it cannot run.
    """
    fits = fit(x, weight, lora_A, lora_B, bias, scaling, dropout_p, gradient_correction)
    if not fits:
        check_tensors(x, weight, lora_A, lora_B, bias)
        check_shapes(x, weight, lora_A, lora_B, bias)
        check_frozen(weight, lora_A, bias)
        scaling = checked_scaling(scaling)
        dropout_p = checked_dropout(dropout_p, scaling)
        check_correction(gradient_correction, scaling)
        x = cast(x, weight, lora_A, lora_B, bias)
    if impl is not _AUTO:
        check_impl(impl)

    rows = x if x.dim() == 2 else as_rows(x, weight.shape[1])
    seed = draw_seed(x.device) if dropout_p else None
    run = ops.direct("forward", impl, rows, lora_A, weight, bias, dropout_p, seed, fits)
    if torch.is_grad_enabled() and (x.requires_grad or lora_B.requires_grad):
        if run is None or transforming() or unwrapped(x) is not x or unwrapped(lora_B) is not lora_B:
            apply = ops.LoRAFALinearFunction.apply
        else:
            apply = ops.bare_apply_linear
        how = scaling, impl, dropout_p, run
        if fits:
            y = apply(rows, weight, lora_A, lora_B, bias, how)
        else:
            inverse = gram_inverse(lora_A) if gradient_correction and lora_B.requires_grad else None
            y = apply(rows, weight, lora_A, lora_B, bias, how, seed, inverse)
    else:
        y = ops.forward_by(run, rows, weight, lora_A, lora_B, bias, scaling, impl, dropout_p, seed)[0]
    return y if rows is x else shaped_as(y, x)


def lorafa_linear_in_parts(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float,
    dropout_p: float,
    gradient_correction: bool,
    impl: str,
    draw: Callable[[torch.device], Tensor],
    inverse_of: Callable[[Tensor], Tensor],
) -> Tensor:
    """As lorafa_linear, for operands that are this process's parts of a layer's.

    draw: gives the seed of the mask, int64 (1,). inverse_of: gives (A Aᵀ + εI)⁻¹ (R, R) of the whole lora_A.
    """
    check_tensors(x, weight, lora_A, lora_B, bias)
    check_shapes(x, weight, lora_A, lora_B, bias)
    check_frozen(weight, lora_A, bias)
    scaling = checked_scaling(scaling)
    dropout_p = checked_dropout(dropout_p, scaling)
    check_correction(gradient_correction, scaling)
    check_impl(impl)
    x = cast(x, weight, lora_A, lora_B, bias)
    rows = as_rows(x, weight.shape[1])
    seed = draw(x.device) if dropout_p else None
    run = ops.direct("forward", impl, rows, lora_A, weight, bias, dropout_p, seed)
    if torch.is_grad_enabled() and (x.requires_grad or lora_B.requires_grad):
        inverse = inverse_of(lora_A) if gradient_correction and lora_B.requires_grad else None
        how = scaling, impl, dropout_p, run
        y = ops.LoRAFALinearFunction.apply(rows, weight, lora_A, lora_B, bias, how, seed, inverse)
    else:
        y = ops.forward_by(run, rows, weight, lora_A, lora_B, bias, scaling, impl, dropout_p, seed)[0]
    return shaped_as(y, x)
