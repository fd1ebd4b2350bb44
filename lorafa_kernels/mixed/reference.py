"""The formula of a layer whose rows have adapters of their own, in plain PyTorch, written for reading.

    forward    z_m  = round( s_i/(1 − p_i) · ((x ⊙ keep)_m A_iᵀ) )           i: the adapter of row m
               y_m  = round( x_m weightᵀ + z_m B_iᵀ + bias )
    backward   dz_m = round( s_i · (dy_m B_i) )
               dB_i = Σ dy_mᵀ z_m over its rows m                           zero without any
               dx_m = round( dy_m weight + keep_m/(1 − p_i) ⊙ (dz_m A_i) )

Rows without an adapter have no z and no low-rank term. Shapes: x, dx (M, K); weight (N, K); A_i = lora_A
(R_i, K); B_i, dB_i (N, R_i); bias (N,); y, dy (M, N); z, dz (M, R), R the largest R_i, zero in the columns
that an adapter does not have. keep (M, K) is made of one seed, as in linear/reference.py, compared with the
p_i of its row. Rounding and dtypes as there.

Arguments: index (B,), places and numbers say which rows are whose (rows.py): numbers has the number in the
index of each entry of lora_As and lora_Bs. A number that numbers does not have has no adapter here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linear import reference as linear


def forward(
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
) -> tuple[Tensor, Tensor]:
    """Compute y (M, N) and z (M, R), both in the dtype of x."""
    wide = linear.accumulator_dtype(x.dtype)
    y = x.to(wide) @ weight.to(wide).T
    if bias is not None:
        y = y + bias.to(wide)
    y = y.to(x.dtype)
    z = x.new_zeros((x.shape[0], max(A.shape[0] for A in lora_As)))
    for own, A, B, s, p in _adapters(x, index, numbers, lora_As, lora_Bs, scalings, dropout_ps):
        # Every adapter on all rows, of which its own are taken: the mask belongs to the row.
        y_all, z_all = linear.forward(x, weight, A, B, bias, s, p, seed)
        y[own] = y_all[own]
        z[own, : A.shape[0]] = z_all[own]
    return y, z


def backward(
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
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Compute dx (M, K) in the dtype of dy, None unless needed, and the dB_i (N, R_i) that are needed, in the
    dtypes of the lora_Bs.
    """
    dx, dBs = None, []
    if need_dx:
        wide = linear.accumulator_dtype(dy.dtype)
        dx = (dy.to(wide) @ weight.to(wide)).to(dy.dtype)
        for own, A, B, s, p in _adapters(dy, index, numbers, lora_As, lora_Bs, scalings, dropout_ps):
            dx[own] = linear.backward_input(dy, weight, A, B, s, p, seed)[own]
    for number, B, need in zip(numbers, lora_Bs, need_dBs, strict=True):
        own = _own(index, number, dy.shape[0])
        R = B.shape[1]
        dBs.append(linear.backward_lora_B(dy[own], z[own][:, :R], B.dtype) if need else None)
    return dx, dBs


def _adapters(x, index, numbers, *adapters):
    for number, *adapter in zip(numbers, *adapters, strict=True):
        yield _own(index, number, x.shape[0]), *adapter


def _own(index: Tensor, number: int, M: int) -> Tensor:
    """Return which of M rows belong to an adapter, bool (M,)."""
    size = M // len(index) if len(index) else 0
    return torch.repeat_interleave(index == number, size)
