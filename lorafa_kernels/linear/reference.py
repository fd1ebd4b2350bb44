"""The LoRA-FA formula in plain PyTorch, written for reading: the oracle that every faster path is checked
against.

LoRA-FA (arXiv 2308.03303) freezes the weight W and the projection-down A of a LoRA layer and trains the
projection-up B.

    forward    z  = round( s/(1 − p) · ((x ⊙ keep) lora_Aᵀ) )
               y  = round( x weightᵀ + z lora_Bᵀ + bias )
    backward   dz = round( s · (dy lora_B) )
               dB = dyᵀ z
               dx = round( dy weight + keep/(1 − p) ⊙ (dz lora_A) )

Shapes: x, dx (M, K); weight (N, K); lora_A (R, K); lora_B, dB (N, R); bias (N,); y, dy (M, N); z, dz (M, R);
keep (M, K) is the dropout mask that philox.py makes of a seed, int64 of shape (1,); all true for p = 0.
Products are accumulated in fp32 (fp64 for fp64 inputs), s is applied to the accumulator, and each result is
rounded once to the dtype of x. 1/(1 − p) is not in dz, which would then overflow in fp16 where the plain
formula does not. lora_A and lora_B may be fp32 beside a 16-bit x: they are rounded to its
dtype first. dB is stored in the dtype of lora_B. An fp32 product on a GPU follows torch's own matmul
precision setting.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..philox import keep_mask


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that products of `dtype` operands are accumulated in: fp64 for fp64, fp32 for everything
    narrower.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    """Compute y (M, N) and z (M, R), both in the dtype of x.

    x (M, K), weight (N, K), bias (N,) or None: one dtype. lora_A (R, K), lora_B (N, R): that dtype or fp32.
    scaling is s and dropout_p is p; where p is 0 there need be no seed.
    """
    wide = accumulator_dtype(x.dtype)
    A = lora_A.to(x.dtype).to(wide)
    B = lora_B.to(x.dtype).to(wide)
    dropped = x.to(wide)
    if dropout_p:
        scaling = scaling / (1 - dropout_p)
        dropped = dropped * keep_mask(seed, dropout_p, *x.shape)
    z = (scaling * (dropped @ A.T)).to(x.dtype)
    y = x.to(wide) @ weight.to(wide).T + z.to(wide) @ B.T
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype), z


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
    """Compute dx (M, K) in the dtype of dy and dB (N, R) in the dtype of lora_B, from dy (M, N) and the
    saved z (M, R).
    """
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
    wide = accumulator_dtype(dy.dtype)
    A = lora_A.to(dy.dtype).to(wide)
    B = lora_B.to(dy.dtype).to(wide)
    dz = (scaling * (dy.to(wide) @ B)).to(dy.dtype)
    low_rank = dz.to(wide) @ A
    if dropout_p:
        low_rank = low_rank / (1 - dropout_p) * keep_mask(seed, dropout_p, *low_rank.shape)
    return (dy.to(wide) @ weight.to(wide) + low_rank).to(dy.dtype)


def backward_lora_B(dy: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute dB = dyᵀ z (N, R), stored in `dtype`; the scaling is already in z."""
    wide = accumulator_dtype(dy.dtype)
    return (dy.to(wide).T @ z.to(wide)).to(dtype)
