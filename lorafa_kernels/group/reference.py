"""Linear layers that share an input, in plain PyTorch, written for reading.

    forward    z_i  = round( s_i/(1 − p_i) · ((x ⊙ keep_i) lora_A_iᵀ) )
               y_i  = round( x weight_iᵀ + z_i lora_B_iᵀ + bias_i )
    backward   dz_i = round( s_i · (dy_i lora_B_i) )
               dB_i = dy_iᵀ z_i
               dx   = round( Σ_i dy_i weight_i + keep_i/(1 − p_i) ⊙ (dz_i lora_A_i) )

With share_A all members have one lora_A, scaling, dropout and mask, hence one z; their dz, summed in the
accumulator and rounded once, is one as well:

               dz   = round( s · Σ_i (dy_i lora_B_i) )
               dx   = round( Σ_i dy_i weight_i + keep/(1 − p) ⊙ (dz lora_A) )

Shapes and dtypes of each member as in linear/reference.py; z (M, ΣR), or (M, R) with share_A: the
members' z side by side (operands.rank_columns). A member without an adapter has None for lora_A and lora_B,
and its part of z is empty. seeds: int64 (n,), one a member, or (1,) with share_A; None without dropout.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..linear.reference import accumulator_dtype, backward_lora_B
from ..philox import keep_mask
from .operands import rank_columns, rank_makers, seed_of


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropout_ps: Sequence[float],
    seeds: Tensor | None,
    share_A: bool,
) -> tuple[list[Tensor], Tensor]:
    """Compute the y_i (M, N_i) and z, in the dtype of x."""
    wide = accumulator_dtype(x.dtype)
    rows = x.to(wide)
    columns = rank_columns(lora_Bs, share_A)
    z = x.new_empty((x.shape[0], max(last for _, last in columns)))
    for i in rank_makers(lora_Bs, share_A):
        A = lora_As[i].to(x.dtype).to(wide)
        p = dropout_ps[i]
        kept = rows if p == 0.0 else rows * _keep(seeds, share_A, i, p, x)
        z[:, slice(*columns[i])] = (scalings[i] / (1 - p) * (kept @ A.T)).to(x.dtype)
    ys = []
    for i in range(len(weights)):
        y = rows @ weights[i].to(wide).T
        if lora_Bs[i] is not None:
            y = y + z[:, slice(*columns[i])].to(wide) @ lora_Bs[i].to(x.dtype).to(wide).T
        if biases[i] is not None:
            y = y + biases[i].to(wide)
        ys.append(y.to(x.dtype))
    return ys, z


def backward(
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
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Compute dx (M, K), or None where it is not needed, and the dB_i (N_i, R_i) that are, in the dtypes of
    the lora_B_i. A dy_i of None belongs to an output that was not used: it adds nothing, and its dB is None.
    """
    columns = rank_columns(lora_Bs, share_A)
    dBs = [
        backward_lora_B(dy, z[:, slice(*columns[i])], lora_Bs[i].dtype) if need and dy is not None else None
        for i, (dy, need) in enumerate(zip(dys, need_dBs, strict=True))
    ]
    if not need_dx:
        return None, dBs
    used = [i for i, dy in enumerate(dys) if dy is not None]
    dtype = dys[used[0]].dtype
    wide = accumulator_dtype(dtype)
    dx = dz_sum = 0.0
    for i in used:
        dy = dys[i].to(wide)
        dx = dx + dy @ weights[i].to(wide)
        if lora_Bs[i] is None:
            continue
        p = dropout_ps[i]
        dz = scalings[i] * (dy @ lora_Bs[i].to(dtype).to(wide))
        if share_A:
            dz_sum = dz_sum + dz
            if i != max(j for j in used if lora_Bs[j] is not None):
                continue
            dz = dz_sum
        term = dz.to(dtype).to(wide) @ lora_As[i].to(dtype).to(wide)
        dx = dx + (term if p == 0.0 else term / (1 - p) * _keep(seeds, share_A, i, p, dx))
    return dx.to(dtype), dBs


# One weight at a time is what it reads anyway.
backward_in_turn = backward


def _keep(seeds: Tensor, share_A: bool, i: int, p: float, like: Tensor) -> Tensor:
    return keep_mask(seed_of(seeds, i, share_A), p, *like.shape)
