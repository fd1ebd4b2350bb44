"""The best arrangement of library matrix products: the fast path without Triton, and one of the plans with
it.

    forward    z  = s · (x lora_Aᵀ)                 one product, s applied to its accumulator
               y  = z lora_Bᵀ + bias, then y += x weightᵀ in place
    backward   dz = s · (dy lora_B)
               dB = dyᵀ z
               dx = dz lora_A, then dx += dy weight in place

Shapes as in reference.py. The rank-R product comes first because it only writes the output, while adding it
afterwards would read the output once more; the large product then accumulates into it. No temporary of M·N
or M·K elements is made. The rank-R term is rounded once more than in the formula; dB is rounded to the
dtype of x where the backend has no product of 16-bit operands with an fp32 result.

With dropout z is made of x ⊙ keep, and the rank-R term in dx is multiplied with keep before dy weight is
added, both for some rows at a time (philox.CHUNK): keep and what it is computed from are the only further
temporaries, of that many rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .philox import keep_chunks


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute y (M, N) and z (M, R); arguments and dtypes as in reference.forward."""
    factor = in_dtype(lora_A, x.dtype).t()
    if dropout_p:
        z = _dropped_product(x, factor, scaling / (1 - dropout_p), dropout_p, seed)
    else:
        z = scaled_product(x, factor, scaling)
    y = F.linear(z, in_dtype(lora_B, x.dtype), bias)
    return y.addmm_(x, weight.t()), z


def backward(
    dy: Tensor,
    z: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute dx (M, K) and dB (N, R); arguments and dtypes as in reference.backward."""
    dx = backward_input(dy, weight, lora_A, lora_B, scaling, dropout_p, seed)
    return dx, backward_lora_B(dy, z, lora_B.dtype)


def backward_input(
    dy: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Compute dx (M, K) alone."""
    if dropout_p:
        scaling = scaling / (1 - dropout_p)
    dz = scaled_product(dy, in_dtype(lora_B, dy.dtype), scaling)
    return input_gradient(dy, dz, weight, lora_A, dropout_p, seed)


def input_gradient(
    dy: Tensor,
    dz: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Compute dx (M, K) where dz (M, R) is known, s/(1 − p) included."""
    dx = dz.mm(in_dtype(lora_A, dy.dtype))
    if dropout_p:
        for rows, keep in keep_chunks(seed, dropout_p, *dx.shape):
            dx[rows].mul_(keep)
    return dx.addmm_(dy, weight)


def backward_lora_B(dy: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute dB = dyᵀ z (N, R) in `dtype`."""
    if dtype != dy.dtype and dy.is_cuda and torch.version.hip is None:
        return torch.mm(dy.t(), z, out_dtype=dtype)
    return in_dtype(dy.t().mm(z), dtype)


def scaled_product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    # beta=0 ignores what the new tensor holds; alpha multiplies the accumulator before the only rounding.
    # Scaling afterwards would round 16-bit results twice, and in fp16 overflow where the scaled product fits.
    product = left.new_empty((left.shape[0], right.shape[1]))
    return product.addmm_(left, right, beta=0, alpha=scaling)


def _dropped_product(left: Tensor, right: Tensor, scaling: float, dropout_p: float, seed: Tensor) -> Tensor:
    """scaling · ((left ⊙ keep) right), some rows at a time."""
    product = left.new_empty((left.shape[0], right.shape[1]))
    for rows, keep in keep_chunks(seed, dropout_p, *left.shape):
        # A product and no selection: what is not finite propagates, as in the plain formula.
        product[rows].addmm_(left[rows] * keep, right, beta=0, alpha=scaling)
    return product


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Tensor.to would return the same tensor too, but takes over a microsecond for it, five times a step.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
