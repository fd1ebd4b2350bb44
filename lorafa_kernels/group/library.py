"""Linear layers that share an input, by the best arrangement of library matrix products.

    forward    z    = s · (x [lora_A_1; lora_A_2; …]ᵀ)        one product where the scalings are equal
               y_i  = z_i lora_B_iᵀ + bias_i, then y_i += x weight_iᵀ in place
    backward   dz_i = s_i · (dy_i lora_B_i)                   into columns of one dz
               dB_i = dy_iᵀ z_i
               dx   = dz [lora_A_1; lora_A_2; …], then dx += dy_i weight_i in place, for each i

Shapes and arguments as in reference.py; each weight is read where it is multiplied, once. The order is that
of linear/library.py: the rank-R products first; for fp32 and fp64 on a CPU the product with the longest
contraction first (sums_in_place). The stacked lora_A (ΣR, K) is the only temporary. Dropout takes one product
per member, and the low-rank terms of dx come last, a chunk of rows at a time (philox.CHUNK). dx is rounded
once per product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear.library import add_dropped, backward_lora_B, in_dtype, scaled_product, sums_in_place
from ..philox import keep_chunks
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
    """Compute the y_i (M, N_i) and z; arguments and dtypes as in reference.forward."""
    columns = rank_columns(lora_Bs, share_A)
    z = _low_rank(x, lora_As, scalings, dropout_ps, seeds, share_A, rank_makers(lora_Bs, share_A), columns)
    ys = []
    for i, (lora_B, bias, (first, last)) in enumerate(zip(lora_Bs, biases, columns, strict=True)):
        if lora_B is None:
            ys.append(F.linear(x, weights[i], bias))
        else:
            B, part = in_dtype(lora_B, x.dtype), _columns(z, first, last)
            if sums_in_place(x) and last - first <= x.shape[1]:
                ys.append(F.linear(x, weights[i], bias).addmm_(part, B.t()))
            else:
                ys.append(F.linear(part, B, bias).addmm_(x, weights[i].t()))
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
    """Compute dx (M, K) and the dB_i (N_i, R_i); arguments, dtypes and Nones as in reference.backward."""
    dBs: list[Tensor | None] = [None] * len(dys)
    if any(need_dBs):
        columns = rank_columns(lora_Bs, share_A)
        for i, dy in enumerate(dys):
            if need_dBs[i] and dy is not None:
                dBs[i] = backward_lora_B(dy, _columns(z, *columns[i]), lora_Bs[i].dtype)
    if not need_dx:
        return None, dBs
    dz = low_rank_gradient(dys, lora_Bs, scalings, share_A)
    return input_gradient(dys, dz, weights, lora_As, dropout_ps, seeds, share_A), dBs


# One weight at a time is what it reads anyway.
backward_in_turn = backward


def low_rank_gradient(
    dys: Sequence[Tensor | None], lora_Bs: Sequence[Tensor | None], scalings: Sequence[float], share_A: bool
) -> Tensor | None:
    """Compute dz, scaling included: the dz_i of the members that have an adapter and a dy side by side, or
    with share_A their sum. None if there is no such member.
    """
    adapted = [i for i, lora_B in enumerate(lora_Bs) if lora_B is not None and dys[i] is not None]
    if not adapted:
        return None
    ranks = [lora_Bs[i].shape[1] for i in adapted]
    dy = dys[adapted[0]]
    dz = dy.new_empty((dy.shape[0], ranks[0] if share_A else sum(ranks)))
    if share_A and sums_in_place(dy):
        adapted.sort(key=lambda i: -dys[i].shape[1])
    last = 0
    for turn, (i, R) in enumerate(zip(adapted, ranks, strict=True)):
        first, last = (0, R) if share_A else (last, last + R)
        factor = in_dtype(lora_Bs[i], dy.dtype)
        beta = 1 if share_A and turn else 0
        _columns(dz, first, last).addmm_(dys[i], factor, beta=beta, alpha=scalings[i])
    return dz


def input_gradient(
    dys: Sequence[Tensor | None],
    dz: Tensor | None,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor | None],
    dropout_ps: Sequence[float],
    seeds: Tensor | None,
    share_A: bool,
) -> Tensor:
    """Compute dx (M, K) where dz is known, as low_rank_gradient returns it."""
    products = [(dy, weights, i) for i, dy in enumerate(dys) if dy is not None]
    adapted = [i for i, A in enumerate(lora_As) if A is not None and dys[i] is not None]
    adapted = adapted[:1] if share_A else adapted
    if adapted and seeds is None:
        products.insert(0, (dz, [_stacked([lora_As[i] for i in adapted], dz.dtype)], 0))
    if sums_in_place(products[0][0]):
        products.sort(key=lambda product: -product[0].shape[1])
    (left, right, i), *others = products
    dx = left.mm(right[i])
    for left, right, i in others:
        dx.addmm_(left, right[i])
    if seeds is not None:
        last = 0
        for i in adapted:
            first, last = last, last + lora_As[i].shape[0]
            part, A = _columns(dz, first, last), in_dtype(lora_As[i], dz.dtype)
            if p := dropout_ps[i]:
                add_dropped(dx, part, A, p, seed_of(seeds, i, share_A))
            else:
                dx.addmm_(part, A)
    return dx


def _low_rank(x, lora_As, scalings, dropout_ps, seeds, share_A, makers, columns) -> Tensor:
    if not makers:
        return x.new_empty((x.shape[0], 0))
    s = scalings[makers[0]]
    if seeds is None and all(scalings[i] == s for i in makers):
        return scaled_product(x, _stacked([lora_As[i] for i in makers], x.dtype).t(), s)
    z = x.new_empty((x.shape[0], max(last for _, last in columns)))
    for i in makers:
        p, part = dropout_ps[i], _columns(z, *columns[i])
        factor, scaling = in_dtype(lora_As[i], x.dtype).t(), scalings[i] / (1 - p)
        if p:
            for rows, keep in keep_chunks(seed_of(seeds, i, share_A), p, *x.shape):
                part[rows].addmm_(x[rows] * keep, factor, beta=0, alpha=scaling)
        else:
            part.addmm_(x, factor, beta=0, alpha=scaling)
    return z


def _stacked(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    if len(factors) == 1:
        return in_dtype(factors[0], dtype)
    return torch.cat([in_dtype(factor, dtype) for factor in factors])


def _columns(tensor: Tensor, first: int, last: int) -> Tensor:
    return tensor if last - first == tensor.shape[1] else tensor[:, first:last]
