"""The formula by PyTorch's matrix products, one large product for all rows and small ones for each adapter.

    forward    z  = s · (x Aᵀ)                       one product where all adapters share A, s and p
               y  = x weightᵀ + bias, then y_i += z_i B_iᵀ on the rows of each adapter
    backward   dz_i = s · (dy_i B_i), dB_i = dy_iᵀ z_i
               dx = dy weight, then += dz A          one product where all share A, else on the rows of each

Shapes and arguments as in reference.py. Rows of one adapter that follow each other are a view. Others are
gathered, a copy (M_i, N) or (M_i, K) of one adapter's rows at a time, in the order of the batch, so that
every sum has one order. For 16 bits, and on GPUs, the rank-R terms come first and the large product is added
to them, as in linear/library.py, for the same reason. No adapter's values enter another's rows: what is not
finite in one stays there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear.library import (
    backward_lora_B,
    dropped_product,
    in_dtype,
    input_gradient,
    scaled_product,
    sums_in_place,
)
from ..philox import keep_chunks, keep_chunks_of
from .rows import rows_of


class _Part(NamedTuple):
    """One adapter and its rows: a slice, or their numbers (M_i,)."""

    place: int
    rows: slice | Tensor
    A: Tensor
    B: Tensor
    scaling: float
    dropout_p: float


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
    """Compute y (M, N) and z (M, R); arguments and dtypes as in reference.forward."""
    parts = _parts(x, index, places, numbers, lora_As, lora_Bs, scalings, dropout_ps)
    z = _low_rank(x, parts, max(A.shape[0] for A in lora_As), seed)
    R = z.shape[1]
    if sums_in_place(x) and x.shape[1] >= R:
        y = F.linear(x, weight, bias)
        for part in parts:
            own = y[part.rows].addmm_(_of(z, part), in_dtype(part.B, x.dtype).t())
            _put_back(y, part.rows, own)
        return y, z
    y = _filled(x, weight.shape[0], bias, parts)
    for part in parts:
        y[part.rows] = F.linear(_of(z, part), in_dtype(part.B, x.dtype), bias)
    return y.addmm_(x, weight.t()), z


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
    """Compute dx (M, K), None unless needed, and the dB_i (N, R_i) that are needed, as
    reference.backward.
    """
    parts = _parts(dy, index, places, numbers, lora_As, lora_Bs, scalings, dropout_ps)
    dBs = [
        torch.zeros_like(B, memory_format=torch.contiguous_format) if need else None
        for B, need in zip(lora_Bs, need_dBs, strict=True)
    ]
    dzs = []
    for part in parts:
        rows = dy[part.rows]
        if need_dx:
            dzs.append(scaled_product(rows, in_dtype(part.B, dy.dtype), part.scaling))
        if need_dBs[part.place]:
            dBs[part.place] = backward_lora_B(rows, _of(z, part), part.B.dtype)
    return (_input_gradient(dy, dzs, weight, parts, seed) if need_dx else None), dBs


def _parts(x, index, places, numbers, lora_As, lora_Bs, scalings, dropout_ps) -> list[_Part]:
    """The adapters that have rows."""
    places = list(places)
    return [
        _Part(place, rows, *adapter)
        for place, (number, *adapter) in enumerate(
            zip(numbers, lora_As, lora_Bs, scalings, dropout_ps, strict=True)
        )
        if (rows := rows_of(index, places, number, x.shape[0])) is not None
    ]


def _of(z: Tensor, part: _Part) -> Tensor:
    """The z_i (M_i, R_i) of an adapter."""
    return z[part.rows][:, : part.B.shape[1]]


def _alike(parts: Sequence[_Part]) -> bool:
    """Whether one product with lora_A serves all rows."""
    return bool(parts) and all(part.A is parts[0].A and part[4:] == parts[0][4:] for part in parts[1:])


def _put_back(target: Tensor, rows: slice | Tensor, own: Tensor) -> None:
    """Write rows that were changed into the matrix they come from, if they are a copy."""
    if not isinstance(rows, slice):
        target[rows] = own


def _filled(x: Tensor, N: int, bias: Tensor | None, parts: Sequence[_Part]) -> Tensor:
    """A matrix (M, N) that holds the bias in the rows that no adapter will write."""
    y = x.new_empty((x.shape[0], N))
    written = sum(p.rows.stop - p.rows.start if isinstance(p.rows, slice) else len(p.rows) for p in parts)
    if written == x.shape[0]:
        return y
    return y.zero_() if bias is None else y.copy_(bias)


def _low_rank(x: Tensor, parts: Sequence[_Part], R: int, seed: Tensor | None) -> Tensor:
    """z (M, R)."""
    if _alike(parts):
        _, _, A, _, scaling, p = parts[0]
        factor = in_dtype(A, x.dtype).t()
        if A.shape[0] == R:
            if p:
                return dropped_product(x, factor, scaling / (1 - p), p, seed)
            return scaled_product(x, factor, scaling)
    z = x.new_zeros((x.shape[0], R))
    for part in parts:
        factor, p = in_dtype(part.A, x.dtype).t(), part.dropout_p
        rows = x[part.rows]
        if p:
            own = rows.new_empty((rows.shape[0], factor.shape[1]))
            for chunk, keep in _keep_chunks(seed, part, x.shape[1]):
                # A product and no selection: what is not finite propagates, as in the plain formula.
                own[chunk].addmm_(rows[chunk] * keep, factor, beta=0, alpha=part.scaling / (1 - p))
        else:
            own = scaled_product(rows, factor, part.scaling)
        z[part.rows, : factor.shape[1]] = own
    return z


def _keep_chunks(seed: Tensor, part: _Part, K: int) -> Iterator[tuple[slice, Tensor]]:
    """As philox.keep_chunks, for the rows of an adapter."""
    if isinstance(part.rows, slice):
        first, last = part.rows.start, part.rows.stop
        return keep_chunks(seed, part.dropout_p, last - first, K, first)
    return keep_chunks_of(seed, part.dropout_p, part.rows, K)


def _input_gradient(dy, dzs, weight, parts, seed) -> Tensor:
    if _alike(parts):
        part = parts[0]
        dz = dzs[0]
        if dz.shape[0] != dy.shape[0]:
            dz = dy.new_zeros((dy.shape[0], dz.shape[1]))
            for other, own in zip(parts, dzs, strict=True):
                dz[other.rows] = own
        return input_gradient(dy, dz, weight, part.A, part.dropout_p, seed)
    if any(part.dropout_p for part in parts) or sums_in_place(dy) or not parts:
        dx = dy.mm(weight)
        for part, dz in zip(parts, dzs, strict=True):
            own = dx[part.rows]
            _add(own, dz, part, seed)
            _put_back(dx, part.rows, own)
        return dx
    dx = _filled(dy, weight.shape[1], None, parts)
    for part, dz in zip(parts, dzs, strict=True):
        dx[part.rows] = dz.mm(in_dtype(part.A, dy.dtype))
    return dx.addmm_(dy, weight)


def _add(dx: Tensor, dz: Tensor, part: _Part, seed: Tensor | None) -> None:
    """dx += keep/(1 − p) ⊙ (dz A) in place, on the rows of an adapter."""
    A, p = in_dtype(part.A, dx.dtype), part.dropout_p
    if not p:
        dx.addmm_(dz, A)
        return
    for chunk, keep in _keep_chunks(seed, part, dx.shape[1]):
        dx[chunk].addcmul_(dz[chunk].mm(A), in_dtype(keep, dx.dtype), value=1 / (1 - p))
